"""What follows from a run's configuration before and between its steps: sizes, lengths, the folder, the meter."""

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from sslcells import checkpoint, distributed, methods, models, optim
from sslcells.config import ConfigError, Run, dump, load
from sslcells.data import open_splits
from sslcells.interrupt import Stopped
from sslcells.lock import Lock


class TrainingError(Exception):
    """Training cannot go on; the message says why, and from where it can be taken up."""


class Plan:
    """Sizes a rank, and lengths in optimizer steps."""

    def __init__(self, run: Run, images: int, world: int) -> None:
        batch = run.train.global_batch
        if batch % world:
            raise ConfigError(f"train.global_batch={batch} does not divide over {world} ranks")
        if images < batch:
            raise ConfigError(f"train.global_batch={batch} is more than the {images} images of the train split")
        self.micro_batch = run.train.micro_batch or batch // world
        if batch // world % self.micro_batch:
            raise ConfigError(
                f"train.micro_batch={self.micro_batch} does not divide the {batch // world} images of a rank "
                f"(train.global_batch={batch} over {world} ranks)"
            )
        self.images, self.world, self.global_batch, self.batch = images, world, batch, batch // world
        self.per_epoch = images // batch
        self.steps = run.train.steps or max(1, round(run.train.epochs * self.per_epoch))
        self.warmup = min(self.steps, round(run.optim.warmup_epochs * self.per_epoch))
        self.evaluate = max(1, round(run.evaluate.every * self.per_epoch))
        self.memory_format = torch.channels_last if run.train.channels_last else torch.contiguous_format

    def due(self, step: int, every: int) -> bool:
        """Whether what is done every so many steps is done after `step` finished ones; after the last, all is."""
        return step % every == 0 or step == self.steps

    def headline(self, device: torch.device, precision: str, views: int) -> str:
        """Who runs, on what, with how many negatives: the first thing that a run says."""
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        return (
            f"world size {self.world}  device {name}  precision {'float32' if precision == 'no' else precision}  "
            f"global batch {self.global_batch} ({self.batch} a rank)  "
            f"negatives per anchor {views * (self.global_batch - 1)}  images {self.images}"
        )


class Meter:
    """Losses and figures between two lines of the log, without waiting for the device at every step."""

    def __init__(self, run: Run, plan: Plan, device: torch.device) -> None:
        self._run, self._plan, self._device = run, plan, device
        self._losses: list[Tensor] = []
        self._figures: dict[str, Tensor] = {}
        self._last_loss = float("nan")
        self.start()

    def start(self) -> None:
        """Start the clock anew: what came before is not training."""
        self._began = self._asked = time.perf_counter()
        self._waited, self._timed = 0.0, 0

    def arrived(self) -> None:
        """The next batch is here; what passed since the last step was waiting for it."""
        self._waited += time.perf_counter() - self._asked

    def add(self, loss: Tensor, figures: Mapping[str, Tensor]) -> None:
        """A finished step."""
        self._losses.append(loss.detach())
        self._figures = {k: v.detach() for k, v in figures.items()}
        self._timed += 1
        self._asked = time.perf_counter()

    def read(self, step: int) -> dict[str, float]:
        """Mean loss since the last line, the last step's figures, and the speed; all ranks take part.

        Raises:
            TrainingError: where a loss was not finite.
        """
        losses = self.check(step)
        self._losses = []
        self._last_loss = losses[-1]
        figures = torch.stack([v.float().to(self._device) for v in self._figures.values()])
        means = distributed.gather(figures[None]).mean(0).tolist()
        seconds = time.perf_counter() - self._began
        speed = {
            "images_per_second": self._timed * self._plan.global_batch / seconds,
            "data_wait": self._waited / seconds,
            "memory_gib": _memory(self._device),
        }
        self.start()
        return {"loss": sum(losses) / len(losses), **dict(zip(self._figures, means, strict=True)), **speed}

    def check(self, step: int) -> list[float]:
        """Losses of the steps since the last line, means over the ranks; raises where one is not finite."""
        local = torch.stack([x.float() for x in self._losses]) if self._losses else torch.empty(0)
        by_rank = distributed.gather(local[None].to(self._device))  # (world, steps)
        losses: list[float] = by_rank.mean(0).tolist()
        first = step - len(losses) + 1
        for at, loss in enumerate(losses, first):
            if not abs(loss) < float("inf"):
                before = losses[at - first - 1] if at > first else self._last_loss
                whole = checkpoint.newest(self._run.folder / "checkpoints")
                on = f"the newest checkpoint is {whole}" if whole else "there is no checkpoint yet"
                ranks = (~by_rank[:, at - first].isfinite()).nonzero()[:, 0].tolist()
                raise TrainingError(
                    f"the loss became {loss} at step {at} on {_ranks(ranks)} (before it: {before:.6g}); {on}. "
                    f"A lower optim.lr, optim.clip_norm or train.precision=no may help."
                )
        return losses

    def state_dict(self) -> dict[str, Any]:
        """Losses that no line has shown yet."""
        return {"losses": [x.item() for x in self._losses], "last": self._last_loss}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with the losses of `state_dict`."""
        self._losses = [torch.tensor(x, device=self._device) for x in state["losses"]]
        self._last_loss = state["last"]


STOPPED = "stopped.txt"
"""In a run's folder: why its last start ended, where the same would come again."""


@contextmanager
def claimed(run: Run) -> Iterator["Claim"]:
    """The run's folder, from its making or finding to the run's end; no other job has it meanwhile.

    An error that leaves the run is told to the other ranks, and written to `stopped.txt` unless another start may do
    better: where a rank was lost, or the run was asked to stop.

    Raises:
        ConfigError: where the folder cannot be written, is in use, or holds a run that must not be gone on with.
        Lost: in place of whatever a broken connection to another rank raises.
    """
    claim = Claim()
    try:
        claim.whole = distributed.from_main(lambda: _take(run, claim))
        claim.ours = True
        yield claim
    except (Stopped, KeyboardInterrupt):
        raise
    except BaseException as error:
        if (lost := distributed.lost(error)) is not None:
            raise lost from error
        cause = f"rank {distributed.rank()}: {type(error).__name__}: {error}"
        distributed.leave(cause)
        if claim.ours:
            with contextlib.suppress(OSError):  # a full disk holds no reasons
                (run.folder / STOPPED).write_text(f"{cause}\n", encoding="utf-8")
        raise
    finally:
        if claim.lock is not None:
            claim.lock.release()


class Claim:
    """A run's folder in use."""

    whole: Path | None = None
    """the checkpoint to go on from"""
    ours: bool = False
    """whether another job has it not"""
    lock: Lock | None = None
    """of rank 0 alone"""

    def check(self) -> None:
        """Raise a TrainingError where another job has taken the folder away, in spite of the lock."""
        if self.lock is not None and self.lock.lost:
            raise TrainingError(f"the run's folder was taken by {self.lock.lost}: two jobs must not share one")


def _take(run: Run, claim: Claim) -> Path | None:
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
        _same_run(run)
    (run.folder / "config.yaml").write_text(dump(run), encoding="utf-8")
    return whole


FREE = {"train.workers", "train.device", "train.timeout", "log", "evaluate", "checkpoint", "resume", "out"}
"""What may change when a run goes on: nothing of it changes what is learned."""


def _same_run(run: Run) -> None:
    """Raise a ConfigError unless the folder's configuration decides the same training."""
    path = run.folder / "config.yaml"
    before, now = load(str(path)).model_dump(mode="json"), run.model_dump(mode="json")
    changed = [
        f"{section}.{key}: {before[section].get(key)!r} → {now[section].get(key)!r}"
        for section in now
        if isinstance(now[section], dict) and section not in FREE
        for key in now[section] | before[section]
        if before[section].get(key) != now[section].get(key) and f"{section}.{key}" not in FREE
    ]
    if before["seed"] != now["seed"]:
        changed.append(f"seed: {before['seed']} → {now['seed']}")
    if changed:
        raise ConfigError(
            f"{run.folder} holds a run with another configuration ({'; '.join(changed)}); choose another name=, "
            f"or go on with the one it has: --config {path}"
        )


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"


def _memory(device: torch.device) -> float:
    """Peak of the device's memory, or this process's share of the machine's, in GiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    resident: int = psutil.Process().memory_info().rss
    return resident / 2**30


def consequences(run: Run, world: int) -> str:
    """What follows from a configuration on so many ranks, for `--check`; opens the data and builds the model.

    Raises:
        ConfigError: as training would.
    """
    splits = open_splits(run.data)
    images = splits["train"]
    plan = Plan(run, len(images), world)
    optim.check(run.optim)
    encoder = models.build(run.model.model_copy(update={"pretrained": False}), images.channels)
    features = models.width(encoder, images.channels, run.augment.size)
    method = methods.build(run.method, features)
    anchors, references = plan.batch * method.views, plan.global_batch * method.views
    dimension = method(torch.zeros(2, features)).shape[1]
    parts = plan.batch // plan.micro_batch
    cached = (
        f"micro-batches: {parts} a rank of {plan.micro_batch} images, about 4/3 of the plain step's compute; the "
        f"gradient is the plain step's, but for BatchNorm, whose statistics are those of a micro-batch"
    )
    loss_mib = (4 * references * (2 * dimension + 6) + 4 * anchors * dimension * 2) / 2**20
    return "\n".join(
        [
            f"images: {', '.join(f'{name} {len(s)}' for name, s in splits.items())}; "
            + (f"{len(images.classes)} classes" if images.classes else "no labels"),
            f"encoder: {sum(p.numel() for p in encoder.parameters()) / 1e6:.2f} M parameters, {features} features",
            f"ranks: {world}, {plan.batch} images and {anchors} anchors each",
            f"negatives per anchor: {references - method.views}, of {references} rows in the global batch",
            *([cached] if parts > 1 else []),
            f"steps: {plan.steps}, {plan.per_epoch} an epoch, warm-up {plan.warmup}, evaluation every {plan.evaluate}",
            f"memory of the loss: {loss_mib:.3g} MiB a rank and a tile; the whole matrix would be "
            f"{4 * anchors * references / 2**20:.4g} MiB",
        ]
    )
