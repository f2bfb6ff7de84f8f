"""The predictions of a trained classifier on a split: on val during training, on any split in `evaluate`."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from sslcells.augment import Augment
from sslcells.config import Run
from sslcells.data import ImageSet
from sslcells.evaluation.encode import encode, spread
from sslcells.evaluation.scores import of_classes, of_ranking
from sslcells.methods import Classifier, Learner, Logits
from sslcells.run.progress import Bars, no_bars
from sslcells.storage import write_atomically


def predictions_file(split: str) -> str:
    """The name of the file of predictions in a run's folder."""
    return f"predictions_{split}.npz"


class Predictions(NamedTuple):
    """A classifier's predictions for M images with known classes."""

    names: Sequence[str]
    classes: Sequence[str]
    labels: Tensor
    """(M,) int64 class, or (M, K) uint8 if an image may have several"""
    sources: Tensor
    """(M,) int64"""
    probabilities: Tensor
    """(M, K) float64"""

    def loss(self) -> float:
        """Mean cross-entropy; with several classes an image, mean binary cross-entropy over classes."""
        p = self.probabilities.clamp(min=1e-12)
        if self.labels.ndim == 1:
            return F.nll_loss(p.log(), self.labels).item()
        return F.binary_cross_entropy(self.probabilities.clamp(1e-12, 1 - 1e-12), self.labels.double()).item()

    def figures(self) -> dict[str, float]:
        """Loss, top1 and balanced accuracy; with several classes an image, loss and the mean AUROC of the classes."""
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


def joined(parts: Sequence[Predictions]) -> Predictions:
    """Predictions of one classifier for several sets of images, one after the other."""
    names = [name for part in parts for name in part.names]
    labels, sources, probabilities = (
        torch.cat([getattr(part, key) for part in parts]) for key in ("labels", "sources", "probabilities")
    )
    return Predictions(names, parts[0].classes, labels, sources, probabilities)


def read_predictions(folder: Path, split: str) -> Predictions:
    """Read what `Predictions.write` wrote to a run's folder."""
    with np.load(folder / predictions_file(split)) as arrays:
        return Predictions(
            arrays["names"].tolist(),
            arrays["classes"].tolist(),
            *(torch.from_numpy(arrays[key]) for key in ("labels", "sources", "probabilities")),
        )


def predict(
    learner: Learner,
    images: ImageSet,
    run: Run,
    augment: Augment,
    device: torch.device,
    bar: Bars = no_bars,
    index: Sequence[int] | None = None,
) -> Predictions | None:
    """A classifier's predictions for the images with known classes; None if there are none, or for other methods.

    Of the images with these indices, of `evaluate.max_images` of them where None. Every rank calls this and gets all
    predictions. `bar` shows how many of the images are done.
    """
    method = learner.method
    if not isinstance(method, Classifier):
        return None
    asked = torch.tensor(spread(len(images), run.evaluate.max_images) if index is None else index, dtype=torch.int64)
    labels = images.targets if method.several and images.targets is not None else images.labels
    asked = asked[labels[asked].reshape(len(asked), -1).min(1).values >= 0]
    if not len(asked):
        return None

    def plain(pixels: Tensor, image: Tensor) -> Tensor:
        return augment.plain(pixels, images.labs_of(image))

    found = encode(
        images,
        Logits(learner),
        plain,
        device,
        run.evaluate.batch,
        run.train.workers,
        asked.tolist(),
        progress=bar("predictions", len(asked)),
    )
    classes = images.classes or range(found.z.shape[1])
    labels = F.one_hot(labels[asked], found.z.shape[1]) if method.several and labels.ndim == 1 else labels[asked]
    probabilities = method.probabilities(found.z).double()
    return Predictions(list(found.names), [*map(str, classes)], labels, found.sources, probabilities)


def _two(positive: Tensor) -> Tensor:
    """(M,) probabilities of a class → (M, 2) scores of its absence and presence."""
    return torch.stack([1 - positive, positive], 1)
