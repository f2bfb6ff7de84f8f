"""Heads between the backbone's features and the rows that a loss sees."""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Norm = Literal["batch", "layer", "none"]


def projection(features: int, hidden: int, out: int, layers: int, norm: Norm, last: bool = False) -> nn.Module:
    """A multilayer perceptron (N, F) → (N, D), arXiv 2002.05709, section 4.2; `layers` linear maps, 1 for one alone.

    `last` normalises the rows too, without scale and shift, arXiv 2011.10566, section 4.4.
    """
    norms = {"batch": nn.BatchNorm1d, "layer": nn.LayerNorm, "none": nn.Identity}
    modules: list[nn.Module] = []
    for _ in range(layers - 1):
        modules += [nn.Linear(features, hidden, bias=norm == "none"), norms[norm](hidden), nn.ReLU(inplace=True)]
        features = hidden
    modules.append(nn.Linear(features, out, bias=norm == "none"))
    if last:
        plain = {"batch": nn.BatchNorm1d(out, affine=False), "layer": nn.LayerNorm(out, elementwise_affine=False)}
        modules.append(plain.get(norm, nn.Identity()))
    return nn.Sequential(*modules)


class Prototypes(nn.Module):
    """Cosines with K learned directions."""

    def __init__(self, dimension: int, count: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(count, dimension))

    def forward(self, z: Tensor, frozen: bool = False) -> Tensor:
        """(A, D) → (A, K). Frozen directions get a zero gradient; weight decay shortens them, but turns none."""
        # Zero and not None, as DDP waits for a gradient.
        weight = self.weight.detach() + 0 * self.weight if frozen else self.weight
        return F.linear(F.normalize(z, dim=1), F.normalize(weight, dim=1))
