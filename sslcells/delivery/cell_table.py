"""The table of `sslcells cells`: one row a cell, with what a table says of its field; and what is told of them."""

import csv
import io
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from sslcells.config import ConfigError
from sslcells.data._columns import KNOWN, PARQUET
from sslcells.data._masks import Cells
from sslcells.data._names import some
from sslcells.storage import write_atomically

TABLE, IMAGES, LEFT_OUT = "cells", "images", "left_out.csv"
BOX = ("x_min", "y_min", "x_max", "y_max")
_SHOWN = 5


class Rule(NamedTuple):
    """How cells are cut, and which."""

    fov: float | None
    """width of the cut in µm"""
    size: int | None
    """or in pixels"""
    background: float | None
    """value of all that is not the cell; None keeps it"""
    border: Literal["leave-out", "keep"]
    min_area: float
    """µm² with `fov`, pixels with `size`"""


class Fields(NamedTuple):
    """The fields, and what their table says of them."""

    root: Path
    names: list[str]
    um: NDArray[np.float64]
    """(N,) µm per pixel, NaN where the table does not say it"""
    columns: pa.Table | None
    """further columns, one row a field"""


class Cut(NamedTuple):
    """The cells that were cut from one field."""

    cells: Cells
    um: float | None
    at_border: int
    small: int
    larger: int
    """that are larger than the cut"""
    stack: int | None
    """channels that are no colours"""
    colours: int
    """1 for grey, 3 for colours"""


def table_of(
    names: Sequence[str], stems: Sequence[str], each: Sequence[Cut], fields: Fields, rows: dict[str, int]
) -> pa.Table:
    """One row a cell: where its image is, where it was, and what the fields' table says of its field."""
    counts = [len(cut.cells.label) for cut in each]
    if not sum(counts):
        raise ConfigError(
            f"no cell of {len(names):,} fields is left: {sum(cut.at_border for cut in each):,} touch the border "
            f"(--border keep), {sum(cut.small for cut in each):,} are smaller than --min-area"
        )
    label, area, centre, box = (np.concatenate([cut.cells[i] for cut in each]) for i in range(4))
    of = np.repeat(np.arange(len(names)), counts)
    um = np.array([cut.um or np.nan for cut in each])[of]
    unknown = np.isnan(um)
    columns = {
        "path": [f"{IMAGES}/{stems[f]}/{n}.tif" for f, n in zip(of.tolist(), label.tolist(), strict=True)],
        "cell_id": [f"{stems[f]}:{n}" for f, n in zip(of.tolist(), label.tolist(), strict=True)],
        "field": [names[f] for f in of.tolist()],
        "mask_label": label,
        "centroid_x": centre[:, 1],
        "centroid_y": centre[:, 0],
        "area_px": area,
        "area_um2": pa.array(area * um**2, mask=unknown),
        **{f"field_{name}": box[:, i] for i, name in enumerate(BOX)},
        "um_per_pixel": pa.array(um, mask=unknown),
    }
    whole = pa.table(columns)
    if fields.columns is None:
        return whole
    more = fields.columns.take(pa.array([rows[names[f]] for f in of.tolist()]))
    for name in more.column_names:
        own = name if name.casefold() not in columns else f"of_field_{name}"
        whole = whole.append_column(own, more[name])
    return whole


def write(table: pa.Table, file: Path) -> None:
    """Write a table as CSV or Parquet, as the file's name ends."""
    if file.suffix in PARQUET:
        write_atomically(file, lambda opened: pq.write_table(table, opened))
        return
    _write_rows(file, table.column_names, zip(*(column.to_pylist() for column in table.columns), strict=True))


def write_left_out(file: Path, without: Sequence[str], alone: Sequence[str]) -> None:
    """Write the fields and masks without a partner, if there are any."""
    rows = [*((name, "field without a mask") for name in without), *((name, "mask without a field") for name in alone)]
    if rows:
        _write_rows(file, ["path", "reason"], rows)


def _write_rows(file: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    write_atomically(file, lambda opened: opened.write(text.getvalue().encode("utf-8", "surrogateescape")))


def tell(
    say: Callable[[str], None],
    each: Sequence[Cut],
    without: Sequence[str],
    alone: Sequence[str],
    file: Path,
    fields: Fields,
    rule: Rule,
) -> None:
    """What was cut, what was left out, and how to open it."""
    for what, names in (("fields without a mask", without), ("masks without a field", alone)):
        if names:
            say(f"left out: {len(names):,} {what}: {some(names, _SHOWN)}; all are in {file.parent / LEFT_OUT}")
    unit = "µm²" if rule.fov is not None else "px"
    for count, what in (
        (sum(cut.at_border for cut in each), "left out: {:,} cells that touch the border"),
        (sum(cut.small for cut in each), f"left out: {{:,}} cells of less than {rule.min_area:g} {unit}"),
        (sum(cut.larger for cut in each), "cut off: {:,} cells that are larger than the cut"),
    ):
        if count:
            say(what.format(count))
    pieces = sum(int((cut.cells.pieces > 1).sum()) for cut in each)
    if pieces:
        say(f"{pieces:,} cells are in several parts that do not touch")
    scales = sorted({cut.um for cut in each if cut.um})
    unknown = sum(not cut.um for cut in each)
    span = "unknown"
    if scales:
        span = f"{scales[0]:g}{f' to {scales[-1]:g}' * (len(scales) > 1)} µm per pixel"
        span += f"; {unknown:,} fields without one" * (unknown > 0)
    say(f"scale: {span}")
    carried = [] if fields.columns is None else fields.columns.column_names
    if carried:
        say(f"columns of the fields' table: {some(carried, 20)}")
    total = sum(len(cut.cells.label) for cut in each)
    settings = _settings(each, scales, rule, carried)
    say(f"{file}: {total:,} cells; sslcells train --config table data.table={file}{settings}")


def _settings(each: Sequence[Cut], scales: Sequence[float], rule: Rule, carried: Sequence[str]) -> str:
    """The settings by which the cells are read."""
    cut = next(c for c in each if len(c.cells.label))
    out = f" data.stack=auto data.channels={cut.stack}" if cut.stack else f" data.channels={cut.colours}"
    if rule.fov is not None:
        out += f" data.um_per_pixel={scales[-1]:g} data.size={max(1, round(rule.fov / scales[-1]))}"
    else:
        out += f" data.size={rule.size}"
    sourced = any(name.strip().lower() in KNOWN["source"] for name in carried)
    return out if sourced else f"{out} data.sources=field"
