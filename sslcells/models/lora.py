"""Low-rank adapters of linear layers, LoRA, arXiv 2106.09685.

An adapter is a parametrization of the layer's weight, so it works wherever timm reads the weight itself, as its
attention with separate biases does, and what is merged is what the forward pass used.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from sslcells.config import ConfigError

_INSIDE = ".parametrizations.weight."
"""in a state, what stands between the name of a layer and the parts of its adapter"""


class LowRank(nn.Module):
    """Weight (out, in) ↦ weight + scale·b·a, eq. 3: a (rank, in) is random at first, b (out, rank) zero."""

    def __init__(self, weight: Tensor, rank: int, scale: float) -> None:
        super().__init__()
        outputs, inputs = weight.shape
        self.a = nn.Parameter(torch.empty(rank, inputs))
        self.b = nn.Parameter(torch.zeros(outputs, rank))
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))  # as a linear layer of torch begins
        self._scale = scale

    def forward(self, weight: Tensor) -> Tensor:
        """(out, in) → (out, in), in float32 whatever autocast says, as it is merged in float32."""
        with torch.autocast(weight.device.type, enabled=False):
            return _with(weight, self.a, self.b, self._scale)


def _with(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    return torch.addmm(weight, b, a, alpha=scale)


def add(encoder: nn.Module, rank: int, scale: float, patterns: Sequence[str], without: Collection[str]) -> list[str]:
    """Give an adapter to every linear layer that a pattern names, but not to those whose weight is in `without`.

    Nothing else of the encoder learns then. Returns the names of the layers; the encoder's features stay as they are.

    Raises:
        ConfigError: if there is no such layer, or one is smaller than the rank.
    """
    linear = {n: m for n, m in encoder.named_modules() if isinstance(m, nn.Linear) and f"{n}.weight" not in without}
    if not linear:
        raise ConfigError(
            f"model.lora_rank={rank}: {type(encoder).__name__} has no linear layer that may learn; LoRA is for vision "
            f"transformers, model.freeze and optim.layer_decay are for all backbones"
        )
    unused = [pattern for pattern in patterns if not any(fnmatchcase(name, pattern) for name in linear)]
    if unused:
        raise ConfigError(f"model.lora_layers: {unused[0]!r} is no linear layer that may learn: {_few(list(linear))}")
    chosen = {n: m for n, m in linear.items() if any(fnmatchcase(n, pattern) for pattern in patterns)}
    small = {n: min(m.weight.shape) for n, m in chosen.items() if rank > min(m.weight.shape)}
    if small:
        name, least = next(iter(small.items()))
        raise ConfigError(f"model.lora_rank={rank} is more than the rank of {name}, {least}: take a smaller one")
    encoder.requires_grad_(False)
    for module in chosen.values():
        parametrize.register_parametrization(module, "weight", LowRank(module.weight, rank, scale))
    return list(chosen)


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f", … ({len(names)} in all)" if len(names) > 4 else "")


def _adapted(encoder: nn.Module) -> dict[str, nn.Module]:
    """The layers with an adapter, by name."""
    return {
        name: module
        for name, module in encoder.named_modules()
        if parametrize.is_parametrized(module, "weight") and isinstance(module.parametrizations["weight"][0], LowRank)
    }


@torch.no_grad()
def merged(encoder: nn.Module) -> dict[str, Tensor]:
    """The encoder's state as timm names it: each adapter is added to its weight."""
    adapted, out = _adapted(encoder), dict[str, Tensor]()
    for name, x in encoder.state_dict().items():
        layer, inside, what = name.partition(_INSIDE)
        if not inside or layer not in adapted:
            out[name] = x
        elif what == "original":
            out[f"{layer}.weight"] = adapted[layer].weight  # type: ignore[assignment]
    return out


def unmerged(tensors: Mapping[str, Tensor]) -> bool:
    """True if a checkpoint's tensors hold adapters beside the weights."""
    return any(_INSIDE in name for name in tensors)


def merged_tensors(tensors: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """As `merged`, of a checkpoint's tensors by name, whatever comes before the encoder's; `scale` as in the run."""
    out = dict[str, Tensor]()
    for name, x in tensors.items():
        layer, inside, what = name.partition(_INSIDE)
        if not inside:
            out[name] = x
        elif what == "original":
            a, b = (tensors[f"{layer}{_INSIDE}0.{which}"] for which in "ab")
            out[f"{layer}.weight"] = _with(x, a, b, scale)
    return out


def merge(encoder: nn.Module) -> None:
    """Add each adapter to its weight and remove it, in place."""
    for module in _adapted(encoder).values():
        weight = module.get_parameter("parametrizations.weight.original").detach()
        # torch's remove_parametrizations would take the weight from copies of the module too: they share its class.
        weight = module.parametrizations["weight"][0](weight).detach()  # type: ignore[index,operator]
        del module.parametrizations
        module.__class__ = module.__class__.__bases__[0]
        module.weight = nn.Parameter(weight)
