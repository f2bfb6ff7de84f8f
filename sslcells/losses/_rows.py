"""What the losses share about rows: unit length, checks, ids as small codes, and the rows of all ranks."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from sslcells import ranks


def at_least_float32(x: Tensor) -> Tensor:
    """The numbers in float32; float64 stays."""
    return x if x.dtype == torch.float64 else x.float()


def unit(z: Tensor) -> Tensor:
    """Scale rows of any norm to length 1, in float32 (float64 stays): (N, D) → (N, D).

    A zero row, or one of subnormal numbers only, stays zero and has a finite gradient. A row that is not finite gives
    a row with NaN.

    Raises:
        ValueError: if z is not (N, D) with D ≥ 1.
    """
    if z.ndim != 2 or not z.shape[1]:
        raise ValueError(f"rows must be (N, D), of one number at least; they are {tuple(z.shape)}")
    z = at_least_float32(z)
    z = z / _magnitude(z)
    norm = z.norm(dim=1, keepdim=True)
    return z / torch.where(norm == 0, 1.0, norm)


def _magnitude(z: Tensor) -> Tensor:
    """The power of two just below each row's largest number: (N, D) → (N, 1); 1 for a row of zeros.

    Dividing by it is exact, and keeps the squares of very large and very small numbers within the range of z's dtype.
    """
    limits, double = torch.finfo(z.dtype), z.dtype == torch.float64
    largest = z.detach().abs().amax(1, keepdim=True)
    exponent = largest.view(torch.int64).bitwise_and(0x7FF << 52) if double else largest.view(torch.int32) & 0x7F800000
    power = exponent.view(z.dtype).clamp_max(1 / limits.tiny)
    return torch.where(power == 0, 1.0, power)


def sound(z: Tensor) -> Tensor:
    """A factor for a loss: 1, which changes no bit of it or its gradient, or NaN if any number of z is not finite.

    Mining and hinges compare numbers, and comparisons skip NaN: without this factor their loss would be finite, or 0,
    for rows that are not. Does not wait for the device.
    """
    if not z.numel():
        return z.new_ones(())
    low, high = z.detach().aminmax()  # both are NaN if any number is
    return 1 + 0 * low + 0 * high


def row_std(z: Tensor) -> Tensor:
    """√D times the standard deviation of each dimension of the unit rows of z (N, D), mean over dimensions, detached.

    1 for rows spread over the sphere, 0 for collapsed rows (arXiv 2011.10566, section 4.1); NaN for no rows.
    """
    if not len(z):
        return z.new_full((), math.nan)
    spread: Tensor = unit(z.detach()).std(0, correction=0).mean()
    return spread * math.sqrt(z.shape[1])


def log1p_exp(x: Tensor) -> Tensor:
    """log(1 + e^x), exact in both tails: torch's softplus is linear from x = 20 on."""
    return torch.logaddexp(x, torch.zeros_like(x))


def check_ids(ids: Tensor | None, count: int, name: str) -> None:
    """Raise a ValueError unless ids is None or (count,) integers."""
    if ids is not None and (ids.shape != (count,) or ids.dtype.is_floating_point):
        raise ValueError(f"{name} must be ({count},) integers; it is {tuple(ids.shape)} {ids.dtype}")


def check_views(first: Tensor, second: Tensor, names: str = "z0 and z1") -> None:
    """Raise a ValueError unless both are (B, D), D ≥ 1: rows of two views of the same images."""
    if first.ndim != 2 or first.shape != second.shape or not first.shape[1]:
        raise ValueError(f"{names} must both be (B, D); they are {tuple(first.shape)} and {tuple(second.shape)}")


def codes(ids: Tensor) -> Tensor:
    """Small codes for ids: (N,) int64 → (N,) int32 in 0..N−1, equal where ids are. A negative id equals no other."""
    unique = torch.where(ids < 0, -1 - torch.arange(len(ids), device=ids.device), ids)
    ordered, order = unique.sort(stable=True)
    step = torch.zeros_like(ordered)
    step[1:] = (ordered[1:] != ordered[:-1]).long().cumsum(0)
    return torch.empty_like(step).scatter_(0, order, step).int()


class Gathered(NamedTuple):
    """The rows of all ranks in rank order, and which of them are this rank's."""

    refs: Tensor
    """(R, D), without gradient"""
    offset: int
    rows: int

    @property
    def own(self) -> slice:
        """Selects this rank's part of anything with one entry per reference."""
        return slice(self.offset, self.offset + self.rows)


def same_rows(z: Tensor) -> None:
    """Raise a ValueError on every rank if the ranks have different numbers of rows, or none."""
    ranks.same_count(len(z), "rows")
    if not len(z):
        raise ValueError(f"there are no rows to have a loss of: they are {tuple(z.shape)}")


def gather_rows(z: Tensor) -> Gathered:
    """Gather the rows of all ranks: (A, D) on every rank → (R, D).

    Raises:
        ValueError: on every rank, if the ranks have different numbers of rows, or none.
    """
    same_rows(z)
    return Gathered(ranks.gather(z), ranks.rank() * len(z), len(z))


def gather_codes(ids: Tensor | None, count: int, name: str) -> Tensor | None:
    """Codes of the ids of all ranks' rows: (A,) integers on every rank → (R,) int32; None for none.

    Raises:
        ValueError: if ids are not (count,) integers; the message calls them `name`.
    """
    check_ids(ids, count, name)
    return None if ids is None else codes(ranks.gather(ids))


def gather_groups(z: Tensor, positive: Tensor, source: Tensor | None) -> tuple[Tensor, Gathered, Tensor, Tensor | None]:
    """This rank's unit rows (A, D), the rows of all ranks, and their positive and source codes, (R,) int32 each.

    Raises:
        ValueError: if z is not (A, D), ids are not (A,) integers, or the ranks have no rows or different numbers.
    """
    if z.ndim != 2:
        raise ValueError(f"z must be (A, D); it is {tuple(z.shape)}")
    check_ids(positive, len(z), "positive")
    check_ids(source, len(z), "source")
    rows = unit(z)
    batch = gather_rows(rows)
    return rows, batch, codes(ranks.gather(positive)), gather_codes(source, len(z), "source")
