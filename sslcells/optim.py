"""The optimizer, from timm, and its learning rate as a function of the step."""

import math

import torch
from timm.optim import create_optimizer_v2, list_optimizers  # type: ignore[attr-defined]
from torch import nn

from sslcells.config import ConfigError, Optim, nearest


def check(config: Optim) -> None:
    """Raise a ConfigError where timm has no such optimizer."""
    names = [str(name) for name in list_optimizers()]
    if config.name not in names:
        raise ConfigError(f"optim.name={config.name!r}: timm has no such optimizer{nearest(config.name, names)}")


def build(config: Optim, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer, without weight decay on biases and normalisation parameters.

    Raises:
        ConfigError: for a name or argument that timm does not know.
    """
    check(config)
    try:
        optimizer: torch.optim.Optimizer = create_optimizer_v2(
            model,
            opt=config.name,
            lr=config.lr,
            weight_decay=config.weight_decay,
            momentum=config.momentum,
            **config.args,
        )
    except (TypeError, ValueError, AssertionError) as error:
        raise ConfigError(f"optim.name={config.name!r} with args={config.args}: {error}") from error
    return optimizer


def learning_rate(config: Optim, step: int, steps: int, warmup: int) -> float:
    """At optimizer step 0..steps-1: linear up to lr over `warmup` steps, then a half cosine down to min_lr."""
    if step < warmup:
        return config.lr * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return config.min_lr + (config.lr - config.min_lr) * (1 + math.cos(math.pi * done)) / 2


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every group this rate, scaled where timm scales a group."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("lr_scale", 1.0)
