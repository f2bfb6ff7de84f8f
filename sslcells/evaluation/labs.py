"""Across laboratories: what an encoder is worth in a laboratory whose labels were not used, and which it tells apart.

Every laboratory is left out in turn: its images are classified by labels of the others, beside what its own labels
would reach. Every two laboratories are compared on samples that have as many images of each class from both.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sslcells.config import Evaluate
from sslcells.evaluation.answer_table import AnswerTable
from sslcells.evaluation.knn import knn_predictions, knn_scores
from sslcells.evaluation.probe import Labelled, linear_probe, shared
from sslcells.evaluation.robustness import (
    FEW,
    KS,
    Predictability,
    Rows,
    best_k,
    index_score,
    matched,
    near,
    neighbour_counts,
    predictability,
)
from sslcells.evaluation.scores import Units, difference, of_classes, rounded, unit_rows
from sslcells.evaluation.ways import ways, without_vote

MOST = 10_000
"""Labelled images that are asked in a laboratory, and of the others that answer; of more, drawn at random."""
_FITTED = 3_000
"""Images of a laboratory in its own linear probe, which is fitted dozens of times."""
_LABS = 12
"""Laboratories that are compared in pairs; of more, the largest."""


class Lab(NamedTuple):
    """A laboratory that is asked about."""

    name: str
    bank: Rows
    """labelled images of the others"""
    val: Rows | None
    """labelled images of the others that were not trained on, to choose the probe's C"""
    asked: Rows
    """labelled images of this laboratory"""
    images: Sequence[str]
    """their names"""


def left_out(
    lab: Lab, classes: Sequence[str], config: Evaluate, seed: int
) -> tuple[dict[str, Any], AnswerTable | None]:
    """What the others' labels reach in a laboratory, and the ceiling from its own labels, for evaluation.json.

    With it what the others' labels, of all classes, say of each image; None if they say nothing.

    Scores are of the classes with at least FEW images there; the others are named under `few`.
    """
    counts = torch.bincount(lab.asked.labels, minlength=len(classes))
    enough = (counts >= FEW).nonzero()[:, 0]
    unknown = [c for c in enough.tolist() if not bool((lab.bank.labels == c).any())]
    counted = torch.isin(lab.asked.labels, enough).nonzero()[:, 0]
    which = counted if len(counted) <= MOST else counted[_drawn(len(counted), seed, MOST)]
    asked, bank = lab.asked.at(which), drawn(lab.bank, seed)
    out: dict[str, Any] = {
        "lab": lab.name,
        "images": len(lab.asked.labels),
        "sources": len(lab.asked.sources.unique()),  # type: ignore[no-untyped-call]
        "by class": {classes[c]: int(n) for c, n in enumerate(counts) if n},
        "few": [classes[c] for c in range(len(classes)) if 0 < int(counts[c]) < FEW],
        "without others' labels": [classes[c] for c in unknown],
        "classes counted": [classes[int(c)] for c in enough],
        "others' images": len(bank.labels),
        "not used": len(counted) - len(asked.labels) + len(lab.bank.labels) - len(bank.labels),
        "no vote": without_vote(Units(asked.sources, seed), asked.labels),
        "figures": [],
        "others − own": [],
    }
    if not len(asked.labels):
        return out, None

    def add(method: str, labels_of: str, among: str, rows: Rows, scores: Tensor) -> None:
        for way in ways(Units(rows.sources, seed, config.bootstrap), rows.labels, scores):
            found = way.scored(of_classes(way.labels, way.predicted, len(classes)))
            row: dict[str, Any] = {"method": method, "labels of": labels_of, "among": among, "unit": way.unit}
            row |= {"images": way.images, "sources": way.sources}
            out["figures"].append(row | {"scores": {key: rounded(score) for key, score in found.items()}})

    by_others = dict[str, Tensor]()
    if len(bank.labels):
        for among, chosen in _choices(bank, enough):
            for method, scores in _by_others(chosen, lab.val, asked, len(classes), config, seed):
                add(method, "the others", among, asked, scores)
                by_others.setdefault(method, scores)
                if method == "linear probe" and among == "all classes":
                    out["confusion"] = confusion_counts(asked.labels, knn_predictions(scores), classes)
    for method, rows, scores in _by_its_own(asked, len(classes), config, seed):
        add(method, "its own", "all classes", rows, scores)
        if method in by_others:
            theirs = by_others[method] if rows is asked else by_others[method][_drawn(len(asked.labels), seed, _FITTED)]
            units = Units(rows.sources, seed, config.bootstrap)
            both = knn_predictions(theirs), knn_predictions(scores)
            out["others − own"].append(_others_minus_own(method, units, rows.labels, *both))
    images, names = [lab.images[i] for i in which.tolist()], [*classes, ""]  # −1 is no answer
    said = {method: [names[c] for c in knn_predictions(scores).tolist()] for method, scores in by_others.items()}
    return out, AnswerTable(images, asked.sources, [classes[c] for c in asked.labels.tolist()], said) if said else None


def _others_minus_own(method: str, units: Units, labels: Tensor, others: Tensor, own: Tensor) -> dict[str, Any]:
    """How much higher the others' labels score than the laboratory's own, on the same resamples."""
    found = difference(units, labels, [others], [own])
    return {"method": method, "scores": {key: rounded(score) for key, score in found.items()}}


def drawn(rows: Rows, seed: int, most: int = MOST) -> Rows:
    """At most this many of the rows, at random."""
    if len(rows.labels) <= most:
        return rows
    return rows.at(_drawn(len(rows.labels), seed, most))


def _drawn(count: int, seed: int, most: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:most]


def _choices(bank: Rows, enough: Tensor) -> Iterator[tuple[str, Rows]]:
    """The bank, and where it has more classes than are counted in the laboratory, only these."""
    yield "all classes", bank
    own = torch.isin(bank.labels, enough)
    if not own.all() and own.any():
        yield "its classes", bank.at(own)


def _by_others(
    bank: Rows, val: Rows | None, asked: Rows, classes: int, config: Evaluate, seed: int
) -> Iterator[tuple[str, Tensor]]:
    """Scores (M, K) of each method that is trained on the bank, never on an image of the source that is asked."""
    near_ones = (config.k, config.temperature, asked.sources, bank.sources)
    yield f"kNN, k = {config.k}", _shares(knn_scores(asked.z, bank.z, bank.labels, classes, *near_ones))
    yield "prototypes", _prototypes(bank, asked, classes)
    chosen_on = None
    if val is not None:
        present = torch.isin(val.labels, bank.labels.unique())  # type: ignore[no-untyped-call]
        chosen_on = _labelled(val.at(present)) if present.any() else None
    probed = linear_probe(_labelled(bank), _labelled(asked), chosen_on, classes, seed)
    if probed is not None:
        yield "linear probe", probed.scores


def _by_its_own(asked: Rows, classes: int, config: Evaluate, seed: int) -> Iterator[tuple[str, Rows, Tensor]]:
    """The rows that were asked and their scores from the laboratory's own labels, never of the same source."""
    own = (asked.sources, asked.sources)
    scores = knn_scores(asked.z, asked.z, asked.labels, classes, config.k, config.temperature, *own)
    yield f"kNN, k = {config.k}", asked, _shares(scores)
    few = drawn(asked, seed, _FITTED)
    probed = linear_probe(_labelled(few), None, None, classes, seed)
    if probed is not None:
        yield "linear probe", few, probed.scores


def _shares(votes: Tensor) -> Tensor:
    """Neighbours' votes (M, K) as shares of all; 0 where no neighbour votes."""
    total = votes.sum(1, keepdim=True)
    return votes / total.where(total > 0, 1)


def _prototypes(bank: Rows, asked: Rows, classes: int) -> Tensor:
    """(M, K) nearness to the mean of unit rows of each class, 1 + cosine (arXiv 1703.05175); 0 for classes without.

    Where a source is in the bank too, its queries are compared with means without its rows.
    """
    rows, query = unit_rows(bank.z), unit_rows(asked.z)
    scores = _nearness(query, rows, bank.labels, classes)
    for source in shared(bank.sources, asked.sources):
        own, rest = asked.sources == source, bank.sources != source
        scores[own] = _nearness(query[own], rows[rest], bank.labels[rest], classes)
    return scores


def _nearness(query: Tensor, rows: Tensor, labels: Tensor, classes: int) -> Tensor:
    scores = query.new_zeros(len(query), classes)
    for c in set(labels.tolist()):
        scores[:, c] = 1 + query @ unit_rows(rows[labels == c].mean(0, keepdim=True))[0]
    return scores


def _labelled(rows: Rows) -> Labelled:
    return Labelled(rows.z, rows.labels, rows.sources)


def confusion_counts(labels: Tensor, predicted: Tensor, classes: Sequence[str]) -> dict[str, dict[str, int]]:
    """True class → predicted class → images; pairs that do not occur are left out."""
    pairs, count = torch.unique(torch.stack([labels, predicted], 1), dim=0, return_counts=True)
    out: dict[str, dict[str, int]] = {}
    for (true, guess), images in zip(pairs.tolist(), count.tolist(), strict=True):
        out.setdefault(classes[true], {})[classes[guess] if guess >= 0 else "none"] = images
    return out


def pair(pool: Rows, names: Mapping[int, str], one: int, other: int, classes: Sequence[str], seed: int) -> Any:
    """Two laboratories on a sample with as many images of each class from both, for evaluation.json.

    With fewer than two such classes, only these are given.
    """
    chosen, shared = matched(pool, one, other, seed)
    out: dict[str, Any] = {"labs": [names[one], names[other]], "classes": [classes[c] for c in shared]}
    if len(shared) < 2:
        return out
    rows = pool.at(chosen)
    found = near(rows, max(KS))
    k = best_k(rows, found)
    out |= {"images of each": len(chosen) // 2, "k": k}
    told = predictability(rows, found, k or KS[2], seed)
    out["lab predictability"] = _predictability(told)
    if k is not None:
        units = Units(rows.sources, seed)
        out["robustness index"] = rounded(index_score(rows, found, k, units))
        so, os = neighbour_counts(rows, found, k)
        out["neighbours"] = {
            "same class, other laboratory": int(so.sum()),
            "other class, same laboratory": int(os.sum()),
            "all": int(found.there[:, :k].sum()),
        }
    return out


def _predictability(told: Predictability) -> dict[str, float | None]:
    given = {"value": told.value, "null low": told.low, "null high": told.high, "p": told.p}
    return {key: None if value != value else value for key, value in given.items()}


def pairs(pool: Rows, names: Mapping[int, str], classes: Sequence[str], seed: int) -> list[dict[str, Any]]:
    """Every two laboratories of the pool, which has known labels and laboratories; of more than 12, the largest."""
    numbers, count = pool.labs.unique(return_counts=True)  # type: ignore[no-untyped-call]
    largest = numbers[count.argsort(descending=True, stable=True)][:_LABS].sort().values.tolist()
    return [pair(pool, names, one, other, classes, seed) for one, other in combinations(largest, 2)]
