"""Tables of the cross-laboratory report."""

from collections.abc import Mapping
from typing import Any

from sslcells.evaluation.robustness import FEW
from sslcells.evaluation.tables import Table, of_images, shown


def lab_tables(result: Mapping[str, Any]) -> list[Table]:
    """The tables of a cross-laboratory report."""
    return [table for table in (_pairs(result), _left_out(result), _classes(result)) if table.rows]


def _pairs(result: Mapping[str, Any]) -> Table:
    lines = []
    for of in result["pairs"]:
        told = of.get("lab predictability")
        if told is None:
            continue
        null = "–" if told["null low"] is None else f"{100 * told['null low']:.1f} to {100 * told['null high']:.1f}"
        index = shown(of.get("robustness index"), percent=False)
        k = "–" if of["k"] is None else str(of["k"])
        classes, images = ", ".join(of["classes"]), f"{of['images of each']:,}"
        lines.append([" – ".join(of["labs"]), classes, images, k, index, f"{100 * told['value']:.1f}", null])
    columns = [
        "laboratories",
        "classes",
        "images of each",
        "k",
        "robustness index",
        "lab predictability, %",
        "by chance",
    ]
    caption = (
        "as many images of each class from both; robustness index: of the nearest k neighbours that speak for class or "
        "laboratory, the share of the same class and the other laboratory: above 0.5 cells count more; predictability: "
        "balanced accuracy of the neighbours' votes for the laboratory, and what shuffled laboratories give"
    )
    return Table("Laboratories told apart", columns, lines, caption)


def _left_out(result: Mapping[str, Any]) -> Table:
    metrics = ("balanced accuracy", "accuracy", "macro F1")
    lines = [
        [lab["lab"], row["method"], row["labels of"], row["among"], row["unit"], of_images(row)]
        + [shown(row["scores"].get(metric)) for metric in metrics]
        for lab in result["labs"]
        for row in lab["figures"]
    ]
    columns = ["laboratory", "method", "labels of", "among", "per", "images", *metrics]
    caption = (
        f"%, with 95 % intervals from resamples of sources, over classes with {FEW} images or more. By labels of the "
        f"others: what a laboratory would see that brings no labels; by its own, cross-validated by source: the ceiling"
    )
    return Table("Each laboratory by the labels of the others", columns, lines, caption)


def _classes(result: Mapping[str, Any]) -> Table:
    lines = [
        [lab["lab"], name, f"{images:,}", "no" if name in lab["few"] else "yes"]
        for lab in result["labs"]
        for name, images in lab["by class"].items()
    ]
    return Table(
        "Images of each class", ["laboratory", "class", "images", "counted"], lines, f"counted from {FEW} images"
    )
