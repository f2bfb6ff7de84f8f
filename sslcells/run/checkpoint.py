"""Checkpoints: written under a temporary name and renamed, verified when read, the newest few kept.

A folder `step_<n>` holds the weights (safetensors), the optimizer's state (tensors and plain containers; reading it
executes nothing) and state.json with the SHA-256 of both. There is no state of random number generators to save: all
randomness of a run is a function of its seed and the step.
"""

import hashlib
import io
import json
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from sslcells.errors import UserError
from sslcells.models import files as models
from sslcells.storage import json_text, patiently

logger = logging.getLogger(__name__)

_WEIGHTS, _STATES, _SUMMARY = "model.safetensors", "optimizer.pt", "state.json"


class CheckpointError(UserError):
    """A checkpoint could not be written; the message says why, and from which one the run can resume."""


class Writer:
    """Writes checkpoints while training continues, one at a time; used by one rank.

    Training waits only while the states are copied into the bytes of the files; a thread writes these to the disk. That
    is as safe as waiting for it, as a checkpoint counts only after it was renamed. The end of the `with` block waits
    for the thread.
    """

    def __init__(self, folder: Path, keep: int, say: Callable[[str], None]) -> None:
        self._folder, self._keep, self._say = folder, keep, say
        self._thread: threading.Thread | None = None
        self._failure: CheckpointError | None = None

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *error: object) -> None:
        self.join()

    def save(self, step: int, model: nn.Module, states: dict[str, Any]) -> None:
        """Begin to write the checkpoint after `step` finished steps.

        `states` is everything else that a resumed run needs: nested dicts, lists, numbers, strings and tensors.

        Raises:
            CheckpointError: if the previous checkpoint could not be written.
        """
        self.wait()
        began = time.perf_counter()
        arguments = step, files(step, model, states), began, time.perf_counter()
        self._thread = threading.Thread(target=self._write, args=arguments, name="checkpoint")
        self._thread.start()

    def wait(self) -> None:
        """Wait until the checkpoint is written; raises like `check`."""
        self.join()
        self.check()

    def join(self) -> None:
        """Wait until nothing is being written."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def check(self) -> None:
        """Raise a CheckpointError if a checkpoint could not be written."""
        if self._failure is not None:
            raise self._failure

    def _write(self, step: int, contents: Mapping[str, bytes], began: float, copied: float) -> None:
        try:
            path = patiently(lambda: write(self._folder, step, contents, self._keep), f"checkpoint of step {step}")
        except OSError as error:
            before = next(_newest_first(self._folder), None)
            on = f"the run can resume from {before}" if before else "there is no earlier one"
            size = sum(map(len, contents.values())) / 2**20
            self._failure = CheckpointError(
                f"the checkpoint of step {step} ({size:.3g} MiB) cannot be written: {error}; {on}"
            )
            return
        seconds = time.perf_counter() - began
        self._say(f"checkpoint {path.name}: {seconds:.2f} s; training waited {copied - began:.2f} s for it")


def files(step: int, model: nn.Module, states: dict[str, Any]) -> dict[str, bytes]:
    """The files of a checkpoint: name → content.

    Raises:
        CheckpointError: if a weight or a state is not finite, as the checkpoint would replace a good one.
    """
    if bad := not_finite(model, states):
        more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
        raise CheckpointError(f"the checkpoint of step {step} is not written: {bad[0]}{more} is not finite")
    weights = {k: v.detach().contiguous() for k, v in model.state_dict().items()}
    plain = io.BytesIO()
    torch.save(states, plain)
    contents = {_WEIGHTS: safetensors.torch.save(weights), _STATES: plain.getvalue()}
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
    return contents | {_SUMMARY: json_text({"step": step, "sha256": digests}, indent=2).encode()}


def not_finite(model: nn.Module, states: Mapping[str, Any]) -> list[str]:
    """The names of the weights and state tensors that contain NaN or an infinity."""
    return models.not_finite([*model.state_dict().items(), *_tensors(states)])


def _tensors(tree: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors in nested dicts and lists, named by their path, such as optimizer.state.0.exp_avg."""
    if isinstance(tree, Tensor):
        yield name, tree
    elif isinstance(tree, (dict, list, tuple)):
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from _tensors(value, f"{name}.{key}" if name else str(key))


def write(folder: Path, step: int, contents: Mapping[str, bytes], keep: int) -> Path:
    """Write the files of a checkpoint, then remove all but the newest `keep`; called by one rank.

    The parent of `folder` must exist, so that nothing is created in its place while its disk is unavailable.

    Raises:
        OSError: if the checkpoint cannot be written; its unfinished files are removed.
    """
    folder.mkdir(exist_ok=True)
    path, partial = folder / f"step_{step:08d}", folder / f".step_{step:08d}.partial"
    for unfinished in folder.glob(".step_*.partial"):  # by a process that was killed
        shutil.rmtree(unfinished, ignore_errors=True)
    try:
        partial.mkdir()
        for name, content in contents.items():
            (partial / name).write_bytes(content)
            _flush(partial / name)
        _flush(partial)
        shutil.rmtree(path, ignore_errors=True)
        partial.rename(path)
    except OSError:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    _flush(folder)
    for old in list(_newest_first(folder))[keep:]:
        shutil.rmtree(old, ignore_errors=True)
    return path


def newest(folder: Path) -> Path | None:
    """The newest intact checkpoint; one that is truncated, altered or not finite is skipped with a warning."""
    for path in _newest_first(folder):
        fault = _fault(path)
        if fault is None:
            return path
        logger.warning("checkpoint %s is damaged (%s); trying an older one", path, fault)
    return None


def load(path: Path, model: nn.Module) -> tuple[int, dict[str, Any]]:
    """Load the weights into `model`; returns the number of finished steps and the saved states."""
    model.load_state_dict(safetensors.torch.load_file(path / _WEIGHTS))
    states: dict[str, Any] = torch.load(path / _STATES, map_location="cpu", weights_only=True)
    return int(json.loads((path / _SUMMARY).read_text(encoding="utf-8"))["step"]), states


def _newest_first(folder: Path) -> Iterator[Path]:
    return iter(sorted(folder.glob("step_*"), reverse=True))


def _fault(path: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    try:
        digests = json.loads((path / _SUMMARY).read_text(encoding="utf-8"))["sha256"]
        altered = [name for name in (_WEIGHTS, _STATES) if _digest(path / name) != digests[name]]
        if altered:
            return f"altered or truncated: {', '.join(altered)}"
        with safetensors.safe_open(path / _WEIGHTS, "pt") as weights:
            bad = models.not_finite((name, weights.get_tensor(name)) for name in weights.keys())  # noqa: SIM118
    except (OSError, ValueError, KeyError, safetensors.SafetensorError) as error:
        return str(error)
    return f"{bad[0]} is not finite" if bad else None


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    """Make the system write a file, or the entries of a folder, to the disk now."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
