"""What follows from a run's configuration before and between its steps: sizes, lengths, the meter."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

import psutil
import torch
from torch import Tensor

from sslcells import checkpoint, methods, models, optim, ranks
from sslcells.config import ConfigError, Run
from sslcells.data import ImageSet, open_splits, sampler
from sslcells.data.describe import describe
from sslcells.data.holdout import hold_out, says
from sslcells.data.subset import labelled_part
from sslcells.errors import UserError


class TrainingError(UserError):
    """Training cannot go on; the message says why, and from where it can be taken up."""


def open_run(run: Run) -> dict[str, ImageSet]:
    """The splits of a run's data set, and of train the part that it learns from; val is held out where there is none.

    Raises:
        ConfigError: where the data is not what the configuration says.
    """
    splits = hold_out(open_splits(run.data), run.evaluate.holdout)
    train = labelled_part(splits["train"], run.train.label_fraction, run.seed)
    if "val" in splits and splits["val"].about and len(train) < run.train.global_batch:
        raise ConfigError(
            f"train.global_batch={run.train.global_batch} is more than the {len(train)} images of the train split that "
            f"are trained on; the figures are {splits['val'].about}: evaluate.holdout"
        )
    return splits | {"train": train}


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

    def headline(self, device: torch.device, precision: str, negatives: int) -> str:
        """Who runs, on what, with how many negatives a row: the first thing that a run says."""
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        against = f"negatives per anchor {negatives}  " if negatives else ""
        return (
            f"world size {self.world}  device {name}  precision {'float32' if precision == 'no' else precision}  "
            f"threads {torch.get_num_threads()}  "
            f"global batch {self.global_batch} ({self.batch} a rank)  "
            f"{against}images {self.images}"
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
        """Losses of the steps since the last line, means over the ranks; raises where one is not finite."""
        local = torch.stack([x.float() for x in self._losses]) if self._losses else torch.empty(0)
        by_rank = ranks.gather(local[None].to(self._device))  # (world, steps)
        losses: list[float] = by_rank.mean(0).tolist()
        first = step - len(losses) + 1
        for at, loss in enumerate(losses, first):
            if not abs(loss) < float("inf"):
                before = losses[at - first - 1] if at > first else self._last_loss
                whole = checkpoint.newest(self._run.folder / "checkpoints")
                on = f"the newest checkpoint is {whole}" if whole else "there is no checkpoint yet"
                bad = (~by_rank[:, at - first].isfinite()).nonzero()[:, 0].tolist()
                raise TrainingError(
                    f"the loss became {loss} at step {at} on {_ranks(bad)} (before it: {before:.6g}); {on}. "
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


def _ranks(numbers: Sequence[int]) -> str:
    return f"rank {numbers[0]}" if len(numbers) == 1 else f"ranks {', '.join(map(str, numbers))}"


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
    splits = open_run(run)
    images = splits["train"]
    plan = Plan(run, len(images), world)
    sampling = sampler.build(run.sampler, images, plan.global_batch, run.seed)
    optim.check(run.optim)
    encoder = models.build(run.model.model_copy(update={"pretrained": False}), images.channels)
    features = models.width(encoder, images.channels, run.augment.size)
    method = methods.build(run.method, features, images)
    if method.local:
        models.width(encoder, images.channels, method.local.size, "method.local_size")
    anchors, references = plan.batch * method.views, plan.global_batch * method.views
    negatives, where = method.negatives(plan.global_batch), "the global batch" + " and the queue" * bool(method.queued)
    dimension = method(torch.zeros(2, features)).shape[1]
    parts = plan.batch // plan.micro_batch
    cached = (
        f"micro-batches: {parts} a rank of {plan.micro_batch} images, about 4/3 of the plain step's compute; the "
        f"gradient is the plain step's, but for BatchNorm, whose statistics are those of a micro-batch"
    )
    loss_mib = (4 * references * (2 * dimension + 6) + 4 * anchors * dimension * 2) / 2**20
    of_loss = (
        f"memory of the loss: {loss_mib:.3g} MiB a rank and a tile; the whole matrix would be "
        f"{4 * anchors * references / 2**20:.4g} MiB"
    )
    return "\n".join(
        [
            describe(splits),
            f"images: {', '.join(f'{name} {len(s)}' for name, s in splits.items())}; "
            + (f"{len(images.classes)} classes" if images.classes else "no labels"),
            says(splits, run.evaluate.holdout),
            f"encoder: {sum(p.numel() for p in encoder.parameters()) / 1e6:.2f} M parameters, {features} features",
            f"ranks: {world}, {plan.batch} images and {anchors} anchors each",
            f"negatives per anchor: {negatives}, of {references + method.queued} rows in {where}"
            if negatives
            else "negatives: none",
            *([cached] if parts > 1 else []),
            f"sampler: {run.sampler.kind}: {sampling.describe()}",
            f"steps: {plan.steps}, {plan.per_epoch} an epoch, warm-up {plan.warmup}, evaluation every {plan.evaluate}",
            *([of_loss] if method.negative_views is None else []),
        ]
    )
