"""An embedding map for a page: its cells are seen when a pointer, a finger or the arrow keys come to them."""

from collections.abc import Callable, Sequence
from html import escape

import numpy as np
from torch import Tensor

from sslcells.evaluation.encode import drawn
from sslcells.evaluation.pictures import Map, grouped
from sslcells.evaluation.sheets import Image
from sslcells.evaluation.thumbnails import thumbnails
from sslcells.storage import json_text

CELLS = 240
"""Points of a map, at most, whose cell is in the page."""
_SIDE = 96
"""Pixels of a cell."""
_SPAN = 1000
"""Units of the map's drawing, across and down."""


def hover_map(
    place: Map,
    groups: Tensor,
    names: Sequence[str],
    files: Sequence[str],
    predicted: tuple[str, Tensor] | None,
    pixels: Callable[[int], Image],
) -> str:
    """The map as HTML, coloured by group; empty if all its points are at one place.

    At most CELLS of its points show their cell: each group by its share, and one at least. `groups` (N,) int64 are
    indices of `names`, below 0 if unknown; `files` are the images' names; `predicted` is a classifier's name and the
    group it says of each image, (N,) int64, below 0 if none; `pixels` gives image i as (H, W, C) uint8.
    """
    span = float(np.ptp(place.place, axis=0).max())
    if not span > 0:
        return ""
    labels = groups.cpu()[place.chosen]
    seen = drawn(labels, CELLS)
    order = seen + sorted(set(range(len(labels))) - set(seen))
    rows = place.chosen[seen].tolist()
    cells = thumbnails((pixels(row) for row in rows), _SIDE)
    styled = grouped(labels.numpy(), names, "other classes")
    style_of = np.stack([inside for _, inside, _ in styled]).argmax(0)
    low = (place.place.min(0) + place.place.max(0) - span) / 2
    at = ((place.place - low) / span * _SPAN).round().astype(int)
    points = [[int(at[i, 0]), _SPAN - int(at[i, 1]), int(style_of[i])] for i in order]
    said = [_said(row, groups, names, predicted, files) for row in rows]
    told = {
        "groups": [[f"{name} ({inside.sum():,})", *style] for name, inside, style in styled],
        "points": points,
        "cells": said,
        "columns": cells.columns,
    }
    how = (
        f"The {len(rows):,} points with an edge, of {len(labels):,}, show their cell: move over the map, touch it, or "
        f"go from cell to cell with the arrow keys. Their pictures are {len(cells.uri) / 1e6:.1f} MB of this page."
    )
    return f"""<div class="live" hidden><div class="map">
<svg viewBox="-20 -20 {_SPAN + 40} {_SPAN + 40}" tabindex="0" role="application"
 aria-label="{escape(place.name)} map of cells: the arrow keys go from cell to cell"></svg>
<div class="cell"><div class="thumbnail" style="background-image:url({cells.uri})"></div>
<p role="status"></p></div></div>
<ul class="legend"></ul><p class="caption">{how}</p>
<script type="application/json">{_json(told)}</script><script>{_SCRIPT}</script></div>"""


def _said(
    row: int, groups: Tensor, names: Sequence[str], predicted: tuple[str, Tensor] | None, files: Sequence[str]
) -> tuple[str, str, str]:
    """Of a cell its group, what a classifier says, and its file."""
    group, file = int(groups[row]), files[row].rpartition("/")[2]
    known = names[group] if group >= 0 else "unlabelled"
    if predicted is None or (guess := int(predicted[1][row])) < 0:
        return known, "", file
    mark = "" if group < 0 else "✓ " if guess == group else "✗ "
    return known, f"{predicted[0]}: {mark}{names[guess]}", file


def _json(told: object) -> str:
    """JSON that no text in it can end the script around it."""
    return json_text(told).replace("<", "\\u003c")


STYLE = """
.live .map { display: flex; flex-wrap: wrap; gap: .5rem 1rem; align-items: flex-start; }
.live svg { flex: 1 1 20rem; max-width: 40rem; width: 100%; aspect-ratio: 1; border: 1px solid #bbb;
  touch-action: pan-y pinch-zoom; }
.live .dim { opacity: .45; } .live .seen { stroke: #000; stroke-width: 2; }
.live .at { fill: none; stroke: #000; stroke-width: 4; }
.live .cell { flex: 0 0 12rem; min-height: 16rem; } .live .cell p { margin: .3rem 0; }
.thumbnail { width: 12rem; height: 12rem; background-color: #fff; border: 1px solid #bbb; }
.live small { display: block; color: #555; overflow-wrap: anywhere; }
.legend { list-style: none; margin: .5rem 0; padding: 0; display: flex; flex-wrap: wrap; gap: 0 1rem;
  font-size: .9rem; }
.live .legend svg { width: .9rem; height: .9rem; border: 0; vertical-align: -.1rem; }
@media print { .live { display: none; } }
"""
_SCRIPT = """
"use strict";
for (const live of document.querySelectorAll(".live")) {
  const told = JSON.parse(live.querySelector("script").textContent), {points, cells, columns} = told;
  const svg = live.querySelector("svg"), status = live.querySelector("[role=status]");
  const thumbnail = live.querySelector(".thumbnail"), lines = Math.ceil(cells.length / columns);
  const shapes = {
    o: r => `m${-r} 0a${r} ${r} 0 1 0 ${2 * r} 0a${r} ${r} 0 1 0 ${-2 * r} 0`,
    s: r => `m${-r} ${-r}h${2 * r}v${2 * r}h${-2 * r}z`,
    "^": r => `m0 ${-r}l${r} ${2 * r}h${-2 * r}z`,
    v: r => `m0 ${r}l${r} ${-2 * r}h${-2 * r}z`,
    D: r => `m0 ${-1.2 * r}l${r} ${1.2 * r}l${-r} ${1.2 * r}l${-r} ${-1.2 * r}z`,
    P: r => `m${-r / 2} ${-r}h${r}v${r / 2}h${r / 2}v${r}h${-r / 2}v${r / 2}h${-r}v${-r / 2}h${-r / 2}v${-r}h${r / 2}z`,
  };
  const path = (d, kind, colour, into) => {
    const made = into.appendChild(document.createElementNS("http://www.w3.org/2000/svg", "path"));
    made.setAttribute("d", d);
    made.setAttribute("class", kind);
    if (colour) made.setAttribute("fill", colour);
    return made;
  };
  const drawn = (from, to, group, shape) => points.slice(from, to).filter(point => point[2] === group)
    .map(([x, y]) => `M${x} ${y}${shape}`).join("");
  told.groups.forEach(([, colour, marker], group) =>
    path(drawn(cells.length, points.length, group, shapes[marker](6)), "dim", colour, svg));
  told.groups.forEach(([, colour, marker], group) =>
    path(drawn(0, cells.length, group, shapes[marker](10)), "seen", colour, svg));
  for (const [name, colour, marker] of told.groups) {
    const item = live.querySelector(".legend").appendChild(document.createElement("li"));
    const sign = item.appendChild(document.createElementNS("http://www.w3.org/2000/svg", "svg"));
    sign.setAttribute("viewBox", "-14 -14 28 28");
    path("M0 0" + shapes[marker](10), "seen", colour, sign);
    item.append(" " + name);
  }
  const ring = path("", "at", "", svg);
  let now = -1;
  const show = i => {
    if (i < 0 || i === now) return;
    now = i;
    ring.setAttribute("d", `M${points[i][0]} ${points[i][1]}${shapes.o(20)}`);
    const part = (at, all) => all > 1 ? `${100 * at / (all - 1)}%` : "0%";
    thumbnail.style.backgroundSize = `${100 * columns}% ${100 * lines}%`;
    thumbnail.style.backgroundPosition = `${part(i % columns, columns)} ${part(Math.floor(i / columns), lines)}`;
    status.replaceChildren(...cells[i].filter(Boolean).map((text, line) => {
      const made = document.createElement(line ? "small" : "b");
      made.textContent = text;
      return made;
    }));
  };
  const nearest = cost => {
    let best = -1, least = Infinity;
    for (let i = 0; i < cells.length; i++) {
      const of = cost(points[i], i);
      if (of < least) [best, least] = [i, of];
    }
    return best;
  };
  const point = event => {
    const {x, y} = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
    show(nearest(([u, v]) => Math.hypot(u - x, v - y)));
  };
  svg.addEventListener("pointermove", point);
  svg.addEventListener("pointerdown", point);
  const ways = {ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1]};
  svg.addEventListener("keydown", event => {
    const way = ways[event.key];
    if (!way) return;
    event.preventDefault();
    const [x, y] = points[now];
    show(nearest(([u, v], i) => {
      const along = (u - x) * way[0] + (v - y) * way[1];
      const across = Math.abs((u - x) * way[1]) + Math.abs((v - y) * way[0]);
      return i === now || along <= 0 ? Infinity : along + 2 * across;
    }));
  });
  show(0);
  live.hidden = false;
  live.closest("figure").classList.add("shown");
}
"""
