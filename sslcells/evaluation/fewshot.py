"""Few-shot classification: each class is represented by the mean of a few labelled images."""

import math

import numpy as np
import torch
from torch import Tensor

from sslcells.evaluation.scores import unit_rows

SHOTS = (1, 5, 10)
DRAWS = 20


def few_shot(
    query: Tensor,
    query_sources: Tensor,
    query_labels: Tensor,
    bank: Tensor,
    bank_labels: Tensor,
    bank_sources: Tensor,
    shots: int,
    seed: int,
) -> tuple[Tensor, float, int]:
    """The share of draws in which the nearest prototype gives each query (M, F) its true class: (M,) in 0..1.

    A prototype is the mean of the unit rows of `shots` bank images of a class, normalised (arXiv 1703.05175, with the
    cosine). Images are drawn from different sources as far as a class has them. A draw leaves out the queries whose
    source was drawn; a query left out of all draws gets NaN.

    A row that is not finite counts as wrong. Also returns the standard deviation of accuracy over draws, and the number
    of images drawn from the smallest class.

    Raises:
        ValueError: if shots is below 1, or no image of the bank has a label.
    """
    if shots < 1:
        raise ValueError(f"shots={shots}: a prototype is the mean of one image at least")
    if not bool((bank_labels >= 0).any()):
        raise ValueError(f"none of the {len(bank)} images of the bank has a label to make a prototype of")
    query = unit_rows(query)
    generator = np.random.default_rng([seed, shots])
    present = sorted(set(bank_labels[bank_labels >= 0].tolist()))
    members = {c: (bank_labels == c).nonzero()[:, 0].numpy() for c in present}
    hits, counted, accuracies = torch.zeros(len(query)), torch.zeros(len(query)), []
    for _ in range(DRAWS):
        chosen = [_apart(generator.permutation(m), bank_sources.numpy(), shots) for m in members.values()]
        prototypes = unit_rows(torch.stack([unit_rows(bank[torch.from_numpy(c)]).mean(0) for c in chosen]))
        nearest, place = (query @ prototypes.T).nan_to_num_(nan=-math.inf).max(1)
        guess = torch.tensor(present)[place]
        drawn = bank_sources[torch.from_numpy(np.concatenate(chosen))]
        fresh = ~torch.isin(query_sources, drawn)
        right = (guess == query_labels) & fresh & nearest.isfinite()
        hits, counted = hits + right, counted + fresh
        if fresh.any():
            accuracies.append(float(right.sum() / fresh.sum()))
    spread = float(np.std(accuracies, ddof=1)) if len(accuracies) > 1 else math.nan
    return hits / counted.where(counted > 0, math.nan), spread, min(map(len, members.values()))


def _apart(order: np.ndarray, sources: np.ndarray, shots: int) -> np.ndarray:
    """The first `shots` of the images, a source's second image only after every source's first."""
    source = sources[order]
    turn = np.zeros(len(order), int)
    seen: dict[int, int] = {}
    for place, number in enumerate(source.tolist()):
        turn[place] = seen.get(number, 0)
        seen[number] = turn[place] + 1
    return order[np.argsort(turn, kind="stable")[:shots]]
