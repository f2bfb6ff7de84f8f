"""VICReg and Barlow Twins: losses on the dimensions of the rows over the global batch.

Both are functions of sums over the images: of rows, (D,), and of products of centred rows, (D, D). Summed over ranks
they equal those of one process, and so do the loss and its gradient. There are two rounds of sums, of rows and then of
products of rows minus their mean, because Σz² − (Σz)²/n cancels in float32.
"""

from typing import NamedTuple, final

import torch
from torch import Tensor, nn

from sslcells import ranks
from sslcells.losses._rows import at_least_float32, check_views


@final
class VICRegLoss(nn.Module):
    """Variance, invariance and covariance over the global batch, arXiv 2105.04906, eq. 6.

    invariance · mean‖z0 − z1‖² / D  +  variance · (v(z0) + v(z1))  +  covariance · (c(z0) + c(z1)). v is the mean over
    dimensions of max(0, 1 − std) (eq. 1), c the sum of the squared covariances of two different dimensions / D (eq. 4).
    The first term is divided by D as in the paper's algorithm 1, which the weights belong to; eq. 5 does not divide.
    The authors' code halves v.

    Where torch.distributed is initialised, the batch is that of all ranks, which may have different numbers of rows.
    The value is the same on every rank, and DDP's mean of gradients is the gradient of one process. Backward needs no
    collective. Sums are in float32 (float64 stays), also under autocast; memory O(D²).

    After each call `stats` holds detached scalars: `invariance`, `variance`, `covariance` (before their weights) and
    `std`, the mean standard deviation of a dimension, 0 for collapsed rows.

    Example:
        >>> z = torch.tensor([[2.0, 0.0], [-2.0, 0.0], [0.0, 2.0], [0.0, -2.0]])
        >>> loss = VICRegLoss()  # equal views, std above 1, no covariance
        >>> print(f"{loss(z, z):.3f}")
        0.000
        >>> print(f"{loss(z, z + 1):.3f}")  # 25 · mean squared difference
        25.000
    """

    def __init__(
        self, invariance: float = 25.0, variance: float = 25.0, covariance: float = 1.0, *, epsilon: float = 1e-4
    ) -> None:
        super().__init__()
        for name, weight in (("invariance", invariance), ("variance", variance), ("covariance", covariance)):
            if weight < 0:
                raise ValueError(f"{name}={weight} is negative")
        self.invariance, self.variance, self.covariance, self.epsilon = invariance, variance, covariance, epsilon
        self.stats: dict[str, Tensor] = {}

    def forward(self, z0: Tensor, z1: Tensor) -> Tensor:
        """Loss of two views of the same images, (B, D) each, of any norm.

        Raises:
            ValueError: for views that are not both (B, D), or fewer than two images in the world.
        """
        with torch.autocast(z0.device.type, enabled=False):
            first, second, count = centred(z0, z1)
            products = torch.stack([first.T @ first, second.T @ second])
            difference = (at_least_float32(z0) - at_least_float32(z1)).square().sum()
            products, difference = totals(products, difference)
            covariance = products / (count - 1)  # (2, D, D)
            std = (covariance.diagonal(dim1=1, dim2=2) + self.epsilon).sqrt()  # (2, D)
            width = std.shape[1]
            invariance = difference / (count * width)
            variance = (1 - std).clamp_min(0).mean(1).sum()
            redundancy = off_diagonal(covariance).square().sum() / width
            loss = self.invariance * invariance + self.variance * variance + self.covariance * redundancy
        self.stats = {
            "invariance": invariance.detach(),
            "variance": variance.detach(),
            "covariance": redundancy.detach(),
            "std": std.detach().mean(),
        }
        return loss


@final
class BarlowTwinsLoss(nn.Module):
    """Redundancy reduction over the global batch, arXiv 2103.03230, eq. 1 and 2.

    Σ_i (1 − C_ii)² + λ Σ_i Σ_{j≠i} C_ij², where C_ij is the correlation of dimension i of one view with dimension j of
    the other. Ranks, precision and memory as in VICRegLoss.

    After each call `stats` holds detached scalars: `on_diagonal` and `off_diagonal` (before its weight), and `std`, the
    mean standard deviation of a dimension.

    Example:
        >>> z = torch.tensor([[2.0, 0.0], [-2.0, 0.0], [0.0, 2.0], [0.0, -2.0]])
        >>> print(f"{BarlowTwinsLoss()(z, z):.3f}")
        0.000
        >>> print(f"{BarlowTwinsLoss()(z, -z):.3f}")  # both correlations are −1
        8.000
    """

    def __init__(self, off_diagonal: float = 0.005, *, epsilon: float = 1e-5) -> None:
        super().__init__()
        if off_diagonal < 0:
            raise ValueError(f"off_diagonal={off_diagonal} is negative")
        self.off_diagonal, self.epsilon = off_diagonal, epsilon
        self.stats: dict[str, Tensor] = {}

    def forward(self, z0: Tensor, z1: Tensor) -> Tensor:
        """Loss of two views of the same images, (B, D) each; raises as VICRegLoss does."""
        with torch.autocast(z0.device.type, enabled=False):
            first, second, count = centred(z0, z1)
            both = torch.stack([first, second])
            products, squares = totals(first.T @ second, both.square().sum(1))
            std = (squares / count + self.epsilon).sqrt()  # (2, D); BatchNorm's, which the authors' code divides by
            correlation = products / count / (std[0][:, None] * std[1])  # (D, D)
            on_diagonal = (1 - correlation.diagonal()).square().sum()
            redundancy = off_diagonal(correlation).square().sum()
            loss = on_diagonal + self.off_diagonal * redundancy
        self.stats = {
            "on_diagonal": on_diagonal.detach(),
            "off_diagonal": redundancy.detach(),
            "std": std.detach().mean(),
        }
        return loss


class Centred(NamedTuple):
    """Two views minus the mean of the global batch."""

    first: Tensor
    """(B, D)"""
    second: Tensor
    """(B, D)"""
    images: Tensor
    """() number of images in the world"""


def centred(z0: Tensor, z1: Tensor) -> Centred:
    """Both views (B, D) in float32 (float64 stays) minus their global means.

    The means carry no gradient: the gradient of a sum of products of centred rows by a mean is 0, as centred rows add
    up to 0.
    """
    check_views(z0, z1)
    z = torch.stack([z0, z1])
    z = at_least_float32(z)
    sums, count = totals(z.detach().sum(1), z.new_tensor(float(len(z0))))
    if len(z0) < 2 and count < 2:  # reads the device only where a rank has so few
        raise ValueError(f"statistics of {int(count)} image in the global batch: there must be two")
    first, second = z - (sums / count)[:, None]
    return Centred(first, second, count)


def totals(*parts: Tensor) -> list[Tensor]:
    """Sums over ranks of tensors of one dtype, in one collective."""
    whole = ranks.total(torch.cat([part.flatten() for part in parts]))
    pieces = torch.split(whole, [part.numel() for part in parts])
    return [piece.view_as(part) for piece, part in zip(pieces, parts, strict=True)]


def off_diagonal(x: Tensor) -> Tensor:
    """(..., D, D) with zeros in place of the diagonal."""
    return x * (1 - torch.eye(x.shape[-1], dtype=x.dtype, device=x.device))
