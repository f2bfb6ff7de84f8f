"""SimSiam, arXiv 2011.10566: predict the other view's row, which gets no gradient."""

from typing import Literal, final

import torch
from pydantic import Field
from torch import Tensor, nn

from sslcells import methods
from sslcells.config import Section
from sslcells.data import Batch, ImageSet
from sslcells.losses import row_std, unit
from sslcells.models.heads import Norm, projection


class Config(Section):
    """Projector and predictor."""

    name: Literal["simsiam"] = "simsiam"
    hidden: int = Field(512, ge=1)
    """Width of the projector's hidden layers (2048 in the paper)."""
    dimension: int = Field(512, ge=2)
    """D, the width of a row (2048 in the paper)."""
    bottleneck: int = Field(128, ge=1)
    """Width of the predictor's hidden layer (512 in the paper)."""
    layers: int = Field(3, ge=1)
    """Linear maps in the projector; the predictor has two."""
    norm: Norm = "batch"
    """Normalisation in both heads, and of the projector's rows."""


@final
class Method(methods.Method):
    """A projector and a predictor."""

    views = 2
    negative_views = 0

    def __init__(self, config: Config, features: int, images: ImageSet) -> None:
        super().__init__()
        out, norm = config.dimension, config.norm
        projector = projection(features, config.hidden, out, config.layers, norm, last=True)
        self.head = nn.Sequential(projector, projection(out, config.bottleneck, out, 2, norm))

    def forward(self, features: Tensor, progress: float) -> Tensor:
        """(2B, F) → predictions and projections, side by side: (2B, 2D)."""
        rows = self.head.get_submodule("0")(features)
        return torch.cat([self.head.get_submodule("1")(rows), rows], 1)

    def teacher_copies(self) -> None:
        """There is no teacher."""

    def loss(self, outputs: methods.Outputs, batch: Batch, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        """Eq. 3 and 4: minus the cosine of one view's prediction and the other view's projection, detached."""
        predicted, projected = outputs.rows.chunk(2, 1)
        other = unit(projected.detach()).roll(len(projected) // 2, 0)
        loss = -(unit(predicted) * other).sum(1).mean()
        return loss, {"row_std": row_std(projected)}
