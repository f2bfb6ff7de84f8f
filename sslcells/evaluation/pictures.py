"""Pictures of a run as PNG files: curves, embedding map, confusion. Those made of images are in `sheets.py`.

Colours are Okabe and Ito's, which colour-blind readers can tell apart. pyplot's global state is not used, so that
pictures can be drawn in any thread.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from numpy.typing import NDArray
from torch import Tensor

from sslcells.config import extra
from sslcells.evaluation.scores import unit_rows

BLUE, VERMILION, GREEN, ORANGE = "#0072B2", "#D55E00", "#009E73", "#E69F00"
OKABE_ITO = (BLUE, ORANGE, GREEN, VERMILION, "#56B4E9", "#CC79A7", "#F0E442", "#000000")
MARKERS = "os^Dv"
GREY = "#8C8C8C"
DPI = 150
Floats = NDArray[np.floating[Any]]

_HEALTH = {
    "effective_rank": "effective rank (dimensions)\nhigher: more are used",
    "row_std": "row std × √D\n1: spread, 0: collapsed",
    "uniformity": "uniformity\nlower: more even",
    "alignment": "alignment |z0 − z1|²\nlower: views agree",
    "distance_from_start": "cosine distance\nfrom the start",
}
_MAP_POINTS = 2_000
_SAME = 1e-5
"""Deviation of unit rows below which they differ by rounding alone."""
_LEGEND_ROWS = 22
_NUMBERED_CLASSES = 16


def short(name: str, most: int = 24) -> str:
    """The name, shortened to `most` characters, with "$" escaped: matplotlib would read a formula."""
    return (name if len(name) <= most else name[: most - 1] + "…").replace("$", r"\$")


def save(figure: Figure, out: Path) -> Path:
    """Write the figure as PNG; its folder is made if missing."""
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=DPI, format="png", bbox_inches="tight")
    return out


def curves(metrics: Sequence[dict[str, Any]], out: Path, query_split: str = "") -> Path | None:
    """The curves of a run from the rows of its metrics.jsonl, one panel for each figure that was logged.

    `query_split` is the split of the accuracies.

    Loss, also a classifier's on a split (keys `…/loss`), and learning rate against the step; accuracies (keys `…/top1`,
    `…/balanced`) with those of step 0, before training, as a dashed line; label-free figures (keys `health/…`). None,
    and no file, if none of these was logged.
    """
    # In the order in which they were logged. `start/…` is logged only at step 0, from fewer images: no curve.
    keys = dict.fromkeys(key for row in metrics for key in row if not key.startswith("start/"))
    accuracy = [key for key in keys if key.endswith(("/top1", "/balanced", "/auroc"))]
    health = [key for key in keys if key.startswith("health/")]
    left = [key for key in ("loss", "loss", "loss", "lr") if key in keys]
    right = ["accuracy"] * len(left or "rows") if accuracy else left
    half = max(1, len(health))
    grid: list[Any] = [[one] * half + [other] * half for one, other in zip(left or right, right, strict=True)]
    grid += [[key for key in health for _ in range(2)]] * 2 if health else []
    if not grid:
        return None
    width = 12 if (left and accuracy) or len(health) > 1 else 7
    figure = Figure(figsize=(width, 1.25 * len(grid) + 0.4), layout="constrained")
    for name, ax in figure.subplot_mosaic(grid).items():
        if name == "accuracy":
            _draw_accuracy(ax, {key: series(metrics, key) for key in accuracy}, query_split)
        else:
            {"loss": _draw_loss, "lr": _draw_rate}.get(name, _draw_health)(ax, name, *series(metrics, name))
        for key in keys if name == "loss" else ():
            if key.endswith("/loss"):
                step, loss = series(metrics, key)
                ax.plot(step, loss, color=VERMILION, marker="o", markersize=4, label=key)
                ax.legend(frameon=False)
        ax.set_xlabel("optimizer step")
        ax.grid(alpha=0.25)
    return save(figure, out)


def series(metrics: Sequence[dict[str, Any]], key: str) -> tuple[Floats, Floats]:
    """Steps and values of a key; of a step that was logged again after a resume, the last value."""
    value = {row["step"]: row[key] for row in metrics if key in row}
    steps = sorted(value)
    return np.array(steps, float), np.array([value[step] for step in steps], float)


def _draw_loss(ax: Axes, _: str, step: Floats, loss: Floats) -> None:
    window = max(1, len(loss) // 25) | 1
    ones = np.ones(window)
    # At the ends the mean is over fewer points.
    smooth = np.convolve(loss, ones, "same") / np.convolve(np.ones_like(loss), ones, "same")
    ax.plot(step, loss, color=BLUE, alpha=0.3, linewidth=0.8, marker=".", markersize=3, label="as logged")
    if window > 1:
        ax.plot(step, smooth, color=BLUE, linewidth=1.8, label=f"mean of {window} points")
    ax.set(title="Training loss", ylabel="loss")
    ax.legend(frameon=False)


def _draw_rate(ax: Axes, _: str, step: Floats, rate: Floats) -> None:
    ax.plot(step, rate, color="black", linewidth=1.2)
    ax.ticklabel_format(axis="y", style="sci", scilimits=(-2, 2))
    ax.set(ylabel="learning\nrate", ylim=(0, None))


def _draw_accuracy(ax: Axes, series: dict[str, tuple[Floats, Floats]], query_split: str) -> None:
    for (key, (step, value)), color, marker in zip(series.items(), OKABE_ITO, "os^Dv<>p", strict=False):
        ax.plot(step, value, color=color, marker=marker, markersize=5, label=f"{key}: {value[-1]:.1%} at the last step")
        if step[0] == 0:
            label = f"before training: {value[0]:.1%}"
            ax.axhline(value[0], color=color, linestyle="--", linewidth=1, label=label)
    ax.yaxis.set_major_formatter(PercentFormatter(xmax=1))
    ax.set(title=f"Accuracy on {query_split}" if query_split else "Accuracy", ylabel="accuracy")
    ax.legend(frameon=False, fontsize="small")


def model_curves(logged: Sequence[tuple[str, Sequence[dict[str, Any]]]], split: str, out: Path, what: str) -> Path:
    """Accuracy and loss of classifiers on a split along their training: model and rows of metrics.jsonl of each."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    axes = figure.subplots(1, 2)
    names = list(dict.fromkeys(model for model, _ in logged))
    keys = {key for _, rows in logged for row in rows for key in row}
    score = next((key for key in ("top1", "auroc") if f"{split}/{key}" in keys), "top1")
    for ax, key, unit in zip(axes, (score, "loss"), ("accuracy" if score == "top1" else "AUROC", "loss"), strict=True):
        for number, name in enumerate(names):
            label: str | None = name
            for model, rows in logged:
                if model == name:
                    step, value = series(rows, f"{split}/{key}")
                    color, marker = OKABE_ITO[number], MARKERS[number]
                    ax.plot(step, value, color=color, marker=marker, markersize=4, linewidth=1.2, label=label)
                    label = None
        ax.set(xlabel="optimizer step", ylabel=f"{split} {unit}")
        ax.grid(alpha=0.25)
    if score == "top1":
        axes[0].yaxis.set_major_formatter(PercentFormatter(xmax=1))
    axes[0].legend(frameon=False)
    figure.suptitle(f"Trained on {what}", fontsize="medium")
    return save(figure, out)


def fractions_plot(points: Sequence[tuple[str, float, float]], out: Path, unit: str) -> Path:
    """Score against the number of labels; `points` are model, fraction of the labels, and score in 0..1."""
    figure = Figure(figsize=(6.5, 4.4), layout="constrained")
    ax = figure.subplots()
    fractions = sorted({fraction for _, fraction, _ in points})
    for number, name in enumerate(dict.fromkeys(model for model, _, _ in points)):
        mine = [(fraction, value) for model, fraction, value in points if model == name]
        means = [(f, np.mean([v for g, v in mine if g == f])) for f in sorted({f for f, _ in mine})]
        color, marker = OKABE_ITO[number % len(OKABE_ITO)], MARKERS[number % len(MARKERS)]
        ax.plot([f for f, _ in means], [v for _, v in means], color=color, marker=marker, label=name)
        ax.scatter([f for f, _ in mine], [v for _, v in mine], color=color, marker=marker, s=14, alpha=0.5)
    ax.set_xscale("log")
    ax.set_xticks(fractions, [f"{100 * f:g} %" for f in fractions])
    ax.minorticks_off()
    ax.yaxis.set_major_formatter(PercentFormatter(xmax=1))
    ax.set(xlabel="labels of train that were used", ylabel=unit, title="What labels are worth")
    ax.grid(alpha=0.25)
    ax.legend(frameon=False)
    return save(figure, out)


def _draw_health(ax: Axes, key: str, step: Floats, value: Floats) -> None:
    ax.plot(step, value, color=GREEN, marker="o", markersize=4)
    ax.set_title(_HEALTH.get(key.removeprefix("health/"), key), fontsize="medium")


class Map(NamedTuple):
    """Positions of some of the rows on a t-SNE or UMAP map."""

    name: str

    chosen: Tensor
    """(n,) int64: which rows"""
    place: Floats
    """(n, 2)"""
    how: str
    rows: int
    """N, the number of all rows"""


def tsne_map(z: Tensor, seed: int) -> Map | None:
    """A t-SNE map of unit rows z (N, F), at most 2,000 of them drawn at random; None for fewer than 5."""

    def place(rows: Floats) -> tuple[Floats, str]:
        from sklearn.manifold import TSNE  # takes a second or more, which every rank would wait for

        perplexity = min(30.0, (len(rows) - 1) / 3)
        tsne = TSNE(perplexity=perplexity, init="pca", random_state=seed)
        return tsne.fit_transform(rows), f"t-SNE of unit rows, perplexity {perplexity:.0f}"

    return _map("t-SNE", z, seed, place)


def umap_map(z: Tensor, seed: int) -> Map | None:
    """A UMAP map (arXiv 1802.03426) of the same rows.

    Raises:
        ConfigError: if the extra umap is not installed.
    """
    umap = extra("umap", "umap", "evaluate.umap=true")

    def place(rows: Floats) -> tuple[Floats, str]:
        neighbours = min(15, len(rows) - 1)
        made = umap.UMAP(n_neighbors=neighbours, metric="euclidean", random_state=seed, n_jobs=1, init="pca")
        return made.fit_transform(rows), f"UMAP of unit rows, {neighbours} neighbours"

    return _map("UMAP", z, seed, place)


def _map(name: str, z: Tensor, seed: int, place: Callable[[Floats], tuple[Floats, str]]) -> Map | None:
    if len(z) < 5:
        return None
    # Drawn at random: every n-th row would miss whole classes where plates or slides are listed in turn.
    shown = torch.randperm(len(z), generator=torch.Generator().manual_seed(seed))[:_MAP_POINTS]
    rows = unit_rows(z.detach().cpu()[shown]).numpy()
    if rows.std(0).max() < _SAME:
        # t-SNE would tear equal rows apart into clusters that are not there.
        return Map(name, shown, np.zeros((len(rows), 2)), "all rows are the same: collapsed", len(z))
    return Map(name, shown, *place(rows), len(z))


def embedding_map(z: Tensor, labels: Tensor, classes: Sequence[str], out: Path, seed: int, title: str) -> Path | None:
    """A t-SNE map of unit rows z (N, F), coloured by true label (N,) int64; unknown ones, below 0, are grey.

    At most 2,000 rows, drawn at random. The 40 commonest classes have a colour and marker of their own, the
    others share one. None, and no file, for fewer than 5 rows.
    """
    drawn = tsne_map(z, seed)
    return None if drawn is None else coloured_map(drawn, labels, classes, out, title)


def coloured_map(
    drawn: Map, groups: Tensor, names: Sequence[str], out: Path, title: str, others: str = "other classes"
) -> Path:
    """A map coloured by group: (N,) int64 for all rows, indices of `names`; grey if below 0."""
    figure = Figure(layout="constrained")
    ax = figure.subplots()
    columns = scatter(ax, drawn.place, groups.cpu()[drawn.chosen].numpy(), names, others)
    figure.set_size_inches(6.2 + 2.6 * columns, 6.6)
    ax.set(xlabel=f"{drawn.name} 1 (no unit)", ylabel=f"{drawn.name} 2 (no unit)", xticks=[], yticks=[])
    ax.set_aspect("equal", adjustable="datalim")
    ax.set_box_aspect(1)
    title = f"{short(title, 70)}\n{len(drawn.chosen):,} of {drawn.rows:,} images; {drawn.how}"
    ax.set_title(title, fontsize="medium")
    return save(figure, out)


def similarity_histogram(kinds: Mapping[str, Tensor], out: Path) -> Path | None:
    """Histogram of the cosines (n,) of each kind of pairs; None, and no file, if there are fewer than two kinds."""
    finite = {name: cosine[cosine.isfinite()].numpy() for name, cosine in kinds.items()}
    kept = {name: cosine.clip(-1, 1) for name, cosine in finite.items() if len(cosine)}
    if len(kept) < 2:
        return None
    figure = Figure(figsize=(8, 4.2), layout="constrained")
    ax = figure.subplots()
    low = min(0.99, *(float(cosine.min()) for cosine in kept.values()))
    edges = np.linspace(low, 1, 61).tolist()
    for (name, cosine), color, line in zip(kept.items(), (GREEN, VERMILION), ("-", "--"), strict=False):
        share = np.ones(len(cosine)) / len(cosine)
        label = f"{name} ({len(cosine):,} pairs, median {np.median(cosine):.2f})"
        ax.hist(cosine, edges, weights=share, color=color, alpha=0.25)
        ax.hist(cosine, edges, weights=share, color=color, histtype="step", linestyle=line, label=label)
    ax.yaxis.set_major_formatter(PercentFormatter(xmax=1))
    ax.set(xlabel="cosine of the two features (no unit)", ylabel="share of the pairs", xlim=(low, 1))
    ax.set_title("Positives against negatives: apart is good", fontsize="medium")
    ax.legend(frameon=False, fontsize="small", loc="upper left")
    return save(figure, out)


def grouped(
    labels: NDArray[np.int64], classes: Sequence[str], others: str
) -> list[tuple[str, NDArray[np.bool_], tuple[str, str]]]:
    """The groups of a map that have points: name, which points (N,), colour and marker (one of MARKERS, or "P").

    The commonest classes have a style of their own; the other classes are one group, called `others`, and points
    without a label, below 0, another.
    """
    images = np.bincount(labels[labels >= 0], minlength=len(classes))
    styles = [(color, marker) for marker in MARKERS for color in OKABE_ITO]
    distinct = sorted(np.argsort(-images, kind="stable")[: len(styles)].tolist())
    other = (labels >= 0) & ~np.isin(labels, distinct)
    groups = [("unlabelled", labels < 0, (GREY, "o")), (others, other, (GREY, "P"))]
    groups += [(classes[c], labels == c, style) for c, style in zip(distinct, styles, strict=False)]
    return [group for group in groups if group[1].any()]


def scatter(ax: Axes, place: Floats, labels: NDArray[np.int64], classes: Sequence[str], others: str) -> int:
    """Points (N, 2) with a legend of classes and how many points each has; returns the legend's columns."""
    size = float(np.clip(12_000 / len(place), 12, 60))  # points²
    for name, chosen, (color, marker) in grouped(labels, classes, others):
        ax.scatter(
            place[chosen, 0],
            place[chosen, 1],
            s=size / 2 if color == GREY else size,
            c=color,
            marker=marker,
            linewidths=0 if color == GREY else 0.3,
            edgecolors="white" if color == "#000000" else "black",
            alpha=0.85,
            label=f"{short(name)} ({chosen.sum():,})",
        )
    columns = -(-len(ax.collections) // _LEGEND_ROWS)
    scale = (40 / size) ** 0.5
    ax.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, ncols=columns, markerscale=scale)
    return columns


def confusion(
    labels: Tensor, predicted: Tensor, classes: Sequence[str], out: Path, who: str = "Confusion"
) -> Path | None:
    """Confusion matrix of true classes (rows) and predicted ones (columns), (N,) int64 each: shares and counts.

    Labels below 0 are ignored. Predictions below 0, of queries without a neighbour, get a column of their own
    if there are any. None, and no file, if no label is known.
    """
    known = (labels >= 0).cpu().numpy()
    if not known.any():
        return None
    true, guess = labels.cpu().numpy()[known], predicted.cpu().numpy()[known]
    names = [short(name) for name in classes]
    columns = [*names, "no neighbour"] if (guess < 0).any() else names
    count = np.zeros((len(names), len(columns)), int)
    np.add.at(count, (true, np.where(guess < 0, len(names), guess)), 1)
    images = count.sum(1, keepdims=True)
    share = count / np.maximum(images, 1)
    side = float(np.clip(0.62 * len(columns), 4, 14))
    figure = Figure(figsize=(side + 3, side + 1.8), layout="constrained")
    ax = figure.subplots()
    picture = ax.imshow(share, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(picture, ax=ax, label="share of the true class", shrink=0.8, format=PercentFormatter(xmax=1))
    totals = [f"{name} ({n:,})" for name, n in zip(names, images[:, 0], strict=True)]
    ax.set_yticks(range(len(totals)), totals)
    ax.set_xticks(range(len(columns)), columns)
    few = len(names) <= _NUMBERED_CLASSES
    ax.tick_params(labelsize="medium" if few else "x-small")
    ax.tick_params(axis="x", labelrotation=45 if few else 90)
    for label in ax.get_xticklabels() if few else []:
        label.set(ha="right", rotation_mode="anchor")
    if few:
        _write_numbers(ax, share, count)
    recall = (np.diagonal(share)[images[:, 0] > 0]).mean()
    ax.set(xlabel="predicted class", ylabel="true class (images)")
    ax.set_title(f"{who}: {(true == guess).mean():.1%} right, {recall:.1%} balanced over classes")
    return save(figure, out)


def _write_numbers(ax: Axes, share: Floats, count: NDArray[np.int64]) -> None:
    for (row, column), images in np.ndenumerate(count):
        if images:
            color = "white" if share[row, column] > 0.5 else "black"
            text = f"{share[row, column]:.0%}\n{images:,}"
            ax.text(column, row, text, color=color, ha="center", va="center", fontsize=7)
