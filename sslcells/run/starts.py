"""The starts that a run's weights come from, a line each in its folder: when, by which commit, and by which command."""

import json
from pathlib import Path

from sslcells.provenance import made
from sslcells.storage import json_text

FILE = "starts.jsonl"


def note(folder: Path, resumes: bool) -> None:
    """Add this start to the run's folder, as its only one unless it resumes from a checkpoint.

    Raises:
        OSError: if the file cannot be written.
    """
    with (folder / FILE).open("a" if resumes else "w", encoding="utf-8") as file:
        file.write(f"{json_text(made())}\n")


def first(folder: Path) -> dict[str, str | None]:
    """The start that the first step was made by; empty where an earlier version noted none, or it cannot be read."""
    try:
        with (folder / FILE).open(encoding="utf-8") as file:
            found = json.loads(file.readline())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
