"""Training, from a configuration to an exported encoder: `accelerate launch -m sslcells.train`."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from sslcells import __version__, checkpoint, distributed, methods, models, optim
from sslcells.augment import Augment
from sslcells.config import Run
from sslcells.data import ImageSet, open_splits
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

    steps = Steps(len(images), run.train.global_batch, run.seed, rank, world, start=step, stop=plan.steps)
    meter.start()
    for batch in read(images, steps, run.train.workers, pin_memory=device.type == "cuda"):
        meter.arrived()
        here = batch.to(device)
        watch("pixels", here.pixels)  # (B, C, H, W) uint8
        optim.set_learning_rate(optimizer, lr := optim.learning_rate(run.optim, step, plan.steps, plan.warmup))
        torch.manual_seed(stream(run.seed, step, rank))

        x = augment(here.pixels, batch.image, seed=run.seed, step=step, views=views)
        watch("views", x)  # (V·B, C, S, S) float32
        rows = network(x.contiguous(memory_format=plan.memory_format))
        watch("rows", rows)  # (A, D)
        loss, figures = method.loss(rows, here)
        watch("loss", loss)  # ()
        accelerator.backward(loss)
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

    drawn = evaluation.pictures(encoder, read_metrics(run.folder))
    if accelerator.is_main_process:
        files.export(encoder, run.model, images.channels, run.augment.size, run.folder)
    log.pictures(step, drawn)
    log.say(f"{run.folder}: {files.WEIGHTS}, {files.SPEC}, metrics.jsonl, plots/")
    log.close()
    distributed.barrier()
    return run.folder


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
