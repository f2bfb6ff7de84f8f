"""What the encoder is worth: figures and pictures from the features of whole splits."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from sslcells import ranks
from sslcells.augment import Augment
from sslcells.config import Run
from sslcells.data import ImageSet
from sslcells.data.loader import InOrder, read
from sslcells.evaluation.classifier import Said
from sslcells.evaluation.features import features, spread
from sslcells.evaluation.health import health
from sslcells.evaluation.knn import knn_accuracy, knn_scores
from sslcells.evaluation.pictures import curves, embedding_map
from sslcells.evaluation.sheets import neighbour_sheet, view_sheet
from sslcells.methods import Classifier, Learner

Prepare = Callable[[Tensor, Tensor], Tensor]

SHOWN = 1000
"""Images in the embedding map, and behind the nearest neighbours."""
LARGE, START = 20_000, 4096
"""Of a split with more images than the first, an encoder that has not learned yet is asked about so many: a training
should begin."""
VIEWED = 512
"""Images whose two views give the alignment."""


class Evaluation:
    """kNN where labels are known, label-free health always; the pictures at the end. Test is not looked at.

    Val, or what is held out in its place, is asked for its neighbours in what is trained on. Where it is not there, or
    has no labels, train is asked itself, each image without itself and without images of its own source: `knn_loo`. A
    classifier is asked what it says of val, in place of all that.
    """

    def __init__(self, run: Run, splits: Mapping[str, ImageSet], augment: Augment, device: torch.device) -> None:
        self._run, self._augment, self._device = run, augment, device
        self._folder = run.folder / "plots"
        self._bank = splits["train"]
        self._val = splits.get("val")
        self._asked = self._val if self._val is not None and self._val.labelled and self._bank.labelled else None
        self._bank_index = spread(len(self._bank), run.evaluate.max_images)
        self._asked_index = spread(len(self._asked), run.evaluate.max_images) if self._asked is not None else []

    def first_figures(self, learner: Learner) -> dict[str, float]:
        """Figures before training; where a split is `LARGE`, of `START` images of each.

        Then they are called `start/…`: among fewer images the neighbours are others.
        """
        most = self._run.evaluate.max_images
        splits = {"train": self._bank} | ({"val": self._val} if self._val is not None else {})
        if max(map(len, splits.values())) <= LARGE or (most is not None and most <= START):
            return self.figures(learner)
        run = self._run.model_copy(update={"evaluate": self._run.evaluate.model_copy(update={"max_images": START})})
        few = Evaluation(run, splits, self._augment, self._device)
        return {f"start/{key}": value for key, value in few.figures(learner).items()}

    def figures(self, learner: Learner) -> dict[str, float]:
        """Figures of what is trained as it is; every rank takes part and knows them."""
        if isinstance(learner.method, Classifier):
            said = self.predictions(learner)
            return {f"val/{key}": value for key, value in said.figures().items()} if said is not None else {}
        return self._encoder_figures(learner.encoder)

    def predictions(self, learner: Learner) -> Said | None:
        """What a classifier says of val; None of other methods, and where nothing is asked. Every rank takes part."""
        return None if self._val is None else said_of(learner, self._val, self._run, self._augment, self._device)

    def _encoder_figures(self, encoder: nn.Module) -> dict[str, float]:
        bank = self._features(encoder, self._bank, self._bank_index)
        out = {f"health/{k}": v for k, v in health(bank, *self._two_views(encoder)).items()}
        if not self._bank.labelled:
            return out
        labels, sources = self._bank.labels[self._bank_index], self._bank.sources[self._bank_index]
        classes, k, t = len(self._bank.classes), self._run.evaluate.k, self._run.evaluate.temperature
        if self._asked is None:
            scores = knn_scores(bank, bank, labels, classes, k, t, sources, sources)
            return out | {f"knn_loo/{k}": v for k, v in knn_accuracy(scores, labels).items()}
        asked = self._features(encoder, self._asked, self._asked_index)
        scores = knn_scores(asked, bank, labels, classes, k, t, self._asked.sources[self._asked_index], sources)
        return out | {f"knn/{k}": v for k, v in knn_accuracy(scores, self._asked.labels[self._asked_index]).items()}

    def pictures(self, encoder: nn.Module, metrics: Sequence[dict[str, Any]]) -> dict[str, Path]:
        """Draw curves, embedding map and nearest neighbours; every rank takes part, rank 0 draws."""
        shown = self._asked if self._asked is not None else self._bank
        index = spread(len(shown), min(SHOWN, self._run.evaluate.max_images or SHOWN))
        z = self._features(encoder, shown, index)
        if ranks.rank() > 0:
            return {}
        labels, sources = shown.labels[index], shown.sources[index]
        split, folder = "val" if self._asked is not None else "train", self._folder
        title = f"Features of the {split} split"
        drawn = {
            "curves": curves(metrics, folder / "curves.png", split),
            "embedding": embedding_map(z, labels, shown.classes, folder / "embedding.png", self._run.seed, title),
            "neighbours": neighbour_sheet(
                lambda i: _hwc(shown.pixels(index[i])), z, labels, shown.classes, sources, folder / "neighbours.png"
            ),
        }
        return {name: path for name, path in drawn.items() if path is not None}

    def view_sheet(self, views: int) -> dict[str, Path]:
        """Draw what the augmentation makes of the first images of train; rank 0 draws."""
        if ranks.rank() > 0:
            return {}
        batch = next(read(self._bank, InOrder(spread(len(self._bank), 8), 8), 0, pin_memory=False))
        x = self._augment(batch.pixels, batch.image, seed=self._run.seed, step=0, views=max(6, views))
        return {"views": view_sheet(batch.pixels, x, *self._augment.normalisation, self._folder / "views.png")}

    def _features(self, encoder: nn.Module, images: ImageSet, index: list[int]) -> Tensor:
        return self._encoded(encoder, images, index, lambda pixels, image: self._augment.plain(pixels))

    def _two_views(self, encoder: nn.Module) -> list[Tensor]:
        """Features (N, F) of two views of the same images, the same views at every call."""
        index, seed = spread(len(self._bank), min(VIEWED, len(self._bank_index))), self._run.seed

        def view(which: int) -> Tensor:
            def prepare(pixels: Tensor, image: Tensor) -> Tensor:
                return self._augment(pixels, image, seed=seed, step=which, views=1)

            return self._encoded(encoder, self._bank, index, prepare)

        return [view(0), view(1)]

    def _encoded(self, encoder: nn.Module, images: ImageSet, index: list[int], prepare: Prepare) -> Tensor:
        batch, workers = self._run.evaluate.batch, self._run.train.workers
        return features(encoder, images, index, prepare, self._device, batch, workers)


def said_of(learner: Learner, images: ImageSet, run: Run, augment: Augment, device: torch.device) -> Said | None:
    """What a classifier says of images with known classes; None where there are none, and of other methods.

    Every rank takes part and knows it.
    """
    method = learner.method
    if not isinstance(method, Classifier):
        return None
    index = torch.tensor(spread(len(images), run.evaluate.max_images))
    labels = images.targets if method.several and images.targets is not None else images.labels
    index = index[labels[index].reshape(len(index), -1).min(1).values >= 0]
    if not len(index):
        return None

    def plain(pixels: Tensor, image: Tensor) -> Tensor:
        return augment.plain(pixels)

    rows = features(learner, images, index.tolist(), plain, device, run.evaluate.batch, run.train.workers)
    labels = F.one_hot(labels[index], rows.shape[1]) if method.several and labels.ndim == 1 else labels[index]
    names, classes = [images.name(i) for i in index.tolist()], images.classes or range(rows.shape[1])
    probabilities = method.probabilities(rows).double()
    return Said(names, [*map(str, classes)], labels, images.sources[index], probabilities)


def _hwc(pixels: Tensor) -> NDArray[np.uint8]:
    array: NDArray[np.uint8] = pixels.permute(1, 2, 0).numpy()
    return array
