"""VICReg, arXiv 2105.04906: two views agree, every dimension varies over the global batch, and no two of them alike."""

from typing import Literal

from pydantic import Field
from torch import Tensor

from sslcells import methods
from sslcells.config import Section
from sslcells.data import Batch, ImageSet
from sslcells.losses import VICRegLoss
from sslcells.models.heads import Norm, projection


class Config(Section):
    """Loss and the head that only the loss sees."""

    name: Literal["vicreg"] = "vicreg"
    invariance: float = Field(25.0, ge=0)
    """Weight of the distance between the views; λ in the paper."""
    variance: float = Field(25.0, ge=0)
    """Weight of what a dimension's standard deviation lacks to 1; μ in the paper."""
    covariance: float = Field(1.0, ge=0)
    """Weight of the covariances between dimensions; ν in the paper."""
    hidden: int = Field(512, ge=1)
    """Width of the head's hidden layers."""
    dimension: int = Field(512, ge=2)
    """D, the width of a row; the loss takes memory for D² numbers, and gains from a wide one (8192 in the paper)."""
    layers: int = Field(3, ge=1)
    """Linear maps in the head."""
    norm: Norm = "batch"
    """Normalisation in the head."""


class Method(methods.Method):
    """An expander and VICReg's three terms."""

    views = 2
    negative_views = 0

    def __init__(self, config: Config, features: int, images: ImageSet) -> None:
        super().__init__()
        self.head = projection(features, config.hidden, config.dimension, config.layers, config.norm)
        self._loss = VICRegLoss(config.invariance, config.variance, config.covariance)

    def forward(self, features: Tensor) -> Tensor:
        """(2B, F) → (2B, D)."""
        rows: Tensor = self.head(features)
        return rows

    def loss(self, rows: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """VICRegLoss of the two views."""
        loss: Tensor = self._loss(*rows.chunk(2))
        return loss, self._loss.stats
