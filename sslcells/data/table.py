"""A table of images: a CSV or Parquet file with a path in each row, and what is known of the image."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal, NamedTuple, Self

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from sslcells.data import SPLITS, ImageSet
from sslcells.data._boxes import Outside, boxes_of
from sslcells.data._columns import Table, joined
from sslcells.data._files import Files, one_group, one_lab
from sslcells.data._found import Clock, Found
from sslcells.data._scales import Scales, magnifications, stated_scales
from sslcells.data._sources import look_up_sources, source_ids
from sslcells.data._table import Rows, numbers
from sslcells.data._table_files import (
    Chosen,
    check_once,
    distinct_files,
    fitting,
    looked,
    scales_of_files,
    skipped_rows,
)
from sslcells.data._table_images import Cuts, TableImages
from sslcells.data.folder import FolderImages


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
    lab_pattern: str | None = None
    """Regular expression, searched in the path of images without a laboratory; its one group is the laboratory."""
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
    _one_lab = field_validator("lab_pattern")(one_lab)

    @model_validator(mode="after")
    def _one_image_a_row(self) -> Self:
        if self.z == "each":
            raise ValueError(
                "z='each' makes several images of a file, but a row of a table is one image: middle or max"
            )
        return self


def open_splits(config: Config, wanted: Sequence[str] = SPLITS) -> dict[str, ImageSet]:
    """Those of the wanted splits that the table has, their images in its order.

    Raises:
        ConfigError: if the table, its columns or the images contradict the configuration.
    """
    clock = Clock()
    rows = Rows(config)
    clock.lap("reading and listing")
    opened = dict[str, ImageSet]()
    for split in wanted:
        images = _opened(config, rows, split, clock)
        if images is not None:
            clock, opened[split] = Clock(), images
    return opened


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
    sites: list[str | None]
    """the laboratory of each row; None where nothing says it"""


def open_rows(config: Config) -> AllRows:
    """All rows of a table; no image is opened.

    Raises:
        ConfigError: as `open_splits`.
    """
    rows = Rows(config, every=True)
    number, columns = np.arange(rows.table.columns.num_rows), rows.columns
    missing = rows.without_file(number)
    wrong = skipped_rows(config, rows, number, missing, f"name no file below {rows.root} (data.path)")
    boxes = boxes_of(rows.table, columns.box, config.box_as == "size")
    if boxes is not None:
        wrong |= skipped_rows(config, rows, number, boxes.wrong, "have no box of at least 1×1 px")
    names = [name if name is not None else missing[row] for row, name in enumerate(rows.files)]
    distinct, of = distinct_files(names)
    cells = None if columns.cell is None else rows.table.text(columns.cell).fill_null("").to_pylist()
    check_once(rows, number, names, None if boxes is None else boxes.edges, cells)
    at_1x = config.um_per_pixel_at_1x
    stated = stated_scales(rows.table, columns.um_per_pixel, columns.magnification, at_1x, number)
    scales = scales_of_files(rows.table, stated, of, distinct, number) if config.um_per_pixel is not None else None
    files = _whole_files(config, rows.root, distinct, {}, scales, boxes is not None)
    cuts = None if boxes is None else Cuts(boxes.edges, config.box_outside)
    images = TableImages(files, of, cuts, cells, config.decoder(), scales, wrong)
    images.labels = images.sources = torch.full((len(names),), -1)
    labels = None if columns.label is None else rows.table.text(columns.label).to_pylist()
    sites = rows.laboratory(config.lab_pattern).to_pylist()
    edges = None if boxes is None else boxes.edges
    return AllRows(rows.root, images, names, labels, edges, rows.table.typed(), columns.label, columns.cell, sites)


def _opened(config: Config, rows: Rows, split: str, clock: Clock) -> TableImages | None:
    number, where = rows.of(split)
    if not len(number):
        return None
    chosen = Chosen.of(config, rows, number)
    looks, scales = looked(config, rows, chosen, split)
    scales.check(rows.file)
    clock.lap("verifying")
    kept, skipped, said = fitting(config, rows, chosen, looks)
    images = _images(config, rows, chosen, kept, looks.broken, scales)
    headers = [(n, header) for n, header in zip(chosen.distinct, looks.headers, strict=False) if header is not None]
    columns, at_1x = rows.columns, config.um_per_pixel_at_1x
    images.found = Found(
        where=f"{rows.file}, {where}",
        ignored=rows.left_out() if split == "train" else {},
        broken=looks.broken | {rows.table.row(row): why for row, why in (chosen.skipped | skipped).items()},
        looked=looks.looked,
        columns=columns.said(rows.names),
        notes=said,
        scales=[*scales.lines(), *magnifications(chosen.part, columns.magnification, at_1x)],
        seconds=clock.laps,
    ).with_headers([name for name, _ in headers], [header for _, header in headers])
    clock.lap("labels and sources")
    return images


def _images(
    config: Config, rows: Rows, chosen: Chosen, kept: NDArray[np.int64], broken: dict[str, str], scales: Scales
) -> TableImages:
    """The images of those rows that are kept, by their place among the chosen, with what the table says of them."""
    sized, edges = scales.um if config.um_per_pixel is not None else None, chosen.edges
    images = TableImages(
        _whole_files(config, rows.root, chosen.distinct, broken, sized, edges is not None),
        chosen.of_row[kept],
        None if edges is None else Cuts(edges[kept], config.box_outside),
        None if chosen.cells is None else [chosen.cells[i] for i in kept],
        config.decoder(),
        sized,
    )
    number, columns = chosen.number[kept], rows.columns
    images.classes = rows.classes
    images.labels = torch.from_numpy(numbers(rows.column(columns.label).take(pa.array(number)), rows.classes))
    names = [chosen.names[i] for i in kept]
    images.sources, images.sourced = _sources(config, rows.part(number), columns.sources, names)
    if rows.labs is not None:
        images.labs, images.lab_names = torch.from_numpy(rows.labs[number]), rows.sites
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


def _sources(config: Config, part: Table, columns: Sequence[str], names: Sequence[str]) -> tuple[Tensor, Tensor | None]:
    """(N,) int64 sources of the rows, and (N,) bool whether known."""
    if not columns and config.source_pattern is None:
        return source_ids(names, [None] * len(names)), None
    found: list[str | None] = [None] * len(names)
    if columns:
        found = joined(part, columns).to_pylist()
    if config.source_pattern is not None:
        by_path = look_up_sources(names, {}, config.source_pattern)
        found = [given if given is not None else other for given, other in zip(found, by_path, strict=True)]
    return source_ids(names, found), torch.tensor([source is not None for source in found], dtype=torch.bool)
