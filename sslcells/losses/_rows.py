"""What the losses share about rows: unit length, ids as small codes, and means over positives."""

import math
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from sslcells import ranks


def unit(z: Tensor) -> Tensor:
    """Rows of length 1 in float32 (float64 stays): (N, D) → (N, D), of any norm.

    A zero row stays zero, with a finite gradient, and so does one of subnormal numbers alone; a row that is not finite
    holds a NaN.

    Raises:
        ValueError: for what is not (N, D) with D of 1 at least.
    """
    if z.ndim != 2 or not z.shape[1]:
        raise ValueError(f"rows must be (N, D), of one number at least; they are {tuple(z.shape)}")
    z = z if z.dtype == torch.float64 else z.float()
    z = z / _magnitude(z)
    norm = z.norm(dim=1, keepdim=True)
    return z / torch.where(norm == 0, 1.0, norm)


def _magnitude(z: Tensor) -> Tensor:
    """The power of two below each row's largest number: (N, D) → (N, 1); 1 for a row of zeros.

    Dividing by it is exact, and keeps the squares of very large and very small rows within the numbers' range.
    """
    limits, double = torch.finfo(z.dtype), z.dtype == torch.float64
    largest = z.detach().abs().amax(1, keepdim=True)
    exponent = largest.view(torch.int64).bitwise_and(0x7FF << 52) if double else largest.view(torch.int32) & 0x7F800000
    power = exponent.view(z.dtype).clamp_max(1 / limits.tiny)
    return torch.where(power == 0, 1.0, power)


def sound(z: Tensor) -> Tensor:
    """1, or NaN where a number of z is not finite: a factor of a loss that changes no bit of it and of its gradient.

    Comparisons, which mining and hinges are made of, skip NaN: without it such a loss is finite, or 0, on rows that
    are not. No device is waited for.
    """
    if not z.numel():
        return z.new_ones(())
    low, high = z.detach().aminmax()  # both are NaN where any number is
    return 1 + 0 * low + 0 * high


def row_std(z: Tensor) -> Tensor:
    """√D times the standard deviation over unit rows of z (N, D), mean over dimensions, detached: 0 for collapsed rows.

    1 for rows spread over the sphere (arXiv 2011.10566, section 4.1); NaN for no rows.
    """
    if not len(z):
        return z.new_full((), math.nan)
    spread: Tensor = unit(z.detach()).std(0, correction=0).mean()
    return spread * math.sqrt(z.shape[1])


def log1p_exp(x: Tensor) -> Tensor:
    """log(1 + e^x), exact in both tails: torch's softplus is linear from x = 20 on."""
    return torch.logaddexp(x, torch.zeros_like(x))


def check_ids(ids: Tensor | None, count: int, name: str) -> None:
    """Raise a ValueError unless ids are None or (count,) integers."""
    if ids is not None and (ids.shape != (count,) or ids.dtype.is_floating_point):
        raise ValueError(f"{name} must be ({count},) integers; it is {tuple(ids.shape)} {ids.dtype}")


def codes(ids: Tensor) -> Tensor:
    """Equal int64 ids → equal int32 codes in 0..N-1: (N,) → (N,). A negative id is unknown and equal to no other."""
    unique = torch.where(ids < 0, -1 - torch.arange(len(ids), device=ids.device), ids)
    ordered, order = unique.sort(stable=True)
    step = torch.zeros_like(ordered)
    step[1:] = (ordered[1:] != ordered[:-1]).long().cumsum(0)
    return torch.empty_like(step).scatter_(0, order, step).int()


class Gathered(NamedTuple):
    """The rows of all ranks in rank order, and where this rank's are."""

    refs: Tensor
    """(R, D), without gradient"""
    offset: int
    rows: int

    @property
    def own(self) -> slice:
        """This rank's part of anything that has one entry a reference."""
        return slice(self.offset, self.offset + self.rows)


def same_rows(z: Tensor) -> None:
    """Raise a ValueError on every rank where the ranks bring different numbers of rows, or none."""
    ranks.same_count(len(z), "rows")
    if not len(z):
        raise ValueError(f"there are no rows to have a loss of: they are {tuple(z.shape)}")


def gather_rows(z: Tensor) -> Gathered:
    """Gather the rows of all ranks: (A, D) on every rank → (R, D).

    Raises:
        ValueError: on every rank, where the ranks bring different numbers of rows, or none.
    """
    same_rows(z)
    return Gathered(ranks.gather(z), ranks.rank() * len(z), len(z))


def gather_groups(z: Tensor, positive: Tensor, source: Tensor | None) -> tuple[Tensor, Gathered, Tensor, Tensor | None]:
    """This rank's unit rows (A, D), those of all ranks, and their positive and source codes, (R,) int32 each.

    Raises:
        ValueError: for z that is not (A, D), ids that are not (A,) integers, no rows, or different numbers of rows.
    """
    if z.ndim != 2:
        raise ValueError(f"z must be (A, D); it is {tuple(z.shape)}")
    check_ids(positive, len(z), "positive")
    check_ids(source, len(z), "source")
    rows = unit(z)
    batch = gather_rows(rows)
    sources = None if source is None else codes(ranks.gather(source))
    return rows, batch, codes(ranks.gather(positive)), sources


class Positives(Protocol):
    """Who is whose positive, as a symmetric relation over the references."""

    def mean(self, x: Tensor, own: slice) -> Tensor:
        """Mean of x over the positives of this rank's rows: (R, D) → (A, D); 0 for a row without positives."""
        ...

    def known(self) -> Tensor:
        """Which references have a positive: (R,) bool."""
        ...


class Pairs(NamedTuple):
    """Every row has one positive, its partner."""

    partner: Tensor
    """(R,) int64 global index"""

    def mean(self, x: Tensor, own: slice) -> Tensor:
        """The partner's x."""
        return x[self.partner[own]]

    def known(self) -> Tensor:
        """Every row."""
        return torch.ones_like(self.partner, dtype=torch.bool)


class Groups(NamedTuple):
    """Rows of equal code are each other's positives."""

    code: Tensor
    """(R,) int32"""

    def mean(self, x: Tensor, own: slice) -> Tensor:
        """Mean over the group without the row itself, from the group's sum: no (A, R) matrix."""
        code = self.code.long()
        total = torch.zeros_like(x).index_add_(0, code, x)
        others = (self._size()[code[own]] - 1).to(x.dtype)[:, None]
        return torch.where(others > 0, (total[code[own]] - x[own]) / others.clamp_min(1), 0.0)

    def known(self) -> Tensor:
        """Rows whose group has another row."""
        return self._size()[self.code.long()] > 1

    def _size(self) -> Tensor:
        code = self.code.long()
        return torch.zeros_like(code).scatter_add_(0, code, torch.ones_like(code))
