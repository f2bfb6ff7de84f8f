"""Heads between the backbone's features and the rows that a loss sees."""

from typing import Literal

from torch import nn

Norm = Literal["batch", "layer", "none"]


def projection(features: int, hidden: int, out: int, layers: int, norm: Norm) -> nn.Module:
    """A multilayer perceptron (N, F) → (N, D), arXiv 2002.05709, section 4.2; `layers` linear maps, 1 for one alone."""
    norms = {"batch": nn.BatchNorm1d, "layer": nn.LayerNorm, "none": nn.Identity}
    modules: list[nn.Module] = []
    for _ in range(layers - 1):
        modules += [nn.Linear(features, hidden, bias=norm == "none"), norms[norm](hidden), nn.ReLU(inplace=True)]
        features = hidden
    return nn.Sequential(*modules, nn.Linear(features, out, bias=norm == "none"))
