"""The figures of a run that a glance shows, from its metrics.jsonl; few lines of a long file are read as JSON."""

import json
import math
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

POINTS = 32
"""Most points of the loss's curve."""
BEST = {
    "knn/top1": "kNN",
    "val/top1": "accuracy",
    "val/auroc": "AUROC",
    "knn_loo/top1": "kNN in train",
}
"""Figures that tell runs apart, higher is better → their name; a run is shown by the first that it has."""


class Best(NamedTuple):
    """The highest value of a figure."""

    name: str
    value: float
    step: int


@dataclass(frozen=True)
class Figures:
    """What metrics.jsonl says of a run."""

    step: int = 0
    """step of the newest line"""
    epoch: float = 0.0
    """its epoch"""
    speed: float | None = None
    """images per second, median of the newest lines"""
    best: Best | None = None
    loss: tuple[float, ...] = ()
    """up to POINTS values, evenly spread over the training"""
    scores: tuple[float, ...] = ()
    """all values of the figure in `best`"""
    lines: int = 0
    """lines with a loss"""


def figures(content: bytes) -> Figures:
    """The figures in the bytes of a metrics.jsonl. A last line without its end is being written, and left out.

    Raises:
        ValueError: if a line is not a row of figures; the message says which.
    """
    lines = _lines(content)
    trained = [at for at, line in enumerate(lines) if b'"loss"' in line]
    looked = [at for at, line in enumerate(lines) if _SCORED.search(line)]
    drawn, newest = _spread(trained, POINTS), trained[-5:]
    rows = {at: _row(lines[at], at + 1) for at in {*drawn, *newest, *looked}}
    of_training = [rows[at] for at in sorted({*trained[-1:], *looked})]
    last: dict[str, Any] = max(of_training, key=lambda row: row["step"], default={})
    key = next((key for key in BEST if any(key in rows[at] for at in looked)), None)
    scores = [] if key is None else [(rows[at][key], rows[at]["step"]) for at in looked if _number(rows[at].get(key))]
    speeds = [rows[at]["images_per_second"] for at in newest if _number(rows[at].get("images_per_second"))]
    return Figures(
        step=last.get("step", 0),
        epoch=last["epoch"] if _number(last.get("epoch")) else 0.0,
        speed=statistics.median(speeds) if speeds else None,
        best=Best(BEST[str(key)], *max(scores, key=lambda score: score[0])) if scores else None,
        loss=tuple(rows[at]["loss"] for at in drawn if _number(rows[at]["loss"])),
        scores=tuple(value for value, _ in scores),
        lines=len(trained),
    )


_SCORED = re.compile(f'"(?:{"|".join(BEST)})"'.encode())


def _lines(content: bytes) -> list[bytes]:
    """The lines that are complete.

    Raises:
        ValueError: if one is no object of JSON, as far as its ends tell.
    """
    *lines, _ = content.split(b"\n")
    if content.count(b"}\n{") < len(lines) - 1 or (lines and not (lines[0][:1] == b"{" and lines[-1][-1:] == b"}")):
        first = next(at for at, line in enumerate(lines, 1) if line[:1] != b"{" or line[-1:] != b"}")
        raise ValueError(f"line {first} is cut off or no JSON")
    return lines


def _row(line: bytes, number: int) -> dict[str, Any]:
    try:
        row = json.loads(line.decode())
    except ValueError:
        row = None
    if not isinstance(row, dict) or type(row.get("step")) is not int:
        raise ValueError(f"line {number} is no row of figures")
    return row


def _number(value: Any) -> bool:
    """False for what is missing, and for what is not finite, which is null in the file."""
    return type(value) in (int, float) and math.isfinite(value)


def _spread(items: Sequence[int], most: int) -> list[int]:
    """Up to `most` items, evenly spread, with the first and the last."""
    if len(items) <= most:
        return list(items)
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]
