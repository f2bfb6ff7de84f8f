"""Data sets of Hugging Face in Parquet, read as they are: a column with the bytes of images, and one with labels."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import Field

from sslcells.config import ConfigError, nearest
from sslcells.data import ImageSet
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
    path: str = Field(min_length=1)
    """Folder with the .parquet files, at any depth, or one of them."""
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


def open_split(config: Config, split: str) -> ImageSet | None:
    """One split of the files; None if there is none. Only labels and sources are in memory.

    Raises:
        ConfigError: if there are no files, one cannot be read, or columns are missing.
    """
    clock = Clock()
    given = {"train": config.train, "val": config.val, "test": config.test}
    root, files, unused = find_files(config.path, ".parquet", given)
    if split not in files:
        return None
    opened = {name: _opened(root / name) for chosen in files.values() for name in chosen}
    schema = opened[files[split][0]].schema_arrow
    for name, file in opened.items():
        if file.schema_arrow.names != schema.names:
            raise ConfigError(
                f"{root / name} has other columns than {files[split][0]}: {some(file.schema_arrow.names)}"
            )
    image = _image_column(config.image_column, schema, root / files[split][0])
    names = _class_names(schema)
    label = _label_column(config.label_column, schema, names, root / files[split][0])
    clock.lap("listing")
    texts = {part: _texts(root, chosen, opened, label) for part, chosen in files.items()}
    groups = [
        [file.metadata.row_group(g).num_rows for g in range(file.num_row_groups)]
        for file in (opened[name] for name in files[split])
    ]
    paths = [str(root / name) for name in files[split]]
    images = ParquetImages(paths, groups, image, config)
    where = f"{root}, column {label}"
    classes, labels = label_numbers(
        [t for of in texts.values() for t in of], config.class_names, names.get(label or "", ()), where
    )
    start = sum(len(texts[part]) for part in [*files][: [*files].index(split)])
    images.classes, images.labels = classes, labels[start : start + len(texts[split])]
    if not len(images):
        raise ConfigError(f"{paths[0]} has no rows")
    source = config.source_column
    if source is not None and source not in schema.names:
        raise ConfigError(f"data.source_column={source!r}: no such column{nearest(source, schema.names)}")
    sources = None if source is None else _texts(root, files[split], opened, source)
    images.sources, images.sourced = sources_of([images.name(i) for i in range(len(images))], sources)
    of_groups = max(max(each, default=0) for each in groups)
    images.found = Found(
        where=f"{root}, {len(paths)} files such as {files[split][0]}",
        ignored={"files of no split": (len(unused), unused[0])} if unused and split == "train" else {},
        columns=[
            f"columns: image from {image}; label from {label or 'nothing'}; source from {source or 'nothing'}",
            f"rows are read in groups of up to {of_groups:,}: sampler.block={of_groups}, or sslcells pack, reads few",
        ],
        seconds=clock.laps,
    )
    clock.lap("labels and sources")
    return images


def _opened(file: Path) -> Any:
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


def _texts(root: Path, names: Sequence[str], opened: dict[str, Any], column: str | None) -> list[str | None]:
    """A column of these files as text; None where it says nothing."""
    out: list[str | None] = []
    for name in names:
        rows = opened[name].metadata.num_rows
        if column is None:
            out += [None] * rows
            continue
        try:
            values = pc.cast(opened[name].read(columns=[column]).column(0), pa.string())
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError) as error:
            raise ConfigError(
                f"{root / name}: column {column!r} cannot be read as text: {next(iter(str(error).splitlines()), error)}"
            ) from None
        out += [None if value in (None, "", "-1") else value for value in values.to_pylist()]
    return out
