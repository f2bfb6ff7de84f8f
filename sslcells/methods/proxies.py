"""Proxy-Anchor, arXiv 2003.13911, and ProxyNCA, arXiv 1703.07464: a learned proxy stands for each class."""

from typing import Literal, final

import torch
from pydantic import Field
from pytorch_metric_learning.losses import ProxyAnchorLoss, ProxyNCALoss
from torch import Tensor

from sslcells.data import Batch, ImageSet
from sslcells.methods import Outputs
from sslcells.methods._centres import Centres, classes, whole_batch
from sslcells.methods._embedding import Embedding


class Config(Centres):
    """Loss and embedding head."""

    name: Literal["proxies"] = "proxies"
    loss: Literal["proxy_anchor", "proxy_nca"] = "proxy_anchor"
    """proxy_anchor: proxies are anchors, compared with the rows; proxy_nca: rows are anchors, compared with proxies."""
    margin: float = Field(0.1, ge=0)
    """With proxy_anchor: added to the cosine of negatives, subtracted from that of positives."""
    alpha: float = Field(32.0, gt=0)
    """With proxy_anchor: the scale of the cosines."""
    softmax_scale: float = Field(8.0, gt=0)
    """With proxy_nca: the scale of the squared distances between rows and proxies of length 1."""


@final
class Method(Embedding):
    """An embedding head, and proxies. Proxy-Anchor compares all rows of a class at once, so each rank gathers all."""

    def __init__(self, config: Config, features: int, images: ImageSet) -> None:
        super().__init__(config, features, config.views)
        count = classes(images, config.name)
        self._anchors = config.loss == "proxy_anchor"
        if self._anchors:
            self._loss = ProxyAnchorLoss(count, config.dimension, margin=config.margin, alpha=config.alpha)
        else:
            self._loss = ProxyNCALoss(count, config.dimension, softmax_scale=config.softmax_scale)

    def loss(self, outputs: Outputs, batch: Batch, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of the global batch, and the fraction of its rows whose nearest proxy is that of their class."""
        with torch.autocast(outputs.rows.device.type, enabled=False):
            z, label, whole = whole_batch(outputs.rows, batch, self.views)
            if not len(label):
                return (0 * z).sum() * whole, {"top1": z.new_ones(())}
            loss: Tensor = self._loss(z, label) * whole
            with torch.no_grad():
                logits = self._loss.get_logits(z)
        nearest = logits.argmax(1) if self._anchors else logits.argmin(1)  # cosines, or distances
        return loss, {"top1": (nearest == label).float().mean()}
