"""Two runs in laboratories whose labels neither of them used, beside each other."""

from collections.abc import Mapping, Sequence
from typing import Any

from sslcells.config import ConfigError
from sslcells.evaluation.answer_table import AnswerTable
from sslcells.evaluation.paired import paired
from sslcells.evaluation.scores import Units

Labs = Mapping[str, AnswerTable]


def compared(
    labs: Sequence[Labs], names: Sequence[str], common: bool, draws: int
) -> tuple[list[dict[str, Any]], list[str]]:
    """Scores of both runs in each laboratory that both were asked about, and notes on the other laboratories.

    The runs are called by `names`; `labs` are the answers of each by laboratory, by the labels of the others. With
    `common` those images alone are compared that both were asked about; intervals are from `draws` resamples.
    """
    first, second = labs
    rows, notes = list[dict[str, Any]](), list[str]()
    for lab in first:
        if lab not in second:
            continue
        try:
            pair = paired([first[lab], second[lab]], names, common)
        except ConfigError as error:
            notes.append(f"laboratory {lab} is not compared: {error}")
            continue
        units = Units(pair.sources, 0, draws)
        counts = {"lab": lab, "images": len(pair.images), "sources": units.count if units.known else None}
        rows += [{**counts, **row} for row in pair.scores(units) if row["unit"] == "image"]
        notes += [f"laboratory {lab}: {note}" for note in pair.notes]
    for name, its, other in ((names[0], first, second), (names[1], second, first)):
        if alone := [lab for lab in its if lab not in other]:
            notes.append(f"{name} alone was asked about laboratories: {', '.join(alone)}")
    return rows, notes


def indices(results: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The robustness index of both runs for each two laboratories that both were asked about."""
    both = [{tuple(of["labs"]): of for of in (result.get("labs") or {}).get("pairs", ())} for result in results]
    return [
        {
            "labs": labs,
            "images": of["images of each"],
            "first": of.get("robustness index"),
            "second": its["robustness index"],
        }
        for labs, of in both[0].items()
        if (its := both[1].get(labs)) and of.get("robustness index") and its.get("robustness index")
    ]
