"""Data sets of Hugging Face in Parquet, read as they are: a column with the bytes of images, and one with labels."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from sslcells.config import ConfigError, nearest
from sslcells.data import SPLITS, ImageSet
from sslcells.data._encoded import Config as Base
from sslcells.data._encoded import Encoded, find_files, label_numbers, sources_of
from sslcells.data._found import Clock, Found
from sslcells.data._names import some

_KEPT = 2**28
"""bytes of row groups that a process keeps"""


class Config(Base):
    """A folder of Parquet files with images, as Hugging Face's datasets writes them."""

    kind: Literal["parquet"] = "parquet"
    """Parquet files whose rows hold the images themselves; data.kind=table reads a table of paths."""
    image_column: str | None = None
    """Column with the images: bytes, or a struct with a field `bytes`; none: the only one."""
    label_column: str | None = None
    """Column with the labels; none: the only one with names of classes, else label or labels, if there is one."""
    source_column: str | None = None
    """Column with the source (donor, slide)."""


class ParquetImages(Encoded):
    """One split; a process keeps the row groups that it read last, as a row cannot be read alone."""

    def __init__(self, files: Sequence[str], groups: Sequence[Sequence[int]], column: str, config: Config) -> None:
        """`groups`: the number of rows of each row group of each file."""
        names = [
            f"{Path(file).name}#{row}" for file, each in zip(files, groups, strict=True) for row in range(sum(each))
        ]
        super().__init__(names, config.decoder())
        self._files, self._column = list(files), column
        self._group = [(f, g) for f, each in enumerate(groups) for g in range(len(each))]
        self._ends = np.cumsum([rows for each in groups for rows in each])
        self._kept: dict[int, Any] = {}

    def encoded(self, index: int) -> bytes:
        """The bytes of image `index`."""
        group = int(np.searchsorted(self._ends, index, "right"))
        rows = self._rows(group)
        data = rows[index - int(self._ends[group]) + len(rows)].as_py()
        if data is None:
            raise ValueError("it has no bytes, perhaps only the path of a file")
        return bytes(data)

    def _rows(self, group: int) -> Any:
        """The images of a row group."""
        if group in self._kept:
            self._kept[group] = self._kept.pop(group)  # the one used last is dropped last
            return self._kept[group]
        file, number = self._group[group]
        try:
            with pq.ParquetFile(self._files[file], memory_map=False) as opened:
                column = opened.read_row_group(number, columns=[self._column]).column(0).combine_chunks()
        except (pa.ArrowInvalid, pa.ArrowException) as error:
            raise ValueError(f"{next(iter(str(error).splitlines()), 'damaged')}") from None
        rows = pc.struct_field(column, "bytes") if pa.types.is_struct(column.type) else column
        while self._kept and sum(kept.nbytes for kept in self._kept.values()) + rows.nbytes > _KEPT:
            self._kept.pop(next(iter(self._kept)))
        self._kept[group] = rows
        return rows

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_kept": {}}


def open_splits(config: Config, wanted: Sequence[str] = SPLITS) -> dict[str, ImageSet]:
    """Those of the wanted splits that the files have. Only labels and sources are in memory.

    Raises:
        ConfigError: if there are no files, one cannot be read, or columns are missing.
    """
    clock = Clock()
    root, names, unused = find_files(config, ".parquet")
    files = _Opened(root, {name: _file(root / name) for chosen in names.values() for name in chosen})
    columns = _columns(config, files)
    clock.lap("listing")
    texts = {split: files.texts(chosen, columns.label) for split, chosen in names.items()}
    classes, labels = label_numbers(texts, config.class_names, columns.classes, f"{root}, column {columns.label}")
    opened = dict[str, ImageSet]()
    for split in (split for split in wanted if split in names):
        groups = [files.groups(name) for name in names[split]]
        images = ParquetImages([str(root / name) for name in names[split]], groups, columns.image, config)
        if not len(labels[split]):
            raise ConfigError(f"{root / names[split][0]} has no rows")
        images.classes, images.labels = classes, labels[split]
        sources = None if columns.source is None else files.texts(names[split], columns.source)
        images.sources, images.sourced = sources_of([images.name(i) for i in range(len(images))], sources)
        images.found = Found(
            where=f"{root}, {len(groups)} files such as {names[split][0]}",
            ignored={"files of no split": (len(unused), unused[0])} if unused and split == "train" else {},
            columns=columns.said(max(max(each, default=0) for each in groups)),
            seconds=clock.laps,
        )
        clock.lap("labels and sources")
        clock, opened[split] = Clock(), images
    return opened


class _Opened(NamedTuple):
    """The files of all splits, opened; all have the same columns."""

    root: Path
    files: dict[str, pq.ParquetFile]
    """by path below the root"""

    def groups(self, name: str) -> list[int]:
        """The number of rows of each row group of a file."""
        file = self.files[name]
        return [file.metadata.row_group(g).num_rows for g in range(file.num_row_groups)]

    def texts(self, names: Sequence[str], column: str | None) -> list[str | None]:
        """A column of these files as text; None where it says nothing.

        Raises:
            ConfigError: if it cannot be read.
        """
        out: list[str | None] = []
        for name in names:
            if column is None:
                out += [None] * self.files[name].metadata.num_rows
                continue
            try:
                values = pc.cast(self.files[name].read(columns=[column]).column(0), pa.string())
            except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError) as error:
                raise ConfigError(
                    f"{self.root / name}: column {column!r} cannot be read as text: "
                    f"{next(iter(str(error).splitlines()), error)}"
                ) from None
            out += [None if value in (None, "", "-1") else value for value in values.to_pylist()]
        return out


class _Columns(NamedTuple):
    """Which column says what."""

    image: str
    label: str | None
    source: str | None
    classes: Sequence[str]
    """names that the files give to the classes"""

    def said(self, group: int) -> list[str]:
        """How the columns were understood, and the largest row group, for a person."""
        return [
            f"columns: image from {self.image}; label from {self.label or 'nothing'}; source from "
            f"{self.source or 'nothing'}",
            f"rows are read in groups of up to {group:,}: sampler.block={group}, or sslcells pack, reads few",
        ]


def _columns(config: Config, files: _Opened) -> _Columns:
    first, *others = files.files
    schema = files.files[first].schema_arrow
    for name in others:
        if (theirs := files.files[name].schema_arrow.names) != schema.names:
            raise ConfigError(f"{files.root / name} has other columns than {first}: {some(theirs)}")
    named = _class_names(schema)
    image = _image_column(config.image_column, schema, files.root / first)
    label = _label_column(config.label_column, schema, named, files.root / first)
    source = config.source_column
    if source is not None and source not in schema.names:
        raise ConfigError(f"data.source_column={source!r}: no such column{nearest(source, schema.names)}")
    return _Columns(image, label, source, named.get(label or "", ()))


def _file(file: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(file, memory_map=False)
    except (OSError, pa.ArrowInvalid) as error:
        raise ConfigError(f"{file} cannot be read: {next(iter(str(error).splitlines()), error)}") from None


def _image_column(given: str | None, schema: pa.Schema, file: Path) -> str:
    fits = [field.name for field in schema if _holds_bytes(field.type)]
    if given is not None and given in fits:
        return given
    if given is None and len(fits) == 1:
        return str(fits[0])
    what = (
        f"data.image_column={given!r}: {file} has no such column of bytes"
        if given
        else f"{file} has {len(fits)} columns"
    )
    advice = (
        " of images; data.kind=table reads a table of paths"
        if not given and not fits
        else " of bytes; say with data.image_column= which holds the images"
        if not given
        else ""
    )
    raise ConfigError(f"{what}{advice}: {some(fits or schema.names, 20)}")


def _holds_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return any(kind.field(i).name == "bytes" for i in range(kind.num_fields))
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _class_names(schema: pa.Schema) -> dict[str, list[str]]:
    """The columns of classes that Hugging Face's metadata describe, and the names of their classes."""
    try:
        said = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        features = said.get("info", {}).get("features", {})
        return {name: [*map(str, f["names"])] for name, f in features.items() if f.get("_type") == "ClassLabel"}
    except (ValueError, AttributeError, KeyError, TypeError):
        return {}


def _label_column(given: str | None, schema: pa.Schema, classes: dict[str, list[str]], file: Path) -> str | None:
    if given is not None:
        if given not in schema.names:
            raise ConfigError(f"data.label_column={given!r}: {file} has no such column{nearest(given, schema.names)}")
        return given
    named = [name for name in classes if name in schema.names]
    if len(named) > 1 and "label" not in named:
        raise ConfigError(f"{file} has several columns of classes; say with data.label_column= which: {some(named)}")
    if len(named) == 1:
        return named[0]
    return next((name for name in ("label", "labels") if name in schema.names), None)
