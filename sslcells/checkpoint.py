"""Checkpoints: written under a temporary name and renamed, verified when read, the newest few kept.

A folder `step_<n>` holds the weights (safetensors), the optimizer's state (tensors and plain containers; reading it
executes nothing) and state.json with the SHA-256 of both. There is no state of random number generators to save: all
randomness of a run is a function of its seed and the step.
"""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

logger = logging.getLogger(__name__)

_FILES = ("model.safetensors", "optimizer.pt")


def save(folder: Path, step: int, model: nn.Module, states: dict[str, Any], keep: int) -> Path:
    """Write the checkpoint of `step` finished steps, then prune to the newest `keep`; for one rank to call.

    `states` is anything else to go on with: nested dicts, lists, numbers, strings and tensors.
    """
    whole, partial = folder / f"step_{step:08d}", folder / f".step_{step:08d}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save_file({k: v.detach().contiguous() for k, v in model.state_dict().items()}, partial / _FILES[0])
    torch.save(states, partial / _FILES[1])
    digests = {name: _digest(partial / name) for name in _FILES}
    (partial / "state.json").write_text(json.dumps({"step": step, "sha256": digests}, indent=2), encoding="utf-8")
    for path in [*partial.iterdir(), partial]:
        _flush(path)
    shutil.rmtree(whole, ignore_errors=True)
    partial.rename(whole)
    _flush(folder)
    for old in list(_newest_first(folder))[keep:]:
        shutil.rmtree(old)
    return whole


def newest(folder: Path) -> Path | None:
    """The newest whole checkpoint; one that is truncated or altered is named in the log and passed over."""
    for path in _newest_first(folder):
        fault = _fault(path)
        if fault is None:
            return path
        logger.warning("checkpoint %s is not whole (%s); looking for an older one", path, fault)
    return None


def load(path: Path, model: nn.Module) -> tuple[int, dict[str, Any]]:
    """Load the weights into `model`; returns the number of finished steps, and the states that were saved."""
    model.load_state_dict(load_file(path / _FILES[0]))
    states: dict[str, Any] = torch.load(path / _FILES[1], map_location="cpu", weights_only=True)
    return int(json.loads((path / "state.json").read_text(encoding="utf-8"))["step"]), states


def _newest_first(folder: Path) -> Iterator[Path]:
    return iter(sorted(folder.glob("step_*"), reverse=True))


def _fault(path: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    try:
        digests = json.loads((path / "state.json").read_text(encoding="utf-8"))["sha256"]
        altered = [name for name in _FILES if _digest(path / name) != digests[name]]
    except (OSError, ValueError, KeyError) as error:
        return str(error)
    return f"{', '.join(altered)} altered or truncated" if altered else None


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    """Have the system write a file, or a folder's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
