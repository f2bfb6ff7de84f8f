"""What a classifier says of a split: of val while it trains and at its end, of another where that is asked."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from sslcells.evaluation.scores import of_classes, of_ranking
from sslcells.storage import write_atomically


def predictions_file(split: str) -> str:
    """In a run's folder: what its classifier says of a split."""
    return f"predictions_{split}.npz"


class Said(NamedTuple):
    """A classifier's word on images with known classes."""

    names: Sequence[str]
    classes: Sequence[str]
    labels: Tensor
    """(M,) int64 class, or (M, K) uint8 where an image may have several"""
    sources: Tensor
    """(M,) int64"""
    probabilities: Tensor
    """(M, K) float64"""

    def loss(self) -> float:
        """Mean cross-entropy; of several classes an image mean binary cross-entropy over classes."""
        p = self.probabilities.clamp(min=1e-12)
        if self.labels.ndim == 1:
            return F.nll_loss(p.log(), self.labels).item()
        return F.binary_cross_entropy(self.probabilities.clamp(1e-12, 1 - 1e-12), self.labels.double()).item()

    def figures(self) -> dict[str, float]:
        """Loss, top1 and balanced accuracy; of several classes an image loss and the mean AUROC of the classes."""
        if not len(self.labels):
            return {}
        one = np.ones((1, len(self.labels)))
        if self.labels.ndim == 1:
            predicted = self.probabilities.argmax(1)
            scores = of_classes(self.labels, predicted, self.probabilities.shape[1])(one)
            named = {"top1": scores["accuracy"], "balanced": scores["balanced accuracy"]}
        else:
            both = [c for c in range(self.labels.shape[1]) if 0 < self.labels[:, c].sum() < len(self.labels)]
            each = [of_ranking(self.labels[:, c].long(), _two(self.probabilities[:, c]))(one)["AUROC"] for c in both]
            named = {"auroc": np.mean(each, axis=0)} if each else {}
        return {"loss": self.loss(), **{key: float(v[0]) for key, v in named.items()}}

    def write(self, folder: Path, split: str) -> None:
        """Write predictions_<split>.npz: names, classes, labels, sources, probabilities."""
        arrays = {key: np.asarray(value) for key, value in self._asdict().items()}
        write_atomically(folder / predictions_file(split), lambda opened: np.savez_compressed(opened, **arrays))  # type: ignore[arg-type]


def read_predictions(folder: Path, split: str) -> Said:
    """What `Said.write` wrote to a run's folder."""
    with np.load(folder / predictions_file(split)) as arrays:
        return Said(
            arrays["names"].tolist(),
            arrays["classes"].tolist(),
            *(torch.from_numpy(arrays[key]) for key in ("labels", "sources", "probabilities")),
        )


def _two(positive: Tensor) -> Tensor:
    """(M,) probabilities of a class → (M, 2) scores of its absence and presence."""
    return torch.stack([1 - positive, positive], 1)
