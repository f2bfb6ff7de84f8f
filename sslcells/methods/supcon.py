"""SupCon, arXiv 2004.11362: images of one class, or of one source, attract, all others of the global batch repel."""

from typing import Literal

from pydantic import Field
from torch import Tensor

from sslcells.data import Batch, ImageSet
from sslcells.losses import SupConLoss
from sslcells.methods import Outputs
from sslcells.methods._embedding import Embedding, Head, check_positives, positives


class Config(Head):
    """Loss and projection head."""

    name: Literal["supcon"] = "supcon"
    temperature: float = Field(0.1, ge=0.003, le=100)
    """Of the similarities."""
    learn_temperature: bool = False
    """Let the loss learn its temperature, from `temperature` on."""
    positive: Literal["label", "source"] = "label"
    """Who is whose positive: its class (an image without one has its own views alone), or its source."""
    same_source: Literal["negative", "ignore"] = "negative"
    """Whether an image of the same source, when it is no positive, is a negative or left out."""


class Method(Embedding):
    """A projection head and SupCon's loss of two views."""

    def __init__(self, config: Config, features: int, images: ImageSet) -> None:
        super().__init__(config, features, views=2)
        check_positives(config.positive, images, self.views)
        self._config = config
        self._loss = SupConLoss(config.temperature, learnable=config.learn_temperature)

    def loss(self, outputs: Outputs, batch: Batch, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        """L_out, equation 2: the mean over all positives outside of the logarithm."""
        source = batch.source.repeat(self.views) if self._config.same_source == "ignore" else None
        loss: Tensor = self._loss(outputs.rows, positives(self._config.positive, batch, self.views), source)
        return loss, self._loss.stats
