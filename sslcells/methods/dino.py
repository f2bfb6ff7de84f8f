"""DINO, arXiv 2104.14294: assign every view to prototypes as a slow-moving teacher assigns the full-size views.

With centring=sinkhorn and koleo=0.1 it is DINOv2's loss of images, arXiv 2304.07193.
"""

from typing import Literal, final

import torch
from torch import Tensor, nn

from sslcells import methods
from sslcells.data import Batch, ImageSet
from sslcells.methods._self_distillation import PrototypeHead, SelfDistillation, of_images


class Config(SelfDistillation):
    """Loss, head, teacher and local views (8 in the paper, of 96 px where augment.size is 224)."""

    name: Literal["dino"] = "dino"


@final
class Method(methods.Method):
    """A head with prototypes, which the teacher has too, and the centre of the teacher's outputs."""

    views = 2
    negative_views = 0
    exported = "teacher"
    centre: Tensor

    def __init__(self, config: Config, features: int, images: ImageSet) -> None:
        super().__init__()
        self.head = PrototypeHead(config, features)
        self.momentum, self.local = config.momentum, config.local
        self._config = config
        self.register_buffer("centre", torch.zeros(config.prototypes))

    def forward(self, features: Tensor, progress: float) -> Tensor:
        """(V·B, F), local views last → (V·B, K)."""
        rows: Tensor = self.head(features, frozen=progress < self._config.freeze)
        return rows

    def teacher_copies(self) -> nn.Module:
        """Head and prototypes."""
        return self.head

    def loss(self, outputs: methods.Outputs, batch: Batch, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of images."""
        return of_images(self._config, outputs, self.centre, progress)
