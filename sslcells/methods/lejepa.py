"""LeJEPA, arXiv 2511.08544: views predict their image's mean row, and rows are normally distributed in every direction.

There is no teacher, no stop-gradient and no schedule.
"""

from typing import Literal, final

from pydantic import Field, field_validator
from torch import Tensor

from sslcells.data import Batch, ImageSet
from sslcells.losses import LeJEPALoss
from sslcells.methods import Outputs
from sslcells.methods._embedding import Embedding, Head, drawn_at
from sslcells.methods._local import LocalViews


class Config(Head, LocalViews):
    """Loss, head and views."""

    name: Literal["lejepa"] = "lejepa"
    weight: float = Field(0.05, ge=0, le=1)
    """Weight of SIGReg, which keeps the rows apart; 1 − weight is that of the prediction. λ in the paper."""
    views: int = Field(2, ge=2)
    """Full-size views of an image; all views predict the mean of their rows."""
    slices: int = Field(1024, ge=1)
    """Random directions, new ones at every step."""
    knots: int = Field(17, ge=3)
    """Points at which the characteristic functions are compared, between −5 and 5; odd."""
    hidden: int = Field(512, ge=1)
    """Width of the head's hidden layers."""
    dimension: int = Field(64, ge=2)
    """D, the width of a row."""
    layers: int = Field(3, ge=1)
    """Linear maps in the head."""

    @field_validator("knots")
    @classmethod
    def _odd(cls, knots: int) -> int:
        if not knots % 2:
            raise ValueError("it must be odd, so that 0 is one of them")
        return knots


@final
class Method(Embedding):
    """A projection head and LeJEPA's loss."""

    negative_views = 0

    def __init__(self, config: Config, features: int, images: ImageSet) -> None:
        super().__init__(config, features, config.views)
        self.local = config.local
        self._loss = LeJEPALoss(config.weight, config.slices, config.knots)

    def loss(self, outputs: Outputs, batch: Batch, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        """LeJEPALoss of all views; the mean is that of the full-size ones."""
        z = outputs.rows.view(self.views_in_all, -1, outputs.rows.shape[1])
        loss: Tensor = self._loss(z, drawn_at(self.seed, progress), self.views)
        return loss, self._loss.stats
