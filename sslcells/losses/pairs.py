"""Losses on all pairs and all triplets of the global batch, computed a few rows against all others at a time.

Every rank computes the loss of the whole batch and keeps the gradient of its own rows, so its work grows with R², not
with A·R as for the tiled losses. No (R, R) matrix is kept, and backward needs no collective.
"""

from abc import ABC, abstractmethod
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from sslcells import ranks
from sslcells.losses._rows import gather_groups, sound
from sslcells.losses.distances import Distance, check_distance, pair_distances

_TILE = 2**21
"""entries of a matrix of rows × references held at a time, or one row where that has more"""


class _AllPairsLoss(nn.Module, ABC):
    """A sum of terms over all pairs of rows, each term divided by a count.

    Rows of equal id are positives; other rows of equal source, where sources are given, are neither positives nor
    negatives. The value is the loss of the global batch, the same on every rank. Gradients are returned × world, so
    that DDP's mean over ranks is the gradient of that loss. Rows are normalised, and distances computed, in float32
    (float64 for float64 rows). `stats` holds detached scalars after each call.
    """

    def __init__(self, distance: Distance) -> None:
        super().__init__()
        check_distance(distance)
        self.distance = distance
        self.stats: dict[str, Tensor] = {}

    def forward(self, z: Tensor, positive: Tensor, source: Tensor | None = None) -> Tensor:
        """Loss of rows with ids.

        Args:
            z: (A, D) rows of any norm.
            positive: (A,) int64 ids; a row with a negative id has no positives and is a negative of every other row.
            source: (A,) int64; rows of equal source that are not positives are not negatives either.

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
        """(T, R) distances of T rows to all, and (T, R) bool masks → the sum of each term, and figures to add up.

        The first figures are the divisors of the terms.
        """

    @abstractmethod
    def _figures(self, totals: Tensor) -> dict[str, Tensor]:
        """`stats` from the figures' totals."""


@final
class BatchAllTripletLoss(_AllPairsLoss):
    """Triplet loss on every valid triplet of the global batch, arXiv 1703.07737 section 3, equation 6.

    The mean over the triplets with a loss above 0 ("BA≠0" there); 0 if there are none. Triplets are not written out: in
    a row's sorted negatives, the number and the summed distance of those nearer than d(positive) + margin are look-ups,
    so that time grows with R² log R and not with R³.

    `stats`: `active`, the fraction of the triplets with a loss above 0; `positive_distance` and `negative_distance`,
    the mean distances of all pairs.

    Example:
        >>> z = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]])
        >>> label = torch.tensor([0, 0, 1])
        >>> loss = BatchAllTripletLoss(margin=0.4, distance="cosine")
        >>> print(f"{loss(z, label):.3f}")  # one of the two triplets is active: 0.2 − 0.4 + 0.4
        0.200
        >>> loss.stats["active"].item()
        0.5
    """

    def __init__(self, margin: float = 0.2, distance: Distance = "euclidean") -> None:
        super().__init__(distance)
        if margin < 0:
            raise ValueError(f"margin={margin} is negative")
        self.margin = margin

    def terms(self, distance: Tensor, positive: Tensor, negative: Tensor) -> tuple[list[Tensor], Tensor]:
        """Σ over each row's positives p and negatives n of max(0, d_p + margin − d_n), in float64."""
        # Rows that are not negatives sort to the end; float32 would lose digits in such long sums.
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


@final
class PairLoss(_AllPairsLoss):
    """Positive pairs nearer than `positive_margin`, negative pairs farther than `margin`, over the global batch.

    squared: ½ max(0, d − positive_margin)² and ½ max(0, margin − d)², the contrastive loss of Hadsell et al. 2006,
    equation 4, where positive_margin is 0; otherwise the hinges themselves. The loss is the mean over the positive
    pairs with a loss above 0 plus the mean over such negative pairs, of which there are many more.

    `stats`: `active_positives` and `active_negatives`, the fractions of the pairs with a loss above 0.

    Example:
        >>> z = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]])
        >>> label = torch.tensor([0, 0, 1])
        >>> loss = PairLoss(margin=0.5, squared=False, distance="cosine")
        >>> print(f"{loss(z, label):.3f}")  # 0.2 of the positive pair, 0.5 − 0.4 of the one active negative pair
        0.300
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
    """Loss of all rows; the gradient of this rank's rows is computed in the forward pass, a few rows at a time."""

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
                sums, figures = pairs.terms(pair_distances(z[part], z, pairs.distance), positive, negative)
                # The divisors are known only at the end: keep the gradient of each term apart.
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
