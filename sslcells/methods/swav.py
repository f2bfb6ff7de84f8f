"""SwAV, arXiv 2006.09882: predict, from one view, the assignment of another view to prototypes.

Sinkhorn–Knopp over the global batch assigns the views so that all prototypes are used equally.
"""

import math
from typing import Literal, final

import torch
from pydantic import Field
from torch import Tensor

from sslcells import methods, ranks
from sslcells.data import Batch, ImageSet
from sslcells.losses import at_least_float32, row_std, sinkhorn, sound, unit
from sslcells.methods._local import LocalViews
from sslcells.methods._prototypes import across_views
from sslcells.models.heads import Norm, Prototypes, projection


class Config(LocalViews):
    """Loss, head, prototypes, queue and local views."""

    name: Literal["swav"] = "swav"
    prototypes: int = Field(512, ge=2)
    """K, the number of prototypes; several times the number of classes (3000 in the paper)."""
    temperature: float = Field(0.1, gt=0)
    """Temperature of the predictions; τ in the paper."""
    epsilon: float = Field(0.05, gt=0)
    """Temperature of the assignments; smaller ones make them harder."""
    iterations: int = Field(3, ge=1)
    """Sinkhorn iterations."""
    freeze: float = Field(0.01, ge=0, le=1)
    """First fraction of the training, in which the prototypes are frozen (one of 100 epochs in the paper)."""
    queue: int = Field(0, ge=0)
    """Rows of earlier steps, for each full-size view, that are assigned together with the batch: for batches smaller
    than a few times `prototypes` (3840 in the paper). It is filled from the first step on."""
    queue_from: float = Field(0.1, ge=0, le=1)
    """Fraction of the training from which the queue is used (15 of 200 epochs in the paper)."""
    hidden: int = Field(512, ge=1)
    """Width of the head's hidden layers (2048 in the paper)."""
    dimension: int = Field(128, ge=2)
    """D, the width of a row."""
    layers: int = Field(2, ge=1)
    """Linear maps in the head, before the prototypes."""
    norm: Norm = "batch"
    """Normalisation in the head."""


@final
class Method(methods.Method):
    """A projection head, the prototypes, and the queue of unit rows (2, Q, D)."""

    views = 2
    negative_views = 0
    queue: Tensor

    def __init__(self, config: Config, features: int, images: ImageSet) -> None:
        super().__init__()
        self.head = projection(features, config.hidden, config.dimension, config.layers, config.norm)
        self.prototypes = Prototypes(config.dimension, config.prototypes)
        self.local = config.local
        self._config = config
        first = unit(torch.randn(self.views * config.queue, config.dimension))
        queue = first.view(self.views, config.queue, config.dimension)
        self.register_buffer("queue", queue, persistent=config.queue > 0)

    def forward(self, features: Tensor, progress: float) -> Tensor:
        """(V·B, F), local views last → (V·B, D)."""
        rows: Tensor = self.head(features)
        return rows

    def teacher_copies(self) -> None:
        """There is no teacher."""

    def loss(self, outputs: methods.Outputs, batch: Batch, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        """Eq. 2: each full-size view's assignment against all other views' predictions. Its rows join the queue."""
        rows = at_least_float32(outputs.rows)
        scores = self.prototypes(rows, frozen=progress < self._config.freeze)  # (V·B, K)
        scores = scores.view(self.views_in_all, -1, scores.shape[1])  # (V, B, K)
        images = scores.shape[1]
        target = torch.stack([self._assigned(scores[v].detach(), v, progress) for v in range(self.views)])  # (2, B, K)
        predicted = (scores / self._config.temperature).log_softmax(2)
        loss = across_views(target, predicted) * sound(outputs.rows)
        self._push(rows.detach())
        usage = ranks.total(target.mean((0, 1))) / ranks.world()
        entropy = torch.special.entr(target).sum(2).mean()
        return (
            loss,
            {
                "assignment_entropy": entropy / math.log(target.shape[2]),  # 1: uniform over the prototypes
                "kl": loss.detach() - entropy,
                "prototypes_used": torch.special.entr(usage).sum().exp(),
                "row_std": row_std(rows[:images]),
            },
        )

    def _assigned(self, scores: Tensor, view: int, progress: float) -> Tensor:
        """Assignments (B, K) of a view's scores; with the queue, each rank brings its share of the queue's rows too."""
        c = self._config
        if c.queue and progress >= c.queue_from:
            share = self.queue[view, ranks.rank() :: ranks.world()]
            with torch.no_grad():
                earlier = self.prototypes(share.to(scores))
            scores = torch.cat([scores, earlier])
            return sinkhorn(scores, c.epsilon, c.iterations)[: len(scores) - len(earlier)]
        return sinkhorn(scores, c.epsilon, c.iterations)

    @torch.no_grad()
    def _push(self, rows: Tensor) -> None:
        """Put the full-size views' rows of all ranks at the front of the queue, in one order on any number of ranks."""
        if not self._config.queue:
            return
        of_view = unit(rows).view(self.views_in_all, -1, rows.shape[1])
        for queue, newest in zip(self.queue, of_view, strict=False):  # local views, which come last, do not join
            queue.copy_(torch.cat([ranks.gather(newest).to(queue), queue])[: len(queue)])
