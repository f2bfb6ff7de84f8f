"""Losses of pytorch-metric-learning that learn class centres or boundaries, over the global batch of all ranks.

They are submodules of the method, so that their parameters are optimised, averaged over ranks, saved and resumed.
"""

from abc import ABC, abstractmethod
from typing import Any, Literal

import torch
from torch import Tensor

from sslcells import ranks
from sslcells.data import Batch, ImageSet
from sslcells.losses import gather_ids, gather_with_grad, sound
from sslcells.methods import Outputs
from sslcells.methods._embedding import Embedding, Head, check_labels


class Centres(Head):
    """Options of all methods with class centres."""

    views: Literal[1, 2] = 1
    """Augmented views of each image."""


class CentreMethod(Embedding, ABC):
    """An embedding head, and class centres; each rank compares its own rows with them."""

    def __init__(self, config: Any, features: int, images: ImageSet) -> None:
        loss = self.centres(config, classes(images, config.name))
        super().__init__(config, features, config.views)
        self._loss = loss

    @staticmethod
    @abstractmethod
    def centres(config: Any, count: int) -> Any:
        """The loss of pytorch-metric-learning, with `count` centres."""

    def loss(self, outputs: Outputs, batch: Batch, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean over the labelled rows of the global batch, and the fraction that is nearest to its own centre."""
        rows = outputs.rows
        known, label = _known(batch.label.repeat(self.views))
        total = ranks.gather(known.sum()[None]).sum()
        if not len(label):
            return (0 * rows).sum(), {"top1": torch.ones_like(total, dtype=torch.float32)}
        with torch.autocast(rows.device.type, enabled=False):
            finite = sound(rows)  # unlabelled rows must be finite too
            rows = rows.float()[known]
            mean: Tensor = self._loss(rows, label) * finite
            with torch.no_grad():
                right = self._loss.get_logits(rows).argmax(1) == label
        # The mean over ranks of (this rank's sum × world / all rows) is the mean over the global batch.
        return mean * len(label) * ranks.world() / total, {"top1": right.float().mean()}


def whole_batch(rows: Tensor, batch: Batch, views: int) -> tuple[Tensor, Tensor, Tensor]:
    """Labelled rows (N, D) of the global batch, with the gradient of `gather_with_grad`, and their labels (N,).

    The third value is a factor for the loss: NaN if any row, labelled or not, is not finite, else 1.
    """
    known, label = _known(gather_ids(batch.label, views))
    z = gather_with_grad(rows.float(), views)
    return z[known], label, sound(z)


def classes(images: ImageSet, name: str) -> int:
    """K, the number of classes. Raises a ConfigError if the images have no labels."""
    check_labels(images, f"method.name={name}")
    return len(images.classes)


def _known(label: Tensor) -> tuple[Tensor, Tensor]:
    known = label >= 0
    return known, label[known]
