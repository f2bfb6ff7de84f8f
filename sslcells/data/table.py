"""A table of images: a CSV or Parquet file with a path in each row, and what is known of the image."""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from sslcells.config import ConfigError
from sslcells.data import SPLITS
from sslcells.data._boxes import Boxes, Outside, beyond, boxes_of
from sslcells.data._columns import Table, joined
from sslcells.data._decode import Header
from sslcells.data._files import Files, one_group, verify
from sslcells.data._found import Clock, Found
from sslcells.data._planes import to_look_at
from sslcells.data._scales import Scales, magnifications, stated_scales, unknown
from sslcells.data._scan import Listing
from sslcells.data._sources import look_up_sources, source_ids
from sslcells.data._table import Rows, numbers
from sslcells.data._table_images import Cuts, TableImages
from sslcells.data._verified import Looks
from sslcells.data.folder import FolderImages

_SHOWN = 5  # rows in one message


class Config(Files):
    """A CSV or Parquet file with one row per image, or per cell with its box; columns are found by usual names."""

    kind: Literal["table"] = "table"
    """A table with the paths of images, and any of label, split, donor, slide, plate, site, scale, box and cell id."""
    table: str = Field(min_length=1)
    """CSV (commas, semicolons or tabs, with a header line) or Parquet file."""
    path: str | None = None
    """Folder that relative paths start from; none: the table's, or what the paths share if all are absolute."""
    path_column: str | None = None
    """Column with the paths; none: path, file, filename, image, …"""
    labels: Literal["table", "none"] = "table"
    """`none` reads no labels."""
    label_column: str | None = None
    """Column with the class; none: label, class or cell_type, if there is one."""
    split_column: str | None = None
    """Column with the split; none: split, subset or fold, if there is one. Without one all rows are train."""
    train: str | None = None
    """Value of the split column for training; none: train or training, in any letter case."""
    val: str | None = None
    """Value of the split column for validation; none: val, valid or validation."""
    test: str | None = None
    """Value of the split column for the test; none: test or testing."""
    sources: str | None = None
    """Column with the source, or several, such as plate+well; none: the first of source, donor, patient, subject,
    photograph, slide and plate that there is."""
    source_pattern: str | None = None
    """Regular expression, searched in the path of images without a source; its one group is the source."""
    site_column: str | None = None
    """Column with the laboratory; none: site, lab, centre or hospital, if there is one."""
    cell_column: str | None = None
    """Column with an id of the cell, which is part of an image's name; none: cell_id or cell, if there is one."""
    box: tuple[str, str, str, str] | None = None
    """Columns with the left, upper, right and lower edge of the cell's box, in px; none: x_min, y_min, x_max and
    y_max, if there are all four. Each row is then cut from its image when it is read; with `um_per_pixel` the field of
    `size` px of that scale around the centre of the box."""
    box_as: Literal["edges", "size"] = "edges"
    """`size`: the last two columns are the width and height of the box."""
    box_outside: Outside = "clip"
    """Boxes that reach beyond their image: cut off at its border (`clip`), its border pixels repeated (`pad`), left out
    (`drop`) or refused (`stop`). Those that lie outside wholly are refused, or left out with on_error=skip."""
    um_per_pixel_column: str | None = None
    """Column with µm per pixel; none: um_per_pixel or mpp, if there is one."""
    um_per_pixel_at_1x: float | None = Field(None, gt=0)
    """µm per pixel at a magnification of 1, such as 10 where 20× means 0.5; then a column of magnification says the
    scale of rows without µm per pixel. none: a magnification says nothing of it."""

    _one_group = field_validator("source_pattern")(one_group)

    @model_validator(mode="after")
    def _one_image_a_row(self) -> Self:
        if self.z == "each":
            raise ValueError(
                "z='each' makes several images of a file, but a row of a table is one image: middle or max"
            )
        return self


def open_splits(config: Config) -> dict[str, TableImages]:
    """Those of the splits that the table has, which is read once.

    Raises:
        ConfigError: as `open_split`.
    """
    clock = Clock()
    rows = Rows(config)
    clock.lap("reading and listing")
    opened: dict[str, TableImages] = {}
    for split in SPLITS:
        images = _opened(config, rows, split, clock if not opened else Clock())
        if images is not None:
            opened[split] = images
    return opened


def open_split(config: Config, split: str) -> TableImages | None:
    """The images of one split in the order of the table; None if the table has none.

    Raises:
        ConfigError: if the table, its columns or the images contradict the configuration.
    """
    clock = Clock()
    rows = Rows(config)
    clock.lap("reading and listing")
    return _opened(config, rows, split, clock)


class AllRows(NamedTuple):
    """Every row of a table, in its order, whatever its split."""

    root: Path
    images: TableImages
    """those that cannot be read, as on_error=skip allows, raise a DataError"""
    files: list[str]
    """of each row its path below the root"""
    labels: list[str | None] | None
    boxes: NDArray[np.int64] | None
    """(N, 4) left, upper, right and lower edge in px"""
    columns: pa.Table
    """all of the table: texts, numbers and truth values"""
    label: str | None
    """the column with the class"""
    cell: str | None
    """the column with the id of a cell"""


def open_rows(config: Config) -> AllRows:
    """All rows of a table; no image is opened.

    Raises:
        ConfigError: as `open_split`.
    """
    rows = Rows(config, every=True)
    number, columns = np.arange(rows.table.columns.num_rows), rows.columns
    missing = rows.without_file(number)
    wrong = _skipped(config, rows, number, missing, f"name no file below {rows.root} (data.path)")
    boxes = boxes_of(rows.table, columns.box, config.box_as == "size")
    if boxes is not None:
        wrong |= _skipped(config, rows, number, boxes.wrong, "have no box of at least 1×1 px")
    names = [name if name is not None else missing[row] for row, name in enumerate(rows.files)]
    distinct, of = _distinct(names)
    cells = None if columns.cell is None else rows.table.text(columns.cell).fill_null("").to_pylist()
    _check_once(rows.table, number, names, None if boxes is None else boxes.edges, cells)
    at_1x = config.um_per_pixel_at_1x
    stated = stated_scales(rows.table, columns.um_per_pixel, columns.magnification, at_1x, number)
    scales = _of_files(rows.table, stated, of, distinct, number) if config.um_per_pixel is not None else None
    files = _whole_files(config, rows.root, distinct, {}, scales, boxes is not None)
    cuts = None if boxes is None else Cuts(boxes.edges, config.box_outside)
    images = TableImages(files, of, cuts, cells, config.decoder(), scales, wrong)
    images.labels = images.sources = torch.full((len(names),), -1)
    labels = None if columns.label is None else rows.table.text(columns.label).to_pylist()
    edges = None if boxes is None else boxes.edges
    return AllRows(rows.root, images, names, labels, edges, rows.table.typed(), columns.label, columns.cell)


def _opened(config: Config, rows: Rows, split: str, clock: Clock) -> TableImages | None:
    number, where = rows.of(split)
    if not len(number):
        return None
    skipped = _skipped(config, rows, number, rows.without_file(number), f"name no file below {rows.root} (data.path)")
    number = number[[row not in skipped for row in number.tolist()]]
    part, columns = rows.part(number), rows.columns
    boxes = boxes_of(part, columns.box, config.box_as == "size")
    if boxes is not None and config.size is None:
        raise ConfigError("data.size is needed with boxes, as they have different sizes")
    if boxes is not None and boxes.wrong:
        advice = "" if config.box_as == "size" else "; data.box_as=size reads the last two as width and height"
        wrong = {int(number[i]): why for i, why in boxes.wrong.items()}
        skipped |= _skipped(config, rows, number, wrong, f"have no box of at least 1×1 px{advice}")
        good = np.array([row not in skipped for row in number.tolist()])
        number, boxes = number[good], Boxes(boxes.edges[good], {})
        part = rows.part(number)
    names = [str(rows.files[row]) for row in number.tolist()]
    distinct, of = _distinct(names)
    cells = None if columns.cell is None else part.text(columns.cell).fill_null("").to_pylist()
    _check_once(rows.table, number, names, None if boxes is None else boxes.edges, cells)
    decoder = config.decoder()
    stated = stated_scales(part, columns.um_per_pixel, columns.magnification, config.um_per_pixel_at_1x, number)
    of_file = _of_files(part, stated, of, distinct, number)
    asked = unknown(config, distinct, of_file)
    all_files = config.verify != "none" or config.size is None
    listing = _listing(rows.root, distinct, {*distinct} if all_files else {*to_look_at(distinct, decoder), *asked})
    looks = verify(config, rows.root, listing, decoder, f"{rows.file.name} {split}", asked)
    scales = _scales_of(config, distinct, looks, of_file)
    scales.check(rows.file)
    clock.lap("verifying")
    kept = np.array([name not in looks.broken for name in distinct], bool)[of]
    said: list[str] = []
    if boxes is not None:
        fits, beyond_it, said = _fitting(config, rows, number, boxes.edges, _sizes(looks.headers, of))
        kept &= fits
        skipped |= beyond_it
    kept_rows = np.flatnonzero(kept)
    sized = scales.um if config.um_per_pixel is not None else None
    images = TableImages(
        _whole_files(config, rows.root, distinct, looks.broken, sized, boxes is not None),
        of[kept],
        None if boxes is None else Cuts(boxes.edges[kept], config.box_outside),
        None if cells is None else [cells[i] for i in kept_rows],
        decoder,
        sized,
    )
    images.classes, images.labels = rows.classes, numbers(part, columns.label, rows.classes)[kept_rows]
    image_names = [names[i] for i in kept_rows]
    images.sources, images.sourced = _sources(config, part, columns.sources, image_names, kept_rows)
    if columns.site is not None:
        images.labs, images.lab_names = numbers(part, columns.site, rows.sites)[kept_rows] + 1, rows.sites
    headers = [(name, header) for name, header in zip(distinct, looks.headers, strict=False) if header is not None]
    images.found = Found(
        where=f"{rows.file}, {where}",
        ignored=rows.left_out() if split == "train" else {},
        broken=looks.broken | {rows.table.row(row): why for row, why in skipped.items()},
        looked=looks.looked,
        columns=columns.said(rows.names),
        notes=said,
        scales=[*scales.lines(), *magnifications(part, columns.magnification, config.um_per_pixel_at_1x)],
        seconds=clock.laps,
    ).with_headers([name for name, _ in headers], [header for _, header in headers])
    clock.lap("labels and sources")
    return images


def _whole_files(
    config: Config,
    root: Path,
    names: Sequence[str],
    broken: dict[str, str],
    scales: NDArray[np.float64] | None,
    cut: bool,
) -> FolderImages:
    """The files of rows; those that boxes are cut from in their own size."""
    decoder, nothing = config.decoder(), torch.full((len(names),), -1)
    how = replace(decoder, size=None, um_per_pixel=None) if cut else decoder
    return FolderImages(root, names, how, (), nothing, nothing, broken, scales=scales)


def _skipped(config: Config, rows: Rows, number: NDArray[np.int64], wrong: dict[int, str], what: str) -> dict[int, str]:
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


def _fitting(
    config: Config, rows: Rows, number: NDArray[np.int64], edges: NDArray[np.int64], sizes: NDArray[np.int64]
) -> tuple[NDArray[np.bool_], dict[int, str], list[str]]:
    """(N,) bool: the rows whose box is used; of the others row → reason; and a line about boxes at the border."""
    part, whole = beyond(edges, sizes)
    beside = whole if config.box_outside != "stop" else part
    reasons = {
        int(number[i]): f"{rows.files[number[i]]} of {sizes[i, 0]}×{sizes[i, 1]} px, box {edges[i].tolist()}"
        for i in np.flatnonzero(beside).tolist()
    }
    what = "have a box outside of their image" if beside is whole else "have a box that reaches beyond its image"
    skipped = _skipped(config, rows, number, reasons, what)
    only = part & ~beside
    count, unknown_sizes = int(only.sum()), int((sizes[:, 0] == 0).sum())
    said = [f"{unknown_sizes:,} boxes not compared with their image, as data.verify={config.verify}"] * bool(
        unknown_sizes
    )
    if count:
        done = {
            "clip": "and are cut off there",
            "pad": "and its border pixels are repeated",
            "drop": "and are left out",
        }
        how = done[config.box_outside]
        if config.um_per_pixel is not None and config.box_outside != "drop":
            how = "and the field around their centre repeats its border pixels"
        first = f"{rows.table.row(int(number[only.argmax()]))} ({rows.files[number[only.argmax()]]})"
        said.append(f"{count:,} of {len(number):,} boxes reach beyond their image, such as {first}, {how}")
    return ~beside & ~(only if config.box_outside == "drop" else np.zeros_like(only)), skipped, said


def _check_once(
    table: Table,
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
            rows = f"{table.row(int(number[first[key]]))} and {table.row(int(number[i]))}"
            what = names[i] if extra is None else f"{names[i]}, {'cell' if cells is not None else 'box'} {extra[i]}"
            raise ConfigError(f"{table.file}: {rows} are the same image, {what}: each image has one row")
        first[key] = i


def _distinct(names: list[str]) -> tuple[list[str], NDArray[np.int64]]:
    """The distinct names in their order, and for each name its place among them."""
    first = dict.fromkeys(names)
    if len(first) == len(names):
        return names, np.arange(len(names))
    at = {name: i for i, name in enumerate(first)}
    return [*first], np.fromiter((at[name] for name in names), np.int64, len(names))


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


def _sources(
    config: Config, part: Table, columns: Sequence[str], names: Sequence[str], kept: NDArray[np.int64]
) -> tuple[Tensor, Tensor | None]:
    """(N,) int64 sources of the rows that are kept, and (N,) bool whether known."""
    if not columns and config.source_pattern is None:
        return source_ids(names, [None] * len(names)), None
    found: list[str | None] = [None] * len(names)
    if columns:
        found = joined(part, columns).take(pa.array(kept)).to_pylist()
    if config.source_pattern is not None:
        by_path = look_up_sources(names, {}, config.source_pattern)
        found = [given if given is not None else other for given, other in zip(found, by_path, strict=True)]
    return source_ids(names, found), torch.tensor([source is not None for source in found], dtype=torch.bool)


def _of_files(
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


def _scales_of(config: Config, names: Sequence[str], looks: Looks, given: NDArray[np.float64]) -> Scales:
    broken = looks.broken
    headers = looks.headers or [None] * len(names)
    if not broken:
        return Scales(config, names, headers, given)
    # What is broken is left out, and nothing is said of its scale.
    return Scales(config, names, headers, np.where([name in broken for name in names], 1.0, given))
