"""A table of images: a CSV or Parquet file with a path in each row, and what is known of the image."""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray
from PIL import Image
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from sslcells.config import ConfigError, nearest
from sslcells.data import SPLITS, DataError, ImageSet
from sslcells.data._columns import Table, find, joined, names_of, read
from sslcells.data._decode import Decoder, Header
from sslcells.data._decode.pixel_size import field
from sslcells.data._files import Files, one_group, verify
from sslcells.data._found import Clock, Found
from sslcells.data._names import check_classes, some
from sslcells.data._places import Place, below
from sslcells.data._planes import to_look_at
from sslcells.data._scales import Scales, magnifications, stated_scales, unknown
from sslcells.data._scan import Listing
from sslcells.data._sources import look_up_sources, source_ids
from sslcells.data._splits import split_of
from sslcells.data._verified import Looks
from sslcells.data.folder import FolderImages
from sslcells.storage import is_file, is_folder
from sslcells.values import place

_BOX = ("x_min", "y_min", "x_max", "y_max")
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


class _Columns(NamedTuple):
    """Which column says what; None for what the table does not say."""

    path: str
    label: str | None
    split: str | None
    sources: tuple[str, ...]
    site: str | None
    cell: str | None
    box: tuple[str, ...]
    um_per_pixel: str | None
    magnification: str | None

    @property
    def used(self) -> list[str]:
        """All of them."""
        one = (self.path, self.label, self.split, self.site, self.cell, self.um_per_pixel, self.magnification)
        return [column for column in (*one, *self.sources, *self.box) if column is not None]

    def said(self, names: Sequence[str]) -> list[str]:
        """How the columns of these names were understood, for a person."""
        named = {
            "path": self.path,
            "label": self.label,
            "split": self.split,
            "source": "+".join(self.sources) or None,
            "site": self.site,
            "cell": self.cell,
            "box": ", ".join(self.box) or None,
            "µm per pixel": self.um_per_pixel,
            "magnification": self.magnification,
        }
        text = "; ".join(f"{what} from {column}" for what, column in named.items() if column is not None)
        unused = [name for name in names if name not in self.used]
        return [f"columns: {text}" + (f"; not used: {some(unused, 20)}" if unused else "")]


class TableImages(ImageSet):
    """One split of a table; a row with a box is cut from its image."""

    def __init__(
        self,
        files: FolderImages,
        rows: NDArray[np.int64],
        boxes: NDArray[np.int64] | None,
        cells: Sequence[str] | None,
        decoder: Decoder,
        scales: NDArray[np.float64] | None,
    ) -> None:
        self._files, self._rows, self._boxes, self._cells, self._scales = files, rows, boxes, cells, scales
        # A cut is 8 bit already, and each of its channels is resized by itself.
        self._cut = replace(decoder, channels=1, stack=None, intensity="percentile", range=None, um_per_pixel=None)
        self._target = decoder.um_per_pixel
        self._last: tuple[int, Tensor] | None = None
        self.channels = files.channels

    def pixels(self, index: int) -> Tensor:
        """Image `index`: (C, H, W) uint8, of the box if the row has one.

        Raises:
            DataError: if the file can no longer be read, or its box lies outside of it; the message names it.
        """
        file = int(self._rows[index])
        if self._boxes is None:
            return self._files.pixels(file)
        if self._last is None or self._last[0] != file:  # the cells of a field often follow each other
            self._last = file, self._files.pixels(file)
        whole = self._last[1]
        left, upper, right, lower = self._inside(index, whole.shape[1], whole.shape[2])
        if self._scales is not None:
            return self._field(whole, index, file)
        return torch.cat([self._cut.pixels(Image.fromarray(x.numpy())) for x in whole[:, upper:lower, left:right]])

    def _field(self, whole: Tensor, index: int, file: int) -> Tensor:
        """(C, H, W) of the field of the wanted scale around the centre of a box."""
        assert self._boxes is not None
        assert self._scales is not None
        left, upper, right, lower = self._boxes[index].tolist()
        size, centre = self._cut.size, ((upper + lower) / 2, (left + right) / 2)
        assert size is not None
        assert self._target is not None
        factor = self._target / float(self._scales[file])
        each = [field(Image.fromarray(x.numpy()), size, factor, centre) for x in whole]
        return torch.from_numpy(np.stack(each))

    def values(self, index: int) -> NDArray[Any]:
        """The raw values of image `index`, of the whole file if the row has a box."""
        return self._files.values(int(self._rows[index]))

    def header(self, index: int) -> Header | None:
        """The file header of image `index`; None if it cannot be read."""
        return self._files.header(int(self._rows[index]))

    def name(self, index: int) -> str:
        """The path as in the folder, with `#` and the cell's id or box if the table has them."""
        path = self._files.name(int(self._rows[index]))
        if self._cells is not None:
            return f"{path}#{self._cells[index]}"
        return path if self._boxes is None else f"{path}#{','.join(map(str, self._boxes[index]))}"

    def _inside(self, index: int, height: int, width: int) -> tuple[int, int, int, int]:
        assert self._boxes is not None
        box = self._boxes[index].tolist()
        left, upper, right, lower = max(0, box[0]), max(0, box[1]), min(width, box[2]), min(height, box[3])
        if left >= right or upper >= lower:
            raise DataError(f"{self.name(index)}: its box {box} lies outside of the image of {height}×{width} px")
        return left, upper, right, lower

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_last": None}


def open_split(config: Config, split: str) -> TableImages | None:
    """The images of one split in the order of the table; None if the table has none.

    Raises:
        ConfigError: if the table, its columns or the images contradict the configuration.
    """
    clock = Clock()
    file = place(config.table)
    if not is_file(file):
        what = "is a folder; data.kind=folder reads it" if is_folder(file) else "no such file"
        near = nearest(file.name, sorted(p.name for p in file.parent.glob("*") if p.is_file()))
        raise ConfigError(f"data.table={config.table!r}: {what}{near}")
    all_names, _ = names_of(file)
    columns = _columns(config, file, all_names)
    table = read(file, columns.used)
    clock.lap("reading")
    classes = _names(table, columns.label)
    check_classes(classes, f"{file}, column {columns.label}")
    sites = _names(table, columns.site)
    splits = _splits(config, table, columns.split)
    number, where = _in_split(table, columns.split, splits, split)
    if not len(number):
        return None
    part = table._replace(columns=table.columns.take(pa.array(number)))
    given = None if config.path is None else place(config.path)
    if given is not None and not is_folder(given):
        raise ConfigError(f"data.path={config.path!r}: no such folder")
    root, paths = below(_paths(table, part, number, columns.path), given, file.parent)
    found = Place(root).files(paths)
    _check_there(table, number, paths, found, root)
    names = [name for name in found if name is not None]
    distinct, of = _distinct(names)
    boxes = _boxes(config, part, columns.box, number, table)
    cells = None if columns.cell is None else part.text(columns.cell).fill_null("").to_pylist()
    _check_once(table, number, names, boxes, cells)
    clock.lap("listing")
    if boxes is not None and config.size is None:
        raise ConfigError("data.size is needed with boxes, as they have different sizes")
    decoder = config.decoder()
    stated = stated_scales(part, columns.um_per_pixel, columns.magnification, config.um_per_pixel_at_1x, number)
    of_file = _of_files(part, stated, of, distinct, number)
    asked = unknown(config, distinct, of_file)
    all_files = config.verify != "none" or config.size is None
    listing = _listing(root, distinct, {*distinct} if all_files else {*to_look_at(distinct, decoder), *asked})
    looks = verify(config, root, listing, decoder, f"{file.name} {split}", asked)
    scales = _scales_of(config, distinct, looks, of_file)
    scales.check(file)
    clock.lap("verifying")
    kept = np.array([name not in looks.broken for name in distinct], bool)[of]
    whole = replace(decoder, size=None, um_per_pixel=None) if boxes is not None else decoder
    nothing = torch.full((len(distinct),), -1)
    sized = scales.um if config.um_per_pixel is not None else None
    files = FolderImages(root, distinct, whole, (), nothing, nothing, looks.broken, scales=sized)
    kept_rows = np.flatnonzero(kept)
    images = TableImages(
        files,
        of[kept],
        None if boxes is None else boxes[kept],
        None if cells is None else [cells[i] for i in kept_rows],
        decoder,
        sized,
    )
    images.classes, images.labels = classes, _numbers(part, columns.label, classes)[kept_rows]
    image_names = [names[i] for i in kept_rows]
    images.sources, images.sourced = _sources(config, part, columns.sources, image_names, kept_rows)
    if columns.site is not None:
        images.labs, images.lab_names = _numbers(part, columns.site, sites)[kept_rows] + 1, sites
    headers = [(name, header) for name, header in zip(distinct, looks.headers, strict=False) if header is not None]
    images.found = Found(
        where=f"{file}, {where}",
        ignored=_left_out(table, columns.split, splits) if split == "train" else {},
        broken=looks.broken,
        looked=looks.looked,
        columns=columns.said(all_names),
        scales=[*scales.lines(), *magnifications(part, columns.magnification, config.um_per_pixel_at_1x)],
        seconds=clock.laps,
    ).with_headers([name for name, _ in headers], [header for _, header in headers])
    clock.lap("labels and sources")
    return images


def _columns(config: Config, file: Path, names: Sequence[str]) -> _Columns:
    def column(meaning: str, key: str, given: str | None) -> str | None:
        return find(names, file, f"data.{key}", given, meaning)

    path = column("path", "path_column", config.path_column)
    if path is None:
        raise ConfigError(f"{file} has no column of paths; name it with data.path_column= (it has: {some(names, 20)})")
    if config.box is not None:
        box: tuple[str, ...] = tuple(str(find(names, file, "data.box", name, "path")) for name in config.box)
    else:
        box = _BOX if {*_BOX} <= {*names} else ()
    sources: tuple[str, ...] = ()
    if config.sources is not None and config.sources not in names:
        sources = tuple(str(column("source", "sources", name.strip())) for name in config.sources.split("+"))
    elif source := column("source", "sources", config.sources):
        sources = (source,)
    return _Columns(
        path,
        column("label", "label_column", config.label_column) if config.labels == "table" else None,
        column("split", "split_column", config.split_column),
        sources,
        column("site", "site_column", config.site_column),
        column("cell", "cell_column", config.cell_column),
        box,
        column("um_per_pixel", "um_per_pixel_column", config.um_per_pixel_column),
        column("magnification", "magnification", None),
    )


def _names(table: Table, column: str | None) -> tuple[str, ...]:
    """The distinct values of a column in the whole table, so that a number means the same in each split."""
    if column is None:
        return ()
    names: list[str] = [name for name in pc.unique(table.text(column)).to_pylist() if name is not None]
    whole = all(name.isascii() and name.isdigit() for name in names)
    return tuple(sorted(names, key=lambda name: (int(name), name) if whole else (0, name)))


def _numbers(table: Table, column: str | None, names: Sequence[str]) -> Tensor:
    """(N,) int64: the place of each row's value in `names`; −1 where it has none."""
    if column is None:
        return torch.full((table.columns.num_rows,), -1)
    places = pc.index_in(table.text(column), pa.array(names, pa.string()))
    return torch.from_numpy(pc.fill_null(places, -1).to_numpy().astype(np.int64))


def _splits(config: Config, table: Table, column: str | None) -> dict[str, str]:
    """Value of the split column → split; empty without such a column.

    Raises:
        ConfigError: if a value is no split's, or a named value or its column does not exist.
    """
    given = {name: value for name in SPLITS if (value := getattr(config, name)) is not None}
    if column is None:
        if given:
            name, value = next(iter(given.items()))
            raise ConfigError(f"data.{name}={value!r}: {table.file} has no column of splits")
        return {}
    counts = {e["values"]: e["counts"] for e in pc.value_counts(table.text(column)).to_pylist()}
    counts.pop(None, None)
    for name, value in given.items():
        if value not in counts:
            near = nearest(value, [*counts])
            raise ConfigError(f"data.{name}={value!r}: column {column} of {table.file} has no such value{near}")
    means = {value: name for name, value in given.items()}
    for value in counts:
        usual = split_of(value)
        if value not in means and usual is not None and usual not in given:
            means[value] = usual
    unknown = [f"{value} ({counts[value]:,} rows)" for value in counts if value not in means]
    if unknown and not given:
        raise ConfigError(
            f"{table.file}: column {column} names splits that are none of {', '.join(SPLITS)}: {some(unknown)}; say "
            f"with data.train=, data.val= and data.test= which values are which, and others are left out"
        )
    return means


def _in_split(table: Table, column: str | None, splits: dict[str, str], split: str) -> tuple[NDArray[np.int64], str]:
    """The rows of a split, and how they were chosen."""
    if column is None:
        count = table.columns.num_rows if split == "train" else 0
        return np.arange(count), "all rows, as there is no column of splits"
    values = [value for value, name in splits.items() if name == split]
    rows = pc.is_in(table.text(column), pa.array(values, pa.string())).to_numpy()
    return np.flatnonzero(rows), f"rows with {column} {' or '.join(values)}"


def _left_out(table: Table, column: str | None, splits: dict[str, str]) -> dict[str, tuple[int, str]]:
    """Rows of no split."""
    if column is None:
        return {}
    text = table.text(column)
    known = pc.is_in(text, pa.array([*splits], pa.string())).to_numpy()
    empty = pc.is_null(text).to_numpy()
    kinds = {"rows without a split": empty, "rows of other splits": ~known & ~empty}
    return {kind: (int(of.sum()), table.row(int(of.argmax()))) for kind, of in kinds.items() if of.any()}


def _paths(table: Table, part: Table, number: NDArray[np.int64], column: str) -> list[str]:
    paths = part.text(column)
    if paths.null_count:
        row = int(number[pc.is_null(paths).to_numpy().argmax()])
        raise ConfigError(f"{table.file}: {paths.null_count:,} rows have no path, such as {table.row(row)}")
    out: list[str] = paths.to_pylist()
    return out


def _check_there(
    table: Table, number: NDArray[np.int64], paths: Sequence[str], found: Sequence[str | None], root: Path
) -> None:
    missing = [i for i, name in enumerate(found) if name is None]
    if missing:
        shown = [f"  {table.row(int(number[i]))}: {paths[i]}" for i in missing[:_SHOWN]]
        more = ["  …"] if len(missing) > _SHOWN else []
        title = f"{table.file}: {len(missing):,} of {len(paths):,} rows name no file below {root} (data.path):"
        raise ConfigError("\n".join([title, *shown, *more]))


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


def _boxes(
    config: Config, part: Table, columns: Sequence[str], number: NDArray[np.int64], table: Table
) -> NDArray[np.int64] | None:
    """(N, 4) int64: left, upper, right and lower edge of each row's box, rounded outwards."""
    if not columns:
        return None
    edges = np.stack([part.numbers(column) for column in columns], 1)
    if config.box_as == "size":
        edges[:, 2:] += edges[:, :2]
    wrong = ~np.isfinite(edges).all(1) | (edges[:, 2:] - edges[:, :2] < 1).any(1)
    if wrong.any():
        row = int(wrong.argmax())
        advice = "" if config.box_as == "size" else "; data.box_as=size reads the last two as width and height"
        raise ConfigError(
            f"{table.file}: {int(wrong.sum()):,} rows have no box of at least 1×1 px, such as "
            f"{table.row(int(number[row]))} with {', '.join(columns)} = {edges[row].tolist()}{advice}"
        )
    return np.concatenate([np.floor(edges[:, :2]), np.ceil(edges[:, 2:])], 1).astype(np.int64)


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
