"""DINO, arXiv 2104.14294: assign every view to prototypes as a slow-moving teacher assigns the full-size views."""

import math
from typing import Literal, Self, final

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from sslcells import methods, ranks
from sslcells.config import Section
from sslcells.data import Batch, ImageSet
from sslcells.losses import sound
from sslcells.models.heads import Norm, Prototypes, projection


class Config(Section):
    """Loss, head, teacher and local views; defaults are the paper's for ViT-S on ImageNet unless stated."""

    name: Literal["dino"] = "dino"
    local_views: int = Field(4, ge=0)
    """Small crops of each image, for the student only (8 in the paper)."""
    local_size: int = Field(24, ge=8)
    """Height and width of a local view, in pixels; 96 in the paper, where augment.size is 224."""
    local_min_scale: float = Field(0.05, gt=0, le=1)
    """Smallest local crop, as a fraction of the image's area."""
    local_max_scale: float = Field(0.4, gt=0, le=1)
    """Largest local crop, as a fraction of the image's area; augment.min_scale is the smallest full-size crop."""
    prototypes: int = Field(4096, ge=2)
    """K, the number of prototypes (65536 in the paper)."""
    momentum: float = Field(0.996, ge=0, lt=1)
    """Momentum of the teacher at the first step; it rises to 1 by half a cosine."""
    temperature: float = Field(0.1, gt=0)
    """Temperature of the student's outputs."""
    teacher_temperature: float = Field(0.04, gt=0)
    """Temperature of the teacher's outputs at the first step."""
    final_teacher_temperature: float = Field(0.07, gt=0)
    """Temperature of the teacher's outputs from `teacher_warmup` on."""
    teacher_warmup: float = Field(0.3, ge=0, le=1)
    """Fraction of the training over which the teacher's temperature rises (30 of 100 epochs in the paper)."""
    centre_momentum: float = Field(0.9, ge=0, lt=1)
    """Momentum of the centre, the running mean of the teacher's outputs."""
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

    @model_validator(mode="after")
    def _scales(self) -> Self:
        low, high = self.local_min_scale, self.local_max_scale
        if low > high:
            raise ValueError(f"local_min_scale={low} is above local_max_scale={high}")
        return self


@final
class Method(methods.Method):
    """A head with prototypes, which the teacher has too, and the centre of the teacher's outputs."""

    views = 2
    negative_views = 0
    exported = "teacher"
    centre: Tensor

    def __init__(self, config: Config, features: int, images: ImageSet) -> None:
        super().__init__()
        rows = projection(features, config.hidden, config.dimension, config.layers, config.norm)
        self._prototypes = config.prototypes
        self.head = nn.Sequential(rows, Prototypes(config.dimension, config.prototypes))
        self.momentum = config.momentum
        if config.local_views:
            scale = config.local_min_scale, config.local_max_scale
            self.local = methods.Local(config.local_views, config.local_size, scale)
        self._config = config
        self.register_buffer("centre", torch.zeros(config.prototypes))

    def forward(self, features: Tensor, progress: float) -> Tensor:
        """(V·B, F), local views last → (V·B, K)."""
        projector, prototypes = self.head.children()
        rows: Tensor = prototypes(projector(features), frozen=progress < self._config.freeze)
        return rows

    def teacher_copies(self) -> nn.Module:
        """Head and prototypes."""
        return self.head

    def loss(self, outputs: methods.Outputs, batch: Batch, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        """Eq. 1 to 3: the teacher's full-size views against all other views of the student."""
        assert outputs.teacher is not None
        c, images = self._config, len(outputs.teacher) // self.views
        student = outputs.rows.float().view(-1, images, self._prototypes)  # (V, B, K)
        teacher = outputs.teacher.detach().float().view(-1, images, self._prototypes)  # (2, B, K)
        rise = min(1.0, progress / c.teacher_warmup) if c.teacher_warmup else 1.0
        temperature = c.teacher_temperature + rise * (c.final_teacher_temperature - c.teacher_temperature)
        log_target = ((teacher - self.centre) / temperature).log_softmax(2)
        target = log_target.exp()  # (2, B, K)
        log_student = (student / c.temperature).log_softmax(2)
        cross = -torch.einsum("tbk,sbk->ts", target, log_student) / images  # (2, V): for each pair of views
        others = 1 - torch.eye(*cross.shape, device=cross.device)
        loss = (cross * others).sum() / others.sum() * sound(outputs.rows) * sound(outputs.teacher)

        entropy = -(target * log_target).sum(2).mean()
        usage = target.mean((0, 1))
        mean = ranks.total(teacher.mean((0, 1))) / ranks.world()
        self.centre.lerp_(mean, 1 - c.centre_momentum)
        return loss, {
            "teacher_entropy": entropy / math.log(self._prototypes),  # 1: uniform over the prototypes
            "kl": loss.detach() - entropy,
            "prototypes_used": torch.special.entr(usage).sum().exp(),  # 1: all images share one
        }
