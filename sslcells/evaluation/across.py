"""The cross-laboratory report of `sslcells evaluate`: which laboratories are asked, by which images, and what for."""

from collections.abc import Mapping, Sequence
from itertools import compress
from typing import Any

import torch
from torch import Tensor

from sslcells.config import Evaluate
from sslcells.evaluation.answer_table import AnswerTable
from sslcells.evaluation.labs import MOST, Lab, drawn, left_out, pairs
from sslcells.evaluation.leaks import SplitFeatures
from sslcells.evaluation.robustness import FEW, KS, Rows, best_k, index_score, near
from sslcells.evaluation.scores import Units, rounded

UNNAMED = "training data"
"""The laboratory of a data set that does not say."""


class Across:
    """The laboratories of a run's data and new ones, and the figures between them, for evaluation.json.

    `result` is None if there are not two, and `answers` then empty: what was answered about the images of each
    laboratory by the others' labels. `pool`, rows of known class and laboratory, is what laboratories are compared
    on: the query split, images of train of laboratories that it lacks, and the new laboratories.
    """

    def __init__(
        self,
        by_split: Mapping[str, SplitFeatures],
        query_split: str | None,
        lab_names: Sequence[str],
        new: Mapping[str, SplitFeatures],
        classes: Sequence[str],
        config: Evaluate,
        seed: int,
    ) -> None:
        self.result: dict[str, Any] | None = None
        self.answers: dict[str, AnswerTable] = {}
        known = dict(enumerate(lab_names or [UNNAMED], 1))
        self.names = known | dict(enumerate(new, len(known) + 1))
        self._new = {number: _known(new[name], number) for number, name in self.names.items() if name in new}
        if query_split is None or (by_split[query_split].labs is None and not new):
            return
        named = bool(lab_names)
        rows = {split: _known(features, None if named else 1) for split, features in by_split.items()}
        train, asked = rows["train"], rows[query_split]
        lacking = train.at(~torch.isin(train.labs, asked.labs))
        self.pool = _of_known_labs(Rows.of([asked, lacking, *self._new.values()]))
        if len(self.pool.labs.unique()) < 2:  # type: ignore[no-untyped-call]
            return
        val = rows["val"] if "val" in rows and query_split != "val" else None
        labs = self._labs(train, val, asked, _names(by_split[query_split])) if named else []
        labs += [
            Lab(self.names[number], train, val, own, _names(new[self.names[number]]))
            for number, own in self._new.items()
        ]
        found = []
        for lab in labs:
            figures, answers = left_out(lab, classes, config, seed)
            found.append(figures | {"trained on": self._in_train(lab.name, train)})
            if answers is not None:
                self.answers[lab.name] = answers
        self.result = {
            "asked": query_split,
            "labs": found,
            "pairs": pairs(self.pool, self.names, classes, seed),
            "robustness index": _index(self.pool, seed),
        }
        self.result["findings"] = [*self._copies(by_split["train"], new), *findings(self.result)]

    def _labs(self, train: Rows, val: Rows | None, asked: Rows, images: Sequence[str]) -> list[Lab]:
        """The laboratories of the query split that others can be asked about; `images` are the names of those asked."""
        out = []
        for number, name in self.names.items():
            here = asked.labs == number
            own = asked.at(here)
            bank = train.at((train.labs > 0) & (train.labs != number))
            if len(own.labels) and len(bank.labels):
                others = None if val is None else val.at((val.labs > 0) & (val.labs != number))
                out.append(Lab(name, bank, others, own, list(compress(images, here.tolist()))))
        return out

    def _in_train(self, name: str, train: Rows) -> bool:
        """True if images of the laboratory were trained on."""
        numbers = [number for number, lab in self.names.items() if lab == name and number not in self._new]
        return bool(torch.isin(train.labs, torch.tensor(numbers, dtype=torch.int64)).any())

    def _copies(self, train: SplitFeatures, new: Mapping[str, SplitFeatures]) -> list[dict[str, Any]]:
        """A warning for each new laboratory with images that training saw."""
        seen = {tuple(digest) for digest in train.digest.tolist()}
        out = []
        for name, features in new.items():
            copies = sum(tuple(digest) in seen for digest in features.digest.tolist())
            if copies:
                text = f"{name}: {copies:,} of {len(features.digest):,} images are in train too: training has seen them"
                out.append(finding(text, warning=True))
        return out


def _known(features: SplitFeatures, lab: int | None) -> Rows:
    """The labelled rows of a split, all of one laboratory if it is given."""
    labs = features.labs if features.labs is not None else torch.zeros_like(features.labels)
    labs = labs if lab is None else torch.full_like(features.labels, lab)
    return Rows(features.z, features.labels, features.sources, labs).at(features.labels >= 0)


def _names(features: SplitFeatures) -> list[str]:
    """The names of the images that `_known` keeps."""
    return list(compress(features.names, (features.labels >= 0).tolist()))


def _of_known_labs(rows: Rows) -> Rows:
    return rows.at(rows.labs > 0)


def _index(pool: Rows, seed: int) -> dict[str, Any] | None:
    """The robustness index of all images, however many each laboratory has of each class."""
    rows = drawn(pool, seed)
    found = near(rows, max(KS))
    k = best_k(rows, found)
    if k is None:
        return None
    score = rounded(index_score(rows, found, k, Units(rows.sources, seed)))
    return {**score, "k": k, "images": len(rows.labels), "drawn": len(pool.labels) > MOST}


def predicted_from(confusion: Mapping[str, Mapping[str, int]], classes: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Labels and predictions (M,) int64 each, -1 for no answer, with the counts of a confusion."""
    number = {name: c for c, name in enumerate(classes)} | {"none": -1}
    cells = [(number[true], number[guess], n) for true, of in confusion.items() for guess, n in of.items()]
    labels, predicted, count = torch.tensor(cells, dtype=torch.int64).view(-1, 3).unbind(1)
    return labels.repeat_interleave(count), predicted.repeat_interleave(count)


def findings(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Sentences about the laboratories, those with `warning` first to be read."""
    out = []
    for of in result["pairs"]:
        both = " and ".join(of["labs"])
        if len(of["classes"]) < 2:
            some = f"only {of['classes'][0]} has" if of["classes"] else "no class has"
            out.append(finding(f"{both} are not compared: {some} {FEW} images in both"))
            continue
        told, index = of["lab predictability"], of.get("robustness index")
        text = f"{both}: neighbours tell the laboratory in {told['value']:.1%} of {2 * of['images of each']:,} images"
        if told["null low"] is None:
            text += ", with too few sources to say what chance is"
        else:
            text += f" (if it made no difference, {told['null low']:.1%} to {told['null high']:.1%})"
        if index is None:
            out.append(finding(f"{text}; no robustness index, as no neighbour speaks for class or laboratory"))
            continue
        text += f"; robustness index {index['value']:.2f} at k = {of['k']}"
        if index["value"] < 0.5:
            text = f"this encoder separates laboratories before it separates cells. {text}"
        out.append(finding(text, warning=index["value"] < 0.5))
    for lab in result["labs"]:
        if lab["not used"]:
            out.append(
                finding(f"{lab['lab']}: {lab['not used']:,} images, drawn at random, were left out to save time")
            )
        if lab["no vote"]:
            out.append(finding(f"{lab['lab']}: {lab['no vote']}"))
        if lab["few"]:
            out.append(finding(f"{lab['lab']}: fewer than {FEW} images of {', '.join(lab['few'])}: not counted"))
        if lab["without others' labels"]:
            named = ", ".join(lab["without others' labels"])
            out.append(finding(f"{lab['lab']}: no other laboratory has {named}: no classifier can name them"))
    return out


def finding(text: str, warning: bool = False) -> dict[str, Any]:
    """A sentence for evaluation.json."""
    return {"text": text, "warning": warning}
