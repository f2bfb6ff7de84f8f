"""Training, from a configuration to an exported encoder: `accelerate launch -m sslcells.train`."""

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from sslcells import __version__, checkpoint, distributed, methods, models, optim
from sslcells.augment import Augment
from sslcells.config import Run
from sslcells.data import Batch, ImageSet, open_splits
from sslcells.data.loader import Steps, read
from sslcells.evaluation import Evaluation
from sslcells.models import files
from sslcells.plan import Meter, Plan, start_folder
from sslcells.tracking import Log, read_metrics

Watch = Callable[[str, Tensor], None]


def train(run: Run, watch: Watch = lambda station, tensor: None) -> Path:
    """Train the run to its end, or go on with it; returns its folder.

    `watch` is shown the tensor at each station of every step: `--debug` prints their shapes.

    Raises:
        ConfigError: where the configuration does not fit the data, the launch or the folder.
        DataError: where an image cannot be read.
        TrainingError: where the loss is no longer a number.
    """
    accelerator = distributed.accelerator(run)
    device, rank, world = accelerator.device, distributed.rank(), distributed.world()
    splits = open_splits(run.data)
    images = splits["train"]
    plan = Plan(run, len(images), world)
    whole = distributed.from_main(lambda: start_folder(run))

    learner = build(run, images, sync_batchnorm=world > 1 and device.type == "cuda")
    network, optimizer = accelerator.prepare(learner, optim.build(run.optim, learner))
    encoder, method, views = learner.backbone, learner.method, learner.method.views
    augment = Augment(run.augment, *models.normalisation(run.model, images.channels))
    evaluation = Evaluation(run, splits, augment, device)
    meter, step = Meter(run, plan, device), 0
    if whole is not None:
        step, states = checkpoint.load(whole, learner)
        optimizer.load_state_dict(states["optimizer"])
        meter.load_state_dict(states["meter"])
        if accelerator.scaler is not None:
            accelerator.scaler.load_state_dict(states["scaler"])

    log = Log(run, plan.steps, step, accelerator)
    log.say(f"sslcells {__version__}  {plan.headline(device, accelerator.mixed_precision, views)}")
    log.say(f"{run.folder}: goes on after step {step}" if step else f"{run.folder}: {plan.steps} steps")
    if step == 0:
        log.metrics(step, 0.0, evaluation.figures(encoder))
        log.pictures(step, evaluation.view_sheet(views))

    def rows_of(part: Batch, index: int) -> Tensor:
        """Augment and embed images: the same numbers whenever the same part of the same step is asked for."""
        x = augment(part.pixels.to(device, non_blocking=True), part.image, seed=run.seed, step=step, views=views)
        watch("views", x)  # (V·b, C, S, S) float32
        torch.manual_seed(stream(run.seed, step, rank, index))
        rows: Tensor = network(x.contiguous(memory_format=plan.memory_format))
        watch("rows", rows)  # (V·b, D)
        return rows

    steps = Steps(len(images), run.train.global_batch, run.seed, rank, world, start=step, stop=plan.steps)
    meter.start()
    for batch in read(images, steps, run.train.workers, pin_memory=device.type == "cuda"):
        meter.arrived()
        watch("pixels", batch.pixels)  # (B, C, H, W) uint8
        optim.set_learning_rate(optimizer, lr := optim.learning_rate(run.optim, step, plan.steps, plan.warmup))
        parts = batch.split(plan.micro_batch)
        if len(parts) == 1:
            loss, figures = method.loss(rows_of(batch, 0), batch.to(device))
            accelerator.backward(loss)
        else:
            loss, figures = cached_backward(accelerator, network, rows_of, method, parts, batch.to(device))
        watch("loss", loss)  # ()
        norm = accelerator.clip_grad_norm_(network.parameters(), run.optim.clip_norm or math.inf)
        optimizer.step()
        optimizer.zero_grad()

        step += 1
        meter.add(loss, {"gradient_norm": norm, **figures})
        log.advance(step)
        if plan.due(step, run.log.every):
            log.metrics(step, step / plan.per_epoch, {**meter.read(step), "lr": lr})
        if plan.due(step, plan.evaluate):
            log.metrics(step, step / plan.per_epoch, evaluation.figures(encoder))
            meter.start()
        if plan.due(step, run.checkpoint.every):
            meter.check(step)
            save(run, step, learner, optimizer, meter, accelerator)

    drawn = evaluation.pictures(encoder, read_metrics(run.folder) if accelerator.is_main_process else [])
    if accelerator.is_main_process:
        files.export(encoder, run.model, images.channels, run.augment.size, run.folder)
    log.pictures(step, drawn)
    log.say(f"{run.folder}: {files.WEIGHTS}, {files.SPEC}, metrics.jsonl, plots/")
    log.close()
    distributed.barrier()
    return run.folder


def cached_backward(
    accelerator: Accelerator,
    network: nn.Module,
    rows_of: Callable[[Batch, int], Tensor],
    method: methods.Method,
    parts: Sequence[Batch],
    batch: Batch,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of a batch whose activations do not fit at once: GradCache, arXiv 2101.06983, section 3.

    Embed every part without a graph, take the loss and its gradient by the rows once, over the global batch, then embed
    every part again, with its graph, and push its rows' gradient through. The gradient is the plain step's; BatchNorm
    alone sees the statistics of a part instead of the batch (and moves its running ones twice). DDP synchronises once.
    """
    with torch.no_grad():
        apart = [by_view(rows_of(part, i), method.views) for i, part in enumerate(parts)]  # (V, b, D) each
    rows = torch.cat(apart, 1).flatten(0, 1).requires_grad_()  # (V·B, D), view-major
    loss, figures = method.loss(rows, batch)
    accelerator.backward(loss)
    assert rows.grad is not None
    grads = torch.split(by_view(rows.grad, method.views), [x.shape[1] for x in apart], 1)
    for i, (part, grad) in enumerate(zip(parts, grads, strict=True)):
        with accelerator.no_sync(network) if i + 1 < len(parts) else nullcontext():
            torch.autograd.backward(rows_of(part, i), grad.flatten(0, 1))
    return loss, figures


def by_view(rows: Tensor, views: int) -> Tensor:
    """(V·B, D) in view-major order → (V, B, D)."""
    return rows.view(views, -1, rows.shape[1])


def build(run: Run, images: ImageSet, sync_batchnorm: bool) -> methods.Learner:
    """Backbone and head as the configuration says, with the same first weights on every rank."""
    torch.manual_seed(run.seed)
    encoder = models.build(run.model, images.channels)
    features = models.width(encoder, images.channels, run.augment.size)
    learner = methods.Learner(encoder, methods.build(run.method, features))
    if sync_batchnorm and run.train.sync_batchnorm:
        learner.backbone = distributed.sync_batchnorm(learner.backbone)
        learner.method.head = distributed.sync_batchnorm(learner.method.head)
    if run.train.channels_last:
        learner.to(memory_format=torch.channels_last)
    if run.train.compile:
        learner.backbone.compile()
    return learner


def save(
    run: Run,
    step: int,
    learner: methods.Learner,
    optimizer: torch.optim.Optimizer,
    meter: Meter,
    accelerator: Accelerator,
) -> None:
    """Write the checkpoint of `step` finished steps; rank 0 writes, the others wait for it."""
    if accelerator.is_main_process:
        states = {"optimizer": optimizer.state_dict(), "meter": meter.state_dict()}
        if accelerator.scaler is not None:
            states["scaler"] = accelerator.scaler.state_dict()
        checkpoint.save(run.folder / "checkpoints", step, learner, states, run.checkpoint.keep)
    distributed.barrier()


def stream(*numbers: int) -> int:
    """A seed for the network's own randomness (dropout, drop path) at a step of a rank, so that it can be replayed."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


if __name__ == "__main__":
    from sslcells.cli import main

    raise SystemExit(main("train"))
