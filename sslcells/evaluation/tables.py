"""Tables of figures as text."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple


class Table(NamedTuple):
    """A table of text."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str


def shown(score: Mapping[str, float | None] | None, percent: bool = True) -> str:
    """`82.0 [80.1, 83.8]`, or a dash if the score is undefined."""
    if score is None or score["value"] is None:
        return "–"
    scale, digits = (100, 1) if percent else (1, 3)
    value, low, high = (None if v is None else f"{scale * v:.{digits}f}" for v in (score[k] for k in score))
    return f"{value}" if low is None else f"{value} [{low}, {high}]"


def of_images(row: Mapping[str, Any]) -> str:
    """How many images a row of figures is of: `2,487 of 72 sources`, or `2,487` if each is its own."""
    sources = row.get("sources")
    return f"{row['images']:,}" + (f" of {sources:,} sources" if sources else "")
