"""The picture at the top of the report: the encoder beside all that it was measured beside, with intervals."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import Formatter, PercentFormatter

from sslcells.evaluation.baselines import METHOD, RUN
from sslcells.evaluation.gallery import Picture
from sslcells.evaluation.in_short import rows_of_lab
from sslcells.evaluation.pictures import BLUE, GREY, VERMILION, save, short
from sslcells.evaluation.scores import METRIC
from sslcells.evaluation.tables import shown

TITLE = "In short"
_LINE, _EDGES = 0.5, 0.9
"""inches of a row, and of the axis below all"""


class Dot(NamedTuple):
    """A score that is drawn, with its name; a heading where there is none."""

    name: str
    score: Mapping[str, float | None] | None
    colour: str = GREY
    chance: float | None = None
    said: str = ""
    """the score in words, if other than in percent"""


def dots(result: Mapping[str, Any]) -> list[Dot]:
    """The scores of an evaluation's results that stand beside each other, below headings."""
    return [*_of_split(result), *_of_labs(result)]


def _of_split(result: Mapping[str, Any]) -> Iterator[Dot]:
    found = result["baselines"]
    if found is None:
        return
    classes = result["leaks"]["images"][result["asked"]]["classes"]
    chance = 1 / max(1, sum(of["images"] > 0 for of in classes.values()))
    yield Dot(f"{result['asked']} split, {METHOD.removesuffix(', weighted')}", None)
    for row in found["figures"]:
        if row["unit"] == "image":
            yield Dot(row["name"], row["scores"][METRIC], BLUE if row["name"] == RUN else GREY, chance)
    for one in result["against"]:
        rows = [r for r in one["figures"] if (f"{r['task']}, {r['name']}", r["unit"]) == (METHOD, "image")]
        yield from (Dot(f"{one['encoder']}, frozen", row["scores"][METRIC], VERMILION, chance) for row in rows)


def _of_labs(result: Mapping[str, Any]) -> Iterator[Dot]:
    for lab in (result["labs"] or {"labs": []})["labs"]:
        if not lab["others − own"]:
            continue
        method, chance = lab["others − own"][-1]["method"], 1 / len(lab["classes counted"])
        yield Dot(f"laboratory {lab['lab']}, {method}", None)
        for whose, row in rows_of_lab(lab, method).items():
            yield Dot(f"by labels of {whose}", row["scores"][METRIC], BLUE if whose == "the others" else GREY, chance)


def draw(result: Mapping[str, Any], folder: Path) -> list[Picture]:
    """Draw the scores into `folder`; no picture where there are none."""
    drawn = [dot for dot in dots(result) if dot.score is None or dot.score["value"] is not None]
    if all(dot.score is None for dot in drawn):
        return []
    caption = f"{METRIC[0].upper()}{METRIC[1:]}, with 95 % intervals; higher is better."
    found = result["baselines"]
    if found is not None:
        caption += f" Colour and the untrained network are searched in {found['images of train']:,} images of train."
    return [Picture(TITLE, dot_plot(drawn, folder / "in_short.png", f"{METRIC} (thin line: chance)"), caption)]


def dot_plot(
    drawn: Sequence[Dot],
    out: Path,
    label: str,
    within: tuple[float, float] = (0, 1.02),
    room: float = 0.05,
    numbers: Formatter | None = None,
) -> Path:
    """Draw scores below each other, with their intervals, on one axis; readable at 400 px.

    The axis has `room` beyond all that is drawn, and never leaves the ends `within`.
    """
    figure = Figure(figsize=(4.4, _LINE * len(drawn) + _EDGES), layout="constrained")
    ax = figure.subplots()
    for place, dot in enumerate(drawn):
        _draw(ax, -place, dot)
    reached = [value for dot in drawn for value in (dot.score or {}).values() if value is not None]
    reached += [dot.chance for dot in drawn if dot.chance is not None]
    ax.set(xlim=(max(within[0], min(reached) - room), min(within[1], max(reached) + room)))
    ax.set(ylim=(-len(drawn) + 0.65, 0.75), yticks=[])
    ax.xaxis.set_major_formatter(numbers or PercentFormatter(xmax=1, decimals=0))
    ax.tick_params(labelsize=11)
    ax.set_xlabel(label, fontsize=11)
    ax.spines[["top", "left", "right"]].set_visible(False)
    return save(figure, out)


def _draw(ax: Axes, y: float, dot: Dot) -> None:
    across = ax.get_yaxis_transform()
    if dot.score is None or (value := dot.score["value"]) is None:
        ax.text(0, y, short(dot.name, 36), transform=across, fontsize=11.5, fontweight="bold", va="center")
        return
    low, high = dot.score["low"], dot.score["high"]
    ax.text(0, y + 0.12, short(dot.name, 28), transform=across, fontsize=11, va="bottom")
    ax.text(1, y + 0.12, dot.said or shown(dot.score), transform=across, fontsize=11, va="bottom", ha="right")
    if low is not None and high is not None:
        ax.plot([low, high], [y, y], color=dot.colour, linewidth=3, solid_capstyle="round")
    ax.plot([value], [y], "o", color=dot.colour, markersize=8)
    if dot.chance is not None:
        ax.plot([dot.chance] * 2, [y - 0.14, y + 0.09], color="black", linewidth=1.2)
