"""The images that one run has right and another wrong, as a sheet for a page: readable at any width, and printed."""

from collections.abc import Mapping, Sequence
from html import escape

import torch
from torch import Tensor

from sslcells.evaluation.paired import Pair
from sslcells.evaluation.sheets import Image, drawn_evenly
from sslcells.evaluation.thumbnails import thumbnails

MOST = 12
"""Images in each direction."""
_SIDE = 96
"""Pixels of an image."""


def chosen(pair: Pair, method: str) -> list[tuple[int, list[int]]]:
    """How many images each run alone has right, and which of them are shown: MOST, evenly from the classes."""
    first, second = pair.right(method)
    found = []
    for alone in (first & ~second, second & ~first):
        rows = alone.nonzero()[:, 0]
        few = drawn_evenly(pair.labels[rows], MOST, 0)
        found.append((len(rows), rows[few].tolist()))
    return found


def sheet(
    pair: Pair,
    method: str,
    names: Sequence[str],
    found: Sequence[tuple[int, list[int]]],
    pixels: Mapping[str, Image],
) -> list[str]:
    """Lines of HTML of what was `chosen`.

    `pixels` has the images by name, (H, W, C) uint8, and lacks those that cannot be shown.
    """
    body = []
    for name, (count, rows) in zip(names, found, strict=True):
        some = f", {len(rows)} of them drawn evenly from the classes" if len(rows) < count else ""
        body.append(f"<h3>{escape(name)} alone is right: {count:,} of {len(pair.images):,} images{some}</h3>")
        cells = [_cell(pair, method, names, row, pixels.get(pair.images[row])) for row in rows]
        body += ['<ul class="cells">', *cells, "</ul>"] if cells else []
    return body


def _cell(pair: Pair, method: str, names: Sequence[str], row: int, pixels: Image | None) -> str:
    true, file = pair.classes[int(pair.labels[row])], pair.images[row]
    picture = ""
    if pixels is not None:
        picture = f'<img src="{thumbnails([pixels], _SIDE).uri}" width="{_SIDE}" height="{_SIDE}" alt="">'
    said = [_said(name, pair, of[row], row) for name, of in zip(names, pair.methods[method], strict=True)]
    short = escape(file.rpartition("/")[2])
    return f'<li>{picture}<b>{escape(true)}</b>{"".join(said)}<small title="{escape(file)}">{short}</small></li>'


def _said(name: str, pair: Pair, guess: Tensor, row: int) -> str:
    said = "no answer" if guess < 0 else pair.classes[int(guess)]
    mark = "✓" if torch.equal(guess, pair.labels[row]) else "✗"
    return f"<small>{mark} {escape(name)}: {escape(said)}</small>"


STYLE = """
.cells { list-style: none; margin: .3rem 0; padding: 0; display: flex; flex-wrap: wrap; gap: .8rem; }
.cells li { width: 8.5rem; break-inside: avoid; line-height: 1.3; overflow-wrap: anywhere; }
.cells img { display: block; border: 1px solid #bbb; margin-bottom: .2rem; }
.cells b, .cells small { display: block; } .cells small { font-size: .8rem; }
"""
