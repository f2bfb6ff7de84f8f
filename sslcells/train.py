"""Training, from a configuration to an exported encoder: `accelerate launch -m sslcells.train`."""

import argparse
import math
import signal
import tempfile
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from sslcells import __version__, commandline, launcher, methods, models, optim, ranks
from sslcells.augment import Augment
from sslcells.commandline import one_process
from sslcells.config import ConfigError, Run, dump, load
from sslcells.data import Batch, ImageSet, holdout, reading, sampler
from sslcells.data.describe import brief
from sslcells.data.loader import attended, read_in_parts
from sslcells.evaluation.during_training import Evaluation
from sslcells.evaluation.encode import NotFinite
from sslcells.models import files
from sslcells.plan import Plan, check_rows, consequences, open_run
from sslcells.run import checkpoint
from sslcells.run.folder import claimed, settled
from sslcells.run.interrupt import Awaited, Interrupt, Stopped
from sslcells.run.meter import Meter, Start
from sslcells.run.metrics import read_metrics
from sslcells.run.tracking import Log

T = TypeVar("T")
Watch = Callable[[str, Tensor], None]


def train(run: Run, watch: Watch = lambda station, tensor: None) -> Path:
    """Train the run to its end, or go on with it; returns its folder.

    `watch` is shown the tensor at each station of every step: `--debug` prints their shapes.

    Raises:
        ConfigError: where the configuration does not fit the data, the launch or the folder.
        DataError: where an image cannot be read.
        TrainingError: where the loss, the gradient or the weights are no longer finite.
        CheckpointError: where a checkpoint cannot be written.
        Stopped: where a signal asked for it, after the checkpoint of the last finished step.
        Lost: where another rank is gone.
    """
    with Interrupt() as interrupt:
        start = Start()
        run = settled(run, launcher.device_for(run))
        accelerator = launcher.accelerator(run)
        start.lap("imports and devices")
        splits = open_run(run)
        start.lap("data")
        plan = Plan(run, len(splits["train"]), ranks.world())
        with claimed(run, splits["train"]) as claim:
            training = Training(run, plan, splits, accelerator, watch)
            start.lap("building")
            training.begin(claim.whole, start)
            with training.writer as writer, attended(training.batches()) as batches:
                for parts in in_step(batches, (claim.check, writer.check), interrupt):
                    training.learn(parts)
                if training.step < plan.steps:
                    training.stop(interrupt.asked)
                training.finish()
    return run.folder


class Training:
    """What is trained and everything around it, at `step` finished optimizer steps."""

    def __init__(
        self, run: Run, plan: Plan, splits: Mapping[str, ImageSet], accelerator: Accelerator, watch: Watch
    ) -> None:
        self._run, self._plan, self._accelerator, self._watch = run, plan, accelerator, watch
        self._splits, self._images = splits, splits["train"]
        self._sampling = sampler.build(run.sampler, self._images, plan.global_batch, run.seed)
        self._device, world = accelerator.device, ranks.world()
        self._learner = build(run, self._images, sync_batchnorm=world > 1 and self._device.type == "cuda")
        check_rows(self._learner.backbone, self._learner.method, run, plan, self._images.channels)
        optimizer = optim.build(run.optim, self._learner, self._learner.backbone)
        self._network, self._optimizer = accelerator.prepare(self._learner, optimizer)
        self._method, self._encoder = self._learner.method, self._learner.encoder
        self._augment = Augment(run.augment, *models.normalisation(run.model, self._images.channels))
        self._method.repeated = self._sampling.repeats
        local = self._method.local
        self._local = self._augment.local(local.size, local.scale) if local else None
        self._evaluation = Evaluation(run, splits, self._augment, self._device)
        self._meter = Meter(run, plan, self._device, scaled=accelerator.scaler is not None)
        self._start: Start | None = None
        self.step = self._saved = 0

    def begin(self, whole: Path | None, start: Start) -> None:
        """Start at step 0 with the figures of the untrained encoder, or go on from a whole checkpoint."""
        run, plan = self._run, self._plan
        ranks.from_main(lambda: holdout.note(run.folder, self._splits, goes_on=whole is not None))
        if whole is not None:
            self.step, states = checkpoint.load(whole, self._learner)
            self._optimizer.load_state_dict(states["optimizer"])
            self._meter.load_state_dict(states["meter"])
            if self._accelerator.scaler is not None:
                self._accelerator.scaler.load_state_dict(states["scaler"])
        self._saved = self.step
        self._log = log = Log(run, plan.steps, self.step, self._accelerator)
        self.writer = checkpoint.Writer(run.folder / "checkpoints", run.checkpoint.keep, log.say)
        precision, negatives = self._accelerator.mixed_precision, self._method.negatives(plan.global_batch)
        log.say(f"sslcells {__version__}  {plan.headline(self._device, precision, negatives)}")
        log.say(holdout.says(self._splits, run.evaluate.holdout))
        if run.model.encoder and (warning := holdout.seen_before(self._splits, Path(run.model.encoder))):
            log.say(warning)
        log.say(f"{run.folder}: {f'goes on after step {self.step}' if self.step else f'{plan.steps} steps'}")
        log.say(brief(self._splits))
        self._start = start
        start.lap("checkpoint" if self.step else "building")
        if self.step == 0:
            log.metrics(0, 0.0, self._measured(lambda: self._evaluation.first_figures(self._learner)))
            log.pictures(0, self._evaluation.view_sheet(self._method.views) if run.evaluate.pictures else {})
            start.lap("figures of the untrained encoder")

    def batches(self) -> Generator[list[Batch], None, None]:
        """This rank's part of the global batches of the steps to come, each in its micro-batches."""
        run, plan = self._run, self._plan
        rank, world = ranks.rank(), ranks.world()
        steps = sampler.Steps(self._sampling, rank, world, start=self.step, stop=plan.steps)
        self._meter.start()
        parts, pin = plan.batch // plan.micro_batch, self._device.type == "cuda"
        return read_in_parts(self._images, steps, parts, run.train.workers, pin_memory=pin)

    def learn(self, parts: Sequence[Batch]) -> None:
        """One optimizer step on a batch in parts, with the figures, the evaluation and the checkpoint due after it."""
        run, plan, meter = self._run, self._plan, self._meter
        meter.arrived()
        for part in parts:
            self._watch("pixels", part.pixels)  # (b, C, H, W) uint8
        batch = Batch.ids(parts)
        rate = optim.learning_rate(run.optim, self.step, plan.steps, plan.warmup)
        optim.set_learning_rate(self._optimizer, rate)
        progress = self.step / plan.steps
        loss, figures = self._backward(parts, batch, progress)
        self._watch("loss", loss)  # ()
        norm = self._accelerator.clip_grad_norm_(self._network.parameters(), run.optim.clip_norm or math.inf)
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._learner.follow(progress)

        self.step = step = self.step + 1
        meter.add(loss, norm, figures)
        if self._start is not None:
            self._log.say(self._start.first_step(self._splits))
            self._start = None
        self._log.advance(step)
        if plan.due(step, run.log.every_steps):
            held = sampler.composition(batch, self._device)
            self._log.metrics(step, step / plan.per_epoch, {**meter.read(step), **held, "lr": rate})
        if plan.due(step, plan.evaluate):
            seen = self._measured(lambda: self._evaluation.figures(self._learner))
            self._log.metrics(step, step / plan.per_epoch, seen)
            meter.start()
        if plan.due(step, run.checkpoint.every_steps):
            self._save()

    def stop(self, number: int) -> NoReturn:
        """Write what a later start needs, and leave with all ranks together."""
        self._save()
        ranks.together(self.writer.wait)
        self._log.close()
        ranks.barrier()
        name, folder = signal.Signals(number).name, self._run.folder
        raise Stopped(number, f"{folder}: stopped by {name} after step {self.step}; the same command goes on")

    def finish(self) -> None:
        """The last pictures, what a classifier says of val, and the encoder on its own."""
        run, log, main = self._run, self._log, self._accelerator.is_main_process
        ranks.together(self.writer.wait)
        said, drawn = self._measured(lambda: self._evaluation.predictions(self._learner)), dict[str, Path]()
        if run.evaluate.pictures:
            rows = read_metrics(run.folder) if main else []
            drawn = self._measured(lambda: self._evaluation.pictures(self._encoder, rows))
        if main:
            if said is not None:
                said.write(run.folder, "val")
            size, channels = run.augment.size, self._images.channels
            files.export(self._encoder, run.model, channels, size, run.folder, reading(run.data, size))
        log.pictures(self.step, drawn)
        log.say(f"{run.folder}: {files.WEIGHTS}, {files.SPEC}, metrics.jsonl, plots/")
        log.close()
        ranks.barrier()

    def _backward(self, parts: Sequence[Batch], ids: Batch, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss, figures, and the gradients in the parameters: in one pass, or in micro-batches."""
        whole = ids.to(self._device)
        if len(parts) > 1:
            return cached_backward(self._accelerator, self._network, self._embed, self._method, parts, whole, progress)
        loss, figures = self._method.loss(self._embed(parts[0], 0, progress), whole, progress)
        self._accelerator.backward(loss)
        return loss, figures

    def _embed(self, part: Batch, index: int, progress: float) -> methods.Outputs:
        """Augment and embed images: the same numbers whenever the same part of the same step is asked for."""
        seed, pixels = self._run.seed, part.pixels.to(self._device, non_blocking=True)
        key: dict[str, Any] = {"seed": seed, "step": self.step, "occurrence": part.occurrence}
        crops = [self._augment(pixels, part.image, views=self._method.views, **key)]
        if self._local is not None and self._method.local is not None:
            few, first = self._method.local.views, self._method.views
            crops.append(self._local(pixels, part.image, views=few, first=first, **key))
        for x in crops:
            self._watch("views", x)  # (V·b, C, S, S) float32
        torch.manual_seed(stream(seed, self.step, ranks.rank(), index))
        crops = [x.contiguous(memory_format=self._plan.memory_format) for x in crops]
        outputs: methods.Outputs = self._network(*crops, progress=progress)
        self._watch("rows", outputs.rows)  # (V·b, D)
        return outputs

    def _measured(self, look: Callable[[], T]) -> T:
        """What is seen of a network that is sound, and the same on every rank.

        Raises:
            TrainingError: where it is not, or what it makes of images is not finite.
        """
        self._sound()
        try:
            return look()
        except NotFinite as error:
            raise self._meter.broken(f"{error} after step {self.step}") from None

    def _sound(self) -> None:
        """Raise a TrainingError where a number of this run is no longer finite; else give all ranks one network.

        Where statistics of BatchNorm are each rank's own, rank 0's count, as DDP has it at the next step.
        """
        self._meter.check(self.step)
        self._meter.check_states(self.step, self._learner, {"optimizer": self._optimizer.state_dict()})
        ranks.as_on_main(self._learner)

    def _save(self) -> None:
        """Have rank 0 begin to write the checkpoint of the finished steps, if they were sound and some are new."""
        self._sound()
        if self._accelerator.is_main_process and self.step > self._saved:
            states = {"optimizer": self._optimizer.state_dict(), "meter": self._meter.state_dict()}
            if self._accelerator.scaler is not None:
                states["scaler"] = self._accelerator.scaler.state_dict()
            self.writer.save(self.step, self._learner, states)
        self._saved = self.step


def in_step(batches: Iterator[T], checks: Sequence[Callable[[], None]], interrupt: Interrupt) -> Iterator[T]:
    """This rank's batches, until they end or any rank is asked to stop; every rank must take part in each.

    Where a check or the reading raises on one rank, every rank raises that error, which says on which. A rank that is
    asked to stop while it waits for a batch waits no longer.
    """
    while True:
        batch, failure = None, None
        try:
            for check in checks:
                check()
            with interrupt.waiting():
                batch = next(batches, None)
        except Awaited:  # the step before is the last
            pass
        except Exception as error:  # handed to every rank, and raised there
            failure = error
        verdict = ranks.largest(_FAILED if failure is not None else interrupt.asked)
        if verdict == _FAILED:
            ranks.raise_first(failure)
        if verdict:
            interrupt.asked = verdict
        if verdict or batch is None:
            return
        yield batch


_FAILED = 1000
"""above the number of any signal"""


def cached_backward(
    accelerator: Accelerator,
    network: nn.Module,
    embed: Callable[[Batch, int, float], methods.Outputs],
    method: methods.Method,
    parts: Sequence[Batch],
    batch: Batch,
    progress: float,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of a batch whose activations do not fit at once: GradCache, arXiv 2101.06983, section 3.

    Embed every part without a graph, take the loss and its gradient by the rows once, over the global batch, then embed
    every part again, with its graph, and push its rows' gradient through. The gradient is the plain step's; BatchNorm
    alone sees the statistics of a part instead of the batch (and moves its running ones twice). DDP synchronises once.
    """
    with torch.no_grad():
        apart = [embed(part, i, progress) for i, part in enumerate(parts)]
    rows = joined([x.rows for x in apart], method.views_in_all).requires_grad_()
    teacher = [x.teacher for x in apart if x.teacher is not None]
    outputs = methods.Outputs(rows, joined(teacher, method.views) if teacher else None)
    loss, figures = method.loss(outputs, batch, progress)
    accelerator.backward(loss)
    assert rows.grad is not None
    images = [len(x.rows) // method.views_in_all for x in apart]
    grads = torch.split(by_view(rows.grad, method.views_in_all), images, 1)
    for i, (part, grad) in enumerate(zip(parts, grads, strict=True)):
        with accelerator.no_sync(network) if i + 1 < len(parts) else nullcontext():
            torch.autograd.backward(embed(part, i, progress).rows, grad.flatten(0, 1))
    return loss, figures


def joined(parts: Sequence[Tensor], views: int) -> Tensor:
    """Rows (V·b, D) of each part → rows of the batch (V·B, D), view-major."""
    return torch.cat([by_view(x, views) for x in parts], 1).flatten(0, 1)


def by_view(rows: Tensor, views: int) -> Tensor:
    """(V·B, D) in view-major order → (V, B, D)."""
    return rows.view(views, -1, rows.shape[1])


def build(run: Run, images: ImageSet, sync_batchnorm: bool) -> methods.Learner:
    """Backbone and head as the configuration says, with the same first weights on every rank."""
    torch.manual_seed(run.seed)
    encoder = models.build(run.model, images.channels)
    features = models.width(encoder, images.channels, run.augment.size, config=run.model)
    if run.model.encoder is not None:
        files.start_from(encoder, run.model, images.channels)
    method = methods.build(run.method, features, images)
    if method.local:
        models.width(encoder, images.channels, method.local.size, "method.local_size", run.model)
    learner = methods.Learner(encoder, method, frozen=run.model.freeze)
    if sync_batchnorm and run.train.sync_batchnorm:
        ranks.sync_batchnorm(learner)
    if run.train.channels_last is True:
        learner.to(memory_format=torch.channels_last)
    if run.train.compile:
        learner.backbone.compile()
        if learner.teacher is not None:
            learner.teacher.backbone.compile()
    return learner


def finished(run: Run, folder: Path, images: ImageSet, device: torch.device) -> methods.Learner:
    """What a run has trained, as its newest checkpoint has it; every rank takes part.

    Raises:
        ConfigError: where the run's folder holds no whole checkpoint.
    """
    newest = ranks.from_main(lambda: checkpoint.newest(folder / "checkpoints"))
    if newest is None:
        raise ConfigError(f"{folder / 'checkpoints'} holds no whole checkpoint: what the run trained is not there")
    without = {"model": {"encoder": None, "pretrained": False}, "train": {"compile": False}}
    own = {section: getattr(run, section).model_copy(update=update) for section, update in without.items()}
    learner = build(run.model_copy(update=own), images, sync_batchnorm=False)
    checkpoint.load(newest, learner)
    return learner.to(device)


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
        train(run)


def _debug(run: Run) -> None:
    """One process, deterministic, with anomaly detection, saying the shape of what passes each station."""
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
