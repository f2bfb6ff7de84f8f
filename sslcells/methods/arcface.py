"""ArcFace, arXiv 1801.07698: a softmax over learned class centres, with an angular margin for the own class."""

from typing import Literal

from pydantic import Field
from pytorch_metric_learning.losses import ArcFaceLoss

from sslcells.data import ImageSet
from sslcells.methods._centres import CentreMethod, Centres, classes


class Config(Centres):
    """Loss and embedding head."""

    name: Literal["arcface"] = "arcface"
    margin: float = Field(28.6, gt=0, lt=180)
    """Added to the angle to the own centre, in degrees."""
    scale: float = Field(64.0, gt=0)
    """Of the logits."""


class Method(CentreMethod):
    """An embedding head, and ArcFace's centres."""

    def __init__(self, config: Config, features: int, images: ImageSet) -> None:
        count = classes(images, config.name)
        loss = ArcFaceLoss(count, config.dimension, margin=config.margin, scale=config.scale)
        super().__init__(config, features, loss)
