"""Where figures go: the console and metrics.jsonl; from there to W&B, and to TensorBoard through Accelerate.

metrics.jsonl and plots/ are the truth; W&B is sent them by a process of its own, `sslcells.run.wandb_sync`.
"""

import contextlib
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from accelerate import Accelerator
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from sslcells.config import Run
from sslcells.errors import UserError
from sslcells.run import wandb_sync
from sslcells.run.metrics import METRICS, flat, forget_after, note_steps
from sslcells.storage import json_text, patiently


class LogError(UserError, OSError):
    """The run's own file of figures cannot be written; the message says why."""


class Log:
    """One place for every figure; only rank 0 writes."""

    def __init__(self, run: Run, steps: int, start: int, accelerator: Accelerator) -> None:
        self._main, self._steps, self._accelerator = accelerator.is_main_process, steps, accelerator
        self._console = Console(highlight=False, quiet=not self._main)
        self._progress: Progress | None = None
        self._tensorboard, self._step = False, start
        self._sender: wandb_sync.Sender | None = None
        if not self._main:
            return
        self._folder, self._path = run.folder, run.folder / METRICS
        forget_after(self._path, start)
        if self._console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._progress = Progress(*columns, console=self._console)
            self._task = self._progress.add_task("training", total=steps, completed=start)
            self._progress.start()
        if run.log.tracker == "tensorboard":
            config = flat(run.model_dump(mode="json"))
            self._tensorboard = True
            self._track(lambda: accelerator.init_trackers(run.log.project, config))
        elif run.log.tracker == "wandb":
            self._sender = self._start_wandb(start)

    def say(self, text: str) -> None:
        """A line for whoever watches."""
        self._console.print(text, markup=False, soft_wrap=True)

    def advance(self, step: int) -> None:
        """Move the progress bar to `step` finished steps."""
        if self._progress is not None:
            self._progress.update(self._task, completed=step)

    def metrics(self, step: int, epoch: float, values: Mapping[str, float]) -> None:
        """One line of metrics.jsonl and of the console, at `step` finished steps.

        Raises:
            LogError: where the line cannot be written; a run without its figures is worth nothing.
        """
        if not self._main:
            return
        self._step = step
        row = {"step": step, "epoch": round(epoch, 4), **values}
        self._write(json_text(row) + "\n")
        shown = "  ".join(f"{k} {v:.4g}" for k, v in values.items())
        self.say(f"{time.strftime('%H:%M:%S')}  step {step}/{self._steps}  epoch {epoch:.2f}  {shown}")
        self._track(lambda: self._accelerator.log(dict(values), step=step))
        self._hear()

    def pictures(self, step: int, paths: Mapping[str, Path]) -> None:
        """Hand pictures to the tracker; they are files of the run's folder already."""
        if not self._main:
            return
        with contextlib.suppress(OSError):  # a picture whose step is not known goes with the last one
            note_steps(paths, step)
        if self._tensorboard:
            stacks = {name: _pixels(path)[None] for name, path in paths.items()}
            for tracker in self._accelerator.trackers:
                self._track(lambda t=tracker: t.log_images(stacks, step=step, dataformats="NHWC"))  # type: ignore[misc]

    def close(self) -> None:
        """Finish the bar and the tracker, which has FINISH seconds."""
        if self._progress is not None:
            self._progress.stop()
        for tracker in self._accelerator.trackers:  # not end_training: that ends the process group too
            self._track(tracker.finish)
        if self._sender is not None:
            self._sender.wait("ended" if self._step == self._steps else "stopped")
            self._hear()
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
        mode = wandb_sync.wandb_mode()
        if mode == "disabled":
            return None
        if mode is None:
            self.say(f"W&B: no key here (WANDB_API_KEY, or wandb login); later: {wandb_sync.later(self._folder)}")
            return None
        try:
            # What came before the checkpoint is in the files that W&B's offline mode left then.
            return wandb_sync.Sender(self._folder, mode, after=start if start and mode != "online" else -1)
        except OSError as error:
            self.say(f"W&B: {error}; later: {wandb_sync.later(self._folder)}")
            return None

    def _hear(self) -> None:
        """Say what the sender has to say; training goes on whatever that is."""
        if self._sender is None:
            return
        for news in self._sender.hear():
            if "url" in news:
                self.say(f"W&B: {news['url'] or f'offline; later: {wandb_sync.later(self._folder)}'}")
        if self._sender.error:
            self.say(
                f"W&B is left alone from here on: {self._sender.error}. Every figure is in {self._path}; those that "
                f"W&B takes of the machine are lost; later: {wandb_sync.later(self._folder)}"
            )
            self._sender.close()
            self._sender = None

    def _track(self, call: Callable[[], object]) -> None:
        """Call the tracker; training goes on whatever becomes of it."""
        if not self._tensorboard:
            return
        try:
            call()
        except Exception as error:
            self._tensorboard = False
            self.say(
                f"the tracker failed and is left alone from here on ({type(error).__name__}: {error}); "
                f"every figure is in {METRICS}"
            )


def _pixels(path: Path) -> NDArray[np.uint8]:
    """A picture's (H, W, 3)."""
    with Image.open(path) as picture:
        return np.array(picture.convert("RGB"))
