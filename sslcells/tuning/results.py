"""What a search found: a table of its trials, the best settings, and a picture of what mattered."""

import csv
import io
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from rich.console import Console

from sslcells.config import Run, dump
from sslcells.evaluation.pictures import BLUE, GREY, VERMILION, save, short
from sslcells.evaluation.report import say_table
from sslcells.evaluation.tables import Table
from sslcells.overview.words import printable
from sslcells.storage import write_atomically
from sslcells.tuning.ranges import Range

if TYPE_CHECKING:
    from sslcells.tuning.study import Done

BEST, TABLE, PICTURE = "best.yaml", "trials.csv", "search.png"
_SHOWN = 20
"""Most trials of the table on the console."""


def write(
    folder: Path,
    figure: str,
    searched: Sequence[Range],
    found: "Sequence[Done]",
    importance: Mapping[str, float],
    best: Run | None,
) -> None:
    """Print the table of trials, the best first; write it, the best configuration and the picture into the folder."""
    keys = [one.key for one in searched]
    rows = [_row(one, keys) for one in found]
    columns = ("trial", "state", f"{figure} on val", *keys, "why")
    caption = f"the best {_SHOWN} of {len(rows)}: {folder / TABLE} has all" if len(rows) > _SHOWN else ""
    say_table(Console(highlight=False, width=160), Table(folder.name, columns, rows[:_SHOWN], caption))
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([columns, *rows])
    write_atomically(folder / TABLE, lambda file: file.write(text.getvalue().encode(errors="backslashreplace")))
    if best is None:
        print(f"{folder}: no trial is finished yet")
        return
    first = found[0]
    about = f"# The best of {len(found)} trials, {first.number}: {figure} {first.value:.4f} on val\n"
    write_atomically(folder / BEST, lambda file: file.write((about + dump(best)).encode()))
    draw(folder / PICTURE, figure, searched, found, importance)
    for key, share in sorted(importance.items(), key=lambda item: -item[1]):
        print(f"{share:6.1%} of what differs is due to {key}")
    print(f"best: {shlex.join(first.settings)}")
    print(f"sslcells train --config {folder / BEST}")
    print(f"{folder}: {BEST}, {TABLE}, {PICTURE}")


def _row(one: "Done", keys: Sequence[str]) -> tuple[str, ...]:
    chosen = dict(setting.split("=", 1) for setting in one.settings)
    value = "" if one.value is None else f"{one.value:.4f}"
    return (str(one.number), one.state, value, *(chosen.get(key, "") for key in keys), printable(one.reason))


def draw(
    out: Path, figure: str, searched: Sequence[Range], found: "Sequence[Done]", importance: Mapping[str, float]
) -> Path:
    """The figure by trial, the importance of each key, and the figure against each key's values."""
    done = sorted((one for one in found if one.value is not None), key=lambda one: one.number)
    keys = sorted(searched, key=lambda one: -importance.get(one.key, 0.0))
    columns = 3
    rows = -(-(len(keys) + 2) // columns)
    page = Figure(figsize=(4.2 * columns, 3.2 * rows), layout="constrained")
    first, second, *others = page.subplots(rows, columns, squeeze=False).flat
    _draw_history(first, done, figure)
    _draw_importance(second, keys, importance)
    best = max(done, key=lambda one: one.value or 0.0)
    for ax, one in zip(others, keys, strict=False):
        _draw_key(ax, one, done, best)
    for ax in others[len(keys) :]:
        ax.set_visible(False)
    return save(page, out)


def _draw_history(ax: Axes, done: "Sequence[Done]", figure: str) -> None:
    values = [one.value or 0.0 for one in done]
    ax.scatter([one.number for one in done], values, color=GREY, s=18, label="trial")
    ax.step([one.number for one in done], np.maximum.accumulate(values), where="post", color=BLUE, label="best so far")
    ax.set(xlabel="trial", ylabel=f"{figure} on val", title="Trials")
    ax.yaxis.set_major_formatter(PercentFormatter(xmax=1))
    ax.legend(frameon=False)


def _draw_importance(ax: Axes, keys: Sequence[Range], importance: Mapping[str, float]) -> None:
    ax.set_title("What mattered")
    if not importance:
        ax.text(0.5, 0.5, "too few trials to tell", ha="center", va="center", transform=ax.transAxes)
        ax.set_axis_off()
        return
    shown = [one.key for one in keys if one.key in importance][::-1]
    ax.barh([short(key) for key in shown], [importance[key] for key in shown], color=BLUE)
    ax.xaxis.set_major_formatter(PercentFormatter(xmax=1))
    ax.set_xlabel("share of the variance, fANOVA")


def _draw_key(ax: Axes, one: Range, done: "Sequence[Done]", best: "Done") -> None:
    chosen = {trial.number: dict(word.split("=", 1) for word in trial.settings)[one.key] for trial in done}
    for trial in done:
        at = one.choices.index(chosen[trial.number]) if one.choices else float(chosen[trial.number])
        color, size = (VERMILION, 45) if trial is best else (GREY, 18)
        ax.scatter([at], [trial.value or 0.0], color=color, s=size, zorder=3 if trial is best else 2)
    if one.choices:
        ax.set_xticks(range(len(one.choices)), [short(choice, 14) for choice in one.choices])
        ax.set_xlim(-0.5, len(one.choices) - 0.5)
    elif one.log:
        ax.set_xscale("log")
    ax.yaxis.set_major_formatter(PercentFormatter(xmax=1))
    ax.set_xlabel(short(one.key, 40))
    ax.grid(alpha=0.25)
