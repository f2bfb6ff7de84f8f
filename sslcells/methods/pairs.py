"""The contrastive loss of Hadsell, Chopra and LeCun (CVPR 2006), or hinges, on all pairs of the global batch.

http://yann.lecun.com/exdb/publis/pdf/hadsell-chopra-lecun-06.pdf
"""

from typing import Literal, Self, final

from pydantic import Field, model_validator
from torch import Tensor

from sslcells.data import Batch, ImageSet
from sslcells.losses import PairLoss
from sslcells.methods import Outputs
from sslcells.methods._embedding import Embedding, Head, Positive, check_positives, positives


class Config(Head):
    """Loss and embedding head."""

    name: Literal["pairs"] = "pairs"
    loss: Literal["contrastive", "hinge"] = "contrastive"
    """contrastive: half the square of what a pair is short of its margin, equation 4; hinge: that amount itself."""
    positive: Positive = "view"
    """Positives: the other view of the image (no labels needed), images of its class, or images of its source."""
    same_source: Literal["negative", "ignore"] = "negative"
    """Images of the same source that are not positives: negatives, or left out."""
    margin: float = Field(1.0, gt=0)
    """Required distance of negative pairs; rows have length 1."""
    positive_margin: float = Field(0.0, ge=0)
    """Positive pairs nearer than this have no loss."""
    distance: Literal["euclidean", "sqeuclidean", "cosine"] = "euclidean"
    """Distance between rows."""
    views: int = Field(2, ge=1, le=2)
    """Augmented views of each image; 1 is enough with labels."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.positive_margin >= self.margin:
            raise ValueError(f"positive_margin={self.positive_margin} is not below margin={self.margin}")
        return self


@final
class Method(Embedding):
    """An embedding head and a loss on pairs."""

    def __init__(self, config: Config, features: int, images: ImageSet) -> None:
        super().__init__(config, features, views=2 if config.positive == "view" else config.views)
        check_positives(config.positive, images, self.views)
        self._config = config
        self._loss = PairLoss(
            config.margin, config.positive_margin, config.loss == "contrastive", distance=config.distance
        )

    def loss(self, outputs: Outputs, batch: Batch, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean over the positive pairs with a loss plus that over the negative pairs with a loss."""
        source = batch.source.repeat(self.views) if self._config.same_source == "ignore" else None
        loss: Tensor = self._loss(outputs.rows, positives(self._config.positive, batch, self.views), source)
        return loss, self._loss.stats
