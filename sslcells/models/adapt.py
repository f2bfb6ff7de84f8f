"""Which part of a backbone learns: all of it, all but its first layers, adapters alone, or nothing."""

from typing import NamedTuple

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from sslcells.config import ConfigError, Model, Optim
from sslcells.models import depth, lora


class Adapted(NamedTuple):
    """What of a backbone stays as it is."""

    fixed: tuple[str, ...]
    """modules that stay in eval mode: those of frozen layers, and BatchNorm beside adapters; "" is the backbone"""
    said: list[str]
    """what learns, in lines; empty if everything does"""


def adapt(encoder: nn.Module, config: Model) -> Adapted:
    """Freeze what `freeze` names, and add the adapters of `lora_rank`; features stay as they are.

    Raises:
        ConfigError: if the backbone has not so many layers, or no layer for adapters.
    """
    if config.freeze is True:
        encoder.requires_grad_(False)
        return Adapted(("",), ["model.freeze: the encoder is fixed, in eval mode; only the head learns"])
    frozen, said = set[str](), list[str]()
    fixed: tuple[str, ...] = ()
    if config.freeze is not False:
        frozen, line = _first(encoder, config.freeze)
        fixed = depth.modules_within(encoder, frozen)
        for name, parameter in encoder.named_parameters():
            parameter.requires_grad_(name not in frozen)
        said.append(line)
    if config.lora_rank is not None:
        total = sum(p.numel() for p in encoder.parameters())
        names = lora.add(encoder, config.lora_rank, config.lora_scale, config.lora_layers, frozen)
        norms = [n for n, m in encoder.named_modules() if isinstance(m, _BatchNorm)]
        fixed += tuple(n for n in norms if not any(n.startswith(f"{outer}.") for outer in fixed))
        said.append(
            f"LoRA: adapters of {len(names)} linear layers learn, {names[0]} to {names[-1]}, with rank "
            f"{config.lora_rank} and scale {config.lora_scale:g}: {learning(encoder):,} numbers; "
            f"the encoder's {total:,} are fixed"
        )
    elif said:
        total = sum(p.numel() for p in encoder.parameters())
        said[-1] += f"; {learning(encoder):,} of its {total:,} numbers learn"
    return Adapted(fixed, said)


def learning(module: nn.Module) -> int:
    """How many numbers of a module learn."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def _first(encoder: nn.Module, freeze: float) -> tuple[set[str], str]:
    """The names of what is in the first layers, of which `freeze` gives the number or the fraction; and a line."""
    found = depth.layers(encoder)
    count = freeze if isinstance(freeze, int) else round(freeze * len(found))
    names = [depth.name_of(layer) for layer in found]
    if not 0 < count < len(found):
        raise ConfigError(
            f"model.freeze={freeze} is {count} of the {len(found)} layers of the backbone, {names[0]} to {names[-1]}; "
            f"take 1 to {len(found) - 1} layers, or true for all"
        )
    which = names[0] if count == 1 else f"{names[0]} to {names[count - 1]}"
    line = f"model.freeze: the first {count} of {len(found)} layers stay fixed, in eval mode ({which})"
    return {name for layer in found[:count] for name in layer}, line


def rates(encoder: nn.Module, config: Optim) -> list[str]:
    """What the layers' learning rates are, as a line where they differ.

    Raises:
        ConfigError: if the order of the layers is not known.
    """
    if config.layer_decay == 1:
        return []
    found = depth.layers(encoder)
    names = depth.name_of(found[0]), depth.name_of(found[-1])
    first = config.encoder_scale * config.layer_decay ** (len(found) - 1)
    return [
        f"optim.layer_decay={config.layer_decay:g}: learning rate × {first:.2g} in the first of {len(found)} layers "
        f"({names[0]}), × {config.encoder_scale:g} in the last ({names[1]}), × 1 in the head"
    ]
