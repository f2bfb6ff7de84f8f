"""NT-Xent, SupCon and their relatives over the global batch: exact, linear in memory, no collective in the backward.

The losses see a row only through S_i(t) = Σ_j exp(t · (cos_ij − 1)) over the references that count, at one or two
inverse temperatures t, and through its mean similarity to its positives, p_i. Any function ℓ of these is served by one
scheme: with g_i = ∂ℓ_i/∂S_i and h_i = ∂ℓ_i/∂p_i, which every rank knows for its own rows after the forward pass and
gathers (2 or 3 floats a row), and m_i the mean of z_j over the positives of i,

    dz_i = Σ_t t · Σ_j E_ij(t) (g_i + g_j) z_j + (1/τ) · (h_i m_i + mean_{j ∈ P_i} h_j z_j)

is the whole gradient of row i, as an anchor and as everyone else's reference: E is symmetric, so one product does both.
The losses depend on cosines over τ alone, so ∂ℓ/∂(1/τ) = τ/2 · Σ_i z_i·dz_i (Euler): a learned temperature is free.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from sslcells import ranks
from sslcells.losses._rows import (
    Gathered,
    Groups,
    Pairs,
    Positives,
    check_ids,
    codes,
    gather_groups,
    gather_rows,
    log1p_exp,
    sound,
    unit,
)
from sslcells.losses.engine import Precision, row_sums, weighted_rows
from sslcells.losses.torch_engine import Exclude

RowLoss = Callable[[Sequence[Tensor], Tensor], Tensor]
"""(log Σ_j exp(t · cos_ij) for each t, mean positive cos/τ), all (A,) → the loss of each anchor, (A,)"""

FLOAT32_INV_T = 40.0
"""exp(−2/τ), the smallest summand, is a normal float32 number up to here; beyond, tiles are computed in float64."""


class _ContrastiveLoss(nn.Module):
    """Temperature, precision and figures, which the losses have in common.

    Where torch.distributed is initialised every rank's rows are references; alone, the local ones. The value is the sum
    over this rank's valid anchors × world / valid anchors in the world: its mean over ranks is the loss of the global
    batch, and DDP's mean of gradients is that loss's gradient. Rows are normalised, and similarities accumulated, in
    float32 (float64 for float64 rows) whatever autocast says.

    `stats` holds detached scalars of this rank after each call: `positive_cosine` and `reference_cosine`, the mean
    cosine to the positives and to all other rows; `top1`, the share of anchors with a positive nearer than every
    negative; and a learned `temperature`.
    """

    def __init__(self, temperature: float = 0.1, *, learnable: bool = False, precision: Precision = "bf16") -> None:
        """Set up the loss.

        Args:
            temperature: τ, 0.003 to 100.
            learnable: learn 1/τ, as the parameter `log_inv_t`; costs one synchronisation with the device a step.
            precision: of the fused GPU kernels' products.
        """
        super().__init__()
        if not 0.003 <= temperature <= 100:
            raise ValueError(f"temperature={temperature} is outside 0.003..100")
        log_inv_t = torch.tensor(-math.log(temperature))
        self._temperature = temperature
        self.log_inv_t = nn.Parameter(log_inv_t) if learnable else None
        self.precision: Precision = precision
        self.stats: dict[str, Tensor] = {}

    @property
    def temperature(self) -> float:
        """τ; a learned one is kept within 0.003..100, and is NaN where what was learned is."""
        if self.log_inv_t is None:
            return self._temperature
        log_t = -self.log_inv_t.item()
        if not math.isfinite(log_t):
            return math.nan
        return min(100.0, max(0.003, math.exp(min(log_t, 10.0))))

    def _scales(self) -> Sequence[float]:
        """Factors of 1/τ at which the row sums are wanted."""
        return (1.0,)

    def _pairs(self, z0: Tensor, z1: Tensor, source: Tensor | None, row_loss: RowLoss) -> Tensor:
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
            exclude = Exclude(partner, image.int(), codes(ranks.gather(source.repeat(2))))
        return self._contrast(rows, batch, Pairs(partner), exclude, row_loss)

    def _groups(self, z: Tensor, positive: Tensor, source: Tensor | None, row_loss: RowLoss) -> Tensor:
        rows, batch, group, sources = gather_groups(z, positive, source)
        exclude = Exclude(None, group, sources) if sources is not None else Exclude()
        return self._contrast(rows, batch, Groups(group), exclude, row_loss)

    def _contrast(
        self, rows: Tensor, batch: Gathered, positives: Positives, exclude: Exclude, row_loss: RowLoss
    ) -> Tensor:
        task = _Task(positives, exclude, 1 / self.temperature, self._scales(), row_loss, self.precision)
        with torch.autocast(rows.device.type, enabled=False):
            loss: Tensor
            loss, positive_cosine, top1 = _Contrast.apply(rows, self.log_inv_t, batch, task)
            loss = loss * sound(batch.refs)
            reference_cosine = (rows.detach() @ batch.refs.sum(0) - 1).mean() / max(1, len(batch.refs) - 1)
        self.stats = {"positive_cosine": positive_cosine, "reference_cosine": reference_cosine, "top1": top1}
        if self.log_inv_t is not None:
            self.stats["temperature"] = (-self.log_inv_t.detach()).exp()
        return loss


class NTXentLoss(_ContrastiveLoss):
    """NT-Xent over the global batch (arXiv 2002.05709, eq. 1).

    The mean over the 2B anchors of each rank; for ranks, `learnable`, `precision` and `stats` see the base class.
    """

    def forward(self, z0: Tensor, z1: Tensor, source: Tensor | None = None) -> Tensor:
        """Loss of two views.

        Args:
            z0: (B, D) rows of the first view, of any norm.
            z1: (B, D) rows of the second view; z1[b] shows the same image as z0[b].
            source: (B,) int64; rows of equal source that are not the two views of one image are no negatives.

        Raises:
            ValueError: for shapes that do not fit, no rows, or numbers of rows that differ between ranks.
        """
        return self._pairs(z0, z1, source, _nt_xent)


class DCLLoss(_ContrastiveLoss):
    """Decoupled contrastive loss (arXiv 2110.06848, eq. 3): NT-Xent with the positive left out of the denominator.

    An anchor without a negative has a loss of 0: there is nothing for its positive to be nearer than.
    """

    def forward(self, z0: Tensor, z1: Tensor, source: Tensor | None = None) -> Tensor:
        """Loss of two views; arguments and errors as in NTXentLoss."""
        return self._pairs(z0, z1, source, _decoupled)


class HardNegativeLoss(_ContrastiveLoss):
    """NT-Xent that expects false negatives: debiased (arXiv 2007.00224, eq. 8), hard ones weighted up (2010.04592).

    A part `prior` of the negatives is taken to be of the anchor's own class, and their expected similarity is taken
    off the sum of the negatives, which is kept above its least possible value. With beta > 0 a negative weighs in
    proportion to exp(beta · cos/τ) (arXiv 2010.04592, eq. 4; the cosine over τ, as in its authors' code).
    """

    def __init__(
        self, temperature: float = 0.1, *, prior: float = 0.1, beta: float = 0.0, precision: Precision = "bf16"
    ) -> None:
        """Set up the loss: prior in [0, 1), beta ≥ 0; others as in NTXentLoss."""
        super().__init__(temperature, precision=precision)
        if not 0 <= prior < 1:
            raise ValueError(f"prior={prior} is outside [0, 1)")
        if beta < 0:
            raise ValueError(f"beta={beta} is negative")
        self.prior, self.beta = prior, beta

    def forward(self, z0: Tensor, z1: Tensor, source: Tensor | None = None) -> Tensor:
        """Loss of two views; arguments and errors as in NTXentLoss.

        The number of negatives N counts those that `source` leaves out too.
        """
        negatives = 2 * len(z0) * ranks.world() - 2
        return self._pairs(z0, z1, source, lambda logs, positive: self._row_loss(logs, positive, negatives))

    def _scales(self) -> Sequence[float]:
        return (1.0,) if self.beta == 0 else (1.0 + self.beta, self.beta)

    def _row_loss(self, logs: Sequence[Tensor], positive: Tensor, negatives: int) -> Tensor:
        if not negatives:
            return 0 * sum(logs, positive)
        log_n = math.log(negatives)
        log_sum = logs[0] if self.beta == 0 else logs[0] - logs[1] + log_n
        # log of max((Σ − prior · N · e^p) / (1 − prior), N · e^(−1/τ)), without leaving the logarithms
        share = positive - log_sum + log_n + (math.log(self.prior) if self.prior else -math.inf)
        rest = log_sum + torch.log1p(-share.clamp_max(-1e-6).exp()) - math.log1p(-self.prior)
        least = log_n - 1 / self.temperature
        return _nt_xent([torch.where(share < -1e-6, rest, -math.inf).clamp_min(least)], positive)


class SupConLoss(_ContrastiveLoss):
    """The supervised contrastive loss L_out over the global batch (arXiv 2004.11362, eq. 2).

    Rows of equal `positive` id are positives of each other: the class, or the image for SimCLR with any number of
    views. An anchor with no positive is left out of the mean; none left gives 0. For ranks, `learnable`, `precision`
    and `stats` see the base class.
    """

    def forward(self, z: Tensor, positive: Tensor, source: Tensor | None = None) -> Tensor:
        """Loss of rows with ids.

        Args:
            z: (A, D) rows of any norm.
            positive: (A,) int64 ids; a negative id has no positives and is a negative of every row.
            source: (A,) int64; rows of equal source that are not positives are no negatives either.

        Raises:
            ValueError: for shapes that do not fit, no rows, or numbers of rows that differ between ranks.
        """
        return self._groups(z, positive, source, _sup_con)


def _nt_xent(logs: Sequence[Tensor], positive: Tensor) -> Tensor:
    """−log(e^p / (e^p + Σ_negatives)), the positive kept out of the sum: no cancellation when the loss is small."""
    return log1p_exp(logs[0] - positive)


def _decoupled(logs: Sequence[Tensor], positive: Tensor) -> Tensor:
    """−log(e^p / Σ_negatives)."""
    return logs[0] - positive


def _sup_con(logs: Sequence[Tensor], positive: Tensor) -> Tensor:
    """Mean over the positives of −log(e^s / Σ_all); the mean of s is all that is needed of them."""
    return logs[0] - positive


class _Task(NamedTuple):
    """What is computed of the rows."""

    positives: Positives
    exclude: Exclude
    inv_t: float
    scales: Sequence[float]
    row_loss: RowLoss
    precision: Precision


class _Contrast(torch.autograd.Function):
    """Loss of this rank's rows, (A, D) unit → scalar, with the whole gradient of each row in its backward."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, log_inv_t: Tensor | None, batch: Gathered, task: _Task
    ) -> tuple[Tensor, Tensor, Tensor]:
        inv_ts = [task.inv_t * scale for scale in task.scales]
        refs = batch.refs if max(inv_ts) <= FLOAT32_INV_T else batch.refs.double()
        group = task.positives.code if isinstance(task.positives, Groups) else None
        found = [
            row_sums(refs, batch.offset, batch.rows, t, task.exclude, None if k else group, task.precision)
            for k, t in enumerate(inv_ts)
        ]
        mean = task.positives.mean(refs, batch.own)
        cosine = (refs[batch.own] * mean).sum(1)
        known = task.positives.known()
        scale = ranks.world() / known.sum().clamp_min(1).to(refs.dtype)
        with torch.enable_grad():
            sums, positive = [s.total.requires_grad_() for s in found], (task.inv_t * cosine).requires_grad_()
            tiny = torch.finfo(refs.dtype).tiny
            logs = [s.clamp_min(tiny).log() + t for s, t in zip(sums, inv_ts, strict=True)]
            counts = known[batch.own]
            if task.row_loss is _decoupled:
                counts = counts & (sums[0] > 0)
            loss = torch.where(counts, task.row_loss(logs, positive), 0.0).sum()
        if any(ctx.needs_input_grad):
            by = torch.autograd.grad(loss, [*sums, positive])
            ctx.save_for_backward(refs, ranks.gather(torch.stack(by, 1)), scale)
            ctx.rest = batch.offset, batch.rows, task, inv_ts
        positive_cosine = cosine.sum() / known[batch.own].sum().clamp_min(1)
        nearest = (inv_ts[0] * (cosine - 1)).exp() if group is None else found[0].largest
        right = (found[0].largest_negative < nearest) & known[batch.own]
        top1 = right.sum() / known[batch.own].sum().clamp_min(1)
        ctx.mark_non_differentiable(positive_cosine, top1)
        return (loss.detach() * scale).to(rows.dtype), positive_cosine, top1

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        refs, by, scale = ctx.saved_tensors
        offset, count, task, inv_ts = ctx.rest
        own = slice(offset, offset + count)
        *by_sums, by_positive = by.unbind(1)
        by_positive = by_positive[:, None]
        with torch.autocast(grad.device.type, enabled=False):
            mean = task.positives.mean
            dz = task.inv_t * (by_positive[own] * mean(refs, own) + mean(by_positive * refs, own))
            for t, by_sum in zip(inv_ts, by_sums, strict=True):
                dz += t * weighted_rows(refs, offset, count, t, by_sum.contiguous(), task.exclude, task.precision)
            dz *= scale * grad
        by_log_inv_t = (refs[own] * dz).sum() / 2 if ctx.needs_input_grad[1] else None
        return dz.to(grad.dtype), by_log_inv_t, None, None
