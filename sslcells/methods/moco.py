"""MoCo v3, arXiv 2104.02057: find the teacher's key for the other view among the keys of the global batch.

With a queue, as in MoCo v1 (arXiv 1911.05722), keys of earlier steps are negatives too.
"""

from typing import Literal, final

import torch
from pydantic import Field
from torch import Tensor, nn

from sslcells import methods, ranks
from sslcells.config import Section
from sslcells.data import Batch, ImageSet
from sslcells.losses import MoCoLoss, row_std, unit
from sslcells.models.heads import Norm, projection


class Config(Section):
    """Loss, heads, teacher and queue."""

    name: Literal["moco"] = "moco"
    temperature: float = Field(0.2, ge=0.003, le=100)
    """Temperature of the similarities."""
    momentum: float = Field(0.99, ge=0, lt=1)
    """Momentum of the teacher at the first step; it rises to 1 by half a cosine."""
    queue: int = Field(0, ge=0)
    """Number of keys of earlier steps that are negatives too: 0 for MoCo v3; 65536 in v1, for small global batches."""
    hidden: int = Field(512, ge=1)
    """Width of the hidden layers of projector and predictor (4096 in the paper)."""
    dimension: int = Field(128, ge=2)
    """D, the width of a row (256 in the paper)."""
    layers: int = Field(3, ge=1)
    """Linear maps in the projector; the predictor has two."""
    norm: Norm = "batch"
    """Normalisation in projector and predictor, and of their rows."""


@final
class Method(methods.Method):
    """A projector, which the teacher has too, a predictor, which only the student has, and the queue of keys."""

    views = 2
    negative_views = 1
    queue: Tensor
    queue_image: Tensor

    def __init__(self, config: Config, features: int, images: ImageSet) -> None:
        super().__init__()
        hidden, out, norm = config.hidden, config.dimension, config.norm
        projector = projection(features, hidden, out, config.layers, norm, last=True)
        self.head = nn.Sequential(projector, projection(out, hidden, out, 2, norm, last=True))
        self.momentum, self.queued = config.momentum, config.queue
        self._loss = MoCoLoss(config.temperature)
        self.register_buffer("queue", unit(torch.randn(config.queue, out)))
        self.register_buffer("queue_image", torch.full((config.queue,), -1), persistent=config.queue > 0)

    def forward(self, features: Tensor, progress: float) -> Tensor:
        """(2B, F) → queries (2B, D)."""
        rows: Tensor = self.head(features)
        return rows

    def teacher_copies(self) -> nn.Module:
        """The projector."""
        return self.head.get_submodule("0")

    def loss(self, outputs: methods.Outputs, batch: Batch, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        """Algorithm 1: 2τ · InfoNCE in both directions. The keys then join the queue.

        Other keys of the query's own image, in the queue or from a repeat in the batch, are not negatives.
        """
        assert outputs.teacher is not None
        queries, keys = outputs.rows.chunk(2), unit(outputs.teacher.detach()).chunk(2)
        queue, ids = (self.queue, self.queue_image) if len(self.queue) else (None, None)
        image = batch.image if self.repeated or queue is not None else None
        loss = self._loss(queries[0], keys[1], queue, image, ids)
        figures = {**self._loss.stats, "row_std": row_std(keys[0])}
        loss = 2 * self._loss.temperature * (loss + self._loss(queries[1], keys[0], queue, image, ids))
        if queue is not None:
            newest = torch.cat([ranks.gather(k) for k in keys])  # in one order on any number of ranks
            self.queue.copy_(torch.cat([newest, queue])[: len(queue)])
            shown = ranks.gather(batch.image).repeat(2)
            self.queue_image.copy_(torch.cat([shown, self.queue_image])[: len(queue)])
        return loss, figures
