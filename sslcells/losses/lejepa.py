"""LeJEPA: views are near their mean, and rows along random directions are distributed as a standard normal."""

from typing import Any, final

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from sslcells.losses._rows import at_least_float32, row_std
from sslcells.losses.redundancy import totals


@final
class LeJEPALoss(nn.Module):
    """Prediction and SIGReg over the global batch, arXiv 2511.08544.

    (1 − weight) · mean squared distance of every view from the mean of the image's global views, over dimensions too,
    + weight · mean over views of SIGReg. SIGReg of N rows is the mean, over random unit directions, of the Epps–Pulley
    statistic of the rows' projections: N ∫ |φ̂(t) − φ(t)|² φ(t) dt over [−5, 5], where φ̂ is their characteristic
    function and φ(t) = exp(−t²/2) that of a standard normal, by the trapezoidal rule. The integrand is even, so that
    only t ≥ 0 are computed.

    Where torch.distributed is initialised, N rows are those of all ranks, which may have different numbers of them: the
    sums of cosines and sines are summed over ranks. The value is the same on every rank, and DDP's mean of gradients is
    the gradient of one process. Backward needs no collective. Sums are in float32 (float64 stays), also under autocast;
    memory is that of the rows and their projections, not of the knots.

    After each call `stats` holds detached scalars: `prediction` and `sigreg` (before their weights) and `row_std`, that
    of this rank's first view, 0 for collapsed rows.

    Example:
        >>> one, apart = torch.zeros(1, 64, 2), torch.randn(1, 64, 2, generator=torch.Generator().manual_seed(0))
        >>> loss = LeJEPALoss(weight=1.0)
        >>> bool(loss(one, seed=0) > 20 * loss(apart, seed=0))  # collapsed rows are far from a normal distribution
        True
    """

    def __init__(self, weight: float = 0.05, slices: int = 1024, knots: int = 17) -> None:
        super().__init__()
        if not 0 <= weight <= 1:
            raise ValueError(f"weight={weight} is not in 0..1")
        if slices < 1 or knots < 3 or not knots % 2:
            raise ValueError(f"slices={slices} must be at least 1, and knots={knots} odd and at least 3")
        self.weight, self.slices, self.knots = weight, slices, knots
        self.stats: dict[str, Tensor] = {}

    def forward(self, z: Tensor, seed: int, global_views: int | None = None) -> Tensor:
        """Loss of V views of the same images, (V, B, D), of any norm.

        Args:
            z: rows of all views, those of the global views first.
            seed: of the random directions; every rank must pass the same, and each step another.
            global_views: how many views make the mean that all views predict; None for all.

        Raises:
            ValueError: for rows that are not (V, B, D), or fewer than two images in the world.
        """
        if z.ndim != 3 or not len(z) or not z.shape[2]:
            raise ValueError(f"z must be (V, B, D), of one view and one number at least; it is {tuple(z.shape)}")
        with torch.autocast(z.device.type, enabled=False):
            z = at_least_float32(z)
            along = z @ directions(z.shape[2], self.slices, seed).to(z)  # (V, B, M)
            t, phi, step = self._knots(z)
            cosines, sines = _Sums.apply(along, t)  # (T, V, M)
            centre = z[:global_views].mean(0)  # (B, D)
            count = z.new_tensor(float(z.shape[1]))
            cosines, sines, apart, count = totals(cosines, sines, (z - centre).square().sum(), count)
            if z.shape[1] < 2 and count < 2:  # reads the device only where a rank has so few
                raise ValueError(f"statistics of {int(count)} image in the global batch: there must be two")
            error = (cosines / count - phi[:, None, None]).square() + (sines / count).square()
            sigreg = count * torch.einsum("t,tvm->", 2 * step * phi, error) / error[0].numel()
            prediction = apart / (count * len(z) * z.shape[2])
            loss: Tensor = (1 - self.weight) * prediction + self.weight * sigreg
        self.stats = {"prediction": prediction.detach(), "sigreg": sigreg.detach(), "row_std": row_std(z[0])}
        return loss

    def _knots(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The knots t ≥ 0, φ(t), and the part of the trapezoidal rule's steps at t ≥ 0: (T,) each."""
        t = torch.linspace(0, _REACH, self.knots // 2 + 1, dtype=z.dtype, device=z.device)
        step = torch.full_like(t, _REACH / (len(t) - 1))
        step[0] /= 2
        step[-1] /= 2
        return t, (-t.square() / 2).exp(), step


_REACH = 5.0
"""the statistic is integrated over −5 to 5"""


def directions(dimension: int, count: int, seed: int) -> Tensor:
    """Random unit directions as columns, (D, M) float64: the same on every rank and device for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(dimension, count, generator=generator, dtype=torch.float64)
    columns: Tensor = drawn / drawn.norm(dim=0)
    return columns


class _Sums(torch.autograd.Function):
    """Σ cos(t·x) and Σ sin(t·x) over this rank's rows: (V, B, M), (T,) → (T, V, M) each; one knot at a time."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, t)
        cosines, sines = x.new_empty((2, len(t), len(x), x.shape[2]))
        for i, knot in enumerate(t):
            torch.sum(torch.cos(x * knot), 1, out=cosines[i])
            torch.sum(torch.sin(x * knot), 1, out=sines[i])
        return cosines, sines

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_cosine: Tensor, by_sine: Tensor) -> tuple[Tensor, None]:
        x, t = ctx.saved_tensors
        grad = torch.zeros_like(x)
        for i, knot in enumerate(t):
            angle = x * knot
            grad.addcmul_(angle.cos(), (knot * by_sine[i])[:, None])
            grad.addcmul_(angle.sin_(), (knot * by_cosine[i])[:, None], value=-1)
        return grad, None
