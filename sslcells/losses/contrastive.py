"""NT-Xent, decoupled, hard-negative and supervised contrastive losses over the global batch."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor, nn

from sslcells import ranks
from sslcells.losses._contrast import Contrast, Objective, Task
from sslcells.losses._rows import (
    Gathered,
    check_ids,
    check_views,
    codes,
    gather_codes,
    gather_groups,
    gather_rows,
    log1p_exp,
    sound,
    unit,
)
from sslcells.losses.engine import Precision
from sslcells.losses.positives import Groups, Pairs, Positives
from sslcells.losses.torch_engine import Exclude


class ContrastiveLoss(nn.Module, ABC):
    """Temperature, precision and figures: what the contrastive losses share.

    Where torch.distributed is initialised, the references are the rows of all ranks; otherwise the local ones. The
    value is the sum over this rank's valid anchors × world / valid anchors in the world: its mean over ranks is the
    loss of the global batch, and DDP's mean of gradients is the gradient of that loss. Rows are normalised, and
    similarities summed, in float32 (float64 for float64 rows), also under autocast.

    After each call `stats` holds detached scalars of this rank: `positive_cosine` and `reference_cosine`, the mean
    cosine to the positives and to all other rows; `top1`, the fraction of anchors with a positive nearer than all
    negatives; and a learned `temperature`. With `figures = False`, an attribute that may change between calls, `top1`
    is left out, and the search for the nearest rows with it; value and gradient are the same to the last bit.
    """

    figures = True

    def __init__(self, temperature: float = 0.1, *, learnable: bool = False, precision: Precision = "bf16") -> None:
        """Set up the loss.

        Args:
            temperature: τ, 0.003 to 100.
            learnable: learn log(1/τ), as the parameter `log_inv_t`; costs one synchronisation with the device a step.
            precision: of the products in the fused GPU kernels; bf16 stands for tf32 below a temperature of 0.025.
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
        """τ; a learned one is clamped to 0.003..100, and is NaN if the parameter is not finite."""
        if self.log_inv_t is None:
            return self._temperature
        log_t = -self.log_inv_t.item()
        if not math.isfinite(log_t):
            return math.nan
        return min(100.0, max(0.003, math.exp(min(log_t, 10.0))))

    @abstractmethod
    def forward(self, a: Tensor, b: Tensor, source: Tensor | None = None) -> Tensor:
        """The loss, a scalar, of two views, or of rows and their positive ids."""

    def _of_views(
        self, z0: Tensor, z1: Tensor, source: Tensor | None, objective: Objective, lab: Tensor | None = None
    ) -> Tensor:
        check_views(z0, z1)
        images = len(z0)
        check_ids(source, images, "source")
        check_ids(lab, images, "lab")
        rows = unit(torch.cat([z0, z1]))
        batch = gather_rows(rows)
        row = torch.arange(len(batch.refs), device=z0.device)
        partner = torch.where(row % (2 * images) < images, row + images, row - images)
        exclude = Exclude(partner)
        if source is not None or lab is not None:
            image = row % images + row // (2 * images) * images
            by_row = (None if ids is None else codes(ranks.gather(ids.repeat(2))) for ids in (source, lab))
            exclude = Exclude(partner, image.int(), *by_row)
        return self._contrast(rows, batch, Pairs(partner), exclude, objective)

    def _of_groups(
        self, z: Tensor, positive: Tensor, source: Tensor | None, lab: Tensor | None, objective: Objective
    ) -> Tensor:
        rows, batch, group, sources = gather_groups(z, positive, source)
        labs = gather_codes(lab, len(z), "lab")
        exclude = Exclude() if sources is None and labs is None else Exclude(None, group, sources, labs)
        return self._contrast(rows, batch, Groups(group), exclude, objective)

    def _contrast(
        self, rows: Tensor, batch: Gathered, positives: Positives, exclude: Exclude, objective: Objective
    ) -> Tensor:
        task = Task(objective, positives, exclude, 1 / self.temperature, self.precision, self.figures)
        with torch.autocast(rows.device.type, enabled=False):
            loss: Tensor
            loss, positive_cosine, top1 = Contrast.apply(rows, self.log_inv_t, batch, task)
            loss = loss * sound(batch.refs)
            reference_cosine = (rows.detach() @ batch.refs.sum(0) - 1).mean() / max(1, len(batch.refs) - 1)
        self.stats = {"positive_cosine": positive_cosine, "reference_cosine": reference_cosine}
        if self.figures:
            self.stats["top1"] = top1
        if self.log_inv_t is not None:
            self.stats["temperature"] = (-self.log_inv_t.detach()).exp()
        return loss


@final
class NTXentLoss(ContrastiveLoss):
    """NT-Xent over the global batch (arXiv 2002.05709, eq. 1): the mean over the 2B anchors of each rank.

    For ranks, `learnable`, `precision` and `stats` see ContrastiveLoss.

    Example:
        >>> z0, z1 = torch.eye(3), torch.eye(3)  # both views of an image agree, different images are orthogonal
        >>> loss = NTXentLoss(temperature=0.5)
        >>> print(f"{loss(z0, z1):.3f}")  # log(1 + 4 exp(−1/0.5))
        0.433
        >>> loss.stats["top1"].item()
        1.0
    """

    def forward(self, z0: Tensor, z1: Tensor, source: Tensor | None = None, lab: Tensor | None = None) -> Tensor:
        """Loss of two views.

        Args:
            z0: (B, D) rows of the first view, of any norm.
            z1: (B, D) rows of the second view; z1[b] shows the same image as z0[b].
            source: (B,) int64; rows of equal source that are not the two views of one image are not negatives.
            lab: (B,) int64; if given, only rows of equal lab are negatives; a negative id equals no other.

        Raises:
            ValueError: for shapes that do not fit, no rows, or numbers of rows that differ between ranks.
        """
        return self._of_views(z0, z1, source, Objective(_nt_xent), lab)


@final
class DCLLoss(ContrastiveLoss):
    """Decoupled contrastive loss (arXiv 2110.06848, eq. 3): NT-Xent without the positive in the denominator.

    An anchor without negatives has a loss of 0. For ranks, `learnable`, `precision` and `stats` see ContrastiveLoss.

    Example:
        >>> z0, z1 = torch.eye(3), torch.eye(3)
        >>> print(f"{DCLLoss(temperature=0.5)(z0, z1):.3f}")  # log(4) − 1/0.5
        -0.614
    """

    def forward(self, z0: Tensor, z1: Tensor, source: Tensor | None = None, lab: Tensor | None = None) -> Tensor:
        """Loss of two views; arguments and errors as in NTXentLoss."""
        return self._of_views(z0, z1, source, Objective(_log_ratio, needs_negatives=True), lab)


@final
class HardNegativeLoss(ContrastiveLoss):
    """NT-Xent that expects false negatives: debiased (arXiv 2007.00224, eq. 8), hard ones weighted up (2010.04592).

    A fraction `prior` of the negatives is assumed to be of the anchor's own class. Their expected similarity is
    subtracted from the sum of the negatives, which is clamped at its smallest possible value. With beta > 0 a negative
    has a weight proportional to exp(beta · cos/τ) (arXiv 2010.04592, eq. 4; cos over τ, as in its authors' code).

    For ranks, `precision` and `stats` see ContrastiveLoss.

    Example:
        >>> z0, z1 = torch.eye(3), torch.eye(3)
        >>> print(f"{HardNegativeLoss(temperature=0.5, prior=0.0)(z0, z1):.3f}")  # without a prior, NT-Xent
        0.433
        >>> print(f"{HardNegativeLoss(temperature=0.5, prior=0.05)(z0, z1):.3f}")
        0.307
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

        The number of negatives N includes those that `source` leaves out.
        """
        negatives = 2 * len(z0) * ranks.world() - 2
        scales = (1.0,) if self.beta == 0 else (1.0 + self.beta, self.beta)
        objective = Objective(lambda logs, positive: self._row_loss(logs, positive, negatives), scales)
        return self._of_views(z0, z1, source, objective)

    def _row_loss(self, logs: Sequence[Tensor], positive: Tensor, negatives: int) -> Tensor:
        if not negatives:
            return 0 * sum(logs, positive)
        log_n = math.log(negatives)
        log_sum = logs[0] if self.beta == 0 else logs[0] - logs[1] + log_n
        # log of max((Σ − prior · N · e^p) / (1 − prior), N · e^(−1/τ)), in logarithms throughout
        share = positive - log_sum + log_n + (math.log(self.prior) if self.prior else -math.inf)
        rest = log_sum + torch.log1p(-share.clamp_max(-1e-6).exp()) - math.log1p(-self.prior)
        least = log_n - 1 / self.temperature
        return _nt_xent([torch.where(share < -1e-6, rest, -math.inf).clamp_min(least)], positive)


@final
class SupConLoss(ContrastiveLoss):
    """The supervised contrastive loss L_out over the global batch (arXiv 2004.11362, eq. 2).

    Rows of equal `positive` id are each other's positives: ids are classes, or images for SimCLR with any number of
    views. The mean is over the anchors with a positive; 0 if there are none. For ranks, `learnable`, `precision` and
    `stats` see ContrastiveLoss.

    Example:
        >>> z = torch.eye(2).repeat_interleave(2, 0)  # two rows of each class
        >>> label = torch.tensor([0, 0, 1, 1])
        >>> print(f"{SupConLoss(temperature=0.5)(z, label):.3f}")  # log(1 + 2 exp(−1/0.5))
        0.240
    """

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
        return self._of_groups(z, positive, source, lab, Objective(_log_ratio))


def _nt_xent(logs: Sequence[Tensor], positive: Tensor) -> Tensor:
    """−log(e^p / (e^p + Σ_negatives)); the positive is not in the sum, so that small losses do not cancel."""
    return log1p_exp(logs[0] - positive)


def _log_ratio(logs: Sequence[Tensor], positive: Tensor) -> Tensor:
    """−log(e^p / Σ), with p the mean similarity to the positives: decoupled over the negatives, SupCon over all."""
    return logs[0] - positive
