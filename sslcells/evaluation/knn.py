"""Weighted k-nearest-neighbour classification by cosine: the quality of features without training on them."""

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from sslcells import launcher
from sslcells.evaluation.screen import GROUP, PAIRS, UnitRows, may_exceed, one_by_one
from sslcells.losses import unit

QUERIES, TILE = 1024, 16384
"""Queries and rows of the bank compared at a time: 64 MiB of cosines, whatever the number of rows."""
_SCREENED = 64
"""Of more neighbours than that each tile holds too many candidates for a screen."""


@torch.no_grad()
def neighbours(
    query: Tensor,
    bank: Tensor,
    k: int,
    query_source: Tensor | None = None,
    bank_source: Tensor | None = None,
    centre: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The k nearest bank rows of every query by cosine, nearest first.

    query (M, F) and bank (N, F) may have any norm; `centre` (F,) is subtracted from both first. With sources, (M,) and
    (N,) int64, bank rows of the query's own source are left out: in leave-one-out the query itself, and all other
    images of the same cell, slide or donor, which would be recognised rather than classified.

    The rows are compared in tiles and the bank is never copied whole: the memory is that of a tile and of what is
    returned. On a CPU with bfloat16 in hardware, once k neighbours of each query are known, a product in bfloat16 finds
    the rows that may be nearer, by a bound on its error, and float32 decides among these.

    Returns cosines (M, k) float32, −inf where fewer rows were left, and bank indices (M, k) int64, with
    k = min(k, N). Among equal cosines the lowest index comes first.

    Raises:
        ValueError: for k below 1, rows of two widths, sources for only one side, or not one a row.
    """
    if k < 1:
        raise ValueError(f"k={k}: must be at least 1")
    if query.ndim != 2 or bank.ndim != 2 or query.shape[1] != bank.shape[1]:
        raise ValueError(f"query and bank must be (M, F) and (N, F); they are {(*query.shape,)} and {(*bank.shape,)}")
    if (query_source is None) != (bank_source is None):
        raise ValueError("sources of the queries and of the bank: give both or neither")
    for name, rows_of, ids in (("query_source", query, query_source), ("bank_source", bank, bank_source)):
        if ids is not None and ids.shape != rows_of.shape[:1]:
            raise ValueError(f"{name} must be ({len(rows_of)},), one a row; it is {(*ids.shape,)}")
    k = min(k, len(bank))
    best = torch.full((len(query), k), -math.inf, device=query.device)
    index = torch.zeros(len(query), k, dtype=torch.int64, device=query.device)
    # Where no query has the source of any row, as between train and val, there is nothing to leave out.
    apart = query_source is None or bank_source is None or not torch.isin(bank_source, query_source).any()
    screens = k <= _SCREENED and len(bank) > TILE and _has_fast_bfloat16(query.device)
    for first in range(0, len(query) if k else 0, TILE):
        rows = query[first : first + TILE]
        queries = [UnitRows(_centred(rows[i : i + QUERIES], centre)) for i in range(0, len(rows), QUERIES)]
        for start in range(0, len(bank), TILE):
            tile = UnitRows(_centred(bank[start : start + TILE], centre))
            for i, block in enumerate(queries):
                part = slice(first + i * QUERIES, first + i * QUERIES + len(block.z))
                own = None
                if not apart and query_source is not None and bank_source is not None:
                    own = query_source[part], bank_source[start : start + TILE]
                if screens and _screen(best[part], index[part], block, tile, own, start):
                    continue
                cosine = block.cosines(tile)  # (m, n)
                _leave_out(cosine, own)
                _merge(best[part], index[part], cosine, start)
                if screens:
                    _recompute(best[part], index[part], block, bank, centre)
    return best, index


Neighbours = Callable[..., tuple[Tensor, Tensor]]
"""A search with the arguments and the result of `neighbours`"""


def _centred(rows: Tensor, centre: Tensor | None) -> Tensor:
    return rows if centre is None else rows - centre


@functools.cache
def _has_fast_bfloat16(device: torch.device) -> bool:
    """True on a CPU that multiplies matrices in bfloat16; a GPU is quick enough without."""
    return device.type == "cpu" and launcher.precision_for(device) == "bf16"


def _leave_out(cosine: Tensor, own: tuple[Tensor, Tensor] | None) -> None:
    """Set the cosines (m, n) of rows of the query's own source to −inf; `own` has the sources (m,) and (n,)."""
    if own is None:
        return
    query_source, bank_source = own
    columns = torch.isin(bank_source, query_source).nonzero()[:, 0]
    if len(columns):
        same = query_source[:, None] == bank_source[columns]
        cosine[:, columns] = cosine[:, columns].masked_fill(same, -math.inf)


def _screen(
    best: Tensor, index: Tensor, block: UnitRows, tile: UnitRows, own: tuple[Tensor, Tensor] | None, start: int
) -> bool:
    """`_merge` for the few rows of a tile that may be among the k nearest; False, and nothing done, if many may."""
    floor = best[:, -1]
    if not floor.isfinite().any():
        return False
    rough, error = block.rough_cosines(tile)
    _leave_out(rough, own)
    found = may_exceed(rough, floor - error)
    if found is None:
        return False
    row, column = found
    cosine = one_by_one(block.z, tile.z, row, column)
    nearer = cosine > floor[row]
    row, column, cosine = row[nearer], column[nearer], cosine[nearer]
    if len(row):
        count = row.bincount(minlength=len(floor))
        place = row, torch.arange(len(row), device=row.device) - (count.cumsum(0) - count)[row]
        cosines = cosine.new_full((len(floor), int(count.max())), -math.inf)
        numbers = torch.zeros_like(cosines, dtype=torch.int64)
        cosines[place], numbers[place] = cosine, column + start
        _keep(best, index, count > 0, cosines[count > 0], numbers[count > 0])
    return True


def _recompute(best: Tensor, index: Tensor, block: UnitRows, bank: Tensor, centre: Tensor | None) -> None:
    """Put the digits of `one_by_one` in place of a product's, so that equal rows of the bank stay equal."""
    index_by_number, order = index.sort(1)
    cosine = best.gather(1, order)
    row, place = cosine.isfinite().nonzero().unbind(1)
    for start in range(0, len(row), PAIRS):
        few = row[start : start + PAIRS], place[start : start + PAIRS]
        near = unit(_centred(bank[index_by_number[few]], centre)).float()
        cosine[few] = one_by_one(block.z, near, few[0], torch.arange(len(near), device=row.device))
    value, order = largest(cosine, best.shape[1])
    best.copy_(value)
    index.copy_(index_by_number.gather(1, order))


def _merge(best: Tensor, index: Tensor, cosine: Tensor, start: int) -> None:
    """Put the nearest rows of a tile, cosines (m, n), among the k nearest so far, (m, k) each, in place.

    The tile begins at row `start` of the bank. The k nearest of a tile lie in the k groups of rows whose nearest rows
    are nearest; groups without one nearer than the k-th so far are not looked at. A tie goes to the lower index: so far
    are lower ones, and the groups stand in their order.
    """
    k, (m, n) = best.shape[1], cosine.shape
    if n < 2 * k * GROUP or n % GROUP:
        numbers = torch.arange(start, start + n, device=cosine.device).expand(m, -1)
        _keep(best, index, slice(None), cosine, numbers)
        return
    groups = cosine.view(m, -1, GROUP)
    nearest = groups.amax(2)  # (m, n / group)
    hits = (nearest > best[:, -1:]).sum(1)
    rows, most = hits.nonzero()[:, 0], min(k, int(hits.max()))
    if not most:
        return
    chosen = largest(nearest[rows], most)[1].sort(1).values  # (r, most)
    numbers = start + chosen[:, :, None] * GROUP + torch.arange(GROUP, device=cosine.device)
    _keep(best, index, rows, groups[rows[:, None], chosen].flatten(1), numbers.flatten(1))


def _keep(best: Tensor, index: Tensor, rows: Tensor | slice, cosine: Tensor, numbers: Tensor) -> None:
    """Of these rows of `best` and `index` and of more cosines with their numbers, (r, c) each, keep the largest."""
    value, order = largest(torch.cat([best[rows], cosine], 1), best.shape[1])
    best[rows], index[rows] = value, torch.cat([index[rows], numbers], 1).gather(1, order)


def largest(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row of x (m, N) with their indices, in order, equal ones by index.

    topk alone does not define which of equal values it takes, and a stable sort of whole rows is far slower.

    Raises:
        ValueError: for k below 0 or above N.
    """
    if not 0 <= k <= x.shape[1]:
        raise ValueError(f"k={k} is not in 0..{x.shape[1]}, the values of a row")
    if k == 0:
        return x[:, :0], x.new_empty((len(x), 0), dtype=torch.int64)
    least = x.topk(k).values[:, -1:]
    above, tied = x > least, x == least
    missing = k - above.sum(1, keepdim=True)
    taken = above | (tied & (tied.cumsum(1, dtype=torch.int32) <= missing))
    index = taken.nonzero()[:, 1].view(len(x), k)
    value, order = x.gather(1, index).sort(dim=1, descending=True, stable=True)
    return value, index.gather(1, order)


def knn_scores(
    query: Tensor,
    bank: Tensor,
    bank_labels: Tensor,
    classes: int,
    k: int,
    temperature: float | None,
    query_source: Tensor | None = None,
    bank_source: Tensor | None = None,
    search: Neighbours = neighbours,
) -> Tensor:
    """Votes of the k nearest labelled bank rows for each class: (M, K) float32.

    query (M, F), bank (N, F), bank_labels (N,) int64 with K = `classes`, unknown ones below 0. A neighbour's vote
    weighs exp(cosine / temperature) as in arXiv 1805.01978 section 3.4, relative to the nearest neighbour's (one
    factor per query, which no ranking sees, so that no temperature overflows); without a temperature it weighs 1.
    Unlabelled rows are no neighbours, nor with sources are rows of the query's own source; if fewer than k are
    left, these vote; if none is, the scores are 0.

    Raises:
        ValueError: for labels that are not one a row of the bank, classes below 1, a temperature not above 0, or as
            `neighbours`.
    """
    if classes < 1:
        raise ValueError(f"classes={classes}: votes are for one class at least")
    if bank_labels.shape != bank.shape[:1]:
        raise ValueError(f"bank_labels must be ({len(bank)},), one a row of the bank; it is {(*bank_labels.shape,)}")
    if temperature is not None and not temperature > 0:
        raise ValueError(f"temperature={temperature} is not above 0; none weighs all neighbours the same")
    known = bank_labels >= 0
    if not known.all():  # otherwise the bank would be copied
        bank, bank_labels = bank[known], bank_labels[known]
        bank_source = None if bank_source is None else bank_source[known]
    cosine, index = search(query, bank, k, query_source, bank_source)
    return votes(cosine, bank_labels[index], classes, temperature)


def votes(cosine: Tensor, label: Tensor, classes: int, temperature: float | None) -> Tensor:
    """Votes for each class (M, K) float32 of neighbours with cosines and labels (M, k), nearest first.

    Weighed as in `knn_scores`; a cosine of −inf means no such neighbour, and no vote.
    """
    if temperature is None:
        weight = cosine.isfinite().float()
    else:
        # The clamp keeps −inf − (−inf) out of rows without any neighbour.
        weight = ((cosine - cosine[:, :1].clamp_min(-1)) / temperature).exp()
    # One sum per class instead of scatter_add, whose order of summation varies on CUDA.
    return torch.stack([(weight * (label == c)).sum(1) for c in range(classes)], dim=1)


def knn_predictions(scores: Tensor) -> Tensor:
    """The class with the highest score, (M,) int64 from (M, K); −1 if no neighbour voted.

    Raises:
        ValueError: for scores of no class.
    """
    if scores.ndim != 2 or not scores.shape[1]:
        raise ValueError(f"scores must be (M, K) of one class at least; they are {(*scores.shape,)}")
    best, label = scores.max(1)
    return label.where(best > 0, -1)


def knn_accuracy(scores: Tensor, labels: Tensor) -> dict[str, float]:
    """Fractions in 0..1 of scores (M, K) against labels (M,) int64; empty if no label is known.

    `top1` is the share of queries classified correctly, `balanced` the mean of that share over the classes
    present in `labels`. Labels below 0 are ignored; a query without neighbours counts as wrong.

    Raises:
        ValueError: for labels that are not one a row of the scores, or a label that these have no column of.
    """
    if labels.shape != scores.shape[:1]:
        raise ValueError(f"labels must be ({len(scores)},), one a row of the scores; it is {(*labels.shape,)}")
    known = labels >= 0
    if not known.any():
        return {}
    if labels.max() >= scores.shape[1]:
        raise ValueError(f"label {int(labels.max())} is none of the {scores.shape[1]} classes that the scores are of")
    labels, right = labels[known], (knn_predictions(scores) == labels)[known]
    images = labels.bincount(minlength=scores.shape[1])
    hits = labels[right].bincount(minlength=scores.shape[1])
    recall = (hits / images)[images > 0]
    return {"top1": right.float().mean().item(), "balanced": recall.mean().item()}
