"""NT-Xent and SupCon over the global batch: exact, linear in memory, and without a collective in the backward pass.

Both losses see a row only through S_i = Σ_j exp((cos_ij − 1)/τ) over the references that count, and through its mean
similarity to its positives, p_i. Any function ℓ(S_i, p_i) is served by one scheme: with g_i = ∂ℓ_i/∂S_i and
h_i = ∂ℓ_i/∂p_i, which every rank knows for its own rows after the forward pass and gathers (2 floats a row),

    dz_i = (1/τ) · [ Σ_j E_ij (g_i + g_j) z_j + h_i m_i + mean_{j ∈ P_i} h_j z_j ],   m_i = mean_{j ∈ P_i} z_j

is the whole gradient of row i, as an anchor and as everyone else's reference: E is symmetric, so one product does both.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from sslcells import distributed
from sslcells.losses._rows import Gathered, Groups, Pairs, Positives, check_ids, codes, gather_rows, log1p_exp, unit
from sslcells.losses.torch_engine import Exclude, row_sums, weighted_rows

RowLoss = Callable[[Tensor, Tensor], Tensor]
"""(log Σ_j exp(s_ij), mean positive s_i), both (A,) → the loss of each anchor, (A,)"""

FLOAT32_INV_T = 40.0
"""exp(−2/τ), the smallest summand, is a normal float32 number up to here; beyond, tiles are computed in float64."""


class NTXentLoss(nn.Module):
    """NT-Xent over the global batch (arXiv 2002.05709, eq. 1).

    Where torch.distributed is initialised every rank's rows are negatives; alone, the local ones. The value is the mean
    over this rank's 2B anchors; its mean over ranks is the loss of the global batch, and DDP's mean of gradients is
    that loss's gradient.

    `stats` holds, after each call, detached scalars of this rank: `positive_cosine` and `reference_cosine` (mean
    cosine to the positive, and to all other rows).
    """

    def __init__(self, temperature: float = 0.1) -> None:
        super().__init__()
        self.temperature = _checked(temperature)
        self.stats: dict[str, Tensor] = {}

    def forward(self, z0: Tensor, z1: Tensor, source: Tensor | None = None) -> Tensor:
        """Loss of two views.

        Args:
            z0: (B, D) rows of the first view, of any norm.
            z1: (B, D) rows of the second view; z1[b] shows the same image as z0[b].
            source: (B,) int64; rows of equal source that are not the two views of one image are no negatives.

        Raises:
            ValueError: for shapes that do not fit, or numbers of rows that differ between ranks.
        """
        if z0.shape != z1.shape or z0.ndim != 2:
            raise ValueError(f"z0 and z1 must both be (B, D); they are {tuple(z0.shape)} and {tuple(z1.shape)}")
        images = len(z0)
        check_ids(source, images, "source")
        rows = unit(torch.cat([z0, z1]))
        batch = gather_rows(rows)
        row = torch.arange(len(batch.refs), device=z0.device)
        partner = torch.where(row % (2 * images) < images, row + images, row - images)
        exclude = Exclude(partner)
        if source is not None:
            image = row % images + row // (2 * images) * images
            sources = distributed.gather(source.repeat(2))
            exclude = Exclude(partner, image.int(), codes(sources))
        loss, self.stats = _contrast(rows, batch, Pairs(partner), exclude, self.temperature, _nt_xent)
        return loss


class SupConLoss(nn.Module):
    """The supervised contrastive loss L_out over the global batch (arXiv 2004.11362, eq. 2).

    Rows of equal `positive` id are positives of each other: the class, or the image for SimCLR with any number of
    views. An anchor with no positive is left out of the mean; none left gives 0. Ranks as in NTXentLoss: the value is
    the sum over this rank's valid anchors × world / valid anchors in the world. `stats` as in NTXentLoss.
    """

    def __init__(self, temperature: float = 0.1) -> None:
        super().__init__()
        self.temperature = _checked(temperature)
        self.stats: dict[str, Tensor] = {}

    def forward(self, z: Tensor, positive: Tensor, source: Tensor | None = None) -> Tensor:
        """Loss of rows with ids.

        Args:
            z: (A, D) rows of any norm.
            positive: (A,) int64 ids; a negative id has no positives and is a negative of every row.
            source: (A,) int64; rows of equal source that are not positives are no negatives either.

        Raises:
            ValueError: for shapes that do not fit, or numbers of rows that differ between ranks.
        """
        if z.ndim != 2:
            raise ValueError(f"z must be (A, D); it is {tuple(z.shape)}")
        check_ids(positive, len(z), "positive")
        check_ids(source, len(z), "source")
        rows = unit(z)
        batch = gather_rows(rows)
        group = codes(distributed.gather(positive))
        exclude = Exclude(None, group, codes(distributed.gather(source))) if source is not None else Exclude()
        loss, self.stats = _contrast(rows, batch, Groups(group), exclude, self.temperature, _sup_con)
        return loss


def _nt_xent(log_negatives: Tensor, positive: Tensor) -> Tensor:
    """−log(e^p / (e^p + Σ_negatives)), the positive kept out of the sum: no cancellation when the loss is small."""
    return log1p_exp(log_negatives - positive)


def _sup_con(log_all: Tensor, positive: Tensor) -> Tensor:
    """Mean over the positives of −log(e^s / Σ_all); the mean of s is all that is needed of them."""
    return log_all - positive


def _contrast(
    rows: Tensor,
    batch: Gathered,
    positives: Positives,
    exclude: Exclude,
    temperature: float,
    row_loss: RowLoss,
) -> tuple[Tensor, dict[str, Tensor]]:
    with torch.autocast(rows.device.type, enabled=False):
        loss, positive_cosine = _Contrast.apply(rows, batch, positives, exclude, 1 / temperature, row_loss)
        reference_cosine = (rows.detach() @ batch.refs.sum(0) - 1).mean() / max(1, len(batch.refs) - 1)
    return loss, {"positive_cosine": positive_cosine, "reference_cosine": reference_cosine}


class _Contrast(torch.autograd.Function):
    """Loss of this rank's rows, (A, D) unit → scalar, with the whole gradient of each row in its backward."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        batch: Gathered,
        positives: Positives,
        exclude: Exclude,
        inv_t: float,
        row_loss: RowLoss,
    ) -> tuple[Tensor, Tensor]:
        refs = batch.refs if inv_t <= FLOAT32_INV_T else batch.refs.double()
        sums = row_sums(refs, batch.offset, batch.rows, inv_t, exclude)
        mean = positives.mean(refs, batch.own)
        positive = inv_t * (refs[batch.own] * mean).sum(1)
        known = positives.known()
        scale = distributed.world() / known.sum().clamp_min(1).to(refs.dtype)
        with torch.enable_grad():
            s, p = sums.requires_grad_(), positive.requires_grad_()
            log_sum = s.clamp_min(torch.finfo(s.dtype).tiny).log() + inv_t
            loss = torch.where(known[batch.own], row_loss(log_sum, p), 0.0).sum()
        if rows.requires_grad:
            by_sum, by_positive = torch.autograd.grad(loss, (s, p))
            ctx.save_for_backward(refs, distributed.gather(torch.stack([by_sum, by_positive], 1)), scale)
            ctx.rest = batch.offset, batch.rows, positives, exclude, inv_t
        positive_cosine = positive.detach().sum() / (inv_t * known[batch.own].sum().clamp_min(1))
        ctx.mark_non_differentiable(positive_cosine)
        return (loss.detach() * scale).to(rows.dtype), positive_cosine

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        refs, by, scale = ctx.saved_tensors
        offset, count, positives, exclude, inv_t = ctx.rest
        own = slice(offset, offset + count)
        by_sum, by_positive = by[:, 0], by[:, 1, None]
        with torch.autocast(grad.device.type, enabled=False):
            dz = weighted_rows(refs, offset, count, inv_t, by_sum, exclude)
            dz += by_positive[own] * positives.mean(refs, own) + positives.mean(by_positive * refs, own)
        return (dz * (inv_t * scale * grad)).to(grad.dtype), None, None, None, None, None


def _checked(temperature: float) -> float:
    if not 0.003 <= temperature <= 100:
        raise ValueError(f"temperature={temperature} is outside 0.003..100")
    return temperature
