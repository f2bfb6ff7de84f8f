"""Contact sheets as PNG files: augmented views beside their originals, images beside their nearest neighbours."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from numpy.typing import NDArray
from torch import Tensor

from sslcells.evaluation.knn import neighbours
from sslcells.evaluation.pictures import DPI, GREEN, GREY, ORANGE, VERMILION, save, short

Image = NDArray[Any]
"""(H, W, C), uint8 or float in 0..1."""

_INCH = 1.3
"""Side of one image on a sheet."""
_GAP, _HEAD = 0.08, 0.55
"""Inches between images, and above them for titles."""


def view_sheet(
    pixels: Tensor,
    views: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    out: Path,
    images: int = 8,
) -> Path:
    """The first images of a batch, one a row: the original on the left, then each of its views.

    pixels (B, C, H, W) uint8; views (V·B, C, S, S) float in view-major order, normalised by `mean` and `std` of
    pixels in 0..1, one value per channel or one for all. Shown are the first three channels, or the first of two.
    """
    shift, scale = (torch.tensor(x).view(-1, 1, 1) for x in (mean, std))
    plain = (views.detach().cpu().float() * scale + shift).clamp(0, 1)
    by_view = plain.view(-1, len(pixels), *plain.shape[1:])  # (V, B, C, S, S)
    rows, columns = min(images, len(pixels)), 1 + len(by_view)
    figure, axes = _sheet(rows, columns, caption=0.08)
    for row in range(rows):
        shown = [pixels[row].cpu(), *by_view[:, row]]
        for ax, image in zip(axes[row], shown, strict=True):
            _show(ax, image.permute(1, 2, 0).numpy())
    for column, ax in enumerate(axes[0]):
        ax.set_title(f"view {column - 1}" if column else "original", fontsize="small")
    channels = pixels.shape[1]
    part = "" if channels in (1, 3) else f" (first {shown_channels(channels)} of {channels} channels)"
    figure.suptitle(f"Augmented views{part}", fontsize="medium", y=1 - 0.08 / figure.get_figheight(), va="top")
    return save(figure, out)


def reconstruction_sheet(
    views: Tensor, seen: Tensor, made: Tensor, mean: Sequence[float], std: Sequence[float], out: Path
) -> Path:
    """Views, one a row, beside what the encoder saw of them and what was made of that.

    All are (A, C, S, S) float, normalised by `mean` and `std` of pixels in 0..1, one value per channel or one for all.
    Shown are the first three channels, or the first of two.
    """
    shift, scale = (torch.tensor(x).view(-1, 1, 1) for x in (mean, std))
    parts = [(x.detach().cpu().float() * scale + shift).clamp(0, 1) for x in (views, seen, made)]
    figure, axes = _sheet(len(views), len(parts), caption=0.08)
    for row, cells in enumerate(axes):
        for ax, part in zip(cells, parts, strict=True):
            _show(ax, part[row].permute(1, 2, 0).numpy())
    for ax, title in zip(axes[0], ("view", "seen", "reconstructed"), strict=True):
        ax.set_title(title, fontsize="small")
    return save(figure, out)


def neighbour_sheet(
    pixels: Callable[[int], Image],
    z: Tensor,
    labels: Tensor,
    classes: Sequence[str],
    sources: Tensor,
    out: Path,
    rows: int = 8,
    columns: int = 8,
    seed: int = 0,
) -> Path:
    """Query images, one a row, and their nearest neighbours by cosine, those of the query's own source left out.

    `pixels` gives image i as (H, W, C) uint8; z (N, F), labels and sources (N,) int64. Queries are drawn evenly
    from the classes. A frame shows if a neighbour has the query's class, where both are known (labels ≥ 0).
    """
    query = drawn_evenly(labels.cpu(), rows, seed)
    source = sources[query.to(sources.device)]
    cosine, index = (x.cpu() for x in neighbours(z[query.to(z.device)], z, columns, source, sources))
    label = labels.cpu()
    judged = cosine.isfinite() & (label[index] >= 0) & (label[query, None] >= 0)  # (rows, columns)
    right = judged & (label[index] == label[query, None])
    figure, axes = _sheet(len(query), 1 + index.shape[1], caption=0.24, legend=0.35)
    names = [*map(short, classes), "unlabelled"]  # label −1 is the last
    for row, image in enumerate(query.tolist()):
        _show(axes[row, 0], pixels(image), frame="black", caption=names[label[image]])
        for ax, near, cos, is_judged, is_right in zip(
            axes[row, 1:], index[row].tolist(), cosine[row].tolist(), judged[row], right[row], strict=True
        ):
            if cos == -math.inf:
                ax.set_axis_off()
            elif not is_judged:
                _show(ax, pixels(near), frame=GREY, caption=f"{cos:.2f}")
            elif is_right:
                _show(ax, pixels(near), frame=GREEN, caption=f"✓ {cos:.2f}")
            else:
                _show(ax, pixels(near), frame=VERMILION, caption=f"✗ {cos:.2f} {short(classes[int(label[near])], 15)}")
    for column, ax in enumerate(axes[0]):
        ax.set_title(f"{column}" if column else "query", fontsize="small")
    share = (
        f": {right.sum() / judged.sum():.0%} of {judged.sum()} labelled pairs agree in class" if judged.any() else ""
    )
    title = f"Nearest neighbours by cosine, same source left out{share}"
    figure.suptitle(title, fontsize="medium", y=1 - 0.08 / figure.get_figheight(), va="top")
    frames = {"✓ same class": GREEN, "✗ other class": VERMILION, "class unknown": GREY}
    handles = [Patch(facecolor="none", edgecolor=color, linewidth=2, label=name) for name, color in frames.items()]
    figure.legend(handles=handles, loc="lower center", ncols=3, frameon=False, fontsize="small")
    return save(figure, out)


def found_sheet(rows: Sequence[Sequence[tuple[Image | None, str]]], title: str, out: Path) -> Path:
    """One query a row, followed by its neighbours, each with its caption; None if an image cannot be shown."""
    columns = max(map(len, rows))
    figure, axes = _sheet(len(rows), columns, caption=0.24)
    for cells, row in zip(axes, rows, strict=True):
        for column, ax in enumerate(cells):
            image, caption = row[column] if column < len(row) else (None, "")
            if image is not None:
                _show(ax, image, frame="black" if column == 0 else None, caption=caption)
                continue
            ax.set(xticks=[], yticks=[])
            ax.set_xlabel(caption, fontsize=7.5, labelpad=2)
            for spine in ax.spines.values():
                spine.set_visible(False)
            if caption:
                ax.text(0.5, 0.5, "missing", ha="center", va="center", fontsize="small", transform=ax.transAxes)
    for column, ax in enumerate(axes[0]):
        ax.set_title(f"{column}" if column else "query", fontsize="small")
    figure.suptitle(title, fontsize="medium", y=1 - 0.08 / figure.get_figheight(), va="top")
    return save(figure, out)


def prediction_sheet(
    pixels: Callable[[int], Image],
    labels: Tensor,
    classes: Sequence[str],
    answers: Mapping[str, Tensor],
    out: Path,
    seed: int = 0,
    rows: int = 4,
    columns: int = 6,
) -> Path:
    """Images drawn evenly from the classes, with the true class and each model's prediction: class, confidence, ✓ or ✗.

    `pixels` gives image i as (H, W, C) uint8; labels (M,) int64; `answers` (2, M) for each model: confidence in 0..1
    and class. A frame shows if all, some or none of the models are right.
    """
    drawn = drawn_evenly(labels, rows * columns, seed).tolist()
    rows = -(-len(drawn) // columns)
    lines = 1 + len(answers)
    figure, axes = _sheet(rows, columns, caption=0.04 + 0.135 * lines, legend=0.35)
    figure.set_figwidth(figure.get_figwidth() * 1.35)  # room for the names of classes
    for ax, i in zip(axes.flat, drawn, strict=False):
        true, words = int(labels[i]), [f"true: {short(classes[int(labels[i])], 18)}"]
        right = [int(answers[model][1, i]) == true for model in answers]
        for (model, word), hit in zip(answers.items(), right, strict=True):
            named = short(classes[int(word[1, i])], 16)
            words.append(f"{'✓' if hit else '✗'} {model[:4]}. {named} {word[0, i]:.0%}")
        frame = GREEN if all(right) else ORANGE if any(right) else VERMILION
        _show(ax, pixels(i), frame=frame, caption="\n".join(words))
        ax.xaxis.label.set(fontsize=6.5, linespacing=1.15)
    for ax in axes.flat[len(drawn) :]:
        ax.set_axis_off()
    title = f"True class, and the predictions of {', '.join(answers)} with confidence"
    figure.suptitle(title, fontsize="medium", y=1 - 0.08 / figure.get_figheight(), va="top")
    frames = {"all right": GREEN, "some right": ORANGE, "none right": VERMILION}
    handles = [Patch(facecolor="none", edgecolor=color, linewidth=2, label=name) for name, color in frames.items()]
    figure.legend(handles=handles, loc="lower center", ncols=len(handles), frameon=False, fontsize="small")
    return save(figure, out)


def pair_sheet(pixels: Callable[[int], Image], kinds: Mapping[str, Sequence[tuple[int, int, int]]], out: Path) -> Path:
    """Pairs of images side by side, a column for each kind: (image, image, number of shared details)."""
    rows = max(map(len, kinds.values()))
    figure, axes = _sheet(rows, 2 * len(kinds), caption=0.24)
    for column, (kind, pairs) in enumerate(kinds.items()):
        for row in range(rows):
            left, right = axes[row, 2 * column : 2 * column + 2]
            if row >= len(pairs):
                left.set_axis_off()
                right.set_axis_off()
                continue
            one, other, details = pairs[row]
            _show(left, pixels(one), caption=f"{details} details")
            _show(right, pixels(other))
        axes[0, 2 * column].set_title(kind, fontsize="small", loc="left")
    figure.suptitle("Pairs closest to the limit", fontsize="medium", y=1 - 0.08 / figure.get_figheight(), va="top")
    return save(figure, out)


def drawn_evenly(labels: Tensor, images: int, seed: int) -> Tensor:
    """Indices (n,) int64 of at most `images` rows, drawn evenly from the labels (N,), sorted by label."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    turn = torch.empty_like(order)
    for label in set(labels.tolist()):
        members = (labels[order] == label).nonzero()[:, 0]
        turn[members] = torch.arange(len(members))
    drawn = order[turn.argsort(stable=True)[:images]]
    return drawn[labels[drawn].argsort(stable=True)]


def _sheet(rows: int, columns: int, caption: float, legend: float = 0.05) -> tuple[Figure, NDArray[Any]]:
    """A figure with axes (rows, columns) for images, `caption` inches of room below each, `legend` below them all."""
    width, height = columns * (_INCH + _GAP) + _GAP, _HEAD + rows * (_INCH + caption) + legend
    figure = Figure(figsize=(width, height))
    axes = figure.subplots(
        rows,
        columns,
        squeeze=False,
        gridspec_kw={
            "left": _GAP / width,
            "right": 1 - _GAP / width,
            "top": 1 - _HEAD / height,
            "bottom": (legend + caption) / height,
            "wspace": _GAP / _INCH,
            "hspace": caption / _INCH,
        },
    )
    return figure, axes


def shown_channels(channels: int) -> int:
    """How many channels of an image are shown: the first three, or the first of two."""
    return 3 if channels >= 3 else 1


def _show(ax: Axes, image: Image, frame: str | None = None, caption: str = "") -> None:
    """Draw an image (H, W, C) with a coloured frame, or none."""
    shown = image[..., : shown_channels(image.shape[2])]
    # Small images are shown pixel by pixel; large ones must be averaged down.
    interpolation = "nearest" if max(shown.shape[:2]) <= _INCH * DPI else "auto"
    top = 255 if shown.dtype == np.uint8 else 1
    ax.imshow(shown, cmap="gray", vmin=0, vmax=top, interpolation=interpolation)
    ax.set(xticks=[], yticks=[])
    ax.set_xlabel(caption, fontsize=7.5, labelpad=2)
    for spine in ax.spines.values():
        spine.set(visible=frame is not None, edgecolor=frame or "none", linewidth=2.5)
