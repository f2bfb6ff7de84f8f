"""Two evaluations of the same images, brought together image by image."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sslcells.config import ConfigError
from sslcells.data._names import some
from sslcells.evaluation.answer_table import AnswerTable
from sslcells.evaluation.scores import Units, difference, mean_of, of_classes, rounded

_NAMED = 3
"""Images that a message names."""


class Pair(NamedTuple):
    """M images, and what two runs answered about each."""

    images: Sequence[str]
    classes: Sequence[str]
    """names of the K classes that are true, or that a run says"""
    labels: Tensor
    """(M,) int64"""
    sources: Tensor
    """(M,) int64"""
    methods: dict[str, tuple[Tensor, Tensor]]
    """what each run says by a method: (M,) int64 each, −1 for no answer"""
    notes: Sequence[str]

    def scores(self, units: Units) -> list[dict[str, Any]]:
        """The second run's scores minus the first's, and both, by each method and way to count."""
        rows = []
        for method, both in self.methods.items():
            for unit in units.names:
                each = [units.scored(of_classes(self.labels, one, len(self.classes)), unit) for one in both]
                less = difference(units, self.labels, [both[1]], [both[0]], unit)
                first, second, minus = ({key: rounded(s) for key, s in of.items()} for of in (*each, less))
                rows.append({"method": method, "unit": unit, "first": first, "second": second, "difference": minus})
        return rows

    def by_class(self, units: Units, method: str) -> list[dict[str, Any]]:
        """The recall of each class by a method: of both runs, and the second's minus the first's."""
        first, second = ((one == self.labels).double() for one in self.methods[method])
        hits = {"first": first, "second": second, "difference": second - first}
        present = self.labels.unique().tolist()  # type: ignore[no-untyped-call]
        shares = {f"{c} {key}": hit.where(self.labels == c, torch.nan) for c in present for key, hit in hits.items()}
        found = units.scored(mean_of(shares))  # at once, as to draw the resamples takes most of the time
        rows = []
        for c in present:
            of = self.labels == c
            sources = len(self.sources[of].unique()) if units.known else None  # type: ignore[no-untyped-call]
            row = {"class": self.classes[c], "images": int(of.sum()), "sources": sources}
            rows.append(row | {key: rounded(found[f"{c} {key}"]) for key in hits})
        return rows

    def right(self, method: str) -> tuple[Tensor, Tensor]:
        """Which images each run has right by a method: (M,) bool each."""
        first, second = (one == self.labels for one in self.methods[method])
        return first, second


def paired(tables: Sequence[AnswerTable], names: Sequence[str], common: bool = False) -> Pair:
    """The answers of two runs, called by these names, to the same images, which are found by their own names.

    With `common` those images alone that both were asked about.

    Raises:
        ConfigError: naming how many and which, if one was asked about other images, or they have other classes or
            sources there; if no method is in both.
    """
    rows = [_rows(table, name) for table, name in zip(tables, names, strict=True)]
    images = [image for image in rows[0] if image in rows[1]]
    alone = [[image for image in one if image not in other] for one, other in (rows, rows[::-1])]
    _check_same(alone, images, names, common)
    first, second = (_at(table, [row[image] for image in images]) for table, row in zip(tables, rows, strict=True))
    other = [i for i, one, its in zip(images, first.classes, second.classes, strict=True) if one != its]
    if other:
        raise ConfigError(
            f"{len(other):,} of the {len(images):,} images have another class in {names[1]} than in {names[0]}: "
            f"{some(other, _NAMED)}; evaluate both with the same labels"
        )
    sources, notes = _sources(first, second, names)
    if any(alone):
        left = " and ".join(f"{len(of):,} of {name}" for name, of in zip(names, alone, strict=True))
        notes.append(f"compared on the {len(images):,} images that both were asked about; left out: {left}")
    methods, not_in_both = _methods(first, second, names)
    said = [of.methods[method] for of in (first, second) for method in methods]
    classes = sorted({*first.classes}.union(*said) - {""})
    number = {name: c for c, name in enumerate(classes)} | {"": -1}
    both = {m: (_numbers(first.methods[m], number), _numbers(second.methods[m], number)) for m in methods}
    return Pair(images, classes, _numbers(first.classes, number), sources, both, [*notes, *not_in_both])


def _methods(first: AnswerTable, second: AnswerTable, names: Sequence[str]) -> tuple[list[str], list[str]]:
    """The methods that have answered in both, and a sentence on each of the others."""
    methods = [method for method in first.methods if method in second.methods]
    if not methods:
        said = "; ".join(f"{name}: {', '.join(of.methods)}" for name, of in zip(names, (first, second), strict=True))
        raise ConfigError(f"no method has answered in both ({said}); evaluate both with the same version of sslcells")
    alone = [
        f"{method} has answered in {name} alone"
        for name, of in zip(names, (first, second), strict=True)
        for method in of.methods
        if method not in methods
    ]
    return methods, alone


def _rows(table: AnswerTable, name: str) -> dict[str, int]:
    """The row of each image."""
    rows = {image: i for i, image in enumerate(table.images)}
    if len(rows) < len(table.images):
        twice = sorted({image for i, image in enumerate(table.images) if rows[image] != i})
        raise ConfigError(f"{name} has several images called {some(twice, _NAMED)}: images are paired by their names")
    return rows


def _check_same(alone: Sequence[Sequence[str]], both: Sequence[str], names: Sequence[str], common: bool) -> None:
    if both and (common or not any(alone)):
        return
    said = "; ".join(
        f"{len(images):,} of {len(images) + len(both):,} images of {name} are not in the other: {some(images, _NAMED)}"
        for name, images in zip(names, alone, strict=True)
        if images
    )
    advice = f", or compare the {len(both):,} that both have with --common" if both else ""
    raise ConfigError(f"the runs were asked about other images. {said}. Evaluate both on the same data{advice}")


def _at(table: AnswerTable, rows: Sequence[int]) -> AnswerTable:
    methods = {method: [said[i] for i in rows] for method, said in table.methods.items()}
    images, classes = ([of[i] for i in rows] for of in (table.images, table.classes))
    return AnswerTable(images, table.sources[list(rows)], classes, methods)


def _sources(first: AnswerTable, second: AnswerTable, names: Sequence[str]) -> tuple[Tensor, list[str]]:
    """The sources of the images; where one evaluation does not know them, those of the other."""
    one, its = (_grouped(table.sources) for table in (first, second))
    if one.equal(its):
        return one, []
    alone = torch.arange(len(one))
    for mine, other, name in ((one, its, names[1]), (its, one, names[0])):
        if other.equal(alone):
            return mine, [f"{name} does not know the sources of its images; those of the other evaluation are taken"]
    different = [image for image, a, b in zip(first.images, one.tolist(), its.tolist(), strict=True) if a != b]
    raise ConfigError(
        f"{len(different):,} images share their sources with others in {names[1]} than in {names[0]}: "
        f"{some(different, _NAMED)}; evaluate both with the same data.sources"
    )


def _grouped(sources: Tensor) -> Tensor:
    """The first row of each row's source: equal for equal groups, whatever their numbers."""
    _, first, group = np.unique(sources.numpy(), return_index=True, return_inverse=True)
    return torch.from_numpy(first[group])


def _numbers(names: Sequence[str], number: Mapping[str, int]) -> Tensor:
    return torch.tensor([number[name] for name in names], dtype=torch.int64)
