"""Where figures go: the console, metrics.jsonl, and W&B or TensorBoard through Accelerate's trackers."""

import json
import logging
import netrc
import os
import secrets
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from sslcells.config import Run

logger = logging.getLogger(__name__)

METRICS = "metrics.jsonl"


class Log:
    """One place for every figure; only rank 0 writes."""

    def __init__(self, run: Run, steps: int, start: int, accelerator: Accelerator) -> None:
        self._main, self._steps, self._trackers = accelerator.is_main_process, steps, accelerator
        self._console = Console(highlight=False, quiet=not self._main)
        self._progress: Progress | None = None
        self._tracked = False
        if not self._main:
            return
        self._path = run.folder / METRICS
        _forget_after(self._path, start)
        if self._console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._progress = Progress(*columns, console=self._console)
            self._task = self._progress.add_task("training", total=steps, completed=start)
            self._progress.start()
        if run.log.tracker != "none":
            self._start_tracker(run)

    def say(self, text: str) -> None:
        """A line for whoever watches."""
        self._console.print(text, markup=False, soft_wrap=True)

    def advance(self, step: int) -> None:
        """Move the progress bar to `step` finished steps."""
        if self._progress is not None:
            self._progress.update(self._task, completed=step)

    def metrics(self, step: int, epoch: float, values: Mapping[str, float]) -> None:
        """One line of metrics.jsonl and of the console, at `step` finished steps."""
        if not self._main:
            return
        row = {"step": step, "epoch": round(epoch, 4), **values}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        shown = "  ".join(f"{k} {v:.4g}" for k, v in values.items())
        self.say(f"{time.strftime('%H:%M:%S')}  step {step}/{self._steps}  epoch {epoch:.2f}  {shown}")
        self._track(lambda: self._trackers.log(dict(values), step=step))

    def pictures(self, step: int, paths: Mapping[str, Path]) -> None:
        """Hand pictures to the tracker; they are files of the run's folder already."""
        if not self._tracked:
            return
        images = {name: _pixels(path) for name, path in paths.items()}
        for tracker in self._trackers.trackers:
            if tracker.name == "wandb":
                lists = {name: [image] for name, image in images.items()}
                self._track(partial(tracker.log_images, lists, step=step))
            else:
                stacks = {name: image[None] for name, image in images.items()}
                self._track(partial(tracker.log_images, stacks, step=step, dataformats="NHWC"))

    def close(self) -> None:
        """Finish the bar and the tracker."""
        if self._progress is not None:
            self._progress.stop()
        if self._tracked:
            self._track(self._trackers.end_training)

    def _start_tracker(self, run: Run) -> None:
        options: dict[str, Any] = {}
        if run.log.tracker == "wandb":
            mode = wandb_mode()
            self.say(
                f"W&B: {mode}" + ("" if mode == "online" else f"; later: wandb sync {run.folder}/wandb/offline-run-*")
            )
            options["wandb"] = {
                "id": _wandb_id(run.folder),
                "name": run.name,
                "entity": run.log.entity,
                "tags": list(run.log.tags),
                "dir": str(run.folder),
                "mode": mode,
                "resume": "allow",
            }
        self._tracked = True
        self._track(lambda: self._trackers.init_trackers(run.log.project, _flat(run.model_dump(mode="json")), options))

    def _track(self, call: Any) -> None:
        """Call the tracker; training goes on whatever becomes of it."""
        if not self._tracked:
            return
        try:
            call()
        except Exception as error:
            self._tracked = False
            self.say(
                f"the tracker failed and is left alone from here on ({type(error).__name__}: {error}); "
                f"every figure is in {METRICS}"
            )


def wandb_mode() -> str:
    """`online` where there are credentials, else `offline`; WANDB_MODE has the last word."""
    if "WANDB_MODE" in os.environ:
        return os.environ["WANDB_MODE"]
    if os.environ.get("WANDB_API_KEY"):
        return "online"
    host = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").split("://")[-1].split("/")[0].split(":")[0]
    try:
        known = netrc.netrc().authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        known = False
    return "online" if known else "offline"


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics.jsonl."""
    lines = (folder / METRICS).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def _pixels(path: Path) -> NDArray[np.uint8]:
    """A picture's (H, W, 3)."""
    with Image.open(path) as picture:
        return np.array(picture.convert("RGB"))


def _forget_after(path: Path, step: int) -> None:
    """Drop what was written after the checkpoint that the run goes on from, and a last line that was cut off."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if row["step"] <= step and step > 0:
            kept.append(line + "\n")
    partial = path.with_suffix(".partial")
    partial.write_text("".join(kept), encoding="utf-8")
    partial.replace(path)


def _wandb_id(folder: Path) -> str:
    """The id of the run at W&B, the same after every restart."""
    path = folder / "wandb_id.txt"
    if not path.is_file():
        path.write_text(secrets.token_hex(4), encoding="utf-8")
    return path.read_text(encoding="utf-8").strip()


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} → {"a.b": 1}, of values that every tracker takes."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value if isinstance(value, int | float | str | bool) else str(value)
    return flat
