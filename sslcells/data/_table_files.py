"""Which files a table's rows mean: rows that can be used, what was seen of their files, and the boxes that fit."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from sslcells.config import ConfigError
from sslcells.data._boxes import beyond, boxes_of
from sslcells.data._columns import Table
from sslcells.data._decode import Header
from sslcells.data._files import verify
from sslcells.data._planes import to_look_at
from sslcells.data._scales import Scales, stated_scales, unknown
from sslcells.data._scan import Listing
from sslcells.data._table import Rows
from sslcells.data._verified import Looks

if TYPE_CHECKING:
    from sslcells.data.table import Config

_SHOWN = 5  # rows in one message


class Chosen(NamedTuple):
    """The rows of a split that name a file, and where the table has boxes a box."""

    number: NDArray[np.int64]
    """(N,) their places in the table"""
    part: Table
    edges: NDArray[np.int64] | None
    """(N, 4) left, upper, right and lower edge in px"""
    names: list[str]
    """the file of each"""
    distinct: list[str]
    """the F files"""
    of_row: NDArray[np.int64]
    """(N,) the place of each row's file among them"""
    cells: list[str] | None
    """ids of cells"""
    skipped: dict[int, str]
    """place in the table → reason, for the rows that are left out"""

    @classmethod
    def of(cls, config: "Config", rows: Rows, number: NDArray[np.int64]) -> Self:
        """Of these rows those that can be used.

        Raises:
            ConfigError: if some cannot, unless `on_error` leaves them out; or two are one image.
        """
        no_file = f"name no file below {rows.root} (data.path)"
        skipped = skipped_rows(config, rows, number, rows.without_file(number), no_file)
        number = _without(number, skipped)
        part, columns, edges = rows.part(number), rows.columns, None
        boxes = boxes_of(part, columns.box, config.box_as == "size")
        if boxes is not None and config.size is None:
            raise ConfigError("data.size is needed with boxes, as they have different sizes")
        if boxes is not None:
            advice = "" if config.box_as == "size" else "; data.box_as=size reads the last two as width and height"
            wrong = {int(number[i]): why for i, why in boxes.wrong.items()}
            skipped |= skipped_rows(config, rows, number, wrong, f"have no box of at least 1×1 px{advice}")
            edges = np.delete(boxes.edges, [*boxes.wrong], axis=0)
            number = _without(number, skipped)
            part = rows.part(number)
        names = [str(rows.files[row]) for row in number.tolist()]
        cells = None if columns.cell is None else part.text(columns.cell).fill_null("").to_pylist()
        check_once(rows, number, names, edges, cells)
        return cls(number, part, edges, names, *distinct_files(names), cells, skipped)


def _without(number: NDArray[np.int64], skipped: dict[int, str]) -> NDArray[np.int64]:
    return number[[row not in skipped for row in number.tolist()]] if skipped else number


def looked(config: "Config", rows: Rows, chosen: Chosen, split: str) -> tuple[Looks, Scales]:
    """What the files of a split are, as far as `verify` asks, and their µm per pixel.

    Raises:
        ConfigError: if some are broken, unless `on_error` leaves them out.
    """
    columns, decoder, distinct = rows.columns, config.decoder(), chosen.distinct
    at_1x = config.um_per_pixel_at_1x
    stated = stated_scales(chosen.part, columns.um_per_pixel, columns.magnification, at_1x, chosen.number)
    of_file = scales_of_files(chosen.part, stated, chosen.of_row, distinct, chosen.number)
    asked = unknown(config, distinct, of_file)
    every = config.verify != "none" or config.size is None
    listing = _listing(rows.root, distinct, {*distinct} if every else {*to_look_at(distinct, decoder), *asked})
    looks = verify(config, rows.root, listing, decoder, f"{rows.file.name} {split}", asked)
    if looks.broken:  # these are left out, and nothing is said of their scale
        of_file = np.where([name in looks.broken for name in distinct], 1.0, of_file)
    return looks, Scales(config, distinct, looks.headers or [None] * len(distinct), of_file)


def fitting(
    config: "Config", rows: Rows, chosen: Chosen, looks: Looks
) -> tuple[NDArray[np.int64], dict[int, str], list[str]]:
    """Places of the rows whose file and box are used; of boxes that are not row → reason; and lines about boxes.

    Raises:
        ConfigError: if boxes lie beside their image, unless `on_error` leaves them out.
    """
    kept = np.array([name not in looks.broken for name in chosen.distinct], bool)[chosen.of_row]
    if chosen.edges is None:
        return np.flatnonzero(kept), {}, []
    sizes, edges = _sizes(looks.headers, chosen.of_row), chosen.edges
    part, whole = beyond(edges, sizes)
    beside = whole if config.box_outside != "stop" else part
    reasons = {
        int(chosen.number[i]): f"{chosen.names[i]} of {sizes[i, 0]}×{sizes[i, 1]} px, box {edges[i].tolist()}"
        for i in np.flatnonzero(beside).tolist()
    }
    what = "have a box outside of their image" if beside is whole else "have a box that reaches beyond its image"
    skipped = skipped_rows(config, rows, chosen.number, reasons, what)
    over = part & ~beside
    kept &= ~beside & ~(over if config.box_outside == "drop" else np.zeros_like(over))
    return np.flatnonzero(kept), skipped, _about_boxes(config, rows, chosen, over, int((sizes[:, 0] == 0).sum()))


def _about_boxes(
    config: "Config", rows: Rows, chosen: Chosen, over: NDArray[np.bool_], unknown_sizes: int
) -> list[str]:
    """Lines about the boxes that reach beyond their image, (N,) bool, and about those that were not compared."""
    said = []
    if unknown_sizes:
        said.append(f"{unknown_sizes:,} boxes not compared with their image, as data.verify={config.verify}")
    if not over.any():
        return said
    done = {"clip": "and are cut off there", "pad": "and its border pixels are repeated", "drop": "and are left out"}
    how = done[config.box_outside]
    if config.um_per_pixel is not None and config.box_outside != "drop":
        how = "and the field around their centre repeats its border pixels"
    first = int(over.argmax())
    such = f"{rows.table.row(int(chosen.number[first]))} ({chosen.names[first]})"
    return [*said, f"{int(over.sum()):,} of {len(over):,} boxes reach beyond their image, such as {such}, {how}"]


def skipped_rows(
    config: "Config", rows: Rows, number: NDArray[np.int64], wrong: dict[int, str], what: str
) -> dict[int, str]:
    """Row → reason of the rows that cannot be used, if `on_error` leaves them out and others are left.

    Raises:
        ConfigError: otherwise; it names the first of them.
    """
    if wrong and (config.on_error == "stop" or len(wrong) == len(number)):
        shown = [f"  {rows.table.row(row)}: {why}" for row, why in list(wrong.items())[:_SHOWN]]
        more = ["  …"] if len(wrong) > _SHOWN else []
        advice = "; data.on_error=skip leaves them out" if len(wrong) < len(number) else ""
        title = f"{rows.file}: {len(wrong):,} of {len(number):,} rows {what}{advice}:"
        raise ConfigError("\n".join([title, *shown, *more]))
    return {row: f"{what.partition(' (')[0].partition(';')[0]}: {why}" for row, why in wrong.items()}


def _sizes(headers: Sequence[Header | None], of: NDArray[np.int64]) -> NDArray[np.int64]:
    """(N, 2) height and width of each row's file, 0 where it was not looked at."""
    if not headers:
        return np.zeros((len(of), 2), np.int64)
    return np.array([(0, 0) if header is None else header.size for header in headers], np.int64)[of]


def check_once(
    rows: Rows,
    number: NDArray[np.int64],
    names: Sequence[str],
    boxes: NDArray[np.int64] | None,
    cells: Sequence[str] | None,
) -> None:
    """Raise a ConfigError if two rows are one image."""
    extra = cells if cells is not None else None if boxes is None else [tuple(box) for box in boxes.tolist()]
    keys: Sequence[Any] = names if extra is None else list(zip(names, extra, strict=True))
    if len({*keys}) == len(keys):
        return
    first: dict[Any, int] = {}
    for i, key in enumerate(keys):
        if key in first:
            both = f"{rows.table.row(int(number[first[key]]))} and {rows.table.row(int(number[i]))}"
            what = names[i] if extra is None else f"{names[i]}, {'cell' if cells is not None else 'box'} {extra[i]}"
            raise ConfigError(f"{rows.file}: {both} are the same image, {what}: each image has one row")
        first[key] = i


def distinct_files(names: list[str]) -> tuple[list[str], NDArray[np.int64]]:
    """The distinct names in their order, and for each name its place among them."""
    first = dict.fromkeys(names)
    if len(first) == len(names):
        return names, np.arange(len(names))
    at = {name: i for i, name in enumerate(first)}
    return [*first], np.fromiter((at[name] for name in names), np.int64, len(names))


def scales_of_files(
    part: Table, um: NDArray[np.float64], of: NDArray[np.int64], names: Sequence[str], number: NDArray[np.int64]
) -> NDArray[np.float64]:
    """(F,) µm per pixel of each file from that of each row; NaN where the table does not say it.

    Raises:
        ConfigError: if two rows of a file say different ones.
    """
    out = np.full(len(names), np.nan)
    known = np.flatnonzero(~np.isnan(um))
    out[of[known]] = um[known]
    other = known[~np.isclose(out[of[known]], um[known], rtol=1e-3)]
    if len(other):
        row, file = int(other[0]), int(of[other[0]])
        raise ConfigError(
            f"{part.file}: the rows of {names[file]} have different µm per pixel, {um[row]:g} in "
            f"{part.row(int(number[row]))} and {out[file]:g} in another"
        )
    return out


def _listing(root: Path, names: Sequence[str], asked: set[str]) -> Listing:
    """The files with size and time of change of those that are asked about."""
    stats = [_size_and_time(f"{root}/{name}") if name in asked else (-1, -1) for name in names]
    return Listing(list(names), [size for size, _ in stats], [changed for _, changed in stats], {})


def _size_and_time(file: str) -> tuple[int, int]:
    try:
        stat = os.stat(file)
    except OSError:  # reading it says why
        return -1, -1
    return stat.st_size, stat.st_mtime_ns
