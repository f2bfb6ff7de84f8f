"""Runs on the console: one line each, once or again and again."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from sslcells.overview.found import runs
from sslcells.overview.summary import Summary
from sslcells.overview.words import best, duration, headline, name, step

STYLES = {
    "running": "green",
    "silent": "bold yellow",
    "broken": "bold red",
    "failed": "red",
    "stopped": "yellow",
    "finished": "dim",
}
_BARS = "▁▂▃▄▅▆▇█"
_HEADINGS = ("run", "state", "step", "left", "best on val", "loss", "seen", "note")
WIDTH = 16
"""Characters of a curve."""


def show(folder: Path) -> None:
    """Print every run below a folder; in a terminal a line is as wide as the window.

    Raises:
        ConfigError: if there is no such folder.
    """
    console = Console(highlight=False)
    for line in lines(folder, runs(folder)):
        if console.is_terminal:
            console.print(line, no_wrap=True, overflow="ellipsis")
        else:
            print(line)


def watch(folder: Path, seconds: float, pause: Callable[[float], None] = time.sleep) -> None:
    """Show every run below a folder, anew every `seconds`, until Ctrl-C; as many lines as the terminal has.

    Raises:
        ConfigError: if there is no such folder.
    """
    console = Console(highlight=False)
    if not console.is_terminal:
        while True:
            print(time.strftime("%H:%M:%S"))
            show(folder)
            pause(seconds)
    with Live(console=console, auto_refresh=False, screen=True) as live:
        while True:
            live.update(_fitted(lines(folder, runs(folder)), console.height), refresh=True)
            pause(seconds)


def _fitted(shown: Sequence[Text], height: int) -> Group:
    """As many lines as fit, and how many there are more."""
    for line in shown:
        line.no_wrap, line.overflow = True, "ellipsis"
    if len(shown) <= height - 1:
        return Group(*shown)
    kept = max(1, height - 2)
    return Group(*shown[:kept], Text(f"and {len(shown) - kept} more lines; sslcells runs shows all"))


def lines(folder: Path, found: Sequence[Summary]) -> list[Text]:
    """A headline, and a line for each run below it, in columns."""
    if not found:
        return [Text(headline(folder, found))]
    table = [_HEADINGS, *(_cells(folder, one) for one in found)]
    widths = [max(len(row[column]) for row in table) for column in range(len(_HEADINGS) - 1)]
    styles = ["bold", *(STYLES[one.state] for one in found)]
    shown = [Text(headline(folder, found))]
    for row, style in zip(table, styles, strict=True):
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
        shown.append(Text("  ".join([*cells, row[-1]]).rstrip(), style))
    return shown


def _cells(folder: Path, one: Summary) -> tuple[str, ...]:
    return (
        name(folder, one),
        one.state,
        step(one),
        "" if one.left is None else duration(one.left),
        best(one),
        curve(one.figures.loss),
        "" if one.seen is None else f"{duration(one.seen)} ago",
        one.note,
    )


def curve(values: Sequence[float], width: int = WIDTH) -> str:
    """Values as a row of bars, from the lowest to the highest."""
    if len(values) < 2:
        return ""
    if len(values) > width:
        values = [values[round(i * (len(values) - 1) / (width - 1))] for i in range(width)]
    low, high = min(values), max(values)
    scale = (len(_BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(_BARS[round((value - low) * scale)] for value in values)
