"""Boxes of cells in the images of a table: which are none, which reach beyond their image, and what is cut."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sslcells.data._columns import Table

Outside = Literal["clip", "pad", "drop", "stop"]
Ints = NDArray[np.int64]
_FAR = 2**31
"""px: an edge further away is a mistake"""
_MOST = 2**26
"""px of a box that is padded"""


class Boxes(NamedTuple):
    """A box for each row."""

    edges: Ints
    """(N, 4): left, upper, right and lower edge in px, rounded outwards; all 0 where a row has none"""
    wrong: dict[int, str]
    """place of each row without a box of at least 1×1 px → what it has instead"""


def boxes_of(table: Table, columns: Sequence[str], as_size: bool) -> Boxes | None:
    """The boxes of a table's rows; None without columns of them.

    Raises:
        ConfigError: if a cell is not a number.
    """
    if not columns:
        return None
    edges = np.stack([table.numbers(column) for column in columns], 1)
    given = edges.copy()
    if as_size:
        edges[:, 2:] += edges[:, :2]
    with np.errstate(invalid="ignore"):
        wrong = ~(np.abs(edges) < _FAR).all(1) | ~(edges[:, 2:] - edges[:, :2] >= 1).all(1)
    edges[wrong] = 0
    named = ", ".join(columns)
    reasons = {i: f"{named} = {', '.join(f'{x:g}' for x in given[i])}" for i in np.flatnonzero(wrong).tolist()}
    return Boxes(np.concatenate([np.floor(edges[:, :2]), np.ceil(edges[:, 2:])], 1).astype(np.int64), reasons)


def beyond(edges: Ints, sizes: Ints) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """(N,) bool each: the boxes that reach beyond their image, and of these the ones that lie outside wholly.

    `sizes`: (N, 2) height and width of each image, 0 where it is not known.
    """
    left, upper, right, lower = edges.T
    height, width = sizes.T
    known = height > 0
    part = known & ((left < 0) | (upper < 0) | (right > width) | (lower > height))
    return part, known & ((left >= width) | (upper >= height) | (right <= 0) | (lower <= 0))


def inside(box: Sequence[int], height: int, width: int, outside: Outside) -> tuple[int, int, int, int]:
    """What of a box lies in an image: left, upper, right, lower.

    Raises:
        ValueError: if nothing does, or not all where the rule is `drop` or `stop`.
    """
    left, upper, right, lower = max(0, box[0]), max(0, box[1]), min(width, box[2]), min(height, box[3])
    if left >= right or upper >= lower:
        raise ValueError(f"its box {list(box)} lies outside of the image of {height}×{width} px")
    if outside in ("drop", "stop") and [left, upper, right, lower] != list(box):
        raise ValueError(f"its box {list(box)} reaches beyond the image of {height}×{width} px")
    if outside == "pad" and (box[2] - box[0]) * (box[3] - box[1]) > _MOST:
        raise ValueError(f"its box {list(box)} is too large to be padded: {_MOST:,} px at the most")
    return left, upper, right, lower


def cut(whole: Tensor, box: Sequence[int], outside: Outside) -> Tensor:
    """The box of an image (C, H, W); with `pad` of its full size, with the border pixels repeated.

    Raises:
        ValueError: as `inside`.
    """
    left, upper, right, lower = inside(box, whole.shape[1], whole.shape[2], outside)
    part = whole[:, upper:lower, left:right]
    if outside != "pad":
        return part
    sides = ((0, 0), (upper - box[1], box[3] - lower), (left - box[0], box[2] - right))
    return torch.from_numpy(np.pad(part.numpy(), sides, mode="edge"))
