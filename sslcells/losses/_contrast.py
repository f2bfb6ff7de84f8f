"""One scheme for NT-Xent, SupCon and their relatives: exact, linear in memory, no collective in the backward.

These losses see row i only through S_i(t) = Σ_j exp(t · (cos_ij − 1)) over the references that count, at one or two
inverse temperatures t, and through p_i, its mean similarity to its positives. For any function ℓ of these, let
g_i = ∂ℓ_i/∂S_i and h_i = ∂ℓ_i/∂p_i, which each rank computes for its own rows in the forward pass and gathers (2 or 3
floats a row), let m_i be the mean of z_j over the positives of i, and E_ij(t) = exp(t · (cos_ij − 1)). Then

    dz_i = Σ_t t · Σ_j E_ij(t) (g_i + g_j) z_j + (1/τ) · (h_i m_i + mean_{j ∈ P_i} h_j z_j)

is the whole gradient of row i, as an anchor and as a reference of all others: E is symmetric, so one product does both.
Where float32 has no number for each summand, S_i comes divided by its row's largest summand, 2^shift_i, and g_i is the
derivative by that: the shifts are gathered with the g, and the kernels divide E by them before it meets the weights.
The losses depend on cos/τ only, so ∂ℓ/∂(1/τ) = τ/2 · Σ_i z_i·dz_i (Euler): learning the temperature costs nothing.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sslcells import ranks
from sslcells.losses._rows import Gathered
from sslcells.losses.engine import Precision, accurate, row_sums, weighted_rows
from sslcells.losses.positives import Positives
from sslcells.losses.torch_engine import Exclude


class Objective(NamedTuple):
    """ℓ: what a loss computes for each anchor."""

    row_loss: Callable[[Sequence[Tensor], Tensor], Tensor]
    """(log Σ_j exp(t · cos_ij) for each t, mean positive cos/τ), (A,) each → the loss of each anchor, (A,)"""
    scales: Sequence[float] = (1.0,)
    """the t, as factors of 1/τ"""
    needs_negatives: bool = False
    """an anchor without negatives has a loss of 0"""


class Task(NamedTuple):
    """What to compute from the rows."""

    objective: Objective
    positives: Positives
    exclude: Exclude
    inv_t: float
    precision: Precision
    figures: bool
    """compute the fraction of anchors with a positive nearer than all negatives"""


class Contrast(torch.autograd.Function):
    """Loss of this rank's unit rows, (A, D) → scalar; backward gives the whole gradient of each row.

    Also returns the mean cosine to the positives and, with `figures`, the fraction of anchors with a positive nearer
    than all negatives (else 0).
    """

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, log_inv_t: Tensor | None, batch: Gathered, task: Task
    ) -> tuple[Tensor, Tensor, Tensor]:
        objective, group = task.objective, task.positives.groups()
        inv_ts = [task.inv_t * scale for scale in objective.scales]
        refs = accurate(batch.refs, max(inv_ts))
        at = refs, batch.offset, batch.rows
        found = [
            row_sums(*at, t, task.exclude, group, task.precision, figures=task.figures and k == 0)
            for k, t in enumerate(inv_ts)
        ]
        mean = task.positives.mean(refs, batch.own)
        cosine = (refs[batch.own] * mean).sum(1)
        known = task.positives.known()
        scale = ranks.world() / known.sum().clamp_min(1).to(refs.dtype)
        with torch.enable_grad():
            sums, positive = [s.total.requires_grad_() for s in found], (task.inv_t * cosine).requires_grad_()
            tiny = torch.finfo(refs.dtype).tiny
            shifts = [0.0 if s.shift is None else s.shift * math.log(2) for s in found]
            logs = [s.clamp_min(tiny).log() + t + shift for s, t, shift in zip(sums, inv_ts, shifts, strict=True)]
            counts = known[batch.own]
            if objective.needs_negatives:
                counts = counts & (sums[0] > 0)
            loss = torch.where(counts, objective.row_loss(logs, positive), 0.0).sum()
        if any(ctx.needs_input_grad):
            by = torch.autograd.grad(loss, [*sums, positive])
            moved = [s.shift for s in found if s.shift is not None]
            ctx.save_for_backward(refs, ranks.gather(torch.stack([*by, *moved], 1)), scale)
            ctx.rest = batch.offset, batch.rows, task, inv_ts, [s.shift is not None for s in found]
        positive_cosine = cosine.sum() / known[batch.own].sum().clamp_min(1)
        top1 = torch.zeros_like(positive_cosine)
        largest, negative = found[0].largest, found[0].largest_negative
        if largest is not None and negative is not None:
            nearest = (inv_ts[0] * (cosine - 1) - shifts[0]).exp() if group is None else largest
            right = (negative < nearest) & known[batch.own]
            top1 = right.sum() / known[batch.own].sum().clamp_min(1)
        ctx.mark_non_differentiable(positive_cosine, top1)
        return (loss.detach() * scale).to(rows.dtype), positive_cosine, top1

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        refs, by, scale = ctx.saved_tensors
        offset, count, task, inv_ts, low = ctx.rest
        own = slice(offset, offset + count)
        columns = by.unbind(1)
        by_sums, by_positive, shifts = columns[: len(low)], columns[len(low)][:, None], iter(columns[len(low) + 1 :])
        with torch.autocast(grad.device.type, enabled=False):
            mean = task.positives.mean
            dz = task.inv_t * (by_positive[own] * mean(refs, own) + mean(by_positive * refs, own))
            for t, by_sum, shifted in zip(inv_ts, by_sums, low, strict=True):
                shift = next(shifts) if shifted else None
                at = refs, offset, count, t, by_sum.contiguous(), task.exclude, task.precision
                dz += t * weighted_rows(*at, shift)
            dz *= scale * grad
        by_log_inv_t = (refs[own] * dz).sum() / 2 if ctx.needs_input_grad[1] else None
        return dz.to(grad.dtype), by_log_inv_t, None, None
