"""All pairs of the global batch: the contrastive loss of Hadsell, Chopra and LeCun (CVPR 2006), or hinges.

http://yann.lecun.com/exdb/publis/pdf/hadsell-chopra-lecun-06.pdf
"""

from typing import Literal, Self

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
    """Half the squared distance beyond the margins, equation 4; or that distance itself."""
    positive: Positive = "view"
    """Who is whose positive: the other view of the image (no labels needed), its class, or its source."""
    same_source: Literal["negative", "ignore"] = "negative"
    """Whether an image of the same source, when it is no positive, is a negative or left out."""
    margin: float = Field(1.0, gt=0)
    """How far apart negatives must be; rows have length 1."""
    positive_margin: float = Field(0.0, ge=0)
    """How near each other positives need not come."""
    distance: Literal["euclidean", "sqeuclidean", "cosine"] = "euclidean"
    """Between rows."""
    views: int = Field(2, ge=1, le=2)
    """Augmented views of each image; 1 is enough with labels."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.positive_margin >= self.margin:
            raise ValueError(f"positive_margin={self.positive_margin} is not below margin={self.margin}")
        return self


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
        """The mean over the positive pairs with a loss, and that over the negative ones."""
        source = batch.source.repeat(self.views) if self._config.same_source == "ignore" else None
        loss: Tensor = self._loss(outputs.rows, positives(self._config.positive, batch, self.views), source)
        return loss, self._loss.stats
