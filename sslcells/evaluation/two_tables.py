"""The tables of two runs beside each other."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from sslcells.evaluation.against import signed
from sslcells.evaluation.scores import METRIC
from sslcells.evaluation.tables import Table, of_images, shown
from sslcells.evaluation.two_pictures import by


def scores(result: Mapping[str, Any]) -> Table:
    """The score of each method of both runs, and the differences of all scores."""
    first, second = result["names"]
    metrics = list(dict.fromkeys(metric for row in result["scores"] for metric in row["difference"]))
    others = [metric for metric in metrics if metric != METRIC]
    lines = [
        [row["method"], row["unit"], shown(row["first"][METRIC]), shown(row["second"][METRIC])]
        + [signed(row["difference"][metric]) for metric in (METRIC, *others)]
        for row in result["scores"]
    ]
    columns = ["method", "per", first, second, "difference", *(f"difference in {metric}" for metric in others)]
    of = f" of {result['sources']:,} sources" if result["sources"] else ""
    caption = (
        f"{METRIC} in %, and differences ({second} minus {first}) in points, of {result['images']:,} images{of}, with "
        f"95 % intervals. Each resample draws the same for both"
    )
    return Table("Both runs, and the difference", columns, lines, caption)


def agreement(result: Mapping[str, Any]) -> Table:
    """How many images each run has right."""
    first, second = result["names"]
    lines = [
        [row["method"], *(f"{row[key]:,}" for key in ("both", "first", "second", "neither"))]
        for row in result["agreement"]
    ]
    columns = ["method", "both right", f"{first} alone", f"{second} alone", "neither"]
    return Table("Who is right", columns, lines, "images")


def by_class(result: Mapping[str, Any]) -> Table:
    """The recall of each class."""
    first, second = result["names"]
    lines = [
        [
            row["class"],
            f"{row['images']:,}",
            "" if row["sources"] is None else f"{row['sources']:,}",
            shown(row["first"]),
            shown(row["second"]),
            signed(row["difference"]),
        ]
        for row in result["by class"]
    ]
    caption = f"recall in %, differences in points, with 95 % intervals, by {by(result['method'])}, per image"
    return Table("Each class", ["class", "images", "sources", first, second, "difference"], lines, caption)


def laboratories(result: Mapping[str, Any]) -> list[Table]:
    """The scores in each laboratory whose labels were not used, and the robustness index; none if none was asked."""
    first, second = result["names"]
    columns = ["laboratory", "method", "images", first, second, "difference"]
    scored = [
        [
            *(row["lab"], row["method"], of_images(row)),
            *(shown(row[key][METRIC]) for key in ("first", "second")),
            signed(row["difference"][METRIC]),
        ]
        for row in result["labs"]
    ]
    caption = f"{METRIC} in % by the labels of the others, differences in points, with 95 % intervals, per image"
    told = [
        [
            " – ".join(row["labs"]),
            f"{row['images']:,}",
            *(shown(row[key], percent=False) for key in ("first", "second")),
        ]
        for row in result["robustness"]
    ]
    apart = (
        "of the nearest neighbours that speak for class or laboratory, the share of the same class and the other "
        "laboratory, each with the 95 % interval of its own"
    )
    tables = [
        Table("Laboratories whose labels were not used", columns, scored, caption),
        Table("Robustness index", ["laboratories", "images of each", first, second], told, apart),
    ]
    return [table for table in tables if table.rows]


def settings(result: Mapping[str, Any]) -> Table:
    """The settings that differ."""
    lines = [list(row) for row in result["settings"]]
    caption = "keys of config.yaml that differ" if lines else "no key of config.yaml that is known of both differs"
    return Table("Settings", ["key", *result["names"]], lines, caption)


def made(result: Mapping[str, Any]) -> Table:
    """Where both runs come from."""
    first, second = result["made"]
    lines = [[key, first[key], second[key]] for key in first]
    return Table("Provenance", ["", *result["names"]], lines, "+ after a commit: its files had been changed")


def notes(found: Sequence[str]) -> list[str]:
    """A heading and sentences as lines of HTML; empty without any."""
    return ["<h2>Notes</h2>", "<ul>", *(f"<li>{escape(note)}</li>" for note in found), "</ul>"] if found else []
