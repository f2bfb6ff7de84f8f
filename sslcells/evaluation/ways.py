"""Ways to count answers: every image once, every source once, or every source by one vote of its images."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sslcells.evaluation.knn import knn_predictions
from sslcells.evaluation.scores import Metric, Score, Units

VOTE = "source vote"
"""The unit of one vote for each source."""
_OF_ONE_CLASS = 0.9
"""Share of the sources with several images that must show one class each, or there are no votes."""


class Way(NamedTuple):
    """Answers as they are counted: of M images, or one for each of M sources."""

    unit: str
    """`image`, `source` (each source counts once, with the mean over its images) or VOTE"""
    labels: Tensor
    """(M,) int64"""
    scores: Tensor
    """(M, K)"""
    units: Units
    images: int
    sources: int | None
    """None where each image is its own"""

    @property
    def predicted(self) -> Tensor:
        """(M,) int64 class; −1 where no score is above 0."""
        return knn_predictions(self.scores)

    @property
    def weighs(self) -> str:
        """What `units` is to count once."""
        return "source" if self.unit == "source" else "image"

    def scored(self, metric: Metric, draws: int | None = None) -> dict[str, Score]:
        """Each score of a metric of these labels and scores, with its interval over sources."""
        return self.units.scored(metric, self.weighs, draws)


def ways(units: Units, labels: Tensor, scores: Tensor) -> Iterator[Way]:
    """The ways to count the answers to M images of known class, labels (M,) and scores (M, K).

    A vote is the mean of the scores of a source's images; see `voters`.
    """
    sources = units.count if units.known else None
    for unit in units.names:
        yield Way(unit, labels, scores, units, len(labels), sources)
    voting = voters(units, labels)
    if voting is None:
        return
    images = np.bincount(units.number)
    summed = [np.bincount(units.number, weights=column) for column in scores.double().numpy().T]
    mean = torch.from_numpy(np.stack(summed, 1) / images[:, None])[voting]
    first = torch.from_numpy(np.unique(units.number, return_index=True)[1])
    count = int(voting.sum())
    yield Way(VOTE, labels[first][voting], mean, units.of(count), int(images[voting.numpy()].sum()), count)


def voters(units: Units, labels: Tensor) -> Tensor | None:
    """(S,) bool: which of the S sources of images with labels (M,) show one class, and so have a vote; or None.

    There are no votes where no source has several images, or where many sources show several classes, as donors do:
    then what one image shows says nothing about the next.
    """
    if not units.known:
        return None
    number = torch.from_numpy(units.number)
    empty = labels.new_zeros(units.count)
    low, high = (empty.scatter_reduce(0, number, labels, end, include_self=False) for end in ("amin", "amax"))
    single = low == high
    return single if single[number.bincount() > 1].double().mean() >= _OF_ONE_CLASS else None


def without_vote(units: Units, labels: Tensor) -> str:
    """A sentence on sources of several classes where the others have a vote; empty if there are none."""
    voting = voters(units, labels)
    left_out = 0 if voting is None else int((~voting).sum())
    if not left_out:
        return ""
    words = "shows images of several classes, and has" if left_out == 1 else "show images of several classes, and have"
    return f"{left_out:,} of {units.count:,} sources {words} no vote"
