"""Distances between unit rows, from 0 to 2 (cosine, euclidean) or to 4 (sqeuclidean)."""

import math
from typing import Literal, get_args

import torch
from torch import Tensor

Distance = Literal["euclidean", "sqeuclidean", "cosine"]
"""√(2 − 2 cos), 2 − 2 cos, 1 − cos"""


def check_distance(kind: str) -> None:
    """Raise a ValueError for a name that is no Distance."""
    if kind not in get_args(Distance):
        raise ValueError(f"distance={kind!r} is none of {', '.join(get_args(Distance))}")


def row_distances(a: Tensor, b: Tensor, kind: Distance) -> Tensor:
    """Distance of each row of a to the same row of b: (N, D) twice → (N,); equal rows have distance 0 and gradient 0.

    Computed from differences, which is exact near 0.
    """
    squared = (a - b).square().sum(1)
    if kind == "cosine":
        return squared / 2
    return squared if kind == "sqeuclidean" else _root(squared, squared > 0)


def pair_distances(a: Tensor, b: Tensor, kind: Distance) -> Tensor:
    """Distance of each row of a to every row of b: (T, D), (R, D) → (T, R).

    Computed from products. The product of a row with itself is 1 up to the rounding of D summands, so rows nearer than
    that have distance 0 and gradient 0: otherwise equal rows would count as a pair with a loss above 0.
    """
    one_minus_cosine = 1 - a @ b.T
    apart = one_minus_cosine > torch.finfo(a.dtype).eps * (4 + math.sqrt(a.shape[1]))
    if kind == "cosine":
        return torch.where(apart, one_minus_cosine, 0.0)
    squared = 2 * one_minus_cosine
    return torch.where(apart, squared, 0.0) if kind == "sqeuclidean" else _root(squared, apart)


def _root(squared: Tensor, apart: Tensor) -> Tensor:
    """√squared, and 0 with gradient 0 where rows are not `apart`: the gradient of √ is infinite at 0."""
    return torch.where(apart, torch.where(apart, squared, 1.0).sqrt(), 0.0)
