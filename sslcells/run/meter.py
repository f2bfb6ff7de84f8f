"""Measures between two lines of the log: losses, speed, and values that are not finite. Also the time to start."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from sslcells import ranks
from sslcells.config import Run
from sslcells.data import ImageSet
from sslcells.errors import TrainingError
from sslcells.plan import Plan
from sslcells.run import checkpoint

SKIPPED = 40
"""Steps in a row that a loss scaler may skip: so many halvings take the scale from 2¹⁶ to float16's smallest number."""


class Start:
    """Seconds of each part of the time from its making, or the start of the process, to the first step."""

    def __init__(self, of_process: bool = False) -> None:
        self._laps: dict[str, float] = {}
        self._began = self._last = psutil.Process().create_time() if of_process else time.time()

    def lap(self, name: str) -> None:
        """Add the time since the last lap to the part `name`."""
        now = time.time()
        self._laps[name] = self._laps.get(name, 0.0) + now - self._last
        self._last = now

    def first_step(self, splits: Mapping[str, ImageSet]) -> str:
        """A line for the log after the first step."""
        self.lap("first step")
        found = [images.found for images in splits.values() if images.found is not None]
        inner: dict[str, float] = {}
        for one in found:
            for name, seconds in one.seconds.items():
                inner[name] = inner.get(name, 0.0) + seconds
        looked = sum(one.looked for one in found)
        parts = [f"{name} {seconds:.1f}" for name, seconds in self._laps.items()]
        if inner:
            of = ", ".join(f"{name} {seconds:.1f}" for name, seconds in inner.items())
            at = list(self._laps).index("data")
            parts[at] += f" ({of}; {looked:,} images opened to verify them)"
        return f"start: first step after {self._last - self._began:.1f} s: {', '.join(parts)}"


class Meter:
    """Collects losses and figures between two lines of the log, without waiting for the device at every step.

    It also ends the run if a loss, a gradient norm or a weight is not finite. With a loss scaler (fp16) a norm may be
    infinite or NaN in up to SKIPPED steps in a row: the scaler skips such a step and halves its scale.
    """

    def __init__(self, run: Run, plan: Plan, device: torch.device, scaled: bool = False) -> None:
        self._run, self._plan, self._device = run, plan, device
        self._losses: list[Tensor] = []
        self._norms: list[Tensor] = []
        self._means: list[float] = []
        self._figures: dict[str, Tensor] = {}
        self._last_loss = float("nan")
        self._most_skipped, self._skipped = SKIPPED if scaled else 0, 0
        self.before_naming: Callable[[], None] = lambda: None
        """called before an error names the newest checkpoint, so that the one being written is complete"""
        self.start()

    def start(self) -> None:
        """Restart the clock, for example after an evaluation."""
        self._began = self._requested = time.perf_counter()
        self._waited, self._timed = 0.0, 0

    def arrived(self) -> None:
        """The next batch has arrived: the time since the last step counts as waiting for data."""
        self._waited += time.perf_counter() - self._requested

    def add(self, loss: Tensor, norm: Tensor, figures: Mapping[str, Tensor]) -> None:
        """Add a finished step: its loss on this rank, the norm of its gradient, and further figures."""
        self._losses.append(loss.detach())
        self._norms.append(norm.detach())
        self._figures = {"gradient_norm": norm.detach(), **{k: v.detach() for k, v in figures.items()}}
        self._timed += 1
        self._requested = time.perf_counter()

    def read(self, step: int) -> dict[str, float]:
        """Mean loss since the last line, figures of the last step, and speed; all ranks must call it.

        Raises:
            TrainingError: if a loss or a norm was not finite.
        """
        losses = self.check(step)
        self._means = []
        self._last_loss = losses[-1]
        figures = torch.stack([v.float().to(self._device) for v in self._figures.values()])
        means = ranks.gather(figures[None]).mean(0).tolist()
        seconds = time.perf_counter() - self._began
        speed = {
            "images_per_second": self._timed * self._plan.global_batch / seconds,
            "data_wait": self._waited / seconds,
            "memory_gib": _memory(self._device),
        }
        self.start()
        return {"loss": sum(losses) / len(losses), **dict(zip(self._figures, means, strict=True)), **speed}

    def check(self, step: int) -> list[float]:
        """Losses of the steps since the last line, means over ranks; raises if a loss or a norm is not finite."""
        new = [x.float().to(self._device) for pair in self._new() for x in pair]
        local = torch.stack(new).view(-1, 2) if new else torch.empty(0, 2, device=self._device)
        by_rank = ranks.gather(local[None])  # (world, new steps, 2)
        first = step - len(local) + 1
        for at, (loss, norm) in enumerate(by_rank.mean(0).tolist(), first):
            if not math.isfinite(loss):
                bad = (~by_rank[:, at - first, 0].isfinite()).nonzero()[:, 0].tolist()
                raise self.divergence(f"the loss became {loss} at step {at} on {_ranks(bad)}{self._before()}")
            self._means.append(loss)
            self._skipped = 0 if math.isfinite(norm) else self._skipped + 1
            if self._skipped > self._most_skipped:
                bad = (~by_rank[:, at - first, 1].isfinite()).nonzero()[:, 0].tolist()
                since = f", as at the {self._skipped - 1} before it," if self._skipped > 1 else ""
                raise self.divergence(
                    f"the norm of the gradient became {norm} at step {at}{since} on {_ranks(bad)}; the loss there "
                    f"was {loss:.6g}"
                )
        return self._means

    def check_states(self, step: int, model: nn.Module, states: Mapping[str, Any]) -> None:
        """Raise a TrainingError if a weight or a state of the optimizer is not finite on any rank."""
        bad = ranks.all_ranks(checkpoint.not_finite(model, states))
        if any(bad):
            first = next(filter(None, bad))
            more = f" and {len(first) - 1} more" if len(first) > 1 else ""
            on = _ranks([rank for rank, names in enumerate(bad) if names])
            raise self.divergence(
                f"the weights are no longer finite after step {step} on {on}: {first[0]}{more}{self._before()}"
            )

    def divergence(self, what: str) -> TrainingError:
        """The error of a run that diverged: what happened, its last good checkpoint, and what may help."""
        self.before_naming()
        newest = checkpoint.newest(self._run.folder / "checkpoints")
        on = f"the newest checkpoint before that is {newest}" if newest else "there is no checkpoint yet"
        return TrainingError(f"{what}; {on}. A lower optim.lr, optim.clip_norm or train.precision=no may help.")

    def state_dict(self) -> dict[str, Any]:
        """Losses that are not in a line of the log yet, means over ranks; call it after `check`."""
        assert not self._losses
        return {"means": list(self._means), "last": self._last_loss, "skipped": self._skipped}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue with the losses of `state_dict`, on any number of ranks."""
        self._means, self._skipped = list(state.get("means", ())), state.get("skipped", 0)
        self._last_loss = state["last"]

    def _new(self) -> list[tuple[Tensor, Tensor]]:
        """Loss and norm of each step since the last `check`."""
        new = list(zip(self._losses, self._norms, strict=True))
        self._losses, self._norms = [], []
        return new

    def _before(self) -> str:
        before = self._means[-1] if self._means else self._last_loss
        return f" (before it: {before:.6g})"


def _ranks(numbers: Sequence[int]) -> str:
    return f"rank {numbers[0]}" if len(numbers) == 1 else f"ranks {', '.join(map(str, numbers))}"


def _memory(device: torch.device) -> float:
    """Peak memory of the GPU, or the resident memory of this process on a CPU, in GiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    resident: int = psutil.Process().memory_info().rss
    return resident / 2**30
