"""What a run's encoder is measured beside: colour histograms, and its own network with random weights.

All three classify the same images of the query split by the same kNN in the same images of train, at most
`evaluate.bank` of them.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sslcells.config import Run
from sslcells.evaluation.encode import NotFinite, drawn
from sslcells.evaluation.figures import KS, Near
from sslcells.evaluation.knn import Neighbours, votes
from sslcells.evaluation.leaks import SplitFeatures
from sslcells.evaluation.scores import METRIC, Units, difference, of_classes, rounded
from sslcells.evaluation.tables import Table, of_images, shown
from sslcells.evaluation.ways import Way, ways
from sslcells.models import files

RUN, COLOUR, UNTRAINED = "this run", "colour histograms", "untrained network"
METHOD = f"kNN, k = {max(KS)}, weighted"

OfRows = Callable[[nn.Module, str, Sequence[int]], Tensor]
"""Network, split and its rows → features (N, F), on rank 0"""


def network(spec: Mapping[str, Any], seed: int) -> nn.Module:
    """The network of an encoder.json with random weights, the same for a seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return files.untrained(spec)


class Baselines:
    """The figures of the run's encoder and of both baselines.

    Every rank makes one and calls `encode`; the rest is for rank 0, which has the features. Without labels in train or
    in a query split there is nothing to measure, and `result` is None.
    """

    def __init__(
        self, run: Run, by_split: Mapping[str, SplitFeatures], query_split: str | None, asked: Sequence[int]
    ) -> None:
        """`asked` are rows of the query split."""
        self._run, self._by_split, self._split = run, by_split, query_split
        self._bank, self._asked = list[int](), list[int]()
        self._untrained: tuple[Tensor, Tensor] | None = None
        self._near: dict[str, Near] = {}
        self.notes: list[str] = []
        labels = by_split["train"].labels
        if query_split is None or not bool((labels >= 0).any()):
            return
        self._bank = [i for i in drawn(labels, run.evaluate.bank) if labels[i] >= 0]
        self._asked = [i for i in asked if by_split[query_split].labels[i] >= 0]

    def encode(self, spec: Mapping[str, Any], features: OfRows) -> None:
        """Encode by the untrained network if the run asks for it."""
        if self._split is None or not self._bank or not self._run.evaluate.untrained:
            return
        untrained = network(spec, self._run.seed)
        try:
            bank = features(untrained, "train", self._bank)
            self._untrained = features(untrained, self._split, self._asked), bank
        except NotFinite as error:
            self.notes.append(f"with random weights {error}: it is left out")

    def search(self, search: Neighbours) -> None:
        """Find the neighbours in train of every query by each encoder."""
        if self._split is None or not self._bank:
            return
        query, bank = self._by_split[self._split], self._by_split["train"]
        rows = {RUN: (query.z[self._asked], bank.z[self._bank])}
        rows[COLOUR] = query.histogram[self._asked], bank.histogram[self._bank]
        if self._untrained is not None:
            rows[UNTRAINED] = self._untrained
        sources = query.sources[self._asked], bank.sources[self._bank]
        self._near = {name: search(*of, max(KS), *sources) for name, of in rows.items()}

    def result(self, classes: Sequence[str]) -> dict[str, Any] | None:
        """The figures, and how much higher the run's are than each baseline's, for evaluation.json."""
        if self._split is None or not self._near:
            return None
        query, bank = self._by_split[self._split], self._by_split["train"].labels[self._bank]
        units = Units(query.sources[self._asked], self._run.seed, self._run.evaluate.bootstrap)

        def counted(near: Near) -> list[Way]:
            cosine, index = near
            found = votes(cosine, bank[index], len(classes), self._run.evaluate.temperature)
            total = found.sum(1, keepdim=True)
            return list(ways(units, query.labels[self._asked], found / total.where(total > 0, 1)))

        of = {name: counted(near) for name, near in self._near.items()}
        return {
            "method": METHOD,
            "images of train": len(self._bank),
            "figures": [_row(name, way, len(classes)) for name, found in of.items() for way in found],
            "differences": [
                {"baseline": name, "unit": way.unit, "scores": _difference(way, its)}
                for name, found in of.items()
                if name != RUN
                for way, its in zip(of[RUN], found, strict=True)
            ],
        }


def _row(name: str, way: Way, classes: int) -> dict[str, Any]:
    scores = way.scored(of_classes(way.labels, way.predicted, classes))
    row = {"name": name, "unit": way.unit, "images": way.images, "sources": way.sources}
    return row | {"scores": {key: rounded(score) for key, score in scores.items()}}


def _difference(way: Way, other: Way) -> dict[str, Any]:
    found = difference(way.units, way.labels, [way.predicted], [other.predicted], way.weighs)
    return {key: rounded(score) for key, score in found.items()}


def baseline_table(result: Mapping[str, Any]) -> Table:
    """The run beside both baselines; no rows where these were not measured."""
    found = result.get("baselines") or {"figures": [], "differences": [], "images of train": 0, "method": METHOD}
    less = {(of["baseline"], of["unit"]): of["scores"][METRIC] for of in found["differences"]}
    metrics = list(dict.fromkeys(metric for row in found["figures"] for metric in row["scores"]))
    lines = [
        [row["name"], row["unit"], of_images(row)]
        + [shown(row["scores"][metric]) for metric in metrics]
        + [shown(less[place]) if (place := (row["name"], row["unit"])) in less else ""]
        for row in found["figures"]
    ]
    caption = (
        f"%, with 95 % intervals. {found['method']}, in the same {found['images of train']:,} images of train; the "
        f"network has random weights. Last column: the run's {METRIC} minus the baseline's, on the same resamples"
    )
    columns = ["features", "per", "images", *metrics, "run − baseline"]
    return Table(f"Beside colour alone and the untrained network, {result['asked']} split", columns, lines, caption)
