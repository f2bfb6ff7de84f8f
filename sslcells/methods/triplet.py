"""Triplet learning, arXiv 1703.07737: batch-hard or batch-all, with views, labels or sources as positives."""

from typing import Literal, Self, final

from pydantic import Field, model_validator
from torch import Tensor

from sslcells.data import Batch, ImageSet
from sslcells.losses import BatchAllTripletLoss, BatchHardTripletLoss
from sslcells.methods import Outputs
from sslcells.methods._embedding import Embedding, Head, Positive, SameLab, check_labs, check_positives, labs, positives


class Config(Head):
    """Loss and embedding head."""

    name: Literal["triplet"] = "triplet"
    positive: Positive = "view"
    """Positives: the other view of the image (no labels needed), images of its class, or images of its source."""
    same_source: Literal["negative", "ignore"] = "negative"
    """Images of the same source that are not positives: negatives, or left out."""
    same_lab: SameLab = "any"
    """Negatives: images of any laboratory, or `only` of the anchor's own, so that none teaches the laboratory."""
    margin: float = Field(0.2, ge=0)
    """How much farther than the positive the negative must be; rows have length 1."""
    distance: Literal["euclidean", "sqeuclidean", "cosine"] = "euclidean"
    """Distance between rows."""
    soft: bool = False
    """Use log(1 + exp(d(positive) − d(negative))) in place of the margin; not with negative=all."""
    negative: Literal["hardest", "semi-hard", "all"] = "hardest"
    """hardest: each anchor's farthest positive with its nearest negative; semi-hard: with the nearest negative that is
    farther than that positive; all: every valid triplet of the global batch, and the mean over those with a loss."""
    rank: int = Field(1, ge=1)
    """Rank of the negative among the hardest: 1 for the hardest, 2 for the next."""
    views: int = Field(2, ge=1, le=2)
    """Augmented views of each image; 1 is enough with labels."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.negative == "all" and (self.soft or self.rank > 1):
            raise ValueError("negative=all goes with a margin and all negatives: soft=false and rank=1")
        if self.negative == "all" and self.same_lab == "only":
            raise ValueError("same_lab=only goes with negative=hardest and semi-hard, not with all")
        return self


@final
class Method(Embedding):
    """An embedding head and a triplet loss."""

    def __init__(self, config: Config, features: int, images: ImageSet) -> None:
        super().__init__(config, features, views=2 if config.positive == "view" else config.views)
        check_positives(config.positive, images, self.views)
        check_labs(config.same_lab, images)
        self._config = config
        self._triplets = _loss(config)

    def loss(self, outputs: Outputs, batch: Batch, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        """The triplet loss over the global batch."""
        source = batch.source.repeat(self.views) if self._config.same_source == "ignore" else None
        lab = {} if self._config.same_lab == "any" else {"lab": labs(self._config.same_lab, batch, self.views)}
        loss: Tensor = self._triplets(outputs.rows, positives(self._config.positive, batch, self.views), source, **lab)
        return loss, self._triplets.stats


def _loss(config: Config) -> BatchHardTripletLoss | BatchAllTripletLoss:
    if config.negative == "all":
        return BatchAllTripletLoss(config.margin, config.distance)
    semi_hard = config.negative == "semi-hard"
    return BatchHardTripletLoss(config.margin, config.distance, config.soft, semi_hard=semi_hard, rank=config.rank)
