"""The linear probe: multinomial logistic regression on frozen features."""

import warnings
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedGroupKFold
from sklearn.preprocessing import StandardScaler
from torch import Tensor

STRENGTHS = tuple(10.0**e for e in range(-4, 3))
"""C, the inverse strength of the regularisation."""
_ITERATIONS = 500

Floats = NDArray[np.float64]


class Labelled(NamedTuple):
    """Rows with known labels."""

    z: Tensor
    """(N, F)"""
    labels: Tensor
    """(N,) int64 class"""
    sources: Tensor
    """(N,) int64"""

    def at(self, index: NDArray[np.int64]) -> "Labelled":
        """The rows with these indices."""
        return Labelled(*(t[torch.from_numpy(index)] for t in self))


class Probed(NamedTuple):
    """The probe's scores for the query rows, and how C was chosen."""

    scores: Tensor
    """(M, K) float64: probabilities; 0 for classes missing in train"""
    strength: float
    """C; with cross-validation the median over folds"""
    chosen_on: str
    on_edge: bool
    """True if C is the smallest or largest of those tried"""
    converged: bool


def linear_probe(
    train: Labelled, query: Labelled | None, val: Labelled | None, classes: int, seed: int, apart: bool = True
) -> Probed | None:
    """Train on `train` with the C that is best on `val`, and score `query`; None if train has fewer than two classes.

    Features are standardised by train's mean and deviation. Without `val` C is chosen by cross-validation inside train;
    without `query` train's own rows are scored, each by a probe that saw no image of its source. Folds keep the images
    of a source together. With `apart` queries whose source train shows too are scored by a probe without that source
    (and others, in up to 3 folds). `val` must not be the query: its figure would be that of the best of seven probes.
    """
    if len(set(train.labels.tolist())) < 2:
        return None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ConvergenceWarning)
        if query is None:
            scores, strength, how = _cross_validated(train, classes, seed)
        else:
            strength, how = _chosen(train, val, seed)
            scores = _scored(train, query, strength, classes, apart)
    unfinished = any(issubclass(w.category, ConvergenceWarning) for w in caught)
    edge = strength in (STRENGTHS[0], STRENGTHS[-1]) and how != _FIXED
    return Probed(torch.from_numpy(scores), strength, how, edge, not unfinished)


_FIXED = "nothing: too few images to hold some out"


def _chosen(train: Labelled, val: Labelled | None, seed: int) -> tuple[float, str]:
    if val is not None and len(val.labels):
        right = [_accuracy(s, val.labels) for s in _path(train, val, STRENGTHS)]
        how = "the validation split"
    else:
        folds = _folds(train, seed)
        if not folds:
            return 1.0, _FIXED
        by_fold = [
            [_accuracy(s, train.labels[torch.from_numpy(out)]) for s in _path(train.at(rest), train.at(out), STRENGTHS)]
            for rest, out in folds
        ]
        right = np.mean(by_fold, axis=0).tolist()
        how = f"{len(folds)} folds of train, by source"
    return STRENGTHS[int(np.argmax(right))], how  # of equal ones the smallest C


def _cross_validated(train: Labelled, classes: int, seed: int) -> tuple[Floats, float, str]:
    """Scores of train's own rows; rows that are in no fold keep 0 for every class."""
    scores, strengths, how = np.zeros((len(train.labels), classes)), [], _FIXED
    for rest, out in _folds(train, seed):
        strength, how = _chosen(train.at(rest), None, seed)
        strengths.append(strength)
        scores[out] = _path(train.at(rest), train.at(out), (strength,), classes)[0]
    return scores, float(np.median(strengths or [1.0])), f"inside each fold: {how}"


def shared(train: Tensor, query: Tensor) -> list[int]:
    """The sources that rows of train and of the query, sources (N,) and (M,), have both; in order."""
    return sorted({*train.tolist()} & {*query.tolist()})


def _scored(train: Labelled, query: Labelled, strength: float, classes: int, apart: bool) -> Floats:
    """Scores (M, K) of the query; 0 where train has fewer than two classes without the query's source."""
    both = shared(train.sources, query.sources) if apart else []
    if not both:
        return _path(train, query, (strength,), classes)[0]
    scores, asked, learnt = np.zeros((len(query.labels), classes)), query.sources.numpy(), train.sources.numpy()
    others = np.setdiff1d(asked, both).tolist()
    for fold in (others, *(both[i::3] for i in range(3))):
        mine, rest = np.flatnonzero(np.isin(asked, fold)), np.flatnonzero(~np.isin(learnt, fold))
        if len(mine) and len(set(train.labels[torch.from_numpy(rest)].tolist())) > 1:
            scores[mine] = _path(train.at(rest), query.at(mine), (strength,), classes)[0]
    return scores


def _folds(rows: Labelled, seed: int) -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Up to 3 folds by source, each trained on at least two classes; empty if there are too few sources."""
    labels, sources = rows.labels.numpy(), rows.sources.numpy()
    per_class = [len(np.unique(sources[labels == c])) for c in np.unique(labels)]
    count = min(3, max(per_class))
    if count < 2:
        return []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a class with fewer sources than folds
        split = StratifiedGroupKFold(count, shuffle=True, random_state=seed).split(labels, labels, sources)
        folds = list(split)
    return [(rest, out) for rest, out in folds if len(np.unique(labels[rest])) > 1 and len(out)]


def _path(train: Labelled, query: Labelled, strengths: tuple[float, ...], classes: int | None = None) -> list[Floats]:
    """Probabilities (M, K) for each C, from the smallest, each fit starting from the one before."""
    scaler = StandardScaler()
    x, y = scaler.fit_transform(train.z.double().numpy()), train.labels.numpy()
    new = scaler.transform(query.z.double().numpy()) if len(query.labels) else np.zeros((0, x.shape[1]))
    model = LogisticRegression(max_iter=_ITERATIONS, warm_start=True)
    out = []
    for strength in strengths:
        model.set_params(C=strength).fit(x, y)
        width = classes if classes is not None else int(model.classes_.max()) + 1
        scores = np.zeros((len(new), width))
        if len(new):
            scores[:, model.classes_] = model.predict_proba(new)
        out.append(scores)
    return out


def _accuracy(scores: Floats, labels: Tensor) -> float:
    return float((scores.argmax(1) == labels.numpy()).mean())
