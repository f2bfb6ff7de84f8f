"""The pictures of two runs beside each other: scores and differences with their intervals, and both trainings."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, PercentFormatter

from sslcells.evaluation.against import signed
from sslcells.evaluation.gallery import Picture
from sslcells.evaluation.in_short_picture import TITLE, Dot, dot_plot
from sslcells.evaluation.pictures import BLUE, MARKERS, VERMILION, Floats, save, series, short
from sslcells.evaluation.scores import METRIC
from sslcells.overview.figures import BEST

COLOURS = (BLUE, VERMILION)
"""of the first run and of the second"""


def by(method: str) -> str:
    """A method's name in a sentence."""
    return method.removesuffix(", weighted")


def intervals(rows: Sequence[Mapping[str, Any]], names: Sequence[str], folder: Path) -> list[Picture]:
    """The differences, which stand beside the answers, and the scores that they are of."""
    points = FuncFormatter(lambda value, _: f"{100 * value:+g}" if value else "0")
    dots, both = list[Dot](), list[Dot]()
    for row in rows:
        name, score = by(row["method"]) + ", per source" * (row["unit"] == "source"), row["difference"][METRIC]
        if score["value"] is not None:
            dots.append(Dot(name, score, "black", 0.0, signed(score)))
            both.append(Dot(name, None))
            both += [Dot(of, row[which][METRIC], c) for of, which, c in zip(names, _RUNS, COLOURS, strict=True)]
    if not dots:
        return []
    label = f"points of {METRIC} (thin line: no difference)"
    file = dot_plot(dots, folder / "differences.png", label, (-1, 1), 0.01, points)
    caption = f"{names[1]} minus {names[0]}, with 95 % intervals; right of the thin line {names[1]} is better."
    shown = [Picture(TITLE, file, caption)]
    scores = dot_plot(both, folder / "scores.png", METRIC)
    return [*shown, Picture("Both runs", scores, "Each with the 95 % interval of its own score; higher is better.")]


_RUNS = ("first", "second")


def trainings(
    metrics: Sequence[Sequence[dict[str, Any]]],
    batches: Sequence[int | None],
    names: Sequence[str],
    folder: Path,
) -> list[Picture]:
    """Curves of what both runs logged, by step and by images seen: the loss, and the figure that tells runs apart."""
    logged = [{key for row in rows for key in row} for rows in metrics]
    score = next((key for key in BEST if all(key in keys for keys in logged)), None)
    wanted = {"loss": "Loss"} | ({score: BEST[score]} if score else {})
    out = list[Picture]()
    for key, name in wanted.items():
        if all(key in keys for keys in logged):
            found = [series(rows, key) for rows in metrics]
            file = folder / f"training_{len(out)}.png"
            caption = "Losses of different methods or settings of a loss cannot be compared." if key == "loss" else ""
            out.append(Picture(name, _curves(found, batches, names, key, name, file), caption))
    return out


def _curves(
    found: Sequence[tuple[Floats, Floats]],
    batches: Sequence[int | None],
    names: Sequence[str],
    key: str,
    name: str,
    out: Path,
) -> Path:
    by_images = all(batches)
    figure = Figure(figsize=(4.6, 5.6 if by_images else 3), layout="constrained")
    axes = figure.subplots(1 + by_images, squeeze=False)[:, 0]
    for ax, each, what in zip(axes, ([1, 1], batches), ("optimizer step", "images seen"), strict=False):
        _draw(ax, found, [float(of or 1) for of in each], names)
        ax.set(xlabel=what, ylabel=name.lower() if key == "loss" else name)
        if key != "loss":
            ax.yaxis.set_major_formatter(PercentFormatter(xmax=1))
    axes[0].legend(frameon=False)
    return save(figure, out)


def _draw(ax: Axes, found: Sequence[tuple[Floats, Floats]], scales: Sequence[float], names: Sequence[str]) -> None:
    for (step, value), scale, name, colour, marker in zip(found, scales, names, COLOURS, MARKERS, strict=False):
        shown = marker if len(step) < 40 else ""
        ax.plot(step * scale, value, color=colour, linewidth=1.4, marker=shown, markersize=4, label=short(name, 30))
    ax.grid(alpha=0.25)
