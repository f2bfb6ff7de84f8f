"""The words for one run, on the console and on the page."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sslcells.overview.summary import Summary


def printable(text: str) -> str:
    """Text of others for a terminal or a page, without control characters and what is no Unicode."""
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text)


def duration(seconds: float) -> str:
    """A time in words: 5 s, 12 min, 3.4 h, 2.5 days."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 6000:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 172_800 else f"{seconds / 86_400:.1f} days"


def headline(folder: Path, found: "Sequence[Summary]") -> str:
    """How many runs of each state a folder has."""
    states = [one.state for one in found]
    counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    of = f"{len(found):,} run{'s' * (len(found) > 1)}: {counts}" if found else "no runs"
    return f"{printable(str(folder))}: {of}"


def name(folder: Path, one: "Summary") -> str:
    """A run's folder below the one that was searched."""
    below = one.folder.relative_to(folder)
    return printable(one.folder.name if below == Path() else str(below))


def step(one: "Summary") -> str:
    """Steps done, of how many."""
    return f"{one.figures.step:,}/{'?' if one.steps is None else f'{one.steps:,}'}"


def best(one: "Summary") -> str:
    """The best figure on val, and its step."""
    found = one.figures.best
    if found is None:
        return "–"
    return f"{found.name} {100 * found.value:.1f} % {f'at {found.step:,}' if found.step else 'before training'}"
