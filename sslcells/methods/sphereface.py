"""SphereFace, arXiv 1704.08063: a softmax over learned class centres, the angle to the own one multiplied."""

from typing import Literal

from pydantic import Field
from pytorch_metric_learning.losses import SphereFaceLoss

from sslcells.data import ImageSet
from sslcells.methods._centres import CentreMethod, Centres, classes


class Config(Centres):
    """Loss and embedding head."""

    name: Literal["sphereface"] = "sphereface"
    margin: int = Field(4, ge=2)
    """The angle to the own centre is multiplied by it."""
    scale: float = Field(1.0, gt=0)
    """Of the logits, beside the length of the row, which is not normalised here."""


class Method(CentreMethod):
    """An embedding head, and SphereFace's centres."""

    def __init__(self, config: Config, features: int, images: ImageSet) -> None:
        count = classes(images, config.name)
        loss = SphereFaceLoss(count, config.dimension, margin=config.margin, scale=config.scale)
        super().__init__(config, features, loss)
