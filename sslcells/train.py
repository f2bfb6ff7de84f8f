"""Training, from a configuration to an exported encoder: `accelerate launch -m sslcells.train`."""

import argparse
import math
import signal
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from sslcells import __version__, commandline, inputs, launcher, learner, micro_batch, optim, ranks, sharding
from sslcells.augment import Draws
from sslcells.commandline import one_process
from sslcells.config import Run, dump, load
from sslcells.data import Batch, ImageSet, holdout, listing, reading, sampler
from sslcells.data.composition import composition
from sslcells.data.describe import brief
from sslcells.data.loader import read_in_parts, with_workers
from sslcells.evaluation import drift
from sslcells.evaluation.during_training import Evaluation
from sslcells.evaluation.encode import NotFinite
from sslcells.methods import MASKS, Learner, Outputs
from sslcells.models import depth, files, weights
from sslcells.plan import Plan, consequences, open_run
from sslcells.run import checkpoint
from sslcells.run.folder import Claim, claimed, resolve_auto
from sslcells.run.interrupt import Awaited, Interrupt, Stopped
from sslcells.run.meter import Meter, Start
from sslcells.run.metrics import read_metrics
from sslcells.run.state import State
from sslcells.run.tracking import Log
from sslcells.standardise import Standard

T = TypeVar("T")
Watch = Callable[[str, Tensor], None]


def train(run: Run, watch: Watch = lambda station, tensor: None, start: Start | None = None) -> Path:
    """Train the run to its end, from its start or from its newest checkpoint; returns its folder.

    `watch` is shown the tensor at each station of every step: `--debug` prints their shapes. The time to the first step
    counts from `start`, else from this call.

    Raises:
        ConfigError: if the configuration does not fit the data, the launch or the folder.
        DataError: if an image cannot be read.
        TrainingError: if the loss, the gradient or the weights are no longer finite.
        CheckpointError: if a checkpoint cannot be written.
        Stopped: after a signal to stop, once the checkpoint of the last finished step is written.
        Lost: if another rank is gone.
    """
    with Interrupt() as interrupt:
        start = start or Start()
        run = resolve_auto(run, launcher.device_for(run))
        accelerator = launcher.accelerator(run)
        start.lap("imports and devices")
        splits = open_run(run)
        start.lap("data")
        run, prepared = _prepared(run, splits["train"].channels)
        plan = Plan(run, len(splits["train"]), ranks.world())
        with claimed(run, splits["train"]) as claim:
            _steps(run, plan, splits, accelerator, claim, interrupt, start, watch, prepared)
    return run.folder


def _prepared(run: Run, channels: int) -> tuple[Run, str]:
    """The run with values for how its images are prepared, and a line that says where they come from."""
    model, said = ranks.from_main(lambda: weights.resolved(run.model, channels))
    return run.model_copy(update={"model": model}), said


def _steps(
    run: Run,
    plan: Plan,
    splits: Mapping[str, ImageSet],
    accelerator: Accelerator,
    claim: Claim,
    interrupt: Interrupt,
    start: Start,
    watch: Watch,
    prepared: str,
) -> None:
    """Every step from the first batch to the last; then the last pictures and the export."""
    images, device, world = splits["train"], accelerator.device, ranks.world()
    if images.device_decoder is not None:
        ranks.together(partial(images.device_decoder.check, device))
    sampling = sampler.build(run.sampler, images, plan.global_batch, run.seed)
    sync, resumes, started = world > 1 and device.type == "cuda", claim.checkpoint is not None, list[str]()
    net = learner.build(run, images, sync_batchnorm=sync, resumes=resumes, say=started.append)
    method = net.method
    learner.check_rows(net.backbone, method, run, images.channels, plan.micro_batch, world)
    by_layer = depth.parameters(net.backbone, apart=run.optim.layer_decay != 1)
    built, blocks = optim.build(run.optim, net, by_layer), depth.blocks(net.backbone)
    network, optimizer, whole = sharding.prepare(accelerator, net, built, blocks)
    method.repeated = sampling.repeats
    standard = inputs.prepared(run, splits, resumes=resumes)
    augment = inputs.augment(run, inputs.in_training(splits), standard)
    augment_local = augment.local(method.local.size, method.local.scale) if method.local else None
    augment_taught = inputs.of_teacher(augment, method.frozen_teacher, inputs.in_training(splits))
    evaluation = Evaluation(run, splits, augment, device)
    meter = Meter(run, plan, device, scaled=accelerator.scaler is not None)
    state = State(net, whole, optimizer, accelerator.scaler, meter)
    start.lap("building")

    ranks.from_main(lambda: holdout.record(run.folder, splits, resumes=claim.checkpoint is not None))
    if claim.checkpoint is not None:
        state.load(claim.checkpoint)
    log = Log(run, plan.steps, state.step, accelerator)
    writer = checkpoint.Writer(run.folder / "checkpoints", run.checkpoint.keep, log.say)
    state.meter.before_naming = writer.join
    _introduce(log, run, plan, splits, state, accelerator, standard)
    for line in [*started, *([prepared] if run.model.start or run.model.encoder else [])]:
        log.say(line)
    for line in drift.lost(run.folder, state.step) if run.model.adapts else []:
        log.say(line)
    start.lap("checkpoint" if state.step else "building")
    if state.step == 0:
        log.metrics(0, 0.0, _measured(state, evaluation.first_figures))
        log.pictures(0, evaluation.view_sheet(method.views) if run.evaluate.pictures else {})
        start.lap("figures before training")

    def views(part: Batch) -> list[Tensor]:
        """Augmented views on the device, the same for the same image and step: (V·b, C, S, S).

        Then the local ones, and those for a frozen teacher.
        """
        pixels = part.pixels.to(device, non_blocking=True)
        key: dict[str, Any] = {"seed": run.seed, "step": state.step, "occurrence": part.occurrence, "lab": part.lab}
        crops = [augment(pixels, part.image, views=method.views, **key)]
        if augment_local is not None and method.local is not None:
            crops.append(augment_local(pixels, part.image, views=method.local.views, first=method.views, **key))
        if augment_taught is not None:
            crops.append(augment_taught(pixels, part.image, views=method.views, **key))
        return [x.contiguous(memory_format=plan.memory_format) for x in crops]

    def embed(part: Batch, index: int) -> Outputs:
        """Augment and embed one micro-batch; the same part of the same step always gives the same numbers."""
        crops = views(part)
        for x in crops:
            watch("views", x)
        torch.manual_seed(stream(run.seed, state.step, ranks.rank(), index))
        hidden = Draws(run.seed, state.step, part.image, method.views, MASKS, part.occurrence)
        outputs: Outputs = network(*crops, progress=state.step / plan.steps, draws=hidden)
        watch("rows", outputs.rows)  # (V·b, D)
        return outputs

    indices = sampler.Steps(sampling, ranks.rank(), world, start=state.step, stop=plan.steps)
    pieces, pin, first = plan.batch // plan.micro_batch, device.type == "cuda", state.step
    meter.start()
    ahead = read_in_parts(images, indices, pieces, run.train.workers, pin_memory=pin, device=device)
    with writer, with_workers(ahead) as batches:
        for parts in in_step(batches, (claim.check, writer.check), interrupt):  # read
            meter.arrived()
            for part in parts:
                watch("pixels", part.pixels)  # (b, C, H, W) uint8
            ids, progress = Batch.ids(parts), state.step / plan.steps
            rate = optim.learning_rate(run.optim, state.step, plan.steps, plan.warmup)
            optim.set_learning_rate(optimizer, rate)
            batch = ids.to(device)
            method.figures = plan.due(state.step + 1, run.log.every_steps)
            if len(parts) == 1:
                outputs = embed(parts[0], 0)  # augment, embed
                loss, figures = method.loss(outputs, batch, progress)  # loss
                accelerator.backward(loss)  # backward
            else:
                loss, figures = micro_batch.backward(accelerator, network, embed, method, parts, batch, progress)
            watch("loss", loss)  # ()
            most = run.optim.clip_norm or math.inf
            norm = sharding.full(accelerator.clip_grad_norm_(network.parameters(), most))  # clip
            optimizer.step()  # step
            optimizer.zero_grad()
            net.follow(progress)  # the teacher follows

            state.step = step = state.step + 1
            epoch = step / plan.per_epoch
            meter.add(loss, norm, figures)
            log.advance(step)
            if step == first + 1:
                log.say(start.first_step(splits))
            if plan.due(step, run.log.every_steps):  # log
                log.metrics(step, epoch, {**meter.read(step), **composition(ids, device), "lr": rate})
            if plan.due(step, plan.evaluate):  # evaluate
                log.metrics(step, epoch, _measured(state, evaluation.figures))
                _warn(log, run)
                meter.start()
            if plan.due(step, run.checkpoint.every_steps):  # save
                state.save(writer)
        if state.step < plan.steps:
            _stop(run, state, writer, log, interrupt.received)
        _finish(run, splits, state, writer, log, evaluation, standard)


def _introduce(
    log: Log,
    run: Run,
    plan: Plan,
    splits: Mapping[str, ImageSet],
    state: State,
    accelerator: Accelerator,
    standard: Standard | None,
) -> None:
    """The first lines of the log: ranks, device, folder and data."""
    negatives = state.learner.method.negatives(plan.global_batch)
    log.say(f"sslcells {__version__}  {plan.headline(accelerator.device, accelerator.mixed_precision, negatives)}")
    log.say(holdout.summary(splits, run.evaluate.holdout) + holdout.limits(splits, run.evaluate))
    if run.model.encoder and (warning := holdout.overlap_warning(splits, Path(run.model.encoder))):
        log.say(warning)
    teacher = state.learner.method.frozen_teacher
    if teacher is not None and "val" in splits:
        for line in listing.warning(teacher.name, teacher.folder, splits["val"], "val"):
            log.say(line)
    log.say(f"{run.folder}: {f'resuming after step {state.step}' if state.step else f'{plan.steps} steps'}")
    log.say(brief(splits))
    if standard is not None:
        log.say(inputs.summary(standard))


def _measured(state: State, compute: Callable[[Learner], T]) -> T:
    """Compute figures of the whole learner after checking that it is finite; every rank then has the same network.

    Raises:
        TrainingError: if a weight or a feature is not finite.
    """
    state.check()
    try:
        with state.whole.gathered() as net:
            return compute(net)
    except NotFinite as error:
        raise state.meter.divergence(f"{error} after step {state.step}") from None


def _warn(log: Log, run: Run) -> None:
    """Say so where an encoder that training started from has just become worse than it was."""
    if run.model.adapts and ranks.rank() == 0 and (warning := drift.fallen(read_metrics(run.folder), newly=True)):
        log.say(warning)


def _stop(run: Run, state: State, writer: checkpoint.Writer, log: Log, number: int) -> NoReturn:
    """Write a checkpoint, then raise Stopped on all ranks together."""
    state.save(writer)
    ranks.together(writer.wait)
    log.close()
    ranks.barrier()
    name = signal.Signals(number).name
    raise Stopped(number, f"{run.folder}: stopped by {name} after step {state.step}; the same command resumes it")


def _finish(
    run: Run,
    splits: Mapping[str, ImageSet],
    state: State,
    writer: checkpoint.Writer,
    log: Log,
    evaluation: Evaluation,
    standard: Standard | None,
) -> None:
    """The last pictures, a classifier's predictions of val, and the encoder on its own."""
    main = ranks.rank() == 0
    ranks.together(writer.wait)
    predictions, drawn = _measured(state, evaluation.predictions), dict[str, Path]()
    if run.evaluate.pictures:
        rows = read_metrics(run.folder) if main else []
        drawn = _measured(state, lambda net: evaluation.pictures(net.encoder, rows) | evaluation.reconstructions(net))
    if main and predictions is not None:
        predictions.write(run.folder, "val")
    size, channels = run.augment.size, splits["train"].channels
    spec = None if standard is None else standard.spec
    with state.whole.gathered() as net:
        if main:
            files.export(net.encoder, run.model, channels, size, run.folder, reading(run.data, size), spec)
    log.pictures(state.step, drawn)
    log.say(f"{run.folder}: {files.WEIGHTS}, {files.SPEC}, metrics.jsonl, plots/")
    log.close()
    ranks.barrier()


def in_step(batches: Iterator[T], checks: Sequence[Callable[[], None]], interrupt: Interrupt) -> Iterator[T]:
    """This rank's batches, until they end or a signal asks any rank to stop; every rank must call this.

    If a check or the reading fails on one rank, every rank raises that error, which names the rank. A signal also ends
    the wait for a batch.
    """
    while True:
        batch, failure = None, None
        try:
            for check in checks:
                check()
            with interrupt.waiting():
                batch = next(batches, None)
        except Awaited:  # the previous step is the last
            pass
        except Exception as error:  # handed to every rank, and raised there
            failure = error
        verdict = ranks.largest(_FAILED if failure is not None else interrupt.received)
        if verdict == _FAILED:
            ranks.raise_first(failure)
        if verdict:
            interrupt.received = verdict
        if verdict or batch is None:
            return
        yield batch


_FAILED = 1000
"""above the number of any signal"""


def stream(*numbers: int) -> int:
    """A seed for the network's own randomness (dropout, drop path) at a step of a rank, so that it can be replayed."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


DEBUG = {
    "name": "debug",
    "train": {"total_steps": 5, "workers": 0, "compile": False, "deterministic": "warn"},
    "log": {"every_steps": 1, "tracker": "none"},
}
"""What --debug changes: few steps, one process, nothing in the background."""


def command(args: argparse.Namespace) -> None:
    """`sslcells train`."""
    overrides = list(args.overrides)
    if args.debug:
        overrides = [*_dotted(DEBUG), f"out={tempfile.mkdtemp(prefix='sslcells-')}", *overrides]
    run = load(args.config, overrides)
    if args.check:
        launcher.check_numerics()
        report = f"{dump(run)}\n{consequences(run, launcher.launched_world())}"
        print(report if launcher.launched_rank() == 0 else "", end="")
    elif args.debug:
        _debug(run)
    else:
        train(run, start=Start(of_process=True))


def _debug(run: Run) -> None:
    """Train in one process, deterministic, with anomaly detection; print the shape of the tensor at each station."""
    one_process("--debug")

    def watch(station: str, x: Tensor) -> None:
        low, high = x.min().item(), x.max().item()
        print(f"  {station:8} {tuple(x.shape)!s:22} {x.dtype} on {x.device}, {low:.4g} to {high:.4g}")

    with torch.autograd.set_detect_anomaly(True):
        train(run, watch)


def _dotted(tree: Mapping[str, object], prefix: str = "") -> list[str]:
    lines: list[str] = []
    for key, value in tree.items():
        lines += _dotted(value, f"{prefix}{key}.") if isinstance(value, Mapping) else [f"{prefix}{key}={value}"]
    return lines


if __name__ == "__main__":
    raise SystemExit(commandline.run("train", command))
