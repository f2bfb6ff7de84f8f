"""Retrieval: how many of an image's nearest neighbours are of its class."""

import math

import torch
from torch import Tensor

from sslcells.evaluation import knn

RECALL_AT = (1, 5, 10)
_TILE = 2**24
"""Pairs looked at at a time: 64 MiB of cosines."""


@torch.no_grad()
def retrieval(z: Tensor, labels: Tensor, sources: Tensor) -> dict[str, Tensor]:
    """Figures of each row as a query among the other rows, (N,) float64 each; NaN where there is nothing to find.

    z (N, F), labels and sources (N,) int64. Rows of the query's own source, the query itself included, are not
    searched; rows with labels below 0 are neither queries nor searched. With R rows of the query's class left:
    recall@k: 1 if one of the k nearest is of its class, else 0; R-precision: share of the R nearest that are;
    mAP@R: the mean over i ≤ R of the precision among the i nearest where the i-th is right, else 0, arXiv 2003.08505
    equation 3. Among equal cosines the lowest index comes first. A row that is not finite finds nothing and is not
    found.

    Raises:
        ValueError: for labels or sources that are not one a row.
    """
    for what, ids in (("labels", labels), ("sources", sources)):
        if ids.shape != z.shape[:1]:
            raise ValueError(f"{what} must be ({len(z)},), one a row; it is {(*ids.shape,)}")
    names = [*(f"recall@{k}" for k in RECALL_AT), "R-precision", "mAP@R"]
    out = {name: torch.full((len(z),), math.nan, dtype=torch.float64) for name in names}
    known = (labels >= 0).nonzero()[:, 0]
    z, labels, sources = z[known], labels[known], sources[known]
    rows = max(1, _TILE // max(1, len(z)))
    for start in range(0, len(z), rows):
        part = slice(start, start + rows)
        own = sources[part, None] == sources  # (m, N)
        relevant = (labels[part, None] == labels) & ~own
        count = relevant.sum(1)  # (m,): R
        most = min(len(z), max(*RECALL_AT, int(count.max())))
        near, index = knn.neighbours(z[part], z, most, sources[part], sources)
        # Rows that are not finite, and those left out, stand last in the order of their index: they are not found.
        right = relevant.gather(1, index) & near.isfinite()  # (m, most), nearest first
        place = torch.arange(1, most + 1)
        within = right & (place <= count[:, None])
        precision = right.cumsum(1) / place.double()
        share = count.clamp_min(1)
        figures = [right[:, :k].any(1).double() for k in RECALL_AT]
        figures += [within.sum(1) / share.double(), (precision * within).sum(1) / share]
        for name, value in zip(names, figures, strict=True):
            out[name][known[part]] = value.where(count > 0, math.nan)
    return out
