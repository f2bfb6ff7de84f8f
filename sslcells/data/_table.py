"""A table of images, read once for all its splits: which column says what, and which files its rows mean."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from sslcells.config import ConfigError, nearest
from sslcells.data import SPLITS
from sslcells.data._columns import Table, find, names_of, read
from sslcells.data._labs import labs_in, no_lab
from sslcells.data._names import check_classes, some
from sslcells.data._places import Place, below
from sslcells.data._splits import split_of
from sslcells.storage import is_file, is_folder
from sslcells.values import place

if TYPE_CHECKING:
    from sslcells.data.table import Config

_BOX = ("x_min", "y_min", "x_max", "y_max")


class Columns(NamedTuple):
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


class Rows:
    """All rows of a table, and the files of those that belong to a split, or with `every` of all.

    Raises:
        ConfigError: if the table or its columns contradict the configuration.
    """

    def __init__(self, config: "Config", every: bool = False) -> None:
        self.file = _file_of(config)
        self.names, _ = names_of(self.file)
        self.columns = _columns(config, self.file, self.names)
        self.table = read(self.file, None if every else self.columns.used)
        self.classes = _names(self.column(self.columns.label))
        check_classes(self.classes, f"{self.file}, column {self.columns.label}")
        self._splits = {} if every else _splits(config, self.table, self.columns.split)
        given = None if config.path is None else place(config.path)
        if given is not None and not is_folder(given):
            raise ConfigError(f"data.path={config.path!r}: no such folder")
        count = self.table.columns.num_rows
        used = np.arange(count) if every else np.sort(np.concatenate([self.of(split)[0] for split in SPLITS]))
        text = self.table.text(self.columns.path)
        empty = pc.is_null(text).to_numpy()
        used = used[~empty[used]]
        self.root, paths = below(text.take(pa.array(used)).to_pylist(), given, self.file.parent)
        self.files: list[str | None] = [None] * count
        """of each row, its path below the root; None if it names none"""
        for row, found in zip(used.tolist(), Place(self.root).files(paths), strict=True):
            self.files[row] = found
        self.sites: tuple[str, ...] = ()
        """the laboratories of all rows"""
        self.labs: NDArray[np.int64] | None = None
        """(N,): 1 + the place of each row's laboratory in `sites`, 0 where unknown; None if nothing says it"""
        if not every and (self.columns.site is not None or config.lab_pattern is not None):
            self.sites, self.labs = self._laboratories(config.lab_pattern)

    def _laboratories(self, pattern: str | None) -> tuple[tuple[str, ...], NDArray[np.int64]]:
        """The laboratories: what the column says, and where it says nothing what the pattern finds in the path."""
        if pattern is not None and not any(labs_in(self.files, pattern)):
            example = next((name for name in self.files if name is not None), "")
            raise ConfigError(no_lab(f"data.lab_pattern={pattern!r}", example, self.root))
        texts = self.laboratory(pattern)
        names = _names(texts)
        check_classes(names, str(self.file), "laboratories")
        return names, numbers(texts, names) + 1

    def laboratory(self, pattern: str | None) -> pa.ChunkedArray | pa.Array:
        """(N,) the name of each row's laboratory: what its column says, else what the pattern finds."""
        texts = self.column(self.columns.site)
        if pattern is None:
            return texts
        given = zip(texts.to_pylist(), labs_in(self.files, pattern), strict=True)
        return pa.array([said if said is not None else found for said, found in given], pa.string())

    def column(self, name: str | None) -> pa.ChunkedArray | pa.Array:
        """The text of a column, nothing but nulls where the name is None."""
        return pa.nulls(self.table.columns.num_rows, pa.string()) if name is None else self.table.text(name)

    def of(self, split: str) -> tuple[NDArray[np.int64], str]:
        """The rows of a split, and how they were chosen."""
        column = self.columns.split
        if column is None:
            count = self.table.columns.num_rows if split == "train" else 0
            return np.arange(count), "all rows, as there is no column of splits"
        values = [value for value, name in self._splits.items() if name == split]
        rows = pc.is_in(self.table.text(column), pa.array(values, pa.string())).to_numpy()
        return np.flatnonzero(rows), f"rows with {column} {' or '.join(values)}"

    def part(self, number: NDArray[np.int64]) -> Table:
        """The table of these rows."""
        return self.table._replace(columns=self.table.columns.take(pa.array(number)))

    def left_out(self) -> dict[str, tuple[int, str]]:
        """Rows of no split."""
        if self.columns.split is None:
            return {}
        text = self.table.text(self.columns.split)
        known = pc.is_in(text, pa.array([*self._splits], pa.string())).to_numpy()
        empty = pc.is_null(text).to_numpy()
        kinds = {"rows without a split": empty, "rows of other splits": ~known & ~empty}
        return {kind: (int(of.sum()), self.table.row(int(of.argmax()))) for kind, of in kinds.items() if of.any()}

    def without_file(self, number: NDArray[np.int64]) -> dict[int, str]:
        """Those of these rows that name no file, and what they name."""
        missing = [row for row in number.tolist() if self.files[row] is None]
        paths = self.table.text(self.columns.path).take(pa.array(missing, pa.int64())).to_pylist()
        return {row: path or "no path" for row, path in zip(missing, paths, strict=True)}


def _file_of(config: "Config") -> Path:
    file = place(config.table)
    if not is_file(file):
        what = "is a folder; data.kind=folder reads it" if is_folder(file) else "no such file"
        near = nearest(file.name, sorted(p.name for p in file.parent.glob("*") if p.is_file()))
        raise ConfigError(f"data.table={config.table!r}: {what}{near}")
    return file


def _columns(config: "Config", file: Path, names: Sequence[str]) -> Columns:
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
    return Columns(
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


def _names(texts: pa.ChunkedArray | pa.Array) -> tuple[str, ...]:
    """The distinct texts of all rows, so that a number means the same in each split."""
    names: list[str] = [name for name in pc.unique(texts).to_pylist() if name is not None]
    whole = all(name.isascii() and name.isdigit() for name in names)
    return tuple(sorted(names, key=lambda name: (int(name), name) if whole else (0, name)))


def numbers(texts: pa.ChunkedArray | pa.Array, names: Sequence[str]) -> NDArray[np.int64]:
    """(N,): the place of each text in `names`; −1 where it has none."""
    places = pc.index_in(texts, pa.array(names, pa.string()))
    found: NDArray[np.int64] = pc.fill_null(places, -1).to_numpy(zero_copy_only=False).astype(np.int64)
    return found


def _splits(config: "Config", table: Table, column: str | None) -> dict[str, str]:
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
