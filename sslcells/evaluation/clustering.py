"""Clustering: how well k-means clusters, found without labels, agree with the classes."""

import warnings
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import adjusted_mutual_info_score, adjusted_rand_score, normalized_mutual_info_score
from torch import Tensor

from sslcells.evaluation.scores import Score, unit_rows

Numbers = NDArray[np.int64]

_SCORES: dict[str, Callable[[Numbers, Numbers], float]] = {
    "NMI": normalized_mutual_info_score,
    "ARI": adjusted_rand_score,
    "AMI": adjusted_mutual_info_score,
}
_DRAWS = 200
"""Resamples; few, as each AMI takes milliseconds."""


def clusters(z: Tensor, count: int, seed: int) -> Tensor:
    """The cluster of each row of z (N, F) by k-means of its unit rows: (N,) int64; the best of ten starts.

    Raises:
        ValueError: if count is below 1, or rows are not finite.
    """
    if count < 1:
        raise ValueError(f"count={count}: there must be one cluster at least")
    if broken := int((~z.isfinite()).any(1).sum()):
        raise ValueError(f"{broken} of {len(z)} rows hold NaN or infinity: they belong to no cluster")
    if not len(z):
        return torch.zeros(0, dtype=torch.int64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer distinct rows than clusters
        fitted = KMeans(min(count, len(z)), n_init=10, random_state=seed).fit_predict(unit_rows(z).numpy())
    return torch.from_numpy(fitted.astype(np.int64))


def clustering(cluster: Tensor, labels: Tensor, sources: Tensor, seed: int) -> dict[str, Score]:
    """NMI, ARI and AMI of clusters and labels, (N,) int64 each and known; intervals by bootstrap over sources.

    NaN for fewer than two images, where every clustering agrees with the labels. Resamples keep the clusters: the
    interval covers the choice of images, not the randomness of k-means.
    """
    if len(labels) < 2:
        return {name: Score(np.nan, np.nan, np.nan) for name in _SCORES}
    found, true = cluster.numpy(), labels.numpy()
    numbers, source = np.unique(sources.numpy(), return_inverse=True)
    order = np.argsort(source, kind="stable")
    groups = np.split(order, np.cumsum(np.bincount(source))[:-1])
    generator = np.random.default_rng(seed)
    drawn: list[list[float]] = []
    for _ in range(_DRAWS if len(numbers) > 1 else 0):
        index = np.concatenate([groups[g] for g in generator.integers(len(groups), size=len(groups))])
        drawn.append([score(true[index], found[index]) for score in _SCORES.values()])
    bounds = np.quantile(drawn, (0.025, 0.975), axis=0).T if drawn else np.full((len(_SCORES), 2), np.nan)
    return {
        name: Score(float(score(true, found)), float(low), float(high))
        for (name, score), (low, high) in zip(_SCORES.items(), bounds, strict=True)
    }
