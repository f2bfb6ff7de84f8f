"""The margin loss with distance-weighted sampling, arXiv 1706.07567: a boundary between near and far pairs."""

from typing import Literal, final

import torch
from pydantic import Field
from pytorch_metric_learning.losses import MarginLoss
from torch import Tensor

from sslcells.data import Batch, ImageSet
from sslcells.losses import unit
from sslcells.methods import Outputs
from sslcells.methods._centres import Centres, classes, whole_batch
from sslcells.methods._embedding import Embedding, seed_of


class Config(Centres):
    """Loss and embedding head."""

    name: Literal["margin"] = "margin"
    margin: float = Field(0.2, gt=0)
    """Required distance of a pair from the boundary, on its side; rows have length 1."""
    boundary: float = Field(1.2, gt=0, lt=2)
    """Initial boundary: the distance between rows that separates positive from negative pairs."""
    learn: Literal["none", "one", "per_class"] = "per_class"
    """Learn no boundary, one for all anchors, or one for each class of the anchor."""
    nu: float = Field(0.0, ge=0)
    """Weight of the regularisation that keeps a learned boundary small."""
    cutoff: float = Field(0.5, gt=0, lt=1.4)
    """Sample negatives nearer than this as if they were this far: very near ones have noisy gradients."""


@final
class Method(Embedding):
    """An embedding head, and the boundaries.

    Every rank holds all rows and all their distances, and draws the same negatives: memory grows with the square of
    the global batch.
    """

    def __init__(self, config: Config, features: int, images: ImageSet) -> None:
        super().__init__(config, features, config.views)
        count = classes(images, config.name)
        self._cutoff = config.cutoff
        self._loss = MarginLoss(
            config.margin,
            config.nu,
            config.boundary,
            learn_beta=config.learn != "none",
            num_classes=count if config.learn == "per_class" else None,
        )

    def loss(self, outputs: Outputs, batch: Batch, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        """Equation 4, over each positive pair of the global batch with one sampled negative of its anchor."""
        with torch.autocast(outputs.rows.device.type, enabled=False):
            z, label, whole = whole_batch(outputs.rows, batch, self.views)
            boundary = self._loss.beta.detach().mean().to(z.device)
            if not len(label):
                return (0 * z).sum() * whole, {"boundary": boundary}
            generator = torch.Generator().manual_seed(seed_of(batch))
            triplets = distance_weighted(z.detach(), label, self._cutoff, generator)
            loss: Tensor = self._loss(z, label, triplets) if len(triplets[0]) else (0 * z).sum()
        return loss * whole, {"boundary": boundary}


def distance_weighted(
    z: Tensor, label: Tensor, cutoff: float, generator: torch.Generator, farthest: float = 1.4
) -> tuple[Tensor, Tensor, Tensor]:
    """All positive pairs, each with a sampled negative of its anchor: (N, D) rows, (N,) labels → three (T,) indices.

    A negative at distance d < `farthest` has weight 1 / q(max(d, cutoff)), where q is the density of distances between
    random points on the sphere (section 4), so that the sampled distances are uniform. Anchors without such a negative
    are left out.
    """
    z = unit(z)
    d = torch.cdist(z, z)
    same = label[:, None] == label
    at, dimension = d.clamp(cutoff, farthest), z.shape[1]
    log_weight = (2 - dimension) * at.log() - (dimension - 3) / 2 * torch.log1p(-at.square() / 4)
    log_weight.masked_fill_(same | (d >= farthest), -torch.inf)
    upto = (log_weight - log_weight.amax(1, keepdim=True)).exp().nan_to_num_(0.0).double().cumsum(1)  # (N, N)
    pair = (same & ~torch.eye(len(z), dtype=torch.bool, device=z.device)) & (upto[:, -1:] > 0)
    anchor, positive = pair.nonzero(as_tuple=True)
    number = (
        torch.rand(len(z), int(pair.sum(1).max()), generator=generator, dtype=torch.float64).to(z.device) * upto[:, -1:]
    )
    drawn = torch.searchsorted(upto, number, right=True)  # (N, P): inverts the running sum of the weights
    return anchor, positive, drawn[anchor, pair.cumsum(1)[anchor, positive] - 1]
