"""The run's folder: created or found, used by one job at a time; it notes why the last start ended."""

import contextlib
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from sslcells import launcher, ranks
from sslcells.config import ConfigError, Run, dump, load
from sslcells.data import ImageSet, listing
from sslcells.data.folder import nearest_folder
from sslcells.data.pack import source_of
from sslcells.errors import TrainingError
from sslcells.names import CONFIG, STOPPED
from sslcells.run import checkpoint, starts
from sslcells.run.interrupt import Stopped
from sslcells.run.lock import Lock
from sslcells.storage import is_folder


def check_is_there(folder: Path, named: object = None) -> None:
    """Raise a ConfigError, with the most similar name that exists, where a run's folder is missing.

    `named` is what the user wrote, if that is not the folder.
    """
    if not is_folder(folder):
        raise ConfigError(f"{folder if named is None else named}: no such run's folder{nearest_folder(folder)}")


@contextmanager
def claimed(run: Run, images: ImageSet) -> Iterator["Claim"]:
    """Create or find the run's folder, and hold it until the end of the `with` block; no other job can use it.

    An error in the block is sent to the other ranks and written to `stopped.txt`. It is not written if another start
    may succeed: if a rank was lost, or a signal stopped the run.

    Raises:
        ConfigError: if the folder cannot be written, is in use, or has a run that must not be resumed.
        Lost: if the connection to another rank broke, instead of the error that this raised.
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
            with contextlib.suppress(OSError):  # such as a full disk
                (run.folder / STOPPED).write_text(f"{cause}\n", encoding="utf-8")
        raise
    finally:
        if claim.lock is not None:
            claim.lock.release()


class Claim:
    """A run's folder that this job holds."""

    checkpoint: Path | None = None
    """the checkpoint to resume from"""
    ours: bool = False
    """True once this job holds the lock"""
    lock: Lock | None = None
    """only on rank 0"""

    def check(self) -> None:
        """Raise a TrainingError if another job took the folder in spite of the lock."""
        if self.lock is not None and self.lock.lost:
            raise TrainingError(f"another job took the run's folder: {self.lock.lost}; two jobs must not share one")


def _take(run: Run, images: ImageSet, claim: Claim) -> Path | None:
    """Create or find the run's folder and lock it; returns the checkpoint to resume from, if any."""
    try:
        (run.folder / "plots").mkdir(parents=True, exist_ok=True)
        claim.lock = Lock(run.folder)
        claim.ours = True
        (run.folder / STOPPED).unlink(missing_ok=True)
    except OSError as error:
        raise ConfigError(f"out={run.out!r}: the run's folder cannot be written: {error}") from None
    newest = checkpoint.newest(run.folder / "checkpoints")
    if newest is not None and run.resume == "never":
        raise ConfigError(f"{run.folder} holds {newest.name} and resume=never; choose another name=")
    if newest is not None:
        _check_same_run(run, images)
    if newest is None or not listing.recorded(run.folder):
        listing.record(run.folder, images)
    (run.folder / CONFIG).write_text(dump(run), encoding="utf-8")
    starts.note(run.folder, resumes=newest is not None)
    return newest


MAY_CHANGE = {
    *("train.workers", "train.threads", "train.device", "train.timeout_minutes", "train.parallel"),
    *("log", "evaluate", "compare", "checkpoint", "resume", "out"),
}
"""Sections and keys that may change when a run resumes, as they do not change what is learned."""
MUST_STAY = {"evaluate.holdout"}
"""Keys of these sections that may not change."""


AUTO = ("precision", "channels_last")
"""Keys of `train` that can be `auto`; a run keeps the values that were chosen at its first start."""


OF_WEIGHTS = ("mean", "std", "interpolation", "crop")
"""Keys of `model` that the weights a run starts from decide, if it does not; it keeps the values of its first start."""


def resolve_auto(run: Run, device: torch.device) -> Run:
    """The run with values in place of `auto`: those in its folder if it resumes, else those for rank 0's device.

    What its first start took from published weights is taken from its folder too, if it resumes.
    """

    def resolve() -> tuple[dict[str, Any], dict[str, Any]]:
        train, folder = run.train.model_dump(include=set(AUTO)), run.folder
        model = {key: getattr(run.model, key) for key in OF_WEIGHTS}
        if any((folder / "checkpoints").glob("step_*")) and (folder / CONFIG).is_file():
            written = load(str(folder / CONFIG))
            before = written.train.model_dump(include=set(AUTO))
            train = {key: before[key] if value == "auto" else value for key, value in train.items()}
            model = {key: getattr(written.model, key) if value is None else value for key, value in model.items()}
        if train["precision"] == "auto":
            train["precision"] = launcher.precision_for(device)
        if train["channels_last"] == "auto":
            train["channels_last"] = launcher.channels_last_for(device, train["precision"])
        return train, model

    train, model = ranks.from_main(resolve)
    return run.model_copy(
        update={"train": run.train.model_copy(update=train), "model": run.model.model_copy(update=model)}
    )


def changed(run: Run, may_change: Collection[str] = ()) -> list[str]:
    """Differences from the configuration in the run's folder, in words; without keys that may change.

    `may_change` are keys that may change besides MAY_CHANGE.
    """
    before, now = (
        of.model_dump(mode="json") | {"data": source_of(of.data)} for of in (load(str(run.folder / CONFIG)), run)
    )
    different = [
        f"{section}.{key}: {before[section].get(key)!r} → {now[section].get(key)!r}"
        for section in now
        if isinstance(now[section], dict)
        for key in now[section] | before[section]
        if not _same(before[section].get(key), now[section].get(key))
        and (f"{section}.{key}" in MUST_STAY or not {section, f"{section}.{key}"} & {*MAY_CHANGE, *may_change})
        and not (section == "train" and key in AUTO and now[section][key] == "auto")
        and not (section == "model" and key in OF_WEIGHTS and None in (now[section][key], before[section][key]))
    ]
    if before["seed"] != now["seed"]:
        different.append(f"seed: {before['seed']} → {now['seed']}")
    return different


def _same(one: Any, other: Any) -> bool:
    """True for equal values; true and 1, which Python calls equal, are not: `model.freeze` takes both."""
    return bool(one == other) and isinstance(one, bool) == isinstance(other, bool)


def _check_same_run(run: Run, images: ImageSet) -> None:
    """Raise a ConfigError unless the run in the folder has the same configuration and the same images.

    The paths of the images may change, as some clusters copy the images to a new folder for each job.
    """
    recorded = listing.recorded(run.folder)
    if different := changed(run, listing.PATHS if recorded else ()):
        raise ConfigError(
            f"{run.folder} holds a run with another configuration ({'; '.join(different)}); choose another name=, "
            f"or resume with the one it has: --config {run.folder / 'config.yaml'}"
        )
    if recorded and (different := listing.differences(run.folder, images)):
        raise ConfigError(
            f"{run.folder} holds a run of other images: {'; '.join(different)}. Use its images, or choose another name="
        )
