"""The network that a run trains: backbone, head and teacher as the configuration says, and the sizes they take."""

import copy
from collections.abc import Callable, Collection, Sequence

import torch
from torch import nn

from sslcells import methods, models, ranks, sharding
from sslcells.config import ConfigError, Model, Run
from sslcells.data import ImageSet
from sslcells.models import adapt, files, tokens, weights


def build(
    run: Run,
    images: ImageSet,
    sync_batchnorm: bool,
    resumes: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> methods.Learner:
    """Build the learner, with the same first weights on every rank; all ranks must call it.

    Where it `resumes`, the weights or the encoder that training started from are not read: a checkpoint has them all.
    `say` is told what became of each tensor of published weights, and which part of the encoder learns.

    Raises:
        ConfigError: if backbone, method, image size, weights and data do not fit each other.
    """
    torch.manual_seed(run.seed)
    encoder = models.build(run.model, images.channels)
    features = models.width(encoder, images.channels, run.augment.size, config=run.model)
    account = [] if resumes else ranks.together(lambda: _start(encoder, run.model, images.channels))
    for line in account:
        say(line)
    if run.model.freeze is True and not methods.classifies(run.method):
        raise ConfigError(
            f"model.freeze=true: nothing would be left of the training, as method.name={_name(run)} hands out the "
            f"encoder without its head. A number freezes the first layers, model.lora_rank trains adapters, and "
            f"method.name=supervised a classifier on the frozen encoder"
        )
    names = {name for name, _ in encoder.named_parameters()}
    fixed, lines = adapt.adapt(encoder, run.model)
    _check_new(encoder, names, account)
    for line in [*lines, *adapt.rates(encoder, run.optim)]:
        say(line)
    if run.model.grad_checkpointing:
        models.checkpoint_activations(encoder, run.model)
    layout = _layout(encoder, run)
    method = ranks.together(lambda: methods.build(run.method, features, images, layout))
    sharding.check(run, method.loss_parameters())
    method.seed = run.seed
    for line in method.about:
        say(line)
    if method.local:
        models.width(encoder, images.channels, method.local.size, "method.local_size", run.model)
    learner = methods.Learner(encoder, method, fixed)
    if sync_batchnorm and run.train.sync_batchnorm:
        ranks.sync_batchnorm(learner)
    if run.train.channels_last is True:
        learner.to(memory_format=torch.channels_last)
    if run.train.compile:
        for backbone in [learner.backbone] + ([learner.teacher.backbone] if learner.teacher is not None else []):
            # Where patches are hidden, the backbone's own forward pass does not run.
            for part in tokens.blocks(backbone) if isinstance(method, methods.Masked) else [backbone]:
                part.compile()
    return learner


def _check_new(encoder: nn.Module, names: Collection[str], account: Sequence[str]) -> None:
    """Raise a ConfigError where a parameter that the weights lack would keep its random first values to the end."""
    new = [line.split()[1].rstrip(":") for line in account if line.startswith("  new ")]
    learning = {name for name, parameter in encoder.named_parameters() if parameter.requires_grad}
    if stuck := [name for name in new if name in names and name not in learning]:
        raise ConfigError(
            f"model.allow_missing: the weights lack {stuck[0]}"
            + (f" and {len(stuck) - 1} more" if len(stuck) > 1 else "")
            + ", and model.freeze or model.lora_rank would keep the random first values: let it learn, or take weights "
            "that have it"
        )


def _name(run: Run) -> str:
    return str(run.method.name)  # type: ignore[attr-defined]


def _layout(encoder: nn.Module, run: Run) -> tokens.Layout | None:
    """How images are cut into patches, for a method that hides some."""
    if not methods.masks(run.method):
        return None
    layout = tokens.layout(encoder, run.augment.size)
    if layout is None:
        args = f"{{img_size: {run.augment.size}, patch_size: 4}}"
        raise ConfigError(
            f"method.name={_name(run)}: it hides patches, and model.backbone={run.model.backbone} has none; take a "
            f"Vision Transformer, such as vit_tiny_patch16_224 with model.args={args}"
        )
    return layout


def _start(encoder: nn.Module, config: Model, channels: int) -> list[str]:
    """Give the encoder the weights that the run starts from; returns what became of them."""
    if config.encoder is not None:
        files.start_from(encoder, config, channels)
    return weights.load(encoder, config, channels) if config.start is not None else []


def check_rows(
    encoder: nn.Module, method: methods.Method, run: Run, channels: int, micro_batch: int, world: int
) -> None:
    """Raise a ConfigError where a forward pass would have a single row, as BatchNorm needs two.

    It runs copies of the networks, so that no running statistic changes; the encoder is in the mode it trains in.
    """
    sizes = [run.augment.size] * (micro_batch * method.views == 1)
    if method.local is not None:
        sizes += [method.local.size] * (micro_batch * method.local.views == 1)
    for size in sizes:
        alone, head = copy.deepcopy(encoder), copy.deepcopy(method).train()
        x = torch.zeros(1, channels, size, size)
        try:
            with torch.no_grad():
                features = alone(x)
                if micro_batch * method.views_in_all == 1:
                    head(features, progress=0.0)
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            key = "train.micro_batch" if run.train.micro_batch else "train.global_batch"
            raise ConfigError(
                f"{key}={getattr(run.train, key.partition('.')[2])}: a rank's forward pass has one row, and BatchNorm "
                f"needs two; take at least {2 if run.train.micro_batch else 2 * world}"
            ) from None
