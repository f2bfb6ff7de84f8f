"""CosFace, arXiv 1801.09414: a softmax over learned class centres, with a margin in the cosine to the own class."""

from typing import Literal

from pydantic import Field
from pytorch_metric_learning.losses import CosFaceLoss

from sslcells.data import ImageSet
from sslcells.methods._centres import CentreMethod, Centres, classes


class Config(Centres):
    """Loss and embedding head."""

    name: Literal["cosface"] = "cosface"
    margin: float = Field(0.35, gt=0, lt=2)
    """Taken from the cosine to the own centre."""
    scale: float = Field(64.0, gt=0)
    """Of the logits."""


class Method(CentreMethod):
    """An embedding head, and CosFace's centres."""

    def __init__(self, config: Config, features: int, images: ImageSet) -> None:
        count = classes(images, config.name)
        loss = CosFaceLoss(count, config.dimension, margin=config.margin, scale=config.scale)
        super().__init__(config, features, loss)
