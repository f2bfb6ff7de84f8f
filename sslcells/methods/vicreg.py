"""VICReg, arXiv 2105.04906: views agree, every dimension varies over the batch, and no two vary together."""

from typing import Literal, final

from pydantic import Field
from torch import Tensor

from sslcells.data import Batch, ImageSet
from sslcells.losses import VICRegLoss
from sslcells.methods import Outputs
from sslcells.methods._embedding import Embedding, WideHead


class Config(WideHead):
    """Loss and expander head."""

    name: Literal["vicreg"] = "vicreg"
    invariance: float = Field(25.0, ge=0)
    """Weight of the distance between the views; λ in the paper."""
    variance: float = Field(25.0, ge=0)
    """Weight of max(0, 1 − standard deviation) of the dimensions; μ in the paper."""
    covariance: float = Field(1.0, ge=0)
    """Weight of the covariances between dimensions; ν in the paper."""


@final
class Method(Embedding):
    """An expander and VICReg's three terms."""

    negative_views = 0

    def __init__(self, config: Config, features: int, images: ImageSet) -> None:
        super().__init__(config, features, views=2)
        self._loss = VICRegLoss(config.invariance, config.variance, config.covariance)

    def loss(self, outputs: Outputs, batch: Batch, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        """VICRegLoss of the two views."""
        loss: Tensor = self._loss(*outputs.rows.chunk(2))
        return loss, self._loss.stats
