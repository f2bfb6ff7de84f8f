"""Scores of predictions, by image or by source, with intervals from a bootstrap over sources.

scikit-learn has the same scores, and the tests compare with it, but a thousand resamples of them would take minutes.
So each score is computed for a matrix of weights, one row a resample; the figure itself is the row of ones.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sslcells.losses import unit

Floats = NDArray[np.float64]
Metric = Callable[[Floats], Mapping[str, Floats]]
"""Weights (r, M) → scores (r,) each."""

METRIC = "balanced accuracy"
"""The score that sentences say."""
DRAWS = 1000
_TILE = 2**22
"""Weights in memory at a time: 32 MiB."""


class Score(NamedTuple):
    """A score and its 95 % interval; NaN if undefined."""

    value: float
    low: float
    high: float


class Units:
    """The units that a resample draws: the sources of M images; each image is its own if sources are unknown."""

    def __init__(self, sources: Tensor, seed: int, draws: int = DRAWS) -> None:
        numbers, self.number = np.unique(sources.cpu().numpy(), return_inverse=True)
        """(M,) int64: which source each image is of, counted from 0"""
        self._size = np.bincount(self.number)
        self._seed, self._draws = seed, draws
        self.count = len(numbers)
        """number of sources"""
        self.known = self.count < len(sources)
        """True if a source has two images or more"""

    @property
    def names(self) -> list[str]:
        """The ways to count: by image, and by source where sources are known."""
        return ["image", "source"] if self.known else ["image"]

    def of(self, count: int) -> "Units":
        """As many units of one image each, with resamples of the same seed and number."""
        return Units(torch.arange(count), self._seed, self._draws)

    def scored(self, metric: Metric, unit: str = "image", draws: int | None = None) -> dict[str, Score]:
        """Each score of a metric with its interval; with unit "source" the images of a source share a weight of 1.

        The interval holds the middle 95 % of the scores over resamples of the sources, drawn with replacement. The
        resamples are the same for every metric, so that methods are compared on the same draws.
        """
        share = 1 / self._size[self.number] if unit == "source" else np.ones(len(self.number))
        value = {key: float(v[0]) for key, v in metric(share[None]).items()}
        if self.count < 2:
            return {key: Score(v, np.nan, np.nan) for key, v in value.items()}
        resamples = self._resamples(min(self._draws, draws or self._draws))
        parts = [metric(times[:, self.number] * share) for times in resamples]
        return {key: Score(value[key], *_middle(np.concatenate([p[key] for p in parts]))) for key in value}

    def _resamples(self, draws: int) -> Iterator[Floats]:
        """How often each source is drawn, (r, sources) at a time."""
        generator, rows = np.random.default_rng(self._seed), max(1, _TILE // len(self.number))
        for start in range(0, draws, rows):
            some = min(rows, draws - start)
            yield generator.multinomial(self.count, np.full(self.count, 1 / self.count), some).astype(float)


def _middle(values: Floats) -> tuple[float, float]:
    finite = values[np.isfinite(values)]
    if not len(finite):
        return np.nan, np.nan
    low, high = np.quantile(finite, (0.025, 0.975))
    return float(low), float(high)


def mean_of(values: Mapping[str, Tensor | Floats]) -> Metric:
    """The metric that is the weighted mean of values (M,) an image; NaN ones, of images not asked, do not count."""
    arrays = {key: np.asarray(v, dtype=float) for key, v in values.items()}

    def metric(weight: Floats) -> dict[str, Floats]:
        return {
            key: _ratio(weight @ np.nan_to_num(v), weight @ np.isfinite(v).astype(float)) for key, v in arrays.items()
        }

    return metric


def of_classes(labels: Tensor, predicted: Tensor, classes: int) -> Metric:
    """Accuracy, balanced accuracy and macro F1 of predictions against labels, (M,) int64 each, labels all known.

    A prediction below 0 is wrong. Means over classes include only classes with weighted images: a class missing from
    the split is no mistake.
    """
    true, guess = labels.numpy(), predicted.numpy()
    is_true, is_guess = (x[:, None] == np.arange(classes) for x in (true, guess))  # (M, K)
    right, is_hit = (true == guess).astype(float), (is_true & is_guess).astype(float)
    each = np.ones_like(right)  # summed as `right` is, so that all right is 1 and no more
    is_true, is_guess = is_true.astype(float), is_guess.astype(float)

    def metric(weight: Floats) -> dict[str, Floats]:
        images, guessed, hits = weight @ is_true, weight @ is_guess, weight @ is_hit  # (r, K)
        f1 = np.where(images > 0, _ratio(2 * hits, images + guessed), np.nan)
        return {
            "accuracy": _ratio(weight @ right, weight @ each),
            "balanced accuracy": _mean_known(_ratio(hits, images)),
            "macro F1": _mean_known(f1),
        }

    return metric


def of_ranking(labels: Tensor, scores: Tensor) -> Metric:
    """AUROC of scores (M, K), each class against the rest, mean over the classes with weighted images."""
    true, values = labels.numpy(), scores.double().numpy()
    present = np.unique(true).tolist()
    if not present:
        return lambda weight: {"AUROC": np.full(len(weight), np.nan)}

    def metric(weight: Floats) -> dict[str, Floats]:
        return {"AUROC": _mean_known(np.stack([auroc(values[:, c], true == c, weight) for c in present], axis=1))}

    return metric


def of_class(number: int, labels: Tensor, scores: Tensor, predicted: Tensor) -> Metric:
    """Recall, precision, F1 and AUROC of one class; NaN if no weighted image has it."""
    true, guess = (labels == number).numpy(), (predicted == number).numpy()
    values = scores[:, number].double().numpy()

    def metric(weight: Floats) -> dict[str, Floats]:
        images, guessed, hits = (weight @ x.astype(float) for x in (true, guess, true & guess))
        return {
            "recall": _ratio(hits, images),
            "precision": np.where(images > 0, np.nan_to_num(_ratio(hits, guessed)), np.nan),
            "F1": np.where(images > 0, _ratio(2 * hits, images + guessed), np.nan),
            "AUROC": auroc(values, true, weight),
        }

    return metric


def auroc(score: Floats, positive: NDArray[np.bool_], weight: Floats) -> Floats:
    """Area under the ROC curve of scores (M,), for each row of weights (r, M): (r,), NaN without both kinds.

    The weight of pairs in which the positive has the higher score, ties counting half, of that of all pairs.
    """
    if not len(score):
        return np.full(len(weight), np.nan)
    order = np.argsort(score, kind="stable")
    ordered, is_positive, w = score[order], positive[order], weight[:, order]
    starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
    plus, minus = (np.add.reduceat(w * kind, starts, axis=1) for kind in (is_positive, ~is_positive))
    below = minus.cumsum(1) - minus
    return _ratio((plus * (below + minus / 2)).sum(1), plus.sum(1) * minus.sum(1))


def difference(
    units: Units, labels: Tensor, ours: Sequence[Tensor], theirs: Sequence[Tensor], unit: str = "image"
) -> dict[str, Any]:
    """Accuracy, balanced accuracy and macro F1 of predictions (M,) minus those of others, with intervals.

    Both are of the same images with these labels (M,), and resampled together, so that what makes images hard for both
    cancels. Of several predictions (of several seeds) the mean of the scores is taken.
    """
    classes = 1 + max(int(x.max()) for x in (labels, *ours, *theirs))
    first, second = ([of_classes(labels, p, classes) for p in some] for some in (ours, theirs))
    return units.scored(_minus(first, second), unit)


def _minus(first: Sequence[Metric], second: Sequence[Metric]) -> Metric:
    def metric(weight: Any) -> dict[str, Any]:
        ours, theirs = ([m(weight) for m in some] for some in (first, second))
        return {
            key: sum(each[key] for each in ours) / len(ours) - sum(each[key] for each in theirs) / len(theirs)
            for key in ours[0]
        }

    return metric


def _ratio(part: Floats, whole: Floats) -> Floats:
    out = np.full(np.shape(whole), np.nan)
    np.divide(part, whole, out=out, where=whole > 0)
    return out


def _mean_known(each: Floats) -> Floats:
    """Mean over the classes (r, K) that are not NaN: (r,)."""
    return _ratio(np.nan_to_num(each).sum(1), np.isfinite(each).sum(1).astype(float))


def rounded(score: Score) -> dict[str, Any]:
    """A score for a JSON file; null if it is NaN."""
    return {key: None if np.isnan(v) else float(v) for key, v in score._asdict().items()}


def unit_rows(z: Tensor) -> Tensor:
    """Rows (N, F) float64 of norm 1; a row of zeros stays one."""
    return unit(z.double())
