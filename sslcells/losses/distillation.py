"""Distillation: a student's rows become like a teacher's features, or their similarities over the global batch."""

from typing import Literal, final

import torch
from torch import Tensor, nn

from sslcells.losses._rows import at_least_float32, unit
from sslcells.losses.redundancy import totals


@final
class FeatureDistillationLoss(nn.Module):
    """The distance of rows from a teacher's features, as a mean over the global batch (arXiv 1412.6550, eq. 3).

    `cosine`: 1 − cosine. `mse`: Σ‖z − t‖² / Σ‖t − mean t‖², the share of the features' variance that is not predicted,
    so that it does not depend on their scale; 1 for rows that are all the teacher's mean.

    Where torch.distributed is initialised, the batch is that of all ranks, which may have different numbers of rows.
    The value is the same on every rank, and DDP's mean of gradients is the gradient of one process. Sums are in float32
    (float64 stays), also under autocast; memory O(B·D). The teacher gets no gradient.

    After each call `stats` holds the detached scalar `cosine`, the mean cosine of a row and its feature.

    Example:
        >>> t = torch.tensor([[2.0, 0.0], [0.0, 2.0]])
        >>> print(f"{FeatureDistillationLoss()(3 * t, t):.3f}")  # the same directions
        0.000
        >>> print(f"{FeatureDistillationLoss('mse')(t.mean(0).expand(2, 2), t):.3f}")
        1.000
    """

    def __init__(self, distance: Literal["cosine", "mse"] = "cosine") -> None:
        super().__init__()
        if distance not in ("cosine", "mse"):
            raise ValueError(f"distance={distance!r} is neither cosine nor mse")
        self.distance = distance
        self.stats: dict[str, Tensor] = {}

    def forward(self, z: Tensor, target: Tensor) -> Tensor:
        """Rows (A, D) and the teacher's features (A, D), both of any norm → the loss, a scalar.

        Raises:
            ValueError: if they are not both (A, D).
        """
        if z.ndim != 2 or z.shape != target.shape:
            raise ValueError(f"rows and the teacher's features must both be (A, D); {_shapes(z, target)}")
        with torch.autocast(z.device.type, enabled=False):
            z, target = at_least_float32(z), at_least_float32(target.detach())
            cosine, error, sums, count = totals(
                (unit(z) * unit(target)).sum(), (z - target).square().sum(), target.sum(0), z.new_tensor(float(len(z)))
            )
            mean = cosine / count
            self.stats = {"cosine": mean.detach()}
            if self.distance == "cosine":
                return 1 - mean
            (spread,) = totals((target - sums.detach() / count).square().sum())
            return error / spread.detach().clamp_min(torch.finfo(spread.dtype).tiny)


@final
class SimilarityDistillationLoss(nn.Module):
    """1 − CKA of the similarity matrices of student and teacher over the global batch, arXiv 1905.00414, eq. 3.

    The matrices are of cosines, (R, R) each for the R rows of all ranks, and centred. They are compared as directions:
    0 where one is a multiple of the other. Neither is ever kept, as their inner products are sums of squares of
    products of features, (D, D'): memory O(D²), whatever the batch. So student and teacher may have different widths.

    Ranks and precision as in FeatureDistillationLoss; of fewer than three images CKA says nothing.

    After each call `stats` holds the detached scalar `cka`.

    Example:
        >>> t = torch.tensor([[2.0, 0.0], [-2.0, 0.0], [0.0, 2.0], [0.0, -2.0]])
        >>> turned = torch.cat([t, 0 * t], 1).roll(1, 1)  # other axes, and more of them
        >>> print(f"{SimilarityDistillationLoss()(turned, t):.3f}")
        0.000
    """

    def __init__(self) -> None:
        super().__init__()
        self.stats: dict[str, Tensor] = {}

    def forward(self, z: Tensor, target: Tensor) -> Tensor:
        """Rows (A, D) and the teacher's features (A, D'), both of any norm → the loss, a scalar.

        Raises:
            ValueError: if they are not (A, D) and (A, D').
        """
        if z.ndim != 2 or target.ndim != 2 or len(z) != len(target):
            raise ValueError(f"rows must be (A, D) and the teacher's features (A, D'); {_shapes(z, target)}")
        with torch.autocast(z.device.type, enabled=False):
            student = unit(z)
            teacher = unit(target.detach()).to(student.dtype)
            means = totals(student.detach().sum(0), teacher.sum(0), student.new_tensor(float(len(z))))
            # The means carry no gradient: that of products of centred rows by them is 0, as centred rows add up to 0.
            student, teacher = student - means[0] / means[2], teacher - means[1] / means[2]
            both, own, theirs = (
                product.square().sum()
                for product in totals(student.T @ teacher, student.T @ student, teacher.T @ teacher)
            )
            cka = both / (own * theirs).clamp_min(torch.finfo(own.dtype).tiny).sqrt()
        self.stats = {"cka": cka.detach()}
        return 1 - cka


def _shapes(z: Tensor, target: Tensor) -> str:
    return f"they are {tuple(z.shape)} and {tuple(target.shape)}"
