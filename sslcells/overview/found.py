"""The runs below a folder."""

import os
from collections.abc import Iterator
from pathlib import Path

from sslcells import names
from sslcells.errors import ConfigError
from sslcells.overview.summary import STATES, Summary, summary
from sslcells.run import lock
from sslcells.run.metrics import METRICS
from sslcells.storage import is_folder

_SIGNS = {METRICS, lock.FILE, names.STOPPED, "checkpoints", "plots"}
"""A run's folder has config.yaml and one of these, or metrics.jsonl."""
_PARTS = {"checkpoints", "plots", "wandb", "export", "embeddings", "tensorboard"}
"""Folders of a run that hold no other run."""


def runs(folder: Path) -> list[Summary]:
    """Every run in a folder, at any depth: those that need attention first, and of each state the newest first.

    Raises:
        ConfigError: if there is no such folder.
    """
    if not is_folder(folder):
        raise ConfigError(f"{folder}: no such folder; runs are in runs/ unless out= said otherwise")
    found = list(_below(folder, set()))
    return sorted(found, key=lambda one: (STATES.index(one.state), one.seen or 0.0, str(one.folder)))


def _below(folder: Path, visited: set[tuple[int, int]]) -> Iterator[Summary]:
    """The runs in a folder, itself included. Links are followed, each folder is visited once."""
    try:
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in visited:
            return
        visited.add((status.st_dev, status.st_ino))
        with os.scandir(folder) as listed:
            entries = {entry.name: entry for entry in listed}
        inner = [name for name, entry in entries.items() if name[0] != "." and _is_folder(entry)]
    except OSError as error:
        yield Summary(folder, "broken", f"the folder: {error.strerror}")
        return
    is_run = METRICS in entries or (names.CONFIG in entries and _SIGNS & entries.keys())
    if is_run:
        yield summary(folder)
    for name in sorted(inner):
        if not (is_run and name in _PARTS):
            yield from _below(folder / name, visited)


def _is_folder(entry: "os.DirEntry[str]") -> bool:
    """False also for a link that leads to itself, or where nobody may look."""
    try:
        return entry.is_dir()
    except OSError:
        return False
