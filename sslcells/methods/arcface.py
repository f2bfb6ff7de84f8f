"""ArcFace, arXiv 1801.07698: a softmax over learned class centres, with an angular margin for the true class."""

from typing import Literal, final

from pydantic import Field
from pytorch_metric_learning.losses import ArcFaceLoss

from sslcells.methods._centres import CentreMethod, Centres


class Config(Centres):
    """Loss and embedding head."""

    name: Literal["arcface"] = "arcface"
    margin: float = Field(28.6, gt=0, lt=180)
    """Added to the angle to the true class's centre, in degrees."""
    scale: float = Field(64.0, gt=0)
    """Factor of the logits."""


@final
class Method(CentreMethod):
    """An embedding head, and ArcFace's centres."""

    @staticmethod
    def centres(config: Config, count: int) -> ArcFaceLoss:
        """The loss with `count` centres."""
        return ArcFaceLoss(count, config.dimension, margin=config.margin, scale=config.scale)
