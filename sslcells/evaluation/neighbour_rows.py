"""Images with their nearest neighbours for a page, sorted by class or by how many neighbours agree."""

import math
from collections.abc import Callable, Sequence
from html import escape
from typing import NamedTuple

from torch import Tensor

from sslcells.evaluation.knn import neighbours
from sslcells.evaluation.sheets import Image, drawn_evenly
from sslcells.evaluation.thumbnails import Thumbnails, thumbnails

QUERIES, NEAREST = 40, 5
"""Rows at most, and neighbours in each: no more than 240 images."""
_SIDE = 96
"""Pixels of an image."""


class _Row(NamedTuple):
    query: int
    near: list[tuple[int, float]]
    """neighbours and their cosines, nearest first"""
    agree: int
    """neighbours of the query's class"""
    judged: int
    """neighbours of a known class, one at least"""


def neighbour_rows(
    pixels: Callable[[int], Image],
    z: Tensor,
    labels: Tensor,
    classes: Sequence[str],
    sources: Tensor,
    files: Sequence[str],
    seed: int = 0,
) -> str:
    """Query images, drawn evenly from the classes, and their neighbours of other sources as HTML; empty without labels.

    `pixels` gives image i as (H, W, C) uint8; z (N, F), labels, below 0 if unknown, and sources (N,) int64; `files` are
    the images' names. Queries without a neighbour of a known class are left out.
    """
    rows = _rows(z, labels.cpu(), sources, seed)
    if not rows:
        return ""
    shown = sorted({row.query for row in rows} | {image for row in rows for image, _ in row.near})
    cells, at = thumbnails(map(pixels, shown), _SIDE), {image: place for place, image in enumerate(shown)}
    lines = -(-len(shown) // cells.columns)
    listed = "\n".join(_html(row, labels.tolist(), classes, files, cells, lines, at) for row in rows)
    caption = (
        f"{len(rows)} images drawn evenly from the classes, and the {NEAREST} nearest of each. Their pictures are "
        f"{len(cells.uri) / 1e6:.1f} MB of this page."
    )
    return f"""<div class="neighbours" hidden><style>.neighbours .cell {{ background-image: url({cells.uri});
  background-size: {100 * cells.columns}% {100 * lines}%; }}</style>
<p><label>Sort by <select><option value="class">class</option>
<option value="fewest">neighbours that agree, fewest first</option>
<option value="most">neighbours that agree, most first</option></select></label></p>
<ol>
{listed}
</ol><p class="caption">{caption}</p><script>{_SCRIPT}</script></div>"""


def _rows(z: Tensor, labels: Tensor, sources: Tensor, seed: int) -> list[_Row]:
    query = drawn_evenly(labels, QUERIES, seed)
    query = query[labels[query] >= 0]
    if not len(query):
        return []
    source = sources[query.to(sources.device)]
    cosine, index = (x.cpu() for x in neighbours(z[query.to(z.device)], z, NEAREST, source, sources))
    out = []
    for image, cosines, indices in zip(query.tolist(), cosine.tolist(), index.tolist(), strict=True):
        near = [(i, of) for i, of in zip(indices, cosines, strict=True) if of > -math.inf]
        judged = [i for i, _ in near if labels[i] >= 0]
        if judged:
            out.append(_Row(image, near, sum(bool(labels[i] == labels[image]) for i in judged), len(judged)))
    return out


def _html(
    row: _Row,
    labels: Sequence[int],
    classes: Sequence[str],
    files: Sequence[str],
    cells: Thumbnails,
    lines: int,
    at: dict[int, int],
) -> str:
    def cell(image: int, kind: str, words: str) -> str:
        across, down = at[image] % cells.columns, at[image] // cells.columns
        place = f"{_part(across, cells.columns)} {_part(down, lines)}"
        file = escape(files[image].rpartition("/")[2])
        return (
            f'<div><div class="cell {kind}" style="background-position:{place}" role="img" aria-label="{file}" '
            f'title="{file}"></div>{escape(words)}</div>'
        )

    label = labels[row.query]
    near = [cell(row.query, "query", classes[label])]
    for image, cosine in row.near:
        known, same = labels[image] >= 0, labels[image] == label
        kind = "same" if same else "other" if known else ""
        words = f"✓ {cosine:.2f}" if same else f"✗ {cosine:.2f} {classes[labels[image]]}" if known else f"{cosine:.2f}"
        near.append(cell(image, kind, words))
    head = f"<b>{escape(classes[label])}</b>: {row.agree} of {row.judged} agree"
    return f'<li data-class="{label}" data-agree="{row.agree / row.judged:.4f}">{head}<div>{"".join(near)}</div></li>'


def _part(place: int, count: int) -> str:
    """The background's position that shows a part of `count` equal ones."""
    return f"{100 * place / (count - 1) if count > 1 else 0:.4f}%"


STYLE = """
.neighbours ol { list-style: none; margin: 0; padding: 0; } .neighbours li { margin: .6rem 0; }
.neighbours li > div { display: grid; grid-template-columns: repeat(auto-fill, minmax(6.5rem, 1fr)); gap: .3rem .5rem;
  max-width: 44rem; font-size: .8rem; overflow-wrap: anywhere; }
.neighbours .cell { aspect-ratio: 1; border: 3px solid #8C8C8C;
  background-origin: content-box; background-clip: content-box; }
.neighbours .query { border-color: #000; } .neighbours .same { border-color: #009E73; }
.neighbours .other { border-color: #D55E00; border-style: dashed; }
.neighbours select { font: inherit; max-width: 100%; }
@media print { .neighbours { display: none; } }
"""

_SCRIPT = """
"use strict";
for (const sheet of document.querySelectorAll(".neighbours")) {
  const list = sheet.querySelector("ol"), select = sheet.querySelector("select");
  const by = key => (a, b) => a.dataset[key] - b.dataset[key];
  const orders = {
    class: (a, b) => by("class")(a, b) || by("agree")(a, b),
    fewest: (a, b) => by("agree")(a, b) || by("class")(a, b),
    most: (a, b) => by("agree")(b, a) || by("class")(a, b),
  };
  const arrange = () => list.append(...[...list.children].sort(orders[select.value]));
  select.addEventListener("change", arrange);
  arrange();
  sheet.hidden = false;
  sheet.closest("figure").classList.add("shown");
}
"""
