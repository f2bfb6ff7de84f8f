"""Batch-hard triplet learning, arXiv 1703.07737: with views, labels or sources as positives."""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from sslcells import methods
from sslcells.config import Section
from sslcells.data import Batch, ImageSet
from sslcells.losses import BatchHardTripletLoss
from sslcells.models.heads import Norm, projection


class Config(Section):
    """Loss and embedding head."""

    name: Literal["triplet"] = "triplet"
    positive: Literal["view", "label", "source"] = "view"
    """Who is whose positive: the other view of the image (no labels needed), its class, or its source."""
    same_source: Literal["negative", "ignore"] = "negative"
    """Whether an image of the same source, when it is no positive, is a negative or left out."""
    margin: float = Field(0.2, ge=0)
    """By how much the hardest negative must be farther than the hardest positive; rows have length 1."""
    distance: Literal["euclidean", "sqeuclidean", "cosine"] = "euclidean"
    """Between rows."""
    soft: bool = False
    """log(1 + exp(difference of distances)) in place of the margin."""
    negative: Literal["hardest", "semi-hard"] = "hardest"
    """semi-hard: the hardest of those farther than the positive."""
    rank: int = Field(1, ge=1)
    """Which of the hardest negatives: 1 is the hardest, 2 the one after it."""
    views: int = Field(2, ge=1, le=2)
    """Augmented views of each image; 1 is enough with labels."""
    hidden: int = Field(256, ge=1)
    """Width of the head's hidden layers."""
    dimension: int = Field(128, ge=2)
    """D, the width of a row."""
    layers: int = Field(2, ge=1)
    """Linear maps in the head; 1 for a linear embedding."""
    norm: Norm = "batch"
    """Normalisation in the head."""


class Method(methods.Method):
    """An embedding head and the batch-hard triplet loss."""

    def __init__(self, config: Config, features: int, images: ImageSet) -> None:
        super().__init__()
        self.views = 2 if config.positive == "view" else config.views
        self.head = projection(features, config.hidden, config.dimension, config.layers, config.norm)
        self._config = config
        self._triplets = BatchHardTripletLoss(
            config.margin, config.distance, config.soft, semi_hard=config.negative == "semi-hard", rank=config.rank
        )

    def forward(self, features: Tensor) -> Tensor:
        """(V·B, F) → (V·B, D)."""
        rows: Tensor = self.head(features)
        return rows

    def loss(self, rows: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The triplet loss with the hardest pairs of the global batch."""
        ids = {"view": batch.image, "label": batch.label, "source": batch.source}[self._config.positive]
        positive, source = (torch.cat([i] * self.views) for i in (ids, batch.source))
        loss = self._triplets(rows, positive, source if self._config.same_source == "ignore" else None)
        return loss, self._triplets.stats
