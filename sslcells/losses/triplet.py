"""Batch-hard triplet loss over the global batch, mined tile by tile."""

from collections.abc import Callable
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from sslcells import ranks
from sslcells.losses._rows import Gathered, gather_codes, gather_groups, log1p_exp, sound
from sslcells.losses.distances import Distance, check_distance, row_distances
from sslcells.losses.engine import MiningPrecision, hardest
from sslcells.losses.torch_engine import ranked_negative


@final
class BatchHardTripletLoss(nn.Module):
    """Batch-hard triplet loss over the global batch (arXiv 1703.07737, eq. 5).

    Each row is an anchor. Its positive is the least similar row with its id, its negative the most similar row with
    another id, among the rows of all ranks. Ties go to the lowest global index, so that the choice does not depend on
    the number of ranks. Pairs are mined by dot products of unit rows, and their distances computed from differences. An
    anchor without a positive or without a negative is left out. The value is the sum over this rank's valid anchors ×
    world / valid anchors in the world, as in NTXentLoss. Only the chosen pairs carry gradient, O(A·D), and backward
    needs no collective.

    After each call `stats` holds detached scalars of this rank: `active` (fraction of valid anchors with a loss above
    0; with `soft`, with the negative nearer than the positive), `positive_distance`, `negative_distance`.

    Mining the hardest negatives can collapse early in training (arXiv 1503.03832). Alternatives: `soft`; the `rank`-th
    hardest negative; `semi_hard` negatives, farther than the positive (section 3.2 there; an anchor without one is left
    out). The last two are mined in torch operations on every device.

    `precision` is that of the fused GPU kernel's comparisons: "exact" distinguishes rows as float32 does; "bf16" is
    faster and chooses another row for up to a third of the anchors of tight classes, each within 0.004 of the cosine.

    When all rows are equal, the loss is exactly the margin and its gradient 0: training cannot recover from that, so
    watch `active` and the distances.

    Example:
        >>> z = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]])
        >>> label = torch.tensor([0, 0, 1])  # the third row has no positive and is left out as an anchor
        >>> loss = BatchHardTripletLoss(margin=0.2, distance="cosine")
        >>> print(f"{loss(z, label):.3f}")  # distances: 0.2 to the positive, 1.0 and 0.4 to the negative
        0.000
        >>> loss.margin = 0.4
        >>> print(f"{loss(z, label):.3f}")  # the mean of 0 and 0.2 − 0.4 + 0.4
        0.100
    """

    def __init__(
        self,
        margin: float = 0.2,
        distance: Distance = "euclidean",
        soft: bool = False,
        *,
        semi_hard: bool = False,
        rank: int = 1,
        precision: MiningPrecision = "exact",
    ) -> None:
        super().__init__()
        if rank < 1:
            raise ValueError(f"rank={rank} is below 1, the hardest negative")
        if margin < 0:
            raise ValueError(f"margin={margin} is negative")
        check_distance(distance)
        self.margin, self.distance, self.soft = margin, distance, soft
        self.semi_hard, self.rank = semi_hard, rank
        self.precision: MiningPrecision = precision
        self.stats: dict[str, Tensor] = {}

    def forward(self, z: Tensor, positive: Tensor, source: Tensor | None = None, lab: Tensor | None = None) -> Tensor:
        """Loss of rows with ids.

        Args:
            z: (A, D) rows of any norm.
            positive: (A,) int64 ids; a row with a negative id has no positives and is a negative of every other row.
            source: (A,) int64; rows of equal source that are not positives are not negatives either.
            lab: (A,) int64; if given, only rows of equal lab are negatives; a negative id equals no other.

        Raises:
            ValueError: for shapes that do not fit, no rows, or numbers of rows that differ between ranks.
        """
        rows, batch, group, sources = gather_groups(z, positive, source)
        labs = gather_codes(lab, len(z), "lab")
        with torch.autocast(rows.device.type, enabled=False):
            far, near = hardest(batch.refs, batch.offset, batch.rows, group, sources, self.precision, labs)
            if self.semi_hard or self.rank > 1:
                bound = (batch.refs[batch.own] * batch.refs[far]).sum(1) if self.semi_hard else None
                near = ranked_negative(batch.refs, batch.offset, batch.rows, group, sources, bound, self.rank, labs)
            chosen = ranks.gather(torch.stack([far, near], 1))
            loss: Tensor
            loss, active, to_positive, to_negative = _Triplets.apply(rows, batch, chosen, self._anchor_loss)
        self.stats = {"active": active, "positive_distance": to_positive, "negative_distance": to_negative}
        return loss * sound(batch.refs)

    def _anchor_loss(self, rows: Tensor, positives: Tensor, negatives: Tensor) -> tuple[Tensor, ...]:
        """(T, D) each → for each triplet the loss, True where it is active, and the two distances, (T,) each."""
        to_positive = row_distances(rows, positives, self.distance)
        to_negative = row_distances(rows, negatives, self.distance)
        gap = to_positive - to_negative + (0.0 if self.soft else self.margin)
        return log1p_exp(gap) if self.soft else gap.clamp_min(0), gap > 0, to_positive, to_negative


class _Triplets(torch.autograd.Function):
    """Loss of this rank's anchors; backward gives this rank's rows their gradient from the triplets of all ranks."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        batch: Gathered,
        chosen: Tensor,
        anchor_loss: Callable[..., tuple[Tensor, ...]],
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        valid = (chosen >= 0).all(1)
        scale = ranks.world() / valid.sum().clamp_min(1).to(rows.dtype)
        far, near = chosen[batch.own].clamp_min(0).unbind(1)
        own = valid[batch.own]
        each, active, to_positive, to_negative = anchor_loss(batch.refs[batch.own], batch.refs[far], batch.refs[near])
        ctx.save_for_backward(batch.refs, chosen, valid, scale)
        ctx.rest = batch.offset, batch.rows, anchor_loss
        count = own.sum().clamp_min(1)
        stats = (
            (active & own).sum() / count,
            (to_positive * own).sum() / count,
            (to_negative * own).sum() / count,
        )
        ctx.mark_non_differentiable(*stats)
        return (each * own).sum() * scale, *stats

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor, None, None, None]:
        refs, chosen, valid, scale = ctx.saved_tensors
        offset, count, anchor_loss = ctx.rest
        triplets = torch.cat([torch.arange(len(refs), device=refs.device)[:, None], chosen], 1)
        ours = ((triplets >= offset) & (triplets < offset + count)).any(1) & valid
        triplets = triplets[ours]
        corners = [refs[triplets[:, k]].requires_grad_() for k in range(3)]
        with torch.enable_grad(), torch.autocast(grad.device.type, enabled=False):
            loss = anchor_loss(*corners)[0].sum()
        dz = torch.zeros_like(refs[:count])
        for k, by in enumerate(torch.autograd.grad(loss, corners)):
            at = triplets[:, k] - offset
            here = (at >= 0) & (at < count)
            dz.index_add_(0, at[here], by[here])
        return dz * (scale * grad), None, None, None
