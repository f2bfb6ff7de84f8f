"""Does an encoder group images by what they show or by where they were taken: the robustness index, and its opposite.

The robustness index is that of PathoROB (arXiv 2507.17845); lab predictability is how well an image's neighbours tell
its laboratory, beside what they would tell if laboratories were shuffled.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import csr_matrix
from torch import Tensor

from sslcells.evaluation.knn import neighbours
from sslcells.evaluation.scores import Floats, Score, Units

Ints = NDArray[np.int64]

KS = (1, 3, 5, 11, 21, 51)
"""Numbers of neighbours to choose from."""
FEW = 10
"""A class with fewer images is no measure: it is listed apart."""
DRAWS = 1000
_MOST = 2000
"""images of a laboratory in a matched sample"""
_SOURCES = 5
"""sources that a laboratory needs for the null"""
_TILE = 2**22


class Rows(NamedTuple):
    """Features of images with what is known of them; the same length each."""

    z: Tensor
    """(N, F)"""
    labels: Tensor
    """(N,) int64 class; -1 where unknown"""
    sources: Tensor
    """(N,) int64"""
    labs: Tensor
    """(N,) int64 laboratory; 0 where unknown"""

    def at(self, index: Tensor) -> "Rows":
        """The rows with these indices, or where this mask is True; not a copy of them if it always is."""
        if index.dtype == torch.bool and bool(index.all()):
            return self
        return Rows(*(x[index] for x in self))

    @staticmethod
    def of(parts: Sequence["Rows"]) -> "Rows":
        """The rows of all parts."""
        return Rows(*(torch.cat(columns) for columns in zip(*parts, strict=True)))


class Near(NamedTuple):
    """The first k neighbours of every row, without those of its own source."""

    neighbour: Tensor
    """(N, k) int64"""
    there: Tensor
    """(N, k) bool: False where there are no more rows"""


def near(rows: Rows, k: int) -> Near:
    """The first k neighbours of every row by cosine, nearest first, without rows of its own source."""
    cosine, index = neighbours(rows.z, rows.z, k, rows.sources, rows.sources)
    return Near(index, cosine.isfinite())


def neighbour_counts(rows: Rows, found: Near, k: int) -> tuple[Tensor, Tensor]:
    """How many of a row's first k neighbours are SO, of its class and another laboratory, and OS: (N,) int64 each.

    OS: of another class and of its laboratory. All labels and laboratories must be known.
    """
    index, there = found.neighbour[:, :k], found.there[:, :k]
    same_class = rows.labels[index] == rows.labels[:, None]
    same_lab = rows.labs[index] == rows.labs[:, None]
    return (there & same_class & ~same_lab).sum(1), (there & ~same_class & same_lab).sum(1)


def robustness_index(z: Tensor, labels: Tensor, labs: Tensor, sources: Tensor, k: int) -> float:
    """ΣSO / (ΣSO + ΣOS) over the first k neighbours of every row, by cosine and without its own source: 0 to 1.

    SO counts neighbours of the row's class and another laboratory, OS those of another class and its laboratory. Above
    0.5 rows lie nearer to what they show than to where they were taken. NaN if there is neither. z (N, F) of any norm;
    labels (below 0: unknown), labs (0: unknown) and sources (N,) int64; rows of which one is unknown are left out.

    Raises:
        ValueError: for k below 1, or ids that are not one a row.
    """
    for what, ids in (("labels", labels), ("labs", labs), ("sources", sources)):
        if ids.shape != z.shape[:1]:
            raise ValueError(f"{what} must be ({len(z)},), one a row; it is {(*ids.shape,)}")
    rows = Rows(z, labels, sources, labs).at((labels >= 0) & (labs > 0))
    if not len(rows.z):
        return float("nan")
    so, os = (int(x.sum()) for x in neighbour_counts(rows, near(rows, k), k))
    return so / (so + os) if so + os else float("nan")


def index_score(rows: Rows, found: Near, k: int, units: Units) -> Score:
    """The robustness index with its interval from resamples of the sources; the neighbours stay as they are."""
    so, os = (x.numpy().astype(float) for x in neighbour_counts(rows, found, k))

    def metric(weight: Floats) -> dict[str, Floats]:
        part, whole = weight @ so, weight @ (so + os)
        out = np.full(len(weight), np.nan)
        np.divide(part, whole, out=out, where=whole > 0)
        return {"index": out}

    return units.scored(metric)["index"]


def best_k(rows: Rows, found: Near) -> int | None:
    """The k of KS with the best balanced accuracy of the neighbours' votes for the class, the smallest of equal ones.

    Only k where the robustness index is defined; None if there is none.
    """
    scored: list[tuple[float, int]] = []
    present = rows.labels.unique()  # type: ignore[no-untyped-call]
    for k in (k for k in KS if k <= found.neighbour.shape[1]):
        so, os = neighbour_counts(rows, found, k)
        if int(so.sum() + os.sum()):
            right = _share_right(rows.labels, rows.labels[found.neighbour[:, :k]], found.there[:, :k], present)
            recall = [float(right[rows.labels == c].mean()) for c in present]
            scored.append((-float(np.mean(recall)), k))
    return min(scored)[1] if scored else None


def _share_right(own: Tensor, voted: Tensor, there: Tensor, groups: Tensor) -> Tensor:
    """(N,) float64: 1 where most neighbours (N, k) are of a row's own group (N,), 1/t where t groups are tied."""
    votes = torch.stack([((voted == g) & there).sum(1) for g in groups])  # (G, N)
    best = votes == votes.amax(0)
    mine = (best & (own == groups[:, None])).any(0) & there.any(1)
    return mine / best.sum(0).double()


def matched(rows: Rows, one: int, other: int, seed: int) -> tuple[Tensor, list[int]]:
    """Indices of a sample with as many images of each class from one laboratory as from the other; and the classes.

    Classes that have fewer than FEW images in either are left out. Drawn at random, at most 2,000 of a laboratory.
    """
    counts = {lab: torch.bincount(rows.labels[(rows.labs == lab) & (rows.labels >= 0)]) for lab in (one, other)}
    width = min(map(len, counts.values()))
    least = torch.minimum(*(count[:width] for count in counts.values()))
    classes: list[int] = (least >= FEW).nonzero()[:, 0].tolist()
    generator, chosen = torch.Generator().manual_seed(seed), [torch.zeros(0, dtype=torch.int64)]
    for c in classes:
        many = min(int(least[c]), _MOST // len(classes))
        for lab in (one, other):
            members = ((rows.labs == lab) & (rows.labels == c)).nonzero()[:, 0]
            chosen.append(members[torch.randperm(len(members), generator=generator)[:many]])
    return torch.cat(chosen), classes


class Predictability(NamedTuple):
    """How well neighbours tell an image's laboratory: balanced accuracy, and the middle 95 % when labs are shuffled."""

    value: float
    low: float
    """of the null; NaN where sources are too few to shuffle"""
    high: float
    p: float
    """share of the shuffles, and of the value itself, that reach the value"""


def predictability(rows: Rows, found: Near, k: int, seed: int, draws: int = DRAWS) -> Predictability:
    """Balanced accuracy of the votes of k neighbours for a row's laboratory, with its permutation null.

    The null shuffles laboratories between sources whose images are mostly of one class, so that it keeps the classes of
    each laboratory; images without a known source are shuffled one by one. Ties count by their share.
    """
    numbers, lab = torch.unique(rows.labs, return_inverse=True)
    unit, lab_of_unit, stratum = _units(rows, lab)
    votes = _votes(found, k)
    value = float(_balanced(lab.numpy()[None], votes, len(numbers))[0])
    if len(numbers) < 2 or int(torch.bincount(lab_of_unit).min()) < _SOURCES:
        return Predictability(value, np.nan, np.nan, np.nan)
    generator = np.random.default_rng(seed)
    shuffled = np.tile(lab_of_unit.numpy(), (draws, 1))
    for s in np.unique(stratum):
        of = np.flatnonzero(stratum == s)
        shuffled[:, of] = generator.permuted(shuffled[:, of], axis=1)
    null = _balanced(shuffled[:, unit.numpy()], votes, len(numbers))
    low, high = np.quantile(null, (0.025, 0.975))
    return Predictability(value, float(low), float(high), float((1 + (null >= value).sum()) / (1 + draws)))


def _units(rows: Rows, lab: Tensor) -> tuple[Tensor, Tensor, Ints]:
    """The unit, a source in a laboratory, of each row (N,); laboratory and commonest class of each unit (U,)."""
    pairs = torch.stack([rows.sources, lab], 1)
    distinct, unit = torch.unique(pairs, dim=0, return_inverse=True)
    width = int(rows.labels.max()) + 1
    of_class = torch.zeros(len(distinct), width).index_put_((unit, rows.labels), torch.ones(len(unit)), accumulate=True)
    return unit, distinct[:, 1], of_class.argmax(1).numpy()


def _votes(found: Near, k: int) -> csr_matrix:
    """(N, N) float32: 1 where a row has another among its first k neighbours."""
    there = found.there[:, :k]
    ends = np.append(0, there.sum(1).cumsum(0).numpy())
    index = found.neighbour[:, :k][there].numpy()
    return csr_matrix((np.ones(len(index), np.float32), index, ends), (len(there),) * 2)


def _balanced(labs: Ints, votes: csr_matrix, count: int) -> Floats:
    """Balanced accuracy over laboratories of the neighbours' votes, for each row of `labs` (r, N): (r,)."""
    out, rows = [], max(1, _TILE // max(1, labs.shape[1]))
    for start in range(0, len(labs), rows):
        mine = np.stack([g == labs[start : start + rows].T for g in range(count)])  # (G, N, r)
        share = np.stack([votes @ of.astype(np.float32) for of in mine])
        best = (share == share.max(0)) & (share.max(0) > 0)
        right = (best & mine).any(0) / np.maximum(best.sum(0), 1)  # (N, r)
        recall = [(right * of).sum(0) / np.maximum(of.sum(0), 1) for of in mine]
        out.append(np.mean(recall, 0))
    return np.concatenate(out)
