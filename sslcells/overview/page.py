"""Runs as one page of HTML that needs no other file and no network: sortable, filtered, with curves."""

import os
import time
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path

from sslcells import __version__
from sslcells.overview.summary import STATES, Summary
from sslcells.overview.words import best, duration, headline, name, step

REPORTS = {"report.html": "report", "comparison.html": "comparison"}
"""Pages that `sslcells evaluate` and `sslcells compare` write into a run's folder → their name."""
_COLUMNS = ("run", "state", "method", "step", "left", "best on val", "val", "loss", "seen", "note")
_NUMBERS = {"step", "left", "best on val", "seen"}
_DRAWN = {"val", "loss"}
"""Columns of pictures, which nothing is sorted by."""


def page(folder: Path, found: Sequence[Summary], link: Callable[[Path], str], refresh: float | None) -> str:
    """The page of the runs below a folder.

    `link` gives the address of a run's report. With `refresh` the page asks its server for news after so many seconds,
    again and again; without, it stays as it is.
    """
    head = "".join(_heading(column) for column in _COLUMNS)
    rows = "\n".join(_row(folder, one, link) for one in found)
    made = f"sslcells {__version__}, {time.strftime('%Y-%m-%d %H:%M:%S')}"
    script = _SCRIPT.replace("REFRESH", f"{1000 * refresh:.0f}" if refresh else "0")
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Runs in {escape(folder.name or str(folder), quote=False)}</title><style>{_STYLE}</style></head>
<body>
<h1 id="headline">{escape(headline(folder, found))}</h1>
<p><span id="made">{made}</span> <span id="lost" role="status"></span></p>
<p><label>Show runs with <input id="filter" type="search" placeholder="name, method, state or note"></label></p>
<div class="scroll" tabindex="0"><table><thead><tr>{head}</tr></thead>
<tbody id="runs">
{rows}
</tbody></table></div>
<script>{script}</script>
</body></html>
"""


def reports(folder: Path) -> list[Path]:
    """The pages in a run's folder."""
    return [folder / file for file in REPORTS if os.path.isfile(folder / file)]


def _heading(column: str) -> str:
    return f"<th>{column}</th>" if column in _DRAWN else f'<th aria-sort="none"><button>{column}</button></th>'


def _row(folder: Path, one: Summary, link: Callable[[Path], str]) -> str:
    found = one.figures
    pages = [f' <a href="{escape(link(file))}">{REPORTS[file.name]}</a>' for file in reports(one.folder)]
    cells = {
        "run": (None, escape(name(folder, one)) + "".join(pages)),
        "method": (None, escape(one.method)),
        "state": (STATES.index(one.state), f'<span class="{one.state}">{one.state}</span>'),
        "step": (found.step, escape(step(one))),
        "left": (one.left, "" if one.left is None else duration(one.left)),
        "best on val": (found.best and found.best.value, escape(best(one))),
        "val": (None, _drawn(found.scores, "best figure on val, from start to now")),
        "loss": (None, _drawn(found.loss, "loss, from start to now")),
        "seen": (one.seen, "" if one.seen is None else f"{duration(one.seen)} ago"),
        "note": (None, escape(one.note)),
    }
    shown = (_cell(column, *cells[column]) for column in _COLUMNS)
    return f"<tr>{''.join(shown)}</tr>"


def _cell(column: str, value: float | None, html: str) -> str:
    sorted_by = "" if value is None else f' data-v="{value:.9g}"'
    kind = ' class="n"' if column in _NUMBERS else ' class="note"' if column == "note" else ""
    return f"<td{kind}{sorted_by}>{html}</td>"


def _drawn(values: Sequence[float], title: str) -> str:
    """A curve of 100×24 pixels, from the lowest to the highest value."""
    if len(values) < 2:
        return ""
    low, high = min(values), max(values)
    scale = 20 / (high - low) if high > low else 0.0
    across = 98 / (len(values) - 1)
    points = " ".join(f"{1 + i * across:.0f},{22 - (value - low) * scale:.0f}" for i, value in enumerate(values))
    return (
        f'<svg viewBox="0 0 100 24" width="100" height="24" role="img"><title>{title}: {values[0]:.4g} to '
        f'{values[-1]:.4g}</title><polyline points="{points}"/></svg>'
    )


_STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; margin: 0; padding: 1rem; }
h1 { font-size: 1.2rem; margin: 0; overflow-wrap: anywhere; }
p { margin: .3rem 0; } #made { color: #555; font-size: .85rem; } #lost { color: #a33a00; font-weight: 600; }
input { font: inherit; width: 16rem; max-width: 100%; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; }
th, td { text-align: left; padding: .2rem .6rem; border-bottom: 1px solid #ddd; white-space: nowrap; }
td:first-child { white-space: normal; overflow-wrap: anywhere; min-width: 9rem; max-width: 24rem; }
td.n { text-align: right; } td.note { white-space: normal; min-width: 16rem; }
th button { font: inherit; font-weight: 600; border: 0; padding: 0; background: none; cursor: pointer; }
th[aria-sort=ascending] button::after { content: " ↑"; } th[aria-sort=descending] button::after { content: " ↓"; }
svg { display: block; } polyline { fill: none; stroke: #0072B2; stroke-width: 1.5; }
.running { color: #006b4f; font-weight: 600; } .silent, .stopped { color: #8a5a00; }
.failed, .broken { color: #a33a00; font-weight: 600; } .finished { color: #555; }
"""

_SCRIPT = """
"use strict";
const body = document.getElementById("runs"), filter = document.getElementById("filter");
let column = -1, sign = 1;
const value = (row, at) => row.cells[at].dataset.v === undefined ? null : Number(row.cells[at].dataset.v);
function compare(a, b) {
  const [x, y] = [value(a, column), value(b, column)];
  if (x !== null && y !== null) return sign * (x - y);
  if (x !== null || y !== null) return x === null ? 1 : -1;  // what is not known comes last
  return sign * a.cells[column].textContent.localeCompare(b.cells[column].textContent, "en", {numeric: true});
}
function arrange() {
  const rows = [...body.rows];
  if (column >= 0) body.append(...rows.sort(compare));
  const words = filter.value.toLowerCase().split(/\\s+/);
  for (const row of rows) row.hidden = !words.every(word => row.textContent.toLowerCase().includes(word));
}
document.querySelectorAll("th[aria-sort]").forEach((heading, _, all) => heading.addEventListener("click", () => {
  sign = column === heading.cellIndex ? -sign : 1;
  column = heading.cellIndex;
  all.forEach(other => other.setAttribute("aria-sort", "none"));
  heading.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
  arrange();
}));
filter.addEventListener("input", arrange);
async function renew() {
  const lost = document.getElementById("lost");
  try {
    const answer = await fetch(location.href, {cache: "no-store"});
    const text = await answer.text();
    if (!answer.ok) throw new Error(text);
    const fresh = new DOMParser().parseFromString(text, "text/html");
    for (const id of ["headline", "made", "runs"])
      document.getElementById(id).innerHTML = fresh.getElementById(id).innerHTML;
    lost.textContent = "";
    arrange();
  } catch (error) {
    lost.textContent = "Not renewed since then: " + (error.message || "the server does not answer");
  }
  setTimeout(renew, REFRESH);
}
if (REFRESH) setTimeout(renew, REFRESH);
"""
