"""The layers of a backbone from the first to the last, as timm groups them."""

from collections import Counter
from collections.abc import Collection

from timm.models import group_parameters
from torch import nn

from sslcells.config import ConfigError


def layers(encoder: nn.Module) -> list[list[str]]:
    """The names of the parameters of each layer: the stem is the first, then each block.

    Raises:
        ConfigError: if timm does not say how the layers of this backbone follow each other.
    """
    matcher = getattr(encoder, "group_matcher", None)
    if matcher is None:
        raise ConfigError(
            f"timm does not say how the layers of {type(encoder).__name__} follow each other; optim.layer_decay and a "
            f"number for model.freeze need another model.backbone"
        )
    groups: dict[int, list[str]] = group_parameters(encoder, matcher(coarse=False))
    return [groups[i] for i in sorted(groups)]


def blocks(encoder: nn.Module) -> list[str]:
    """The classes of modules that are several of the layers: `Block` of a Vision Transformer, `BasicBlock` of a ResNet.

    Empty where timm does not say how the layers follow each other.
    """
    if not hasattr(encoder, "group_matcher"):
        return []
    within = [_alone(encoder.get_submodule(n)) for layer in layers(encoder) for n in modules_within(encoder, layer)]
    kinds = Counter(type(module).__name__ for module in within if _blocklike(module))
    return [kind for kind, count in kinds.items() if count > 1]


def _alone(module: nn.Module) -> nn.Module:
    """The only module of a sequence of one."""
    return _alone(module[0]) if isinstance(module, nn.Sequential) and len(module) == 1 else module


def _blocklike(module: nn.Module) -> bool:
    """True for a module of several that is no mere sequence of them, as heads are too."""
    return any(True for _ in module.children()) and not isinstance(module, nn.Sequential)


def parameters(encoder: nn.Module, apart: bool) -> list[list[nn.Parameter]]:
    """The parameters of each layer where they are to be `apart`, else all of them as one layer."""
    if not apart:
        return [list(encoder.parameters())]
    named = dict(encoder.named_parameters())
    return [[named[name] for name in layer] for layer in layers(encoder)]


def modules_within(encoder: nn.Module, names: Collection[str]) -> tuple[str, ...]:
    """The largest modules of which every parameter is among these names, and which have one."""
    found = list[str]()
    for name, module in encoder.named_modules():
        if name and any(name.startswith(f"{outer}.") for outer in found):
            continue
        inside = [n for n, _ in module.named_parameters(prefix=name)]
        if inside and all(n in names for n in inside):
            found.append(name)
    return tuple(found)


def name_of(layer: Collection[str]) -> str:
    """What a person calls a layer: the module, or the token, that its first name is of."""
    split = [name.split(".") for name in layer]
    alike = [parts for parts in split if parts[0] == split[0][0]]
    common = [parts[0] for parts in zip(*alike, strict=False) if len(set(parts)) == 1]
    return ".".join(common[: max(1, min(map(len, alike)) - 1)])
