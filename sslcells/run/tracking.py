"""All figures go to metrics.jsonl and the tracker; the main ones to the console.

metrics.jsonl and plots/ are complete. A process of its own, `sslcells.run.wandb_sync`, sends them to W&B; TensorBoard
gets them through Accelerate.
"""

import contextlib
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from accelerate import Accelerator
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from rich.progress import Progress

from sslcells.config import Run
from sslcells.errors import UserError
from sslcells.run import wandb_sync
from sslcells.run.metrics import METRICS, flat, forget_after, note_steps
from sslcells.run.progress import columns_on
from sslcells.storage import json_text, patiently


class LogError(UserError, OSError):
    """metrics.jsonl cannot be written; the message says why."""


class Log:
    """Writes every figure of a run; only rank 0 writes."""

    def __init__(self, run: Run, steps: int, start: int, accelerator: Accelerator) -> None:
        self._main, self._steps, self._accelerator = accelerator.is_main_process, steps, accelerator
        self._console = Console(highlight=False, quiet=not self._main)
        self._progress: Progress | None = None
        self._newest = dict[str, float]()
        self._tensorboard, self._step = False, start
        self._sender: wandb_sync.Sender | None = None
        if not self._main:
            return
        self._folder, self._path = run.folder, run.folder / METRICS
        forget_after(self._path, start)
        if self._console.is_terminal:
            self._progress = columns_on(self._console)
            self._task = self._progress.add_task("training", total=steps, completed=start, figures="")
            self._progress.start()
        if run.log.tracker == "tensorboard":
            config = flat(run.model_dump(mode="json"))
            self._tensorboard = True
            self._track(lambda: accelerator.init_trackers(run.log.project, config))
        elif run.log.tracker == "wandb":
            self._sender = self._start_wandb(start)

    def say(self, text: str) -> None:
        """Print a line."""
        self._console.print(text, markup=False, soft_wrap=True)

    def advance(self, step: int) -> None:
        """Move the progress bar to `step` finished steps."""
        if self._progress is not None:
            self._progress.update(self._task, completed=step)

    def metrics(self, step: int, epoch: float, values: Mapping[str, float]) -> None:
        """Write figures after `step` finished steps: a line of metrics.jsonl, a line of the console, and the tracker.

        Raises:
            LogError: if metrics.jsonl cannot be written; a run without its figures is worth nothing.
        """
        if not self._main:
            return
        self._step = step
        row = {"step": step, "epoch": round(epoch, 4), **values}
        self._write(json_text(row) + "\n")
        self._newest |= values
        if self._progress is not None:
            self._progress.update(self._task, figures=figures_line(self._newest))
        if line := console_line(step, self._steps, epoch, values):
            self.say(f"{time.strftime('%H:%M:%S')} {line}")
        self._track(lambda: self._accelerator.log(dict(values), step=step))
        self._read_sender()

    def pictures(self, step: int, paths: Mapping[str, Path]) -> None:
        """Send pictures, which are files in the run's folder already, to the tracker."""
        if not self._main:
            return
        with contextlib.suppress(OSError):  # a picture without a known step is sent with the last step
            note_steps(paths, step)
        if self._tensorboard:
            stacks = {name: _pixels(path)[None] for name, path in paths.items()}
            for tracker in self._accelerator.trackers:
                self._track(lambda t=tracker: t.log_images(stacks, step=step, dataformats="NHWC"))  # type: ignore[misc]

    def close(self) -> None:
        """Finish the progress bar, and the tracker within wandb_sync.FINISH seconds."""
        if self._progress is not None:
            self._progress.stop()
        for tracker in self._accelerator.trackers:  # not end_training: that ends the process group too
            self._track(tracker.finish)
        if self._sender is not None:
            self._sender.wait("ended" if self._step == self._steps else "stopped")
            self._read_sender()
        if self._sender is not None:
            self._sender.close()

    def _write(self, line: str) -> None:
        def append() -> None:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(line)

        try:
            patiently(append, str(self._path))
        except OSError as error:
            raise LogError(f"{self._path} cannot be written: {error.strerror}") from error

    def _start_wandb(self, start: int) -> wandb_sync.Sender | None:
        if os.environ.get("WANDB_MODE") == "disabled":
            return None
        try:
            # In offline mode, an earlier start's files hold the steps up to the checkpoint.
            return wandb_sync.Sender(self._folder, after=start or -1)
        except OSError as error:
            self.say(f"W&B: {error}; to send later: {wandb_sync.later(self._folder)}")
            return None

    def _read_sender(self) -> None:
        """Read the sender's messages and print them. Training continues whatever they say."""
        if self._sender is None:
            return
        for message in self._sender.read():
            if "url" in message:
                self.say(f"W&B: {message['url'] or f'offline; to send later: {wandb_sync.later(self._folder)}'}")
        if self._sender.error:
            self.say(
                f"W&B is disabled for the rest of this run: {self._sender.error}. Every figure is in {self._path}; "
                f"only W&B's own figures of the machine are lost. To send later: {wandb_sync.later(self._folder)}"
            )
            self._sender.close()
            self._sender = None

    def _track(self, call: Callable[[], object]) -> None:
        """Call the tracker; training continues if it fails."""
        if not self._tensorboard:
            return
        try:
            call()
        except Exception as error:
            self._tensorboard = False
            self.say(
                f"TensorBoard is disabled for the rest of this run ({type(error).__name__}: {error}). "
                f"Every figure is in {METRICS}"
            )


def console_line(step: int, steps: int, epoch: float, values: Mapping[str, float]) -> str:
    """The figures that a person follows, each in a column of its own; empty if `values` has none of them.

    A column that has no value is left blank, so that the lines of training and of evaluation stand below each other.
    """
    if not any(key in values for key, _ in _COLUMNS):
        return ""
    shown = [column.format(values[key]) if key in values else " " * len(column.format(0)) for key, column in _COLUMNS]
    return "  ".join([f"step {step:>{len(str(steps))}}/{steps}", f"epoch {epoch:6.2f}", *shown]).rstrip()


def figures_line(values: Mapping[str, float]) -> str:
    """What stands beside the bar: `loss 4.21  530 images/s  kNN 87.5%`, as far as it is known."""
    return "  ".join(form.format(values[key]) for key, form in _BESIDE if key in values)


_COLUMNS = (
    ("loss", "loss {:<8.4g}"),
    ("lr", "lr {:.1e}"),
    ("images_per_second", "{:5.0f} images/s"),
    ("data_wait", "wait {:4.0%}"),
    ("knn/top1", "kNN {:6.1%}"),
)
"""Key and format of each column on the console."""
_BESIDE = [
    ("loss", "loss {:.4g}"),
    ("images_per_second", "{:,.0f} images/s"),
    ("knn/top1", "kNN {:.1%}"),
    ("knn_loo/top1", "kNN of train {:.1%}"),
    ("val/top1", "val {:.1%}"),
    ("val/auroc", "val AUROC {:.3f}"),
]
"""Likewise beside the bar, where each is the newest."""


def _pixels(path: Path) -> NDArray[np.uint8]:
    """A picture as (H, W, 3)."""
    with Image.open(path) as picture:
        return np.array(picture.convert("RGB"))
