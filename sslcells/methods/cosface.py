"""CosFace, arXiv 1801.09414: a softmax over learned class centres, with a cosine margin for the true class."""

from typing import Literal, final

from pydantic import Field
from pytorch_metric_learning.losses import CosFaceLoss

from sslcells.methods._centres import CentreMethod, Centres


class Config(Centres):
    """Loss and embedding head."""

    name: Literal["cosface"] = "cosface"
    margin: float = Field(0.35, gt=0, lt=2)
    """Subtracted from the cosine to the true class's centre."""
    scale: float = Field(64.0, gt=0)
    """Factor of the logits."""


@final
class Method(CentreMethod):
    """An embedding head, and CosFace's centres."""

    @staticmethod
    def centres(config: Config, count: int) -> CosFaceLoss:
        """The loss with `count` centres."""
        return CosFaceLoss(count, config.dimension, margin=config.margin, scale=config.scale)
