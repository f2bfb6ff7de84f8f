"""The figures and pictures of a training, computed from features of whole splits while it runs and at its end."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sslcells import ranks
from sslcells.augment import Augment, Draws
from sslcells.config import Run
from sslcells.data import ImageSet
from sslcells.data.loader import InOrder, read
from sslcells.evaluation import drift
from sslcells.evaluation.cell_sheet import cell_sheet
from sslcells.evaluation.classifier import Predictions, predict
from sslcells.evaluation.encode import Features, Prepare, drawn, encode, sharded, spread
from sslcells.evaluation.health import health
from sslcells.evaluation.knn import QUERIES, knn_accuracy, knn_scores
from sslcells.evaluation.pictures import curves, embedding_map
from sslcells.evaluation.sheets import neighbour_sheet, reconstruction_sheet, view_sheet
from sslcells.methods import MASKS, Classifier, Learner, Reconstructing

SHOWN = 1000
"""Images in the embedding map, and in the search for the nearest neighbours that are drawn."""
LARGE, START = 20_000, 4096
"""If a split has more than LARGE images, the figures before training use START of each: training should begin soon."""
CELLS = 48
"""Images on the sheet of the cells that were found."""
VIEWED = 512
"""Images whose two views give the alignment."""


class Evaluation:
    """kNN if labels are known, and label-free health figures; pictures at the end. The test split is not used.

    Queries are the images of val, or of the images of train held out in its place; their neighbours are searched in
    what is trained on. Without such a split, or without labels in it, the queries are train itself, each image without
    itself and without images of its own source: `knn_loo`. A classifier gets the figures of its predictions on val
    instead. `evaluate.queries` and `evaluate.bank` say of how many images; these are the same at every look. Where
    training starts from weights, the features' distance from theirs is a figure too.
    """

    def __init__(self, run: Run, splits: Mapping[str, ImageSet], augment: Augment, device: torch.device) -> None:
        self._run, self._augment, self._device = run, augment, device
        self._folder = run.folder / "plots"
        self._bank = splits["train"]
        self._val = splits.get("val")
        self._query = self._val if self._val is not None and self._val.labelled and self._bank.labelled else None
        self._bank_index = self._chosen(self._bank, run.evaluate.bank)
        self._val_index = self._chosen(self._val, run.evaluate.queries) if self._val is not None else []
        self._start: Tensor | None = None

    def first_figures(self, learner: Learner) -> dict[str, float]:
        """Figures before training, of START images a split if a split has more than LARGE.

        Then their keys start with `start/`, as fewer images have other neighbours. Where training starts from weights,
        it is of all that later figures are of, to be compared with them; the features of the start are kept.
        """
        if self._run.model.adapts:
            self._start = self._moving(learner.encoder)
            drift.keep(self._run.folder, self._start)
            return self.figures(learner)
        most = max(len(self._bank_index), len(self._val_index))
        splits = {"train": self._bank} | ({"val": self._val} if self._val is not None else {})
        if max(map(len, splits.values())) <= LARGE or most <= START:
            return self.figures(learner)
        few_of_each = self._run.evaluate.model_copy(update={"bank": START, "queries": START})
        run = self._run.model_copy(update={"evaluate": few_of_each})
        few = Evaluation(run, splits, self._augment, self._device)
        return {f"start/{key}": value for key, value in few.figures(learner).items()}

    def figures(self, learner: Learner) -> dict[str, float]:
        """Figures of the learner as it is now; every rank calls this and gets them."""
        if not isinstance(learner.method, Classifier):
            return self._encoder_figures(learner.encoder) | self._distance(learner.encoder)
        predictions = self._predicted(learner, self._val_index)
        of_val = {} if predictions is None else predictions.figures()
        return {f"val/{key}": value for key, value in of_val.items()} | self._distance(learner.encoder)

    def _distance(self, encoder: nn.Module) -> dict[str, float]:
        """How far the features have moved from the start's, if training started from weights and these are known."""
        if not self._run.model.adapts:
            return {}
        if self._start is None:
            self._start = drift.kept(self._run.folder)
        return {} if self._start is None else {drift.DISTANCE: drift.distance(self._moving(encoder), self._start)}

    def _moving(self, encoder: nn.Module) -> Tensor:
        """Features (N, F) of the fixed images whose distance from the start is measured."""
        images = self._val if self._val is not None else self._bank
        return self._features(encoder, images, spread(len(images), min(drift.MOST, len(images)))).z

    def predictions(self, learner: Learner) -> Predictions | None:
        """A classifier's predictions on all of val; None for other methods, and without val. Every rank calls this."""
        return self._predicted(learner, None)

    def _predicted(self, learner: Learner, index: list[int] | None) -> Predictions | None:
        if self._val is None:
            return None
        return predict(learner, self._val, self._run, self._augment, self._device, index=index)

    def _encoder_figures(self, encoder: nn.Module) -> dict[str, float]:
        bank = self._features(encoder, self._bank, self._bank_index)
        out = {f"health/{k}": v for k, v in health(bank.z, *self._two_views(encoder)).items()}
        if not self._bank.labelled:
            return out
        if self._query is not None:
            query, name = self._features(encoder, self._query, self._val_index), "knn"
        else:
            query, name = _some(bank, drawn(bank.labels, self._run.evaluate.queries)), "knn_loo"
        return out | {f"{name}/{key}": value for key, value in self._knn(query, bank).items()}

    def _knn(self, query: Features, bank: Features) -> dict[str, float]:
        """Each rank searches the neighbours of its part of the queries, on its device."""
        k, temperature, classes = self._run.evaluate.k, self._run.evaluate.temperature, len(self._bank.classes)
        z, labels, sources = (x.to(self._device) for x in bank[:3])

        def scored(mine: Sequence[int]) -> list[tuple[Tensor, ...]]:
            rows, source = query.z[mine].to(self._device), query.sources[mine].to(self._device)
            return [(knn_scores(rows, z, labels, classes, k, temperature, source, sources),)]

        scores = sharded(range(len(query.z)), scored, QUERIES, self._device)
        return knn_accuracy(scores[0], query.labels) if scores else {}

    def pictures(self, encoder: nn.Module, metrics: Sequence[dict[str, Any]]) -> dict[str, Path]:
        """Draw curves, embedding map and nearest neighbours; every rank calls this, rank 0 draws."""
        shown = self._query if self._query is not None else self._bank
        index = spread(len(shown), min(SHOWN, self._run.evaluate.max_images or SHOWN))
        features = self._features(encoder, shown, index)
        if ranks.rank() > 0:
            return {}
        z, labels, sources = features[:3]
        split, folder = "val" if self._query is not None else "train", self._folder
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
        """Draw augmented views of the first images of train, and their cells if the input needs them; rank 0 draws."""
        if ranks.rank() > 0:
            return {}
        batch = next(read(self._bank, InOrder(spread(len(self._bank), 8), 8), 0, pin_memory=False))
        x = self._augment(batch.pixels, batch.image, seed=self._run.seed, step=0, views=max(6, views), lab=batch.lab)
        drawn = {"views": view_sheet(batch.pixels, x, *self._augment.normalisation, self._folder / "views.png")}
        standard = self._augment.standard
        if standard is not None and (standard.needs_cell or self._run.augment.of_others):
            many = spread(len(self._bank), CELLS)
            batch = next(read(self._bank, InOrder(many, CELLS), 0, pin_memory=False))
            rows = self._augment.rows(batch.lab, len(batch.lab))
            drawn["cells"] = cell_sheet(batch.pixels, standard, self._folder / "cells.png", rows)
        return drawn

    def reconstructions(self, learner: Learner) -> dict[str, Path]:
        """Draw hidden patches as the method predicts them, of images that it is not trained on if there are any.

        Rank 0 draws; nothing is drawn for other methods.
        """
        method, shown = learner.method, self._val if self._val is not None else self._bank
        if ranks.rank() > 0 or not isinstance(method, Reconstructing):
            return {}
        batch = next(read(shown, InOrder(spread(len(shown), 8), 8), 0, pin_memory=False))
        x = self._augment.plain(batch.pixels.to(self._device), batch.lab)
        training = learner.training
        learner.eval()
        seen, made = method.reconstruct(learner.backbone, x, Draws(self._run.seed, 0, batch.image, 1, MASKS))
        learner.train(training)
        out = self._folder / "reconstructions.png"
        return {"reconstructions": reconstruction_sheet(x, seen, made, *self._augment.normalisation, out)}

    def _chosen(self, images: ImageSet, most: int | None) -> list[int]:
        """The images of a split that the figures use: at most `most`, drawn by class from those that are read."""
        index = spread(len(images), self._run.evaluate.max_images)
        return [index[i] for i in drawn(images.labels[torch.tensor(index, dtype=torch.int64)], most)]

    def _features(self, encoder: nn.Module, images: ImageSet, index: list[int]) -> Features:
        def prepare(pixels: Tensor, image: Tensor) -> Tensor:
            return self._augment.plain(pixels, images.labs_of(image))

        return self._encode(encoder, images, index, prepare)

    def _two_views(self, encoder: nn.Module) -> list[Tensor]:
        """Features (N, F) of two views of the same images, the same views at every call."""
        index, seed = spread(len(self._bank), min(VIEWED, len(self._bank_index))), self._run.seed

        def view(which: int) -> Tensor:
            def prepare(pixels: Tensor, image: Tensor) -> Tensor:
                lab = self._bank.labs_of(image)
                return self._augment(pixels, image, seed=seed, step=which, views=1, lab=lab)

            return self._encode(encoder, self._bank, index, prepare).z

        return [view(0), view(1)]

    def _encode(self, encoder: nn.Module, images: ImageSet, index: list[int], prepare: Prepare) -> Features:
        batch, workers = self._run.evaluate.batch, self._run.train.workers
        return encode(images, encoder, prepare, self._device, batch, workers, index)


def _some(features: Features, index: list[int]) -> Features:
    """The features with these indices; their names are not needed."""
    return Features(features.z[index], features.labels[index], features.sources[index], ())


def _hwc(pixels: Tensor) -> NDArray[np.uint8]:
    array: NDArray[np.uint8] = pixels.permute(1, 2, 0).numpy()
    return array
