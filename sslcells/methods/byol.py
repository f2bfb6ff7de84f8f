"""BYOL, arXiv 2006.07733: predict, from one view, the row that a slow-moving teacher gives the other view."""

from typing import Literal, final

from pydantic import Field
from torch import Tensor, nn

from sslcells import methods
from sslcells.config import Section
from sslcells.data import Batch, ImageSet
from sslcells.losses import row_std, unit
from sslcells.models.heads import Norm, projection


class Config(Section):
    """Heads and teacher."""

    name: Literal["byol"] = "byol"
    momentum: float = Field(0.996, ge=0, lt=1)
    """Momentum of the teacher at the first step; it rises to 1 by half a cosine."""
    hidden: int = Field(512, ge=1)
    """Width of the hidden layers of projector and predictor (4096 in the paper)."""
    dimension: int = Field(128, ge=2)
    """D, the width of a row (256 in the paper)."""
    layers: int = Field(2, ge=1)
    """Linear maps in the projector; the predictor has two."""
    norm: Norm = "batch"
    """Normalisation in projector and predictor."""


@final
class Method(methods.Method):
    """A projector, which the teacher has too, and a predictor, which only the student has."""

    views = 2
    negative_views = 0

    def __init__(self, config: Config, features: int, images: ImageSet) -> None:
        super().__init__()
        hidden, out, norm = config.hidden, config.dimension, config.norm
        projector = projection(features, hidden, out, config.layers, norm)
        self.head = nn.Sequential(projector, projection(out, hidden, out, 2, norm))
        self.momentum = config.momentum

    def forward(self, features: Tensor, progress: float) -> Tensor:
        """(2B, F) → predictions (2B, D)."""
        rows: Tensor = self.head(features)
        return rows

    def teacher_copies(self) -> nn.Module:
        """The projector."""
        return self.head.get_submodule("0")

    def loss(self, outputs: methods.Outputs, batch: Batch, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        """Eq. 2, the squared distance of unit rows, in both directions."""
        assert outputs.teacher is not None
        target = unit(outputs.teacher.detach())  # (2B, D)
        first, second = target.chunk(2)
        loss = (unit(outputs.rows) - target.roll(len(first), 0)).square().sum(1).mean() * 2
        figures = {"teacher_alignment": (first - second).square().sum(1).mean(), "row_std": row_std(outputs.teacher)}
        return loss, figures
