"""Which classes a classifier takes for which others."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sslcells.evaluation.robustness import FEW
from sslcells.evaluation.scores import Units, mean_of, rounded

_MOST = 5
"""pairs of classes that are given"""


def confused(method: str, labels: Tensor, predicted: Tensor, classes: Sequence[str], units: Units) -> dict[str, Any]:
    """The shares of a true class that are taken for another, the largest first, with intervals, for evaluation.json.

    labels and predicted (M,) int64; −1 is no answer. Classes with fewer than FEW images are left out, and named under
    `few`.
    """
    counts = labels.bincount(minlength=len(classes)).tolist()
    pairs = []
    for c, images in enumerate(counts):
        if images >= FEW:
            guesses = predicted[(labels == c) & (predicted >= 0)].bincount(minlength=len(classes)).tolist()
            pairs += [(n / images, c, g) for g, n in enumerate(guesses) if n and g != c]
    found = []
    for _, true, guess in sorted(pairs, reverse=True)[:_MOST]:
        hits = (predicted == guess).double().where(labels == true, torch.nan)
        share = units.scored(mean_of({"share": hits}))["share"]
        row = {"true": classes[true], "taken for": classes[guess], "images": counts[true]}
        found.append(row | {"share": rounded(share)})
    few = [classes[c] for c, images in enumerate(counts) if 0 < images < FEW]
    return {"method": method, "pairs": found, "few": few}
