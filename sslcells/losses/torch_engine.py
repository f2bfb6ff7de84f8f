"""The tiled engine in torch operations: CPUs, and any device without the fused kernels.

Similarities are computed tile by tile, masked, reduced and dropped; no (A, R) matrix is ever kept. Shape letters: A
anchors of this rank; R references, the rows of all ranks, this rank's anchors being refs[offset : offset + A]; D width.
Between a rank's own rows the similarity is symmetric, so there each pair of tiles is computed once.
"""

import functools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

FLOAT32_INV_T = 40.0
"""exp(−2/τ), the smallest summand, is a normal float32 number up to this 1/τ"""


class Exclude(NamedTuple):
    """Pairs that count neither as positive nor as negative, besides a row and itself."""

    partner: Tensor | None = None
    """(R,) int64 global index of the one row that is left out for each row (symmetric), or None"""
    positive: Tensor | None = None
    """(R,) int32 codes; needed with `source` and `lab`"""
    source: Tensor | None = None
    """(R,) int32 codes: pairs of equal source and different positive code are left out, or None"""
    lab: Tensor | None = None
    """(R,) int32 codes: pairs of different laboratory and different positive code are left out, or None"""


class _Tile(NamedTuple):
    rows: slice
    columns: slice
    mirrored: bool
    """the tile also stands for its transpose, which is not visited"""


class RowSums(NamedTuple):
    """Of each anchor, over the references that are not excluded; all summands are divided by 2^shift."""

    total: Tensor
    """(A,) Σ_j exp(inv_t · (z_i·z_j − 1))"""
    largest: Tensor | None
    """(A,) the largest summand, if it was asked for"""
    largest_negative: Tensor | None
    """(A,) the largest summand of another group; without groups `largest`"""
    shift: Tensor | None = None
    """(A,) binary logarithm of the largest summand, or None: nothing is divided"""


def row_sums(
    refs: Tensor,
    offset: int,
    count: int,
    inv_t: float,
    exclude: Exclude,
    group: Tensor | None = None,
    *,
    figures: bool = True,
) -> RowSums:
    """Sums, and with `figures` largest summands, of exp(inv_t · (cos − 1)).

    (R, D) unit rows, (R,) int32 codes of groups → (A,) each.
    """
    total, largest, negative = refs.new_zeros(3, refs.shape[0])
    for tile, e in _exponentials(refs, offset, count, inv_t, exclude):
        for axis, into in enumerate((tile.rows, tile.columns)[: 1 + tile.mirrored]):
            total[into] += e.sum(1 - axis)
            if figures:
                torch.maximum(largest[into], e.amax(1 - axis), out=largest[into])
        if figures and group is not None:
            e.masked_fill_(group[tile.rows, None] == group[tile.columns], 0.0)
            for axis, into in enumerate((tile.rows, tile.columns)[: 1 + tile.mirrored]):
                torch.maximum(negative[into], e.amax(1 - axis), out=negative[into])
    own = slice(offset, offset + count)
    if not figures:
        return RowSums(total[own].clone(), None, None)
    found = RowSums(total[own].clone(), largest[own].clone(), negative[own].clone())
    return found if group is not None else found._replace(largest_negative=found.largest)


def weighted_rows(refs: Tensor, offset: int, count: int, inv_t: float, weight: Tensor, exclude: Exclude) -> Tensor:
    """Σ_j E_ij (weight_i + weight_j) z_j with E as in `row_sums`: (R, D) unit rows, (R,) weights → (A, D)."""
    out = refs.new_zeros(count, refs.shape[1])
    for tile, e in _exponentials(refs, offset, count, inv_t, exclude):
        e.mul_(weight[tile.rows, None] + weight[tile.columns])
        own = slice(tile.rows.start - offset, tile.rows.stop - offset)
        out[own].addmm_(e, refs[tile.columns])
        if tile.mirrored:
            own = slice(tile.columns.start - offset, tile.columns.stop - offset)
            out[own].addmm_(e.T, refs[tile.rows])
    return out


def hardest(
    refs: Tensor, offset: int, count: int, positive: Tensor, source: Tensor | None, lab: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Index of each anchor's least similar positive and most similar negative, -1 where there is none.

    Positives have the anchor's code, negatives another code (and another source, where sources are given, and the same
    laboratory, where these are); the lowest index wins ties. refs (R, D), positive, source and lab (R,) int32 codes →
    two (A,) int64.
    """
    far = torch.full((refs.shape[0],), torch.inf, dtype=refs.dtype, device=refs.device)
    near = -far
    far_index = torch.full_like(far, -1, dtype=torch.int64)
    near_index = far_index.clone()
    for tile in _tiles(offset, count, refs.shape[0], tile_size(refs)):
        s = refs[tile.rows] @ refs[tile.columns].T
        same = positive[tile.rows, None] == positive[tile.columns]
        other = ~same
        if source is not None:
            other &= source[tile.rows, None] != source[tile.columns]
        if lab is not None:
            other &= lab[tile.rows, None] == lab[tile.columns]
        if tile.rows.start == tile.columns.start:
            same.fill_diagonal_(False)
        negatives = s.masked_fill(~other, -torch.inf)
        positives = s.masked_fill_(~same, torch.inf)
        both = ((tile.rows, tile.columns), (tile.columns, tile.rows))
        for axis, (into, of) in enumerate(both[: 1 + tile.mirrored]):
            _keep(near, near_index, into, *negatives.max(1 - axis), of.start, closer=True)
            _keep(far, far_index, into, *positives.min(1 - axis), of.start, closer=False)
    own = slice(offset, offset + count)
    return far_index[own].clone(), near_index[own].clone()


def ranked_negative(
    refs: Tensor,
    offset: int,
    count: int,
    positive: Tensor,
    source: Tensor | None,
    bound: Tensor | None = None,
    rank: int = 1,
    lab: Tensor | None = None,
) -> Tensor:
    """Index of each anchor's rank-th most similar negative, of those less similar than its `bound` where one is given.

    The last one where there are fewer, -1 where there is none; the lowest index wins ties. Arguments as in `hardest`,
    bound (A,) cosines → (A,) int64.
    """
    size = tile_size(refs)
    found = []
    for start in range(offset, offset + count, size):
        rows = slice(start, min(start + size, offset + count))
        best = refs.new_full((rows.stop - start, rank), -torch.inf)
        index = torch.full_like(best, -1, dtype=torch.int64)
        for left in range(0, len(refs), size):
            columns = slice(left, min(left + size, len(refs)))
            s = refs[rows] @ refs[columns].T
            left_out = positive[rows, None] == positive[columns]
            if source is not None:
                left_out |= source[rows, None] == source[columns]
            if lab is not None:
                left_out |= lab[rows, None] != lab[columns]
            if bound is not None:
                left_out |= s >= bound[start - offset : rows.stop - offset, None]
            s.masked_fill_(left_out, -torch.inf)
            column = torch.arange(left, columns.stop, device=s.device).expand_as(s)
            # Columns come in order and the sort is stable: of equal ones the lowest index stays in front.
            best, order = torch.cat([best, s], 1).sort(dim=1, descending=True, stable=True)
            best, index = best[:, :rank], torch.cat([index, column], 1).gather(1, order[:, :rank])
        last = best.isfinite().sum(1).clamp_min(1) - 1
        found.append(torch.where(best[:, 0].isfinite(), index.gather(1, last[:, None])[:, 0], -1))
    return torch.cat(found)


def _keep(best: Tensor, index: Tensor, into: slice, value: Tensor, at: Tensor, start: int, closer: bool) -> None:
    """Update the running extreme and its index with those of one tile; the lowest index wins ties."""
    at = at + start
    better = value > best[into] if closer else value < best[into]
    tied = (value == best[into]) & value.isfinite() & (at < index[into])
    take = better | tied
    best[into] = torch.where(take, value, best[into])
    index[into] = torch.where(take, at, index[into])


def _exponentials(
    refs: Tensor, offset: int, count: int, inv_t: float, exclude: Exclude
) -> Iterator[tuple[_Tile, Tensor]]:
    """Tiles of exp(inv_t · (cos − 1)), zero where excluded; each is valid until the next one is requested."""
    size = tile_size(refs)
    buffer = refs.new_empty(size * size)
    scaled = refs * inv_t
    for tile in _tiles(offset, count, refs.shape[0], size):
        left, right = scaled[tile.rows], refs[tile.columns]
        e = buffer[: len(left) * len(right)].view(len(left), len(right))
        torch.mm(left, right.T, out=e)
        e.sub_(inv_t).exp_()
        _exclude(e, tile, exclude)
        yield tile, e


def _exclude(e: Tensor, tile: _Tile, exclude: Exclude) -> None:
    if tile.rows.start == tile.columns.start:
        e.fill_diagonal_(0.0)
    if exclude.partner is not None:
        column = exclude.partner[tile.rows, None] - tile.columns.start
        inside = (column >= 0) & (column < e.shape[1])
        column = column.clamp(0, e.shape[1] - 1)
        e.scatter_(1, column, e.gather(1, column).masked_fill_(inside, 0.0))
    rows, columns = tile.rows, tile.columns
    if exclude.source is not None or exclude.lab is not None:
        assert exclude.positive is not None
        left_out = torch.zeros_like(e, dtype=torch.bool)
        if exclude.source is not None:
            left_out |= exclude.source[rows, None] == exclude.source[columns]
        if exclude.lab is not None:
            left_out |= exclude.lab[rows, None] != exclude.lab[columns]
        left_out &= exclude.positive[rows, None] != exclude.positive[columns]
        e.masked_fill_(left_out, 0.0)


def _tiles(offset: int, count: int, total: int, size: int) -> Iterator[_Tile]:
    """All pairs of an own row and a reference, once; pairs of own rows by the upper triangle of tiles."""
    end = offset + count
    for start in range(offset, end, size):
        rows = slice(start, min(start + size, end))
        for left in range(start, end, size):
            yield _Tile(rows, slice(left, min(left + size, end)), mirrored=left > start)
        for first, last in ((0, offset), (end, total)):
            for left in range(first, last, size):
                yield _Tile(rows, slice(left, min(left + size, last)), mirrored=False)


def tile_size(refs: Tensor) -> int:
    """Rows and columns of a tile: an eighth of a CPU's cache, or a little of another device's memory.

    A power of two, and no more than half the rows, so that symmetry saves a tile. Not of the memory that happens to be
    free: the order of the sums, and so their last bit, is the same when a run resumes.
    """
    if refs.device.type == "cpu":
        room, largest = _cache() // 8, max(256, len(refs) // 2)
    elif refs.device.type == "cuda":
        room, largest = torch.cuda.get_device_properties(refs.device).total_memory // 128, 8192
    else:
        room, largest = 64 * 2**20, 8192
    side = min(math.isqrt(room // refs.element_size()), largest)
    return max(128, 1 << (side.bit_length() - 1))


@functools.cache
def _cache() -> int:
    """Bytes of the CPU's largest cache, as Linux lists them; elsewhere a usual one."""
    sizes = [file.read_text() for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max(
        (int(size.strip().rstrip("K")) * 1024 for size in sizes if size.strip().endswith("K")), default=32 * 2**20
    )
