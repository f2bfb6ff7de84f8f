"""What follows from a run's configuration before and between its steps: sizes, lengths, the meter."""

import copy
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from sslcells import checkpoint, methods, models, optim, ranks
from sslcells.augment import Augment
from sslcells.config import ConfigError, Run, check_tracker
from sslcells.data import ImageSet, open_splits, sampler
from sslcells.data.describe import describe
from sslcells.data.holdout import hold_out, says
from sslcells.data.subset import labelled_part
from sslcells.errors import UserError
from sslcells.models import files

SKIPPED = 40
"""Steps in a row that a loss scaler may leave out: as many halvings take it from 2¹⁶ to float16's smallest number."""


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


class Start:
    """What the time between a process's start and its first step went into."""

    def __init__(self) -> None:
        self._laps: dict[str, float] = {}
        self._began = self._last = psutil.Process().create_time()

    def lap(self, name: str) -> None:
        """What passed since the last was this."""
        now = time.time()
        self._laps[name] = self._laps.get(name, 0.0) + now - self._last
        self._last = now

    def first_step(self, splits: Mapping[str, ImageSet]) -> str:
        """A line for the log, when the first step is done."""
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
        self.memory_format = torch.channels_last if run.train.channels_last is True else torch.contiguous_format

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
    """Losses and figures between two lines of the log, without waiting for the device at every step.

    And the watch over the run: a loss, a gradient norm or a weight that is no number ends it. Where a loss scaler takes
    part (fp16) it leaves out the steps whose gradients are too large for the format, and halves its scale: a norm that
    is not finite is an error only when SKIPPED steps in a row had one.
    """

    def __init__(self, run: Run, plan: Plan, device: torch.device, scaled: bool = False) -> None:
        self._run, self._plan, self._device = run, plan, device
        self._losses: list[Tensor] = []
        self._norms: list[Tensor] = []
        self._means: list[float] = []
        self._figures: dict[str, Tensor] = {}
        self._last_loss = float("nan")
        self._most_skipped, self._skipped = SKIPPED if scaled else 0, 0
        self.start()

    def start(self) -> None:
        """Start the clock anew: what came before is not training."""
        self._began = self._asked = time.perf_counter()
        self._waited, self._timed = 0.0, 0

    def arrived(self) -> None:
        """The next batch is here; what passed since the last step was waiting for it."""
        self._waited += time.perf_counter() - self._asked

    def add(self, loss: Tensor, norm: Tensor, figures: Mapping[str, Tensor]) -> None:
        """A finished step: its loss on this rank, the norm of its gradient, and further figures."""
        self._losses.append(loss.detach())
        self._norms.append(norm.detach())
        self._figures = {"gradient_norm": norm.detach(), **{k: v.detach() for k, v in figures.items()}}
        self._timed += 1
        self._asked = time.perf_counter()

    def read(self, step: int) -> dict[str, float]:
        """Mean loss since the last line, the last step's figures, and the speed; all ranks take part.

        Raises:
            TrainingError: where a loss or a norm was not finite.
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
        """Losses of the steps since the last line, means over the ranks; raises where one, or a norm, is not finite."""
        new = [x.float().to(self._device) for pair in self._new() for x in pair]
        local = torch.stack(new).view(-1, 2) if new else torch.empty(0, 2, device=self._device)
        by_rank = ranks.gather(local[None])  # (world, new steps, 2)
        first = step - len(local) + 1
        for at, (loss, norm) in enumerate(by_rank.mean(0).tolist(), first):
            if not math.isfinite(loss):
                bad = (~by_rank[:, at - first, 0].isfinite()).nonzero()[:, 0].tolist()
                raise self.broken(f"the loss became {loss} at step {at} on {_ranks(bad)}{self._before()}")
            self._means.append(loss)
            self._skipped = 0 if math.isfinite(norm) else self._skipped + 1
            if self._skipped > self._most_skipped:
                bad = (~by_rank[:, at - first, 1].isfinite()).nonzero()[:, 0].tolist()
                since = f", as at the {self._skipped - 1} before it," if self._skipped > 1 else ""
                raise self.broken(
                    f"the norm of the gradient became {norm} at step {at}{since} on {_ranks(bad)}; the loss there "
                    f"was {loss:.6g}"
                )
        return self._means

    def check_states(self, step: int, model: nn.Module, states: Mapping[str, Any]) -> None:
        """Raise a TrainingError where a weight, or a state of the optimizer, is no longer finite on any rank."""
        bad = ranks.all_ranks(checkpoint.not_finite(model, states))
        if any(bad):
            first = next(filter(None, bad))
            more = f" and {len(first) - 1} more" if len(first) > 1 else ""
            on = _ranks([rank for rank, names in enumerate(bad) if names])
            raise self.broken(
                f"the weights are no longer finite after step {step} on {on}: {first[0]}{more}{self._before()}"
            )

    def broken(self, what: str) -> TrainingError:
        """The error of a run that has broken down: what was seen, where it can go on from, and what may help."""
        whole = checkpoint.newest(self._run.folder / "checkpoints")
        on = f"the newest checkpoint, before that, is {whole}" if whole else "there is no checkpoint yet"
        return TrainingError(f"{what}; {on}. A lower optim.lr, optim.clip_norm or train.precision=no may help.")

    def state_dict(self) -> dict[str, Any]:
        """Losses that no line has shown yet, means over the ranks; after `check`."""
        assert not self._losses
        return {"means": list(self._means), "last": self._last_loss, "skipped": self._skipped}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with the losses of `state_dict`, on any number of ranks."""
        self._means, self._skipped = list(state.get("means", ())), state.get("skipped", 0)
        self._last_loss = state["last"]

    def _new(self) -> list[tuple[Tensor, Tensor]]:
        """Loss and norm of each step that no rank has told the others of."""
        new = list(zip(self._losses, self._norms, strict=True))
        self._losses, self._norms = [], []
        return new

    def _before(self) -> str:
        before = self._means[-1] if self._means else self._last_loss
        return f" (before it: {before:.6g})"


def _ranks(numbers: Sequence[int]) -> str:
    return f"rank {numbers[0]}" if len(numbers) == 1 else f"ranks {', '.join(map(str, numbers))}"


def _memory(device: torch.device) -> float:
    """Peak of the device's memory, or this process's share of the machine's, in GiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    resident: int = psutil.Process().memory_info().rss
    return resident / 2**30


def check_rows(encoder: nn.Module, method: methods.Method, run: Run, plan: Plan, channels: int) -> None:
    """Raise a ConfigError where a forward pass has a single row of something, and BatchNorm needs two.

    Asked of copies, so that nothing moves; where there are more rows it need not be asked.
    """
    sizes = [run.augment.size] * (plan.micro_batch * method.views == 1)
    if method.local is not None:
        sizes += [method.local.size] * (plan.micro_batch * method.local.views == 1)
    for size in sizes:
        alone, head = copy.deepcopy(encoder).train(not run.model.freeze), copy.deepcopy(method).train()
        x = torch.zeros(1, channels, size, size)
        try:
            with torch.no_grad():
                features = alone(x)
                if plan.micro_batch * method.views_in_all == 1:
                    head(features)
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            key = "train.micro_batch" if run.train.micro_batch else "train.global_batch"
            raise ConfigError(
                f"{key}={getattr(run.train, key.partition('.')[2])}: a rank's forward pass has one row, and BatchNorm "
                f"needs two; take at least {2 if run.train.micro_batch else 2 * plan.world}"
            ) from None


def consequences(run: Run, world: int) -> str:
    """What follows from a configuration on so many ranks, for `--check`; opens the data and builds the model.

    Raises:
        ConfigError: as training would.
    """
    check_tracker(run.log)
    splits = open_run(run)
    images = splits["train"]
    plan = Plan(run, len(images), world)
    sampling = sampler.build(run.sampler, images, plan.global_batch, run.seed)
    optim.check(run.optim)
    encoder = models.build(run.model.model_copy(update={"pretrained": False}), images.channels)
    features = models.width(encoder, images.channels, run.augment.size, config=run.model)
    if run.model.encoder is not None:
        files.start_from(encoder, run.model, images.channels)
    method = methods.build(run.method, features, images)
    if method.local:
        models.width(encoder, images.channels, method.local.size, "method.local_size", run.model)
        augment = Augment(run.augment, *models.normalisation(run.model, images.channels))
        augment.local(method.local.size, method.local.scale)  # which not every recipe has
    check_rows(encoder, method, run, plan, images.channels)
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
