"""What the encoder is worth: figures and pictures from the features of whole splits."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sslcells import distributed
from sslcells.augment import Augment
from sslcells.config import Run
from sslcells.data import ImageSet
from sslcells.data.loader import InOrder, read
from sslcells.evaluation.features import features, spread
from sslcells.evaluation.health import health
from sslcells.evaluation.knn import knn_accuracy, knn_scores
from sslcells.evaluation.pictures import curves, embedding_map
from sslcells.evaluation.sheets import neighbour_sheet, view_sheet

Prepare = Callable[[Tensor, Tensor], Tensor]

SHOWN = 1000
"""Images in the embedding map, and behind the nearest neighbours."""
VIEWED = 512
"""Images whose two views give the alignment."""


class Evaluation:
    """kNN where labels are known, label-free health always; the pictures at the end.

    The labelled split is asked for its neighbours in train. Without one, train is asked itself, each image without
    itself and without images of its own source: `knn_loo`.
    """

    def __init__(self, run: Run, splits: Mapping[str, ImageSet], augment: Augment, device: torch.device) -> None:
        self._run, self._augment, self._device = run, augment, device
        self._folder = run.folder / "plots"
        self._bank = splits["train"]
        asked = splits.get(run.evaluate.split) or splits.get("val") or splits.get("test")
        self._asked = asked if asked is not None and asked.labelled and self._bank.labelled else None
        self._bank_index = spread(len(self._bank), run.evaluate.max_images)
        self._asked_index = spread(len(self._asked), run.evaluate.max_images) if self._asked is not None else []

    def figures(self, encoder: nn.Module) -> dict[str, float]:
        """Figures of the encoder as it is; every rank takes part and knows them."""
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
        if distributed.rank() > 0:
            return {}
        labels, sources = shown.labels[index], shown.sources[index]
        split = self._run.evaluate.split if self._asked is not None else "train"
        folder = self._folder
        title = f"Features of the {split} split"
        drawn = {
            "curves": curves(metrics, folder / "curves.png"),
            "embedding": embedding_map(z, labels, shown.classes, folder / "embedding.png", self._run.seed, title),
            "neighbours": neighbour_sheet(
                lambda i: _hwc(shown.pixels(index[i])), z, labels, shown.classes, sources, folder / "neighbours.png"
            ),
        }
        return {name: path for name, path in drawn.items() if path is not None}

    def view_sheet(self, views: int) -> dict[str, Path]:
        """Draw what the augmentation makes of the first images of train; rank 0 draws."""
        if distributed.rank() > 0:
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


def _hwc(pixels: Tensor) -> NDArray[np.uint8]:
    array: NDArray[np.uint8] = pixels.permute(1, 2, 0).numpy()
    return array
