"""Hyperparameter search with Optuna: `sslcells tune`.

Each trial is a run of the usual training loop in a folder of its own below the study's. Its figure is the last one on
val that training wrote; test is never read. Several processes may share a study: each takes the next trial.
"""

import argparse
import contextlib
import gc
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch

from sslcells import commandline, launcher, ranks
from sslcells.config import ConfigError, Run, dump, installed, load
from sslcells.data import ImageSet
from sslcells.errors import UserError
from sslcells.methods import classifies
from sslcells.names import CONFIG, STOPPED
from sslcells.plan import open_run
from sslcells.run.checkpoint import CheckpointError
from sslcells.run.folder import changed
from sslcells.run.interrupt import Stopped
from sslcells.run.metrics import read_metrics
from sslcells.storage import is_file, write_atomically
from sslcells.train import train
from sslcells.tuning import results
from sslcells.tuning.ranges import Range, first, ranges

if TYPE_CHECKING:
    from sslcells.tuning.study import Study, Taken

Training = Callable[[Run], object]


class Search(NamedTuple):
    """What is searched, and what all trials have in common."""

    config: str | None
    overrides: tuple[str, ...]
    ranges: tuple[Range, ...]
    trials: int = 20
    seed: int = 0

    @property
    def base(self) -> Run:
        """The configuration with the first value of each range; its folder is the study's."""
        return first(self.ranges, self.config, self.overrides)

    def run(self, settings: Sequence[str], name: str, out: Path) -> Run:
        """The configuration of a trial.

        Raises:
            ConfigError: if its settings do not go together.
        """
        return load(self.config, [*self.overrides, *settings, f"name={name}", f"out={out}"])


def search(
    words: Sequence[str], config: str | None = None, overrides: Sequence[str] = (), trials: int = 20, seed: int = 0
) -> Search:
    """The search that `KEY=RANGE` words describe; nothing is opened or trained.

    Raises:
        ConfigError: as `ranges`; if there is nothing to search, or no trial.
    """
    if not words:
        raise ConfigError("nothing to search: --search optim.lr=1e-4..1e-2:log")
    if trials < 1 or seed < 0:
        raise ConfigError(f"--trials {trials}: expected 1 or more" if trials < 1 else f"--seed {seed} is below 0")
    return Search(config, tuple(overrides), tuple(ranges(words, config, overrides)), trials, seed)


def tune(wanted: Search, training: Training = train) -> Path:
    """Run trials until the study has as many as wanted; print and write the results; returns the study's folder.

    A trial that cannot be trained is recorded as failed, with its reason, and the search goes on; all ranks call this.

    Raises:
        ConfigError: if Optuna is not installed, the data has no figure on val, or the folder holds another search.
        Stopped, Lost: as training does; the same command resumes the trial.
        OSError, CheckpointError: if a file cannot be written; likewise.
    """
    installed("optuna", "optuna", "sslcells tune")
    base = wanted.base
    launcher.device_for(base)
    figure = _figure(wanted, open_run(base))
    study = _Shared(wanted, base, figure)
    while (taken := study.take()) is not None:
        _carry_out(taken, wanted, figure, study, training)
    study.report()
    return base.folder


class _Shared:
    """The study, which rank 0 holds, for every rank."""

    def __init__(self, wanted: Search, base: Run, figure: str) -> None:
        self.folder = base.folder
        self._wanted, self._base, self._figure = wanted, base, figure
        self._study: Study
        ranks.from_main(self._open)

    def _open(self) -> None:
        from sslcells.tuning.study import Study

        self._study = Study(self.folder, self._wanted.ranges, self._wanted.seed, self._figure)
        if not is_file(self.folder / CONFIG):
            write_atomically(self.folder / CONFIG, lambda file: file.write(dump(self._base).encode()))
        before = load(str(self.folder / CONFIG)).evaluate
        different = changed(self._base) + ["evaluate"] * (before != self._base.evaluate)
        if different:
            words = f"holds a search with another configuration ({'; '.join(different)}); choose another name="
            raise ConfigError(f"{self.folder} {words}")

    def take(self) -> "Taken | None":
        return ranks.from_main(lambda: self._study.take(self._wanted.trials))

    def finish(self, number: int, value: float) -> None:
        ranks.from_main(lambda: self._study.finish(number, value))

    def fail(self, number: int, reason: str) -> None:
        _say(f"trial {number} failed: {reason}")
        ranks.from_main(lambda: self._study.fail(number, reason))

    def leave(self, number: int) -> None:
        """Let go of a trial that is not done, without waiting for ranks that may be gone."""
        if ranks.rank() == 0:
            self._study.leave(number)

    def report(self) -> None:
        """Print and write the results as they are; other processes may still run trials."""
        ranks.from_main(self._report)

    def _report(self) -> None:
        found, best = self._study.trials(), None
        if found and found[0].value is not None:
            best = self._wanted.run(found[0].settings, f"{self._base.name}_best", Path(self._base.out))
        results.write(self.folder, self._figure, self._wanted.ranges, found, self._study.importance(), best)


def _carry_out(taken: "Taken", wanted: Search, figure: str, study: _Shared, training: Training) -> None:
    """Train a trial, or resume it, and record its figure, or why it failed."""
    number, folder = taken.number, study.folder / taken.name
    before = ranks.from_main(lambda: taken.hopeless or _stopped(folder))
    if before:
        study.fail(number, before)
        return
    _say(f"trial {number} of {wanted.trials}: {' '.join(taken.settings)}")
    try:
        run = wanted.run(taken.settings, taken.name, study.folder)
        training(run)
        value = ranks.from_main(lambda: _value(folder, figure))
    except (Stopped, ranks.Lost, KeyboardInterrupt):
        study.leave(number)
        raise
    except (OSError, CheckpointError):  # not the fault of the settings
        if ranks.rank() == 0:
            with contextlib.suppress(OSError):
                (folder / STOPPED).unlink(missing_ok=True)
        study.leave(number)
        raise
    except Exception as error:
        if ranks.world() > 1 and not isinstance(error, UserError):  # other ranks may not have it
            raise
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
    else:
        _say(f"trial {number}: {figure} {value:.4f} on val")
        study.finish(number, value)
        return
    _free_memory()
    study.fail(number, reason)


def _stopped(folder: Path) -> str:
    """Why an earlier start of a run ended, if another would end in the same way; else empty."""
    file = folder / STOPPED
    return " ".join(file.read_text(encoding="utf-8", errors="replace").split()) if is_file(file) else ""


def _value(folder: Path, figure: str) -> float:
    """The last value of a figure that training wrote: that of the encoder which is exported.

    Raises:
        ConfigError: if there is none.
    """
    values = [row[figure] for row in read_metrics(folder) if math.isfinite(row.get(figure, math.nan))]
    if not values:
        raise ConfigError(f"{folder}: training wrote no {figure}")
    return float(values[-1])


def _free_memory() -> None:
    """Give back what a failed trial held of the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _figure(wanted: Search, splits: Mapping[str, ImageSet]) -> str:
    """The figure on val by which trials are compared: of a classifier its own, else kNN's.

    Raises:
        ConfigError: if there is none, or not the same for all methods that are searched.
    """
    names = next((one.choices for one in wanted.ranges if one.key == "method.name"), (wanted.base.method.name,))  # type: ignore[attr-defined]
    firsts = [f"{one.key}={one.extremes[0]}" for one in wanted.ranges]
    runs = {name: load(wanted.config, [*wanted.overrides, *firsts, f"method.name={name}"]) for name in names}
    kinds = {name: classifies(run.method) for name, run in runs.items()}
    if len({*kinds.values()}) > 1:
        classifiers = ", ".join(name for name, classifier in kinds.items() if classifier)
        raise ConfigError(f"--search method.name: {classifiers} has other figures than the others; search it apart")
    val = splits.get("val")
    several = val is not None and val.targets is not None
    classifier = all(kinds.values())
    if val is None or not (val.labelled or (several and classifier)):
        why = "has no val" if val is None else "val has no labels" if not several else "val has several labels an image"
        raise ConfigError(f"a search chooses by {'accuracy' if classifier else 'kNN'} on val, but the data: {why}")
    return "knn/top1" if not classifier else "val/auroc" if several else "val/top1"


def _say(line: str) -> None:
    if ranks.rank() == 0:
        print(line, flush=True)


def command(args: argparse.Namespace) -> None:
    """`sslcells tune`."""
    wanted = search(args.search, args.config, args.overrides, args.trials, args.seed)
    if args.check:
        if launcher.launched_rank() == 0:
            print(f"{dump(wanted.base)}\nsearch: {', '.join(map(str, wanted.ranges))}; {wanted.trials} trials")
        return
    tune(wanted)


if __name__ == "__main__":
    raise SystemExit(commandline.run("tune", command))
