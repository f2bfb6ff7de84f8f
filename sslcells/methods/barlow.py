"""Barlow Twins, arXiv 2103.03230: each dimension correlates with itself in the other view, and with no other."""

from typing import Literal, final

from pydantic import Field
from torch import Tensor

from sslcells.data import Batch, ImageSet
from sslcells.losses import BarlowTwinsLoss
from sslcells.methods import Outputs
from sslcells.methods._embedding import Embedding, WideHead


class Config(WideHead):
    """Loss and projection head."""

    name: Literal["barlow"] = "barlow"
    off_diagonal: float = Field(0.005, ge=0)
    """Weight of the correlations between different dimensions; λ in the paper."""


@final
class Method(Embedding):
    """A projection head and Barlow Twins' loss."""

    negative_views = 0

    def __init__(self, config: Config, features: int, images: ImageSet) -> None:
        super().__init__(config, features, views=2)
        self._loss = BarlowTwinsLoss(config.off_diagonal)

    def loss(self, outputs: Outputs, batch: Batch, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        """BarlowTwinsLoss of the two views."""
        loss: Tensor = self._loss(*outputs.rows.chunk(2))
        return loss, self._loss.stats
