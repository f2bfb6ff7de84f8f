"""Losses of pytorch-metric-learning whose class centres, or boundaries, are learned, on the ranks of one global batch.

They are modules of the method, so that their parameters are optimised, averaged over ranks, saved and resumed.
"""

from typing import Any, Literal

import torch
from torch import Tensor

from sslcells import ranks
from sslcells.data import Batch, ImageSet
from sslcells.losses import gather_ids, gather_with_grad, sound
from sslcells.methods import Outputs
from sslcells.methods._embedding import Embedding, Head, check_labels


class Centres(Head):
    """What all of them have."""

    views: Literal[1, 2] = 1
    """Augmented views of each image."""


class CentreMethod(Embedding):
    """An embedding head, and class centres that each row is compared with on its own, on its own rank."""

    def __init__(self, config: Centres, features: int, loss: Any) -> None:
        super().__init__(config, features, config.views)
        self._loss = loss

    def loss(self, outputs: Outputs, batch: Batch, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean over the labelled rows of the global batch; and for how many the nearest centre is their own's."""
        rows = outputs.rows
        known, label = _known(batch.label.repeat(self.views))
        total = ranks.gather(known.sum()[None]).sum()
        if not len(label):
            return (0 * rows).sum(), {"top1": torch.ones_like(total, dtype=torch.float32)}
        with torch.autocast(rows.device.type, enabled=False):
            whole = sound(rows)  # an unlabelled row that is not finite is a fault too
            rows = rows.float()[known]
            mean: Tensor = self._loss(rows, label) * whole
            with torch.no_grad():
                right = self._loss.get_logits(rows).argmax(1) == label
        # The mean over ranks of own sum × world / all is the mean over the global batch.
        return mean * len(label) * ranks.world() / total, {"top1": right.float().mean()}


def whole_batch(rows: Tensor, batch: Batch, views: int) -> tuple[Tensor, Tensor, Tensor]:
    """Labelled rows (N, D) of the global batch, with the gradient of `gather_with_grad`, and their labels (N,).

    The third is a factor of the loss: NaN where any row is not finite, labelled or not, else 1.
    """
    known, label = _known(gather_ids(batch.label, views))
    z = gather_with_grad(rows.float(), views)
    return z[known], label, sound(z)


def classes(images: ImageSet, name: str) -> int:
    """K. Raises a ConfigError where images have no labels."""
    check_labels(images, f"method.name={name}")
    return len(images.classes)


def _known(label: Tensor) -> tuple[Tensor, Tensor]:
    known = label >= 0
    return known, label[known]
