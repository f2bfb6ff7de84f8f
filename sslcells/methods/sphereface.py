"""SphereFace, arXiv 1704.08063: a softmax over learned class centres; the angle to the true one is multiplied."""

from typing import Literal, final

from pydantic import Field
from pytorch_metric_learning.losses import SphereFaceLoss

from sslcells.methods._centres import CentreMethod, Centres


class Config(Centres):
    """Loss and embedding head."""

    name: Literal["sphereface"] = "sphereface"
    margin: int = Field(4, ge=2)
    """Factor of the angle to the true class's centre."""
    scale: float = Field(1.0, gt=0)
    """Factor of the logits, which also grow with the length of the row: rows are not normalised here."""


@final
class Method(CentreMethod):
    """An embedding head, and SphereFace's centres."""

    @staticmethod
    def centres(config: Config, count: int) -> SphereFaceLoss:
        """The loss with `count` centres."""
        return SphereFaceLoss(count, config.dimension, margin=config.margin, scale=config.scale)
