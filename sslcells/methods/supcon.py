"""SupCon, arXiv 2004.11362: images of one class or source attract, all others of the global batch repel."""

from typing import Literal, final

from pydantic import Field
from torch import Tensor

from sslcells.data import Batch, ImageSet
from sslcells.losses import SupConLoss
from sslcells.methods import Outputs
from sslcells.methods._embedding import Embedding, Head, SameLab, check_labs, check_positives, labs, positives


class Config(Head):
    """Loss and projection head."""

    name: Literal["supcon"] = "supcon"
    temperature: float = Field(0.1, ge=0.003, le=100)
    """Temperature of the similarities."""
    learn_temperature: bool = False
    """Learn the temperature, starting from `temperature`."""
    positive: Literal["label", "source"] = "label"
    """Positives: images of the same class (without a label, only the other view), or of the same source."""
    same_source: Literal["negative", "ignore"] = "negative"
    """Images of the same source that are not positives: negatives, or left out."""
    same_lab: SameLab = "any"
    """Negatives: images of any laboratory, or `only` of the anchor's own, so that none teaches the laboratory."""


@final
class Method(Embedding):
    """A projection head and SupCon's loss of two views."""

    def __init__(self, config: Config, features: int, images: ImageSet) -> None:
        super().__init__(config, features, views=2)
        check_positives(config.positive, images, self.views)
        check_labs(config.same_lab, images)
        self._config = config
        self._loss = SupConLoss(config.temperature, learnable=config.learn_temperature)

    def loss(self, outputs: Outputs, batch: Batch, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        """L_out, equation 2: the mean over the positives is outside the logarithm."""
        source = batch.source.repeat(self.views) if self._config.same_source == "ignore" else None
        ids = positives(self._config.positive, batch, self.views)
        self._loss.figures = self.figures
        loss: Tensor = self._loss(outputs.rows, ids, source, labs(self._config.same_lab, batch, self.views))
        return loss, self._loss.stats
