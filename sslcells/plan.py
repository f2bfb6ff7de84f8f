"""What follows from a run's configuration before its first step: splits, sizes, lengths in steps."""

from collections.abc import Mapping, Sequence

import torch

from sslcells import inputs, learner, models, optim, sharding
from sslcells.config import ConfigError, Run, check_tracker
from sslcells.data import ImageSet, open_splits, sampler
from sslcells.data.describe import describe
from sslcells.data.holdout import hold_out, limits, summary
from sslcells.data.subset import labelled_part, without_labs
from sslcells.models import depth, weights
from sslcells.standardise import standard_of


def open_run(run: Run) -> dict[str, ImageSet]:
    """The splits of a run's data set, and of train the part that it learns from; val is held out where there is none.

    Raises:
        ConfigError: if the data is not what the configuration says.
    """
    splits = leave_out(open_splits(run.data), run.train.without_labs)
    splits = hold_out(splits, run.evaluate.holdout)
    train = labelled_part(splits["train"], run.train.label_fraction, run.seed)
    if "val" in splits and splits["val"].about and len(train) < run.train.global_batch:
        raise ConfigError(
            f"train.global_batch={run.train.global_batch} is more than the {len(train)} images of the train split that "
            f"are trained on; the figures are of {splits['val'].about}: evaluate.holdout"
        )
    return splits | {"train": train}


def leave_out(splits: Mapping[str, ImageSet], labs: Sequence[str]) -> dict[str, ImageSet]:
    """The splits, but train and val without these laboratories; a val that has no others is left out.

    Raises:
        ConfigError: if train does not know them, or nothing is left of it.
    """
    left = {name: images if name == "test" else without_labs(images, labs) for name, images in splits.items()}
    if not len(left["train"]):
        raise ConfigError(f"train.without_labs={', '.join(labs)}: train has no images of other laboratories")
    return {name: images for name, images in left.items() if len(images)}


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
        self.steps = run.train.total_steps or max(1, self.in_steps(run.train.total_epochs))
        self.warmup = min(self.steps, self.in_steps(run.optim.warmup_epochs))
        self.evaluate = max(1, self.in_steps(run.evaluate.every_epochs))
        self.memory_format = torch.channels_last if run.train.channels_last is True else torch.contiguous_format

    def in_steps(self, epochs: float) -> int:
        """A number of epochs in optimizer steps, rounded."""
        return round(epochs * self.per_epoch)

    def due(self, step: int, every: int) -> bool:
        """True every `every` steps, and after the last step."""
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


def consequences(run: Run, world: int = 1) -> str:
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
    standard, started = standard_of(inputs.measured(run, splits)), list[str]()
    model, prepared = weights.resolved(run.model, images.channels)
    train = run.train.model_copy(update={"compile": False})
    run = run.model_copy(update={"model": model, "train": train})
    net = learner.build(run, images, sync_batchnorm=False, say=started.append)
    encoder, method = net.backbone, net.method
    features = models.width(encoder, images.channels, run.augment.size, config=run.model)
    if method.local:
        augment = inputs.augment(run, inputs.in_training(splits), standard)
        augment.local(method.local.size, method.local.scale)  # which not every recipe has
    learner.check_rows(encoder, method, run, images.channels, plan.micro_batch, world)
    anchors, references = plan.batch * method.views, plan.global_batch * method.views
    negatives, where = method.negatives(plan.global_batch), "the global batch" + " and the queue" * bool(method.queued)
    dimension = method(torch.zeros(2, features), progress=0.0).shape[1]
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
            *([inputs.summary(standard)] if standard is not None else []),
            f"images: {', '.join(f'{name} {len(s)}' for name, s in splits.items())}; "
            + (f"{len(images.classes)} classes" if images.classes else "no labels"),
            summary(splits, run.evaluate.holdout) + limits(splits, run.evaluate),
            *started,
            prepared,
            f"encoder: {sum(p.numel() for p in encoder.parameters()) / 1e6:.2f} M parameters, {features} features",
            f"ranks: {world}, {plan.batch} images and {anchors} anchors each",
            f"negatives per anchor: {negatives}, of {references + method.queued} rows in {where}"
            if negatives
            else "negatives: none",
            *([cached] if parts > 1 else []),
            *([sharding.describe(net, depth.blocks(encoder), world)] if run.train.parallel == "fsdp" else []),
            f"sampler: {run.sampler.kind}: {sampling.describe()}",
            f"steps: {plan.steps}, {plan.per_epoch} an epoch, warm-up {plan.warmup}, evaluation every {plan.evaluate}",
            *([of_loss] if method.negative_views is None else []),
        ]
    )
