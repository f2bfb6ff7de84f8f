"""Losses on all pairs and all triplets of the global batch, a few rows against all others at a time.

Every rank computes the loss of the whole batch (so the work on a rank grows with R², and not with A·R as the tiled
losses') and keeps the gradient of its own rows; no (R, R) matrix is kept, and backward needs no collective.
"""

import math
from abc import ABC, abstractmethod
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from sslcells import ranks
from sslcells.losses._rows import gather_groups, sound
from sslcells.losses.triplet import Distance

_TILE = 2**21
"""entries of the matrices of rows × references that are held at a time, unless one row has more"""


class _AllPairsLoss(nn.Module, ABC):
    """A sum over what each row has with all others, its terms each divided by what they count.

    Rows of equal id are positives; of the others, those of equal source, where sources are given, count as neither.
    The value is the same on every rank: the loss of the global batch. Gradients are handed back × world, so that DDP's
    mean over ranks is that loss's gradient. Rows are normalised, and distances computed, in float32 (float64 for
    float64 rows). `stats` holds detached scalars after each call.
    """

    def __init__(self, distance: Distance) -> None:
        super().__init__()
        if distance not in get_args(Distance):
            raise ValueError(f"distance={distance!r} is none of {', '.join(get_args(Distance))}")
        self.distance = distance
        self.stats: dict[str, Tensor] = {}

    def forward(self, z: Tensor, positive: Tensor, source: Tensor | None = None) -> Tensor:
        """Loss of rows with ids.

        Args:
            z: (A, D) rows of any norm.
            positive: (A,) int64 ids; a negative id has no positives and is a negative of every row.
            source: (A,) int64; rows of equal source that are not positives are no negatives either.

        Raises:
            ValueError: for shapes that do not fit, no rows, or numbers of rows that differ between ranks.
        """
        rows, batch, group, sources = gather_groups(z, positive, source)
        with torch.autocast(rows.device.type, enabled=False):
            loss: Tensor
            loss, totals = _AllPairs.apply(rows, batch.refs, batch.own, group, sources, self)
        self.stats = self._figures(totals)
        return loss * sound(batch.refs)

    @abstractmethod
    def terms(self, distance: Tensor, positive: Tensor, negative: Tensor) -> tuple[list[Tensor], Tensor]:
        """(T, R) distances of some rows to all, and bool who is whose → the terms' sums, and figures to add up.

        The first figures are the terms' divisors.
        """

    @abstractmethod
    def _figures(self, totals: Tensor) -> dict[str, Tensor]:
        """`stats` from the added-up figures."""


class BatchAllTripletLoss(_AllPairsLoss):
    """Triplet loss on every valid triplet of the global batch, arXiv 1703.07737 section 3, equation 6.

    The mean over the triplets whose loss is above 0 ("BA≠0" there); none gives 0. A row's triplets are not written out:
    with its negatives sorted, how many are nearer than a positive's distance + margin, and the sum of their distances,
    is a look-up, so that time grows with R² log R and not R³.

    `stats`: `active`, the share of the triplets with a loss above 0; `positive_distance` and `negative_distance`, the
    mean distances of all pairs.
    """

    def __init__(self, margin: float = 0.2, distance: Distance = "euclidean") -> None:
        super().__init__(distance)
        if margin < 0:
            raise ValueError(f"margin={margin} is negative")
        self.margin = margin

    def terms(self, distance: Tensor, positive: Tensor, negative: Tensor) -> tuple[list[Tensor], Tensor]:
        """Σ over each row's positives p and negatives n of max(0, d_p + margin − d_n), in float64."""
        # Rows that are no negatives stand at the end; the sums are long, and lose what a float32 cannot hold.
        far = torch.where(negative, distance, torch.inf).double().sort(1)[0]  # (T, R)
        to = (distance + self.margin).double()
        nearer = torch.searchsorted(far.detach(), to.detach().contiguous())  # (T, R)
        sums = nn.functional.pad(far.nan_to_num(posinf=0.0).cumsum(1), (1, 0)).gather(1, nearer)
        loss = torch.where(positive, to * nearer - sums, 0.0).sum()
        of = positive.sum(1).double(), negative.sum(1).double()
        figures = [
            torch.where(positive, nearer, 0).sum(),
            of[0] @ of[1],
            of[0].sum(),
            torch.where(positive, distance, 0.0).sum(),
            of[1].sum(),
            torch.where(negative, distance, 0.0).sum(),
        ]
        return [loss], torch.stack([x.detach().double() for x in figures])

    def _figures(self, totals: Tensor) -> dict[str, Tensor]:
        active, triplets, positives, near, negatives, far = totals.float()
        return {
            "active": active / triplets.clamp_min(1),
            "positive_distance": near / positives.clamp_min(1),
            "negative_distance": far / negatives.clamp_min(1),
        }


class PairLoss(_AllPairsLoss):
    """Pairs of one id nearer than `positive_margin`, of two ids farther than `margin`, over the global batch.

    squared: ½ max(0, d − positive_margin)² and ½ max(0, margin − d)², the contrastive loss of Hadsell et al. 2006,
    equation 4, which has a positive margin of 0; otherwise the hinges themselves. Of positive and of negative pairs
    each the mean over those with a loss above 0, as there are many more negative ones; the sum of both.

    `stats`: `active_positives` and `active_negatives`, the shares of the pairs with a loss above 0.
    """

    def __init__(
        self, margin: float = 1.0, positive_margin: float = 0.0, squared: bool = True, distance: Distance = "euclidean"
    ) -> None:
        super().__init__(distance)
        if not 0 <= positive_margin < margin:
            raise ValueError(f"positive_margin={positive_margin} is not in 0..margin={margin}")
        self.margin, self.positive_margin, self.squared = margin, positive_margin, squared

    def terms(self, distance: Tensor, positive: Tensor, negative: Tensor) -> tuple[list[Tensor], Tensor]:
        """Σ over positive pairs and Σ over negative pairs."""
        gaps = [
            torch.where(positive, distance - self.positive_margin, 0.0).clamp_min(0),
            torch.where(negative, self.margin - distance, 0.0).clamp_min(0),
        ]
        sums = [(gap.square() / 2 if self.squared else gap).double().sum() for gap in gaps]
        figures = [*(gap > 0 for gap in gaps), positive, negative]
        return sums, torch.stack([x.sum().double() for x in figures])

    def _figures(self, totals: Tensor) -> dict[str, Tensor]:
        near, far, positives, negatives = totals.float()
        return {
            "active_positives": near / positives.clamp_min(1),
            "active_negatives": far / negatives.clamp_min(1),
        }


class _AllPairs(torch.autograd.Function):
    """Loss of all rows; their gradient is taken in the forward pass, a few rows at a time, and kept for this rank's."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        refs: Tensor,
        own: slice,
        group: Tensor,
        source: Tensor | None,
        pairs: _AllPairsLoss,
    ) -> tuple[Tensor, Tensor]:
        losses: list[Tensor] = []
        totals: list[Tensor] = []
        gradients: list[Tensor] = []
        size = max(1, _TILE // len(refs))
        for start in range(0, len(refs), size):
            part = slice(start, start + size)
            positive = group[part, None] == group
            negative = ~positive
            if source is not None:
                negative &= source[part, None] != source
            positive[torch.arange(len(positive)), torch.arange(start, start + len(positive))] = False
            with torch.enable_grad():
                z = refs.detach().requires_grad_()
                sums, figures = pairs.terms(_distances(z[part], z, pairs.distance), positive, negative)
                # The divisors are only known at the end: each term's gradient is kept on its own.
                by_term = [torch.autograd.grad(s, z, retain_graph=True)[0][own] for s in sums]
            _add(losses, [s.detach() for s in sums])
            _add(gradients, by_term)
            _add(totals, [figures])
        share = [1 / t.clamp_min(1) for t in totals[0][: len(losses)]]
        ctx.save_for_backward(sum(g * s.to(g.dtype) for g, s in zip(gradients, share, strict=True)))
        ctx.mark_non_differentiable(totals[0])
        loss = torch.stack([x * s for x, s in zip(losses, share, strict=True)]).sum()
        return loss.to(rows.dtype), totals[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * (grad * ranks.world()), None, None, None, None, None


def _add(sums: list[Tensor], more: list[Tensor]) -> None:
    sums[:] = [a + b for a, b in zip(sums, more, strict=True)] if sums else more


def _distances(a: Tensor, b: Tensor, kind: Distance) -> Tensor:
    """Distances of unit rows: (T, D), (R, D) → (T, R); rows too near to be told apart have distance 0 and gradient 0.

    The product of a row with itself is 1 up to the rounding of D summands: without a threshold equal rows would count
    as a pair with a loss above 0.
    """
    cosine_distance = 1 - a @ b.T
    apart = cosine_distance > torch.finfo(a.dtype).eps * (4 + math.sqrt(a.shape[1]))
    if kind == "cosine":
        return torch.where(apart, cosine_distance, 0.0)
    if kind == "sqeuclidean":
        return torch.where(apart, 2 * cosine_distance, 0.0)
    return torch.where(apart, torch.where(apart, 2 * cosine_distance, 1.0).sqrt(), 0.0)
