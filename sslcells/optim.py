"""The optimizer, from timm, and its learning rate as a function of the step."""

import math
from collections.abc import Sequence

import torch
from timm.optim import create_optimizer_v2, list_optimizers  # type: ignore[attr-defined]
from torch import nn

from sslcells.config import ConfigError, Optim, nearest


def check(config: Optim) -> None:
    """Raise a ConfigError where timm has no such optimizer."""
    names = [str(name) for name in list_optimizers()]
    if config.name not in names:
        raise ConfigError(f"optim.name={config.name!r}: timm has no such optimizer{nearest(config.name, names)}")
    if own := sorted({"layer_decay", "layer_decay_min_scale", "layer_decay_no_opt_scale"} & set(config.args)):
        raise ConfigError(f"optim.args: {own[0]}={config.args[own[0]]!r} cannot be: set optim.layer_decay")


def build(config: Optim, model: nn.Module, encoder: Sequence[Sequence[nn.Parameter]] = ()) -> torch.optim.Optimizer:
    """The optimizer of what can learn in `model`, without weight decay on biases and normalisation parameters.

    Nor on what `model.no_weight_decay()` names, where it has that method of timm's models. LARS and LAMB adapt the rate
    of what weight decay is for, also where it is 0, unless `args` say what they adapt. `encoder` holds parameters of
    the model by layer, first to last: the last layer's learning rate is `encoder_scale` times the head's, that of each
    one before it `layer_decay` times the next one's.

    Raises:
        ConfigError: for a name or argument that timm does not know.
    """
    check(config)
    try:
        optimizer = _create(config, model, config.weight_decay)
        if config.weight_decay == 0 and "always_adapt" in optimizer.defaults and "always_adapt" not in config.args:
            # timm adapts the rate of what it decays: have it part the two, as if there were decay.
            optimizer = _create(config, model, 1.0)
            for group in optimizer.param_groups:
                group["always_adapt"], group["weight_decay"] = group["weight_decay"] > 0, 0.0
    except (TypeError, ValueError, AssertionError) as error:
        raise ConfigError(f"optim.name={config.name!r} with args={config.args}: {error}") from error
    if encoder and (config.encoder_scale, config.layer_decay) != (1, 1):
        _scale(optimizer, encoder, config)
    return optimizer


def _create(config: Optim, model: nn.Module, weight_decay: float) -> torch.optim.Optimizer:
    optimizer: torch.optim.Optimizer = create_optimizer_v2(
        model, opt=config.name, lr=config.lr, weight_decay=weight_decay, momentum=config.momentum, **config.args
    )
    return optimizer


def _scale(optimizer: torch.optim.Optimizer, layers: Sequence[Sequence[nn.Parameter]], config: Optim) -> None:
    """Split every group: the head, and each layer with its own scale of the learning rate."""
    place = {id(p): number for number, layer in enumerate(layers, start=1) for p in layer}  # 0 is the head
    scales = [1.0, *(config.encoder_scale * config.layer_decay**after for after in reversed(range(len(layers))))]
    groups = []
    for group in optimizer.param_groups:
        parts = [[p for p in group["params"] if place.get(id(p), 0) == number] for number in range(len(scales))]
        pairs = zip(parts, scales, strict=True)
        groups += [{**group, "params": some, "lr_scale": scale} for some, scale in pairs if some]
    optimizer.param_groups[:] = groups


def learning_rate(config: Optim, step: int, steps: int, warmup: int) -> float:
    """At optimizer step 0..steps-1: linear up to lr over `warmup` steps, then a half cosine down to min_lr.

    The last step has min_lr itself, where the warm-up leaves it a step; the only step of a run has lr.
    """
    if step < warmup:
        return config.lr * (step + 1) / warmup
    down = steps - 1 - warmup  # steps after the first that is not of the warm-up
    done = (step - warmup) / down if down > 0 else float(warmup > 0)
    return config.min_lr + (config.lr - config.min_lr) * (1 + math.cos(math.pi * done)) / 2


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every group this rate, scaled where timm scales a group."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("lr_scale", 1.0)
