"""The figures of `sslcells evaluate`, from the features of whole splits, computed by one process."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sslcells.config import Run
from sslcells.evaluation.clustering import clustering, clusters
from sslcells.evaluation.confused import confused
from sslcells.evaluation.encode import drawn
from sslcells.evaluation.fewshot import DRAWS, SHOTS, few_shot
from sslcells.evaluation.health import effective_rank, row_std, uniformity
from sslcells.evaluation.knn import Neighbours, knn_predictions, neighbours, votes
from sslcells.evaluation.leaks import SplitFeatures
from sslcells.evaluation.probe import Labelled, linear_probe, shared
from sslcells.evaluation.retrieval import retrieval
from sslcells.evaluation.scores import Score, Units, mean_of, of_class, of_classes, of_ranking, rounded
from sslcells.evaluation.ways import VOTE, Way, ways, without_vote

KS = (1, 5, 20)
_PROBED = 100_000
"""Images of train that the linear probe learns from, at most: it holds them in float64, and fits them many times."""
_SLOW_DRAWS = 200
"""Resamples for AUROC and for each class."""


class ClassScores(NamedTuple):
    """A classifier's scores for M query images."""

    name: str
    scores: Tensor
    """(M, K)"""
    predicted: Tensor
    """(M,) int64; -1 if it has no answer"""

    @property
    def method(self) -> str:
        """The name without the C that an encoder was given."""
        return self.name.partition(", C = ")[0]


Near = tuple[Tensor, Tensor]
"""Cosines and indices of the nearest labelled images of train, (M, k) each, of the M labelled queries."""


def nearest(by_split: Mapping[str, SplitFeatures], asked: SplitFeatures, search: Neighbours) -> Near | None:
    """The neighbours of the queries of Figures; None if train has no labels."""
    query, bank = _labelled(asked), _labelled(by_split["train"])
    return _nearest(query, bank, search) if len(bank.labels) else None


def _nearest(query: Labelled, bank: Labelled, search: Neighbours) -> Near:
    return search(query.z, bank.z, max(KS), query.sources, bank.sources)


class Figures:
    """Figures of the query split as rows, one for each method and way to count (by image or by source)."""

    def __init__(
        self,
        run: Run,
        by_split: Mapping[str, SplitFeatures],
        query_split: str | None,
        classes: Sequence[str],
        asked: SplitFeatures | None = None,
        brief: bool = False,
        near: Near | None = None,
    ) -> None:
        """`asked` are those images of the query split that are measured; all of them where None.

        With `brief` kNN and the linear probe alone are computed. `near` are the neighbours of the queries, if `nearest`
        has found them.
        """
        self.rows: list[dict[str, Any]] = []
        self.by_class: list[dict[str, Any]] = []
        self.notes: list[str] = []
        self.predictions: list[ClassScores] = []
        self.cluster: Tensor | None = None
        """(M,) int64 of the query images with known labels"""
        self._run, self._classes, self._near = run, classes, near
        chooses = run.evaluate.split == "val"  # then no figure may use test
        self.health = {
            split: _health(features)
            for split, features in by_split.items()
            if not (brief or (chooses and split == "test"))
        }
        if query_split is None:
            self.notes.append("no labels: only figures that need none")
            return
        self._query, self._bank = _labelled(asked or by_split[query_split]), _labelled(by_split["train"])
        self._asked, self._alone = query_split, query_split == "train"
        self._units = Units(self._query.sources, run.seed, run.evaluate.bootstrap)
        val = _labelled(by_split["val"]) if "val" in by_split and query_split != "val" else None
        self._add_caveats(query_split)
        if len(self._bank.labels):
            self._knn()
            self._probe(val)
        else:
            self.notes.append("train has no labels: no kNN, no linear probe, no few-shot")
        if brief:
            return
        if len(self._bank.labels):
            self._few_shot()
        self._retrieval()
        self._clustering()

    def _add_caveats(self, query_split: str) -> None:
        units, sources = self._units, "images" if not self._units.known else "sources"
        if self._alone:
            self.notes.append(
                "no other labelled split: queries are train itself, each image without all images of its source"
            )
        if units.count < 2:
            self.notes.append(f"{query_split} has a single source: no intervals")
        elif units.count < 10:
            self.notes.append(f"{query_split} has {units.count} {sources}: intervals are too narrow")
        if said := without_vote(units, self._query.labels):
            self.notes.append(f"{query_split}: {said}")
        shown = set(self._query.labels.tolist())
        absent = [name for c, name in enumerate(self._classes) if c not in shown]
        if absent:
            self.notes.append(f"{query_split} shows no {', no '.join(absent)}: means over classes leave them out")
        unseen = [self._classes[c] for c in sorted(shown - set(self._bank.labels.tolist()))]
        if unseen and len(self._bank.labels):
            self.notes.append(f"train shows no {', no '.join(unseen)}: no classifier can name them")

    def _add(
        self, task: str, name: str, unit: str, images: int, scores: Mapping[str, Score], sources: int | None = None
    ) -> None:
        kept = {key: rounded(score) for key, score in scores.items()}
        if sources is None and self._units.known:
            sources = self._units.count
        row = {"task": task, "name": name, "unit": unit, "images": images, "sources": sources}
        self.rows.append(row | {"scores": kept})

    def confused(self) -> dict[str, Any] | None:
        """Which classes the last classifier takes for which others; None where there is none."""
        if not self.predictions:
            return None
        answer = self.predictions[-1]
        return confused(answer.name, self._query.labels, answer.predicted, self._classes, self._units)

    def ways(self, scores: Tensor) -> Iterator[Way]:
        """The ways to count scores (M, K) for the images that were asked."""
        return ways(self._units, self._query.labels, scores)

    def _classifier(self, task: str, name: str, scores: Tensor, each_class: bool = False) -> None:
        labels = self._query.labels
        answer = ClassScores(f"{task}, {name}" if name else task, scores, knn_predictions(scores))
        for way in self.ways(scores):
            found = way.scored(of_classes(way.labels, way.predicted, len(self._classes)))
            found |= way.scored(of_ranking(way.labels, way.scores), _SLOW_DRAWS)
            self._add(task, name, way.unit, way.images, found, way.sources)
            for c in sorted(set(labels.tolist())) if each_class and way.unit != VOTE else []:
                each = way.scored(of_class(c, labels, scores, answer.predicted), _SLOW_DRAWS)
                of = labels == c
                row = {"method": answer.name, "class": self._classes[c], "unit": way.unit, "images": int(of.sum())}
                row["sources"] = _distinct(self._query.sources[of]) if self._units.known else None
                self.by_class.append(row | {"scores": {key: rounded(score) for key, score in each.items()}})
        if each_class:
            self.predictions.append(answer)

    def _knn(self) -> None:
        query, bank = self._query, self._bank
        cosine, index = self._near or _nearest(query, bank, neighbours)
        label, temperature = bank.labels[index], self._run.evaluate.temperature
        alone = int((~cosine.isfinite()).all(1).sum())
        if alone:
            self.notes.append(f"kNN: {alone:,} images have no neighbour of another source, and count as wrong")
        for k in KS:
            for weighted in (False, True) if k > 1 else (False,):
                scores = votes(cosine[:, :k], label[:, :k], len(self._classes), temperature if weighted else None)
                total = scores.sum(1, keepdim=True)
                name = f"k = {k}" + ", weighted" * weighted
                self._classifier("kNN", name, scores / total.where(total > 0, 1), k == max(KS) and weighted)

    def _probe(self, val: Labelled | None) -> None:
        bank = self._query if self._alone else self._bank
        learnt = bank.at(np.array(drawn(bank.labels, _PROBED)))
        if len(learnt.labels) < len(self._bank.labels):
            self.notes.append(
                f"linear probe: trained on {len(learnt.labels):,} of the {len(self._bank.labels):,} images of train"
            )
        query = None if self._alone else self._query
        probed = linear_probe(bank if self._alone else learnt, query, val, len(self._classes), self._run.seed)
        if probed is None:
            self.notes.append("linear probe: train shows one class alone")
            return
        if not self._alone and (both := shared(self._bank.sources, self._query.sources)):
            mine = int(torch.isin(self._query.sources, torch.tensor(both)).sum())
            self.notes.append(
                f"linear probe: {len(both):,} sources are in train and in {self._asked} too; their {mine:,} images are "
                f"classified by probes that did not learn from them, as kNN leaves out their neighbours"
            )
        self._classifier("linear probe", f"C = {probed.strength:g}", probed.scores, each_class=True)
        self.notes.append(f"linear probe: C = {probed.strength:g}, chosen on {probed.chosen_on}")
        if probed.on_edge:
            self.notes.append("linear probe: that C is at the end of the range tried")
        if not probed.converged:
            self.notes.append("linear probe: some fits stopped before they converged")

    def _few_shot(self) -> None:
        query, bank = self._query, self._bank
        for shots in SHOTS:
            hits, spread, smallest = few_shot(
                query.z, query.sources, query.labels, bank.z, bank.labels, bank.sources, shots, self._run.seed
            )
            name = f"{shots} a class, {DRAWS} draws"
            for unit in self._units.names:
                share = {"accuracy": hits.numpy().astype(float)}
                scores = self._units.scored(mean_of(share), unit)
                scores |= self._units.scored(_mean_by_class(hits, query.labels), unit)
                if not np.isfinite(scores["accuracy"].value):
                    continue
                self._add("few-shot", name, unit, len(hits), scores)
                self.rows[-1]["spread over draws"] = None if np.isnan(spread) else spread
            if smallest < shots:
                self.notes.append(f"few-shot, {shots} a class: the smallest class of train has {smallest}")

    def _retrieval(self) -> None:
        found = retrieval(self._query.z, self._query.labels, self._query.sources)
        answerable = int(found["recall@1"].isfinite().sum())
        images = len(self._query.labels)
        if answerable < images:
            why = "have no other image of their class" + " from another source" * self._units.known
            self.notes.append(f"retrieval: {images - answerable:,} of {images:,} images {why}: not queried")
        for unit in self._units.names if answerable else []:
            self._add("retrieval", "", unit, answerable, self._units.scored(mean_of(found), unit))

    def _clustering(self) -> None:
        count = _distinct(self._query.labels)
        if count < 2:
            self.notes.append("clustering: left out, as there is only one class")
            return
        self.cluster = clusters(self._query.z, count, self._run.seed)
        scores = clustering(self.cluster, self._query.labels, self._query.sources, self._run.seed)
        self._add("clustering", f"k-means, {count} clusters", "image", len(self._query.labels), scores)
        if (got := _distinct(self.cluster)) < count:
            self.notes.append(f"clustering: only {got} of {count} clusters found: too few distinct features")


def _labelled(features: SplitFeatures) -> Labelled:
    known = features.labels >= 0
    if known.all():  # otherwise they would be copied
        return Labelled(features.z, features.labels, features.sources)
    return Labelled(features.z[known], features.labels[known], features.sources[known])


def _mean_by_class(hits: Tensor, labels: Tensor) -> Any:
    """A metric: the mean over classes of the weighted mean of hits (M,), which are NaN for queries left out."""
    present = sorted(set(labels.tolist()))
    metric = mean_of({str(c): hits.where(labels == c, torch.nan) for c in present})

    def balanced(weight: Any) -> dict[str, Any]:
        each = np.stack([*metric(weight).values()], axis=1)
        count = np.isfinite(each).sum(1)
        mean = np.nan_to_num(each).sum(1) / np.maximum(count, 1)
        return {"balanced accuracy": np.where(count > 0, mean, np.nan)}

    return balanced


def _health(features: SplitFeatures) -> dict[str, float | None]:
    found = {"effective rank": effective_rank(features.z), "row std": row_std(features.z)}
    if len(features.z) > 1:
        found["uniformity"] = uniformity(features.z)
    return {key: None if np.isnan(v) else v for key, v in found.items()}


def _distinct(numbers: Tensor) -> int:
    return len(set(numbers.tolist()))
