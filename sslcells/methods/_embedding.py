"""What methods share: the head that makes the rows, and which rows are positives."""

from typing import Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from sslcells import methods, ranks
from sslcells.config import ConfigError, Section
from sslcells.data import Batch, ImageSet
from sslcells.models.heads import Norm, projection

Positive = Literal["view", "label", "source"]
SameLab = Literal["any", "only"]
"""Negatives of any laboratory, or only of the anchor's own."""


class Head(Section):
    """The head that makes the rows."""

    hidden: int = Field(256, ge=1)
    """Width of the head's hidden layers."""
    dimension: int = Field(128, ge=2)
    """D, the width of a row."""
    layers: int = Field(2, ge=1)
    """Linear maps in the head; 1 for a linear embedding."""
    norm: Norm = "batch"
    """Normalisation in the head."""


class WideHead(Head):
    """A wide head, for losses on the dimensions of the rows."""

    hidden: int = Field(512, ge=1)
    """Width of the head's hidden layers."""
    dimension: int = Field(512, ge=2)
    """D, the width of a row; a wide one helps (8192 in the paper), but the loss keeps D² numbers."""
    layers: int = Field(3, ge=1)
    """Linear maps in the head."""


class Embedding(methods.Method):
    """A method whose rows are the features after a projection head; it has no teacher."""

    def __init__(self, config: Head, features: int, views: int) -> None:
        super().__init__()
        self.views = views
        self.head = projection(features, config.hidden, config.dimension, config.layers, config.norm)

    def forward(self, features: Tensor, progress: float) -> Tensor:
        """(V·B, F) → (V·B, D)."""
        rows: Tensor = self.head(features)
        return rows

    def teacher_copies(self) -> None:
        """There is no teacher."""


def check_positives(kind: Positive, images: ImageSet, views: int) -> None:
    """Raise a ConfigError if no image can have a positive of this kind."""
    if kind == "label":
        check_labels(images, "method.positive=label")
    if kind == "source" and views == 1 and len(images.sources.unique()) == len(images):  # type: ignore[no-untyped-call]
        raise ConfigError(
            f"method.positive=source: each of the {len(images)} images of the train split is the only one of its "
            f"source, and with one view has no positive; method.positive=view needs no sources"
        )


def check_labels(images: ImageSet, what: str) -> None:
    """Raise a ConfigError unless the images have labels of at least two classes."""
    if not images.labelled:
        raise ConfigError(
            f"{what} needs labels of at least two classes; the train split has {len(images)} images without; "
            f"method.name=simclr needs none"
        )


def check_labs(same_lab: SameLab, images: ImageSet) -> None:
    """Raise a ConfigError if negatives are to be of the same laboratory and an image has none."""
    if same_lab == "any":
        return
    unknown = torch.ones(len(images)) if images.labs is None else images.labs == 0
    without = unknown.nonzero()[:, 0]
    if len(without):
        raise ConfigError(
            f"method.same_lab=only needs the laboratory of every image of train; {len(without):,} of {len(images):,} "
            f"have none, such as {images.name(int(without[0]))}: give it by a table's column (data.site_column), "
            f"data.lab_pattern or data.lab_folder"
        )


def labs(same_lab: SameLab, batch: Batch, views: int = 1) -> Tensor | None:
    """(V·B,) laboratories of the rows where negatives are of the same one; None where they are of any."""
    return batch.lab.repeat(views) if same_lab == "only" else None


def positives(kind: Positive, batch: Batch, views: int) -> Tensor:
    """(V·B,) ids ≥ 0, equal for positives; an image without a label has only its own other view as a positive."""
    if kind == "label":
        ids = torch.where(batch.label < 0, batch.image + _UNKNOWN, batch.label)
    else:
        ids = batch.image if kind == "view" else batch.source
    return ids.repeat(views)


_UNKNOWN = 2**32
"""above every class"""


def drawn_at(seed: int, progress: float) -> int:
    """A seed for what a loss draws at a step, which `progress` tells from all others: the same on every rank."""
    at = int(progress * 2**53)  # exact
    return int(np.random.SeedSequence([seed, at]).generate_state(1, np.uint64)[0] >> 1)


def seed_of(batch: Batch) -> int:
    """A seed made from the image ids of the global batch in their order: the same on every rank."""
    mixed = 0
    for image in ranks.gather(batch.image).tolist():
        mixed = (mixed * 1_000_003 + image) % 2**63
    return mixed
