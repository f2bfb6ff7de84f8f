"""Barlow Twins, arXiv 2103.03230: a dimension of one view correlates with itself in the other, and with no other."""

from typing import Literal

from pydantic import Field
from torch import Tensor

from sslcells import methods
from sslcells.config import Section
from sslcells.data import Batch, ImageSet
from sslcells.losses import BarlowTwinsLoss
from sslcells.models.heads import Norm, projection


class Config(Section):
    """Loss and the head that only the loss sees."""

    name: Literal["barlow"] = "barlow"
    off_diagonal: float = Field(0.005, ge=0)
    """Weight of the correlations between different dimensions; λ in the paper."""
    hidden: int = Field(512, ge=1)
    """Width of the head's hidden layers."""
    dimension: int = Field(512, ge=2)
    """D, the width of a row; the loss takes memory for D² numbers, and gains from a wide one (8192 in the paper)."""
    layers: int = Field(3, ge=1)
    """Linear maps in the head."""
    norm: Norm = "batch"
    """Normalisation in the head."""


class Method(methods.Method):
    """A projection head and Barlow Twins' loss."""

    views = 2
    negative_views = 0

    def __init__(self, config: Config, features: int, images: ImageSet) -> None:
        super().__init__()
        self.head = projection(features, config.hidden, config.dimension, config.layers, config.norm)
        self._loss = BarlowTwinsLoss(config.off_diagonal)

    def forward(self, features: Tensor) -> Tensor:
        """(2B, F) → (2B, D)."""
        rows: Tensor = self.head(features)
        return rows

    def loss(self, rows: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """BarlowTwinsLoss of the two views."""
        loss: Tensor = self._loss(*rows.chunk(2))
        return loss, self._loss.stats
