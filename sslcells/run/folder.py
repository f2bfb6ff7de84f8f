"""The run's folder: made or found, one job's at a time, with the reason in it why the last start ended."""

import contextlib
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from sslcells import launcher, ranks
from sslcells.config import ConfigError, Run, dump, load
from sslcells.data import ImageSet, listing
from sslcells.errors import TrainingError
from sslcells.run import checkpoint
from sslcells.run.interrupt import Stopped
from sslcells.run.lock import Lock

STOPPED = "stopped.txt"
"""In a run's folder: why its last start ended, where the same would come again."""


@contextmanager
def claimed(run: Run, images: ImageSet) -> Iterator["Claim"]:
    """The run's folder, from its making or finding to the run's end; no other job has it meanwhile.

    An error that leaves the run is told to the other ranks, and written to `stopped.txt` unless another start may do
    better: where a rank was lost, or the run was asked to stop.

    Raises:
        ConfigError: where the folder cannot be written, is in use, or holds a run that must not be gone on with.
        Lost: in place of whatever a broken connection to another rank raises.
    """
    claim = Claim()
    try:
        with ranks.parting():
            claim.checkpoint = ranks.from_main(lambda: _take(run, images, claim))
            claim.ours = True
            yield claim
    except (Stopped, KeyboardInterrupt, ranks.Lost):
        raise
    except BaseException as error:
        if claim.ours:
            cause = f"rank {ranks.rank()}: {type(error).__name__}: {error}"
            with contextlib.suppress(OSError):  # a full disk holds no reasons
                (run.folder / STOPPED).write_text(f"{cause}\n", encoding="utf-8")
        raise
    finally:
        if claim.lock is not None:
            claim.lock.release()


class Claim:
    """A run's folder in use."""

    checkpoint: Path | None = None
    """the checkpoint to resume from"""
    ours: bool = False
    """True once this job holds the lock"""
    lock: Lock | None = None
    """of rank 0 alone"""

    def check(self) -> None:
        """Raise a TrainingError where another job has taken the folder away, in spite of the lock."""
        if self.lock is not None and self.lock.lost:
            raise TrainingError(f"the run's folder was taken by {self.lock.lost}: two jobs must not share one")


def _take(run: Run, images: ImageSet, claim: Claim) -> Path | None:
    """Make the run's folder, or find it; returns the whole checkpoint to go on from, if any."""
    try:
        (run.folder / "plots").mkdir(parents=True, exist_ok=True)
        claim.lock = Lock(run.folder)
        claim.ours = True
        (run.folder / STOPPED).unlink(missing_ok=True)
    except OSError as error:
        raise ConfigError(f"out={run.out!r}: the run's folder cannot be written: {error}") from None
    whole = checkpoint.newest(run.folder / "checkpoints")
    if whole is not None and run.resume == "never":
        raise ConfigError(f"{run.folder} holds {whole.name} and resume=never; choose another name=")
    if whole is not None:
        _same_run(run, images)
    if whole is None or not listing.recorded(run.folder):
        listing.record(run.folder, images)
    (run.folder / "config.yaml").write_text(dump(run), encoding="utf-8")
    return whole


FREE = {
    *("train.workers", "train.threads", "train.device", "train.timeout_minutes"),
    *("log", "evaluate", "compare", "checkpoint", "resume", "out"),
}
"""What may change when a run goes on: nothing of it changes what is learned."""
BOUND = {"evaluate.holdout"}
"""What may not, of sections that may."""


SETTLED = ("precision", "channels_last")
"""Of `train`: where `auto` is asked for, what it stands for is settled when a run begins, and kept by it."""


def settled(run: Run, device: torch.device) -> Run:
    """The run with what `auto` stands for: what its folder says where it goes on, else what suits rank 0's device."""

    def settle() -> dict[str, Any]:
        train, folder = run.train.model_dump(include=set(SETTLED)), run.folder
        if any((folder / "checkpoints").glob("step_*")) and (folder / "config.yaml").is_file():
            before = load(str(folder / "config.yaml")).train.model_dump(include=set(SETTLED))
            train = {key: before[key] if value == "auto" else value for key, value in train.items()}
        if train["precision"] == "auto":
            train["precision"] = launcher.precision_for(device)
        if train["channels_last"] == "auto":
            train["channels_last"] = launcher.channels_last_for(device, train["precision"])
        return train

    return run.model_copy(update={"train": run.train.model_copy(update=ranks.from_main(settle))})


def changed(run: Run, free: Collection[str] = ()) -> list[str]:
    """What of a run is not as the configuration in its folder says, and decides the training; read for a person.

    `free` may change too.
    """
    before, now = load(str(run.folder / "config.yaml")).model_dump(mode="json"), run.model_dump(mode="json")
    different = [
        f"{section}.{key}: {before[section].get(key)!r} → {now[section].get(key)!r}"
        for section in now
        if isinstance(now[section], dict)
        for key in now[section] | before[section]
        if before[section].get(key) != now[section].get(key)
        and (f"{section}.{key}" in BOUND or not {section, f"{section}.{key}"} & {*FREE, *free})
        and not (section == "train" and key in SETTLED and now[section][key] == "auto")
    ]
    if before["seed"] != now["seed"]:
        different.append(f"seed: {before['seed']} → {now['seed']}")
    return different


def _same_run(run: Run, images: ImageSet) -> None:
    """Raise a ConfigError unless the folder's configuration decides the same training, of the same images.

    Where these lie may change, as it does where each job copies them to a place of its own.
    """
    recorded = listing.recorded(run.folder)
    if different := changed(run, listing.PATHS if recorded else ()):
        raise ConfigError(
            f"{run.folder} holds a run with another configuration ({'; '.join(different)}); choose another name=, "
            f"or go on with the one it has: --config {run.folder / 'config.yaml'}"
        )
    if recorded and (different := listing.differences(run.folder, images)):
        raise ConfigError(
            f"{run.folder} holds a run of other images: {'; '.join(different)}. Give it the images that it had, or "
            f"choose another name="
        )
