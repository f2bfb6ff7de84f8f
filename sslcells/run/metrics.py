"""The rows of a run's metrics.jsonl, and the step that each picture shows."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sslcells.storage import json_text, write_atomically

METRICS = "metrics.jsonl"


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics.jsonl, with NaN for null, which stands for a value that was not finite."""
    lines = (folder / METRICS).read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    return [_numbers(row) for row in rows]


def _numbers(row: dict[str, Any]) -> dict[str, Any]:
    return {key: math.nan if value is None else value for key, value in row.items()}


def row_of(line: bytes) -> dict[str, Any] | None:
    """One line of metrics.jsonl as a row of `read_metrics`; None if the line is cut off."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return _numbers(row) if isinstance(row, dict) and isinstance(row.get("step"), int) else None


def forget_after(path: Path, step: int) -> None:
    """Remove the rows after `step`, the checkpoint that the run resumes from, and lines that were cut off."""
    if not path.is_file():
        return
    rows = ((line, row_of(line)) for line in path.read_bytes().splitlines())
    kept = [line + b"\n" for line, row in rows if row is not None and row["step"] <= step and step > 0]
    write_atomically(path, lambda file: file.write(b"".join(kept)))


def note_steps(paths: Mapping[str, Path], step: int) -> None:
    """Write the step that pictures show into steps.json beside them."""
    for path in paths.values():
        notes = path.parent / "steps.json"
        notes.write_text(json_text(_noted(notes) | {path.name: step}), encoding="utf-8")


def _noted(path: Path) -> dict[str, int]:
    try:
        notes: dict[str, int] = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return notes


def pictures_of(folder: Path, step: int, newest: bool) -> list[Path]:
    """The pictures that show a step; those without a known step belong to the newest."""
    notes = _noted(folder / "plots" / "steps.json")
    paths = sorted((folder / "plots").glob("*.png"))
    return [path for path in paths if notes.get(path.name, step if newest else None) == step]


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} → {"a.b": 1}, with values that every tracker accepts."""
    out: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            out |= flat(value, f"{prefix}{key}.")
        else:
            out[prefix + key] = value if isinstance(value, int | float | str | bool) else str(value)
    return out
