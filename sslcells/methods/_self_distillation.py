"""What dino and ibot share: a slow-moving teacher assigns images and patches to prototypes, and the student follows."""

import math
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from sslcells import ranks
from sslcells.losses import KoLeoLoss, at_least_float32, sinkhorn, sound
from sslcells.methods import Outputs
from sslcells.methods._local import LocalViews
from sslcells.methods._prototypes import across_views
from sslcells.models.heads import Norm, Prototypes, projection


class SelfDistillation(LocalViews):
    """Loss, head and teacher; defaults are DINO's for ViT-S on ImageNet unless stated."""

    prototypes: int = Field(4096, ge=2)
    """K, the number of prototypes (65536 in the paper)."""
    momentum: float = Field(0.996, ge=0, lt=1)
    """Momentum of the teacher at the first step; it rises to 1 by half a cosine. Lower it for short trainings."""
    temperature: float = Field(0.1, gt=0)
    """Temperature of the student's outputs."""
    teacher_temperature: float = Field(0.04, gt=0)
    """Temperature of the teacher's outputs at the first step."""
    final_teacher_temperature: float = Field(0.07, gt=0)
    """Temperature of the teacher's outputs from `teacher_warmup` on."""
    teacher_warmup: float = Field(0.3, ge=0, le=1)
    """Fraction of the training over which the teacher's temperature rises (30 of 100 epochs in the paper)."""
    centring: Literal["mean", "sinkhorn"] = "mean"
    """What keeps the teacher from giving everything to one prototype: `mean` subtracts the running mean of its outputs,
    `sinkhorn` makes it use all prototypes of the global batch equally (arXiv 2006.09882, as in DINOv2)."""
    centre_momentum: float = Field(0.9, ge=0, lt=1)
    """With centring=mean: momentum of the centre, the running mean of the teacher's outputs."""
    sinkhorn_iterations: int = Field(3, ge=1)
    """With centring=sinkhorn: how often prototypes and rows are scaled."""
    koleo: float = Field(0.0, ge=0)
    """Weight of KoLeo, which pushes each image's features from the nearest of the global batch; 0.1 in DINOv2."""
    freeze: float = Field(0.01, ge=0, le=1)
    """First fraction of the training, in which the prototypes are frozen (one of 100 epochs in the paper)."""
    hidden: int = Field(512, ge=1)
    """Width of the head's hidden layers (2048 in the paper)."""
    dimension: int = Field(128, ge=2)
    """Width of a prototype (256 in the paper)."""
    layers: int = Field(3, ge=1)
    """Linear maps in the head, before the prototypes."""
    norm: Norm = "none"
    """Normalisation in the head; none in the paper."""


class PrototypeHead(nn.Sequential):
    """A projection, then cosines with the prototypes."""

    def __init__(self, config: SelfDistillation, features: int) -> None:
        rows = projection(features, config.hidden, config.dimension, config.layers, config.norm)
        super().__init__(rows, Prototypes(config.dimension, config.prototypes))

    def forward(self, features: Tensor, frozen: bool = False) -> Tensor:
        """(N, F) → (N, K); `frozen` prototypes get a zero gradient."""
        rows, prototypes = self.children()
        scores: Tensor = prototypes(rows(features), frozen=frozen)
        return scores


def assigned(config: SelfDistillation, scores: Tensor, centre: Tensor, progress: float) -> Tensor:
    """The teacher's soft assignments: (N, K) scores of this rank → (N, K), each row sums to 1.

    With centring=mean the centre (K,) moves afterwards to the mean over all ranks, which may bring different N, also 0.
    """
    rise = min(1.0, progress / config.teacher_warmup) if config.teacher_warmup else 1.0
    first, last = config.teacher_temperature, config.final_teacher_temperature
    temperature = first + rise * (last - first)
    if config.centring == "sinkhorn":
        return sinkhorn(scores, temperature, config.sinkhorn_iterations)
    target = ((scores - centre) / temperature).softmax(1)
    sums = ranks.total(torch.cat([scores.sum(0), scores.new_tensor([float(len(scores))])]))
    mean = torch.where(sums[-1] > 0, sums[:-1] / sums[-1].clamp_min(1), centre)
    centre.lerp_(mean.to(centre.dtype), 1 - config.centre_momentum)
    return target


def of_images(
    config: SelfDistillation, outputs: Outputs, centre: Tensor, progress: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """DINO's eq. 1 to 3, the teacher's two full-size views against all other views of the student; and KoLeo.

    KoLeo is the mean over the full-size views, which DINOv2 sums.
    """
    assert outputs.teacher is not None
    images = len(outputs.teacher) // 2
    student = at_least_float32(outputs.rows).view(-1, images, config.prototypes)  # (V, B, K)
    target = assigned(config, at_least_float32(outputs.teacher.detach()), centre, progress).view(
        2, images, -1
    )  # (2, B, K)
    log_student = (student / config.temperature).log_softmax(2)
    loss = across_views(target, log_student) * sound(outputs.rows) * sound(outputs.teacher)

    entropy = torch.special.entr(target).sum(2).mean()
    figures = {
        "teacher_entropy": entropy / math.log(config.prototypes),  # 1: uniform over the prototypes
        "kl": loss.detach() - entropy,
        "prototypes_used": torch.special.entr(target.mean((0, 1))).sum().exp(),  # 1: all images share one
    }
    if config.koleo:
        assert outputs.features is not None
        koleo = KoLeoLoss()
        spread = torch.stack([koleo(view) for view in outputs.features.chunk(2)]).mean()
        return loss + config.koleo * spread, figures | {"koleo": spread.detach(), **koleo.stats}
    return loss, figures
