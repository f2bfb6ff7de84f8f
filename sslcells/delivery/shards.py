"""A folder of embeddings in shards: which images each shard holds, how shards are written atomically and read."""

import hashlib
import json
import os
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Self, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from sslcells.config import ConfigError, extra
from sslcells.data import DataError
from sslcells.storage import json_text, partial_name, patiently, write_atomically

T = TypeVar("T")

MANIFEST = "embeddings.json"
UNREADABLE, NO_CELL = "unreadable.csv", "no_cell.csv"
"""Lists of images that could not be read, and of those in which no cell was found."""
FORMATS = ("parquet", "npz", "h5ad")
OURS = ("path", "id", "vector", "label")
"""Columns of a shard beside those of an embedded table"""
SHOWN = ("image_file", "image_box")
"""and of its file and box, which are columns of our own too"""
_TABLE = "table/"


class Shard(NamedTuple):
    """Consecutive images of the sorted list: n that could be read, and why the others could not."""

    id: NDArray[np.int64]
    """(n,): indices in the sorted list of all images"""
    path: list[str]
    """n paths below the folder of images"""
    vector: NDArray[np.float32]
    """(n, F)"""
    label: list[str | None] | None
    """n classes; None if labels were not wanted"""
    unreadable: list[tuple[str, str]]
    """path and reason"""
    more: pa.Table | None = None
    """n rows of the embedded table, without columns that are called like the shard's own; None of a folder"""
    no_cell: Sequence[str] = ()
    """paths of those of the n images in which the standardisation found no cell"""

    def shown(self, index: int) -> tuple[str, list[int] | None]:
        """The file of an image, below the folder of images, and the box that was cut from it if there was one."""
        if self.more is None:
            return self.path[index], None
        box = self.more["image_box"][index].as_py() if "image_box" in self.more.column_names else None
        return self.more["image_file"][index].as_py(), box


class Embeddings:
    """A folder of embeddings, complete or not, as its embeddings.json describes it."""

    def __init__(self, folder: Path, manifest: Mapping[str, Any]) -> None:
        self.folder, self._manifest = folder, dict(manifest)
        self.encoder: str = manifest["encoder"]
        """digest of the encoder"""
        self.run: str = manifest["run"]
        """the folder of its run when the embeddings were made"""
        self.root: str = manifest["images"]
        """the folder of images when the embeddings were made"""
        self.count: int = manifest["count"]
        """images, readable or not"""
        self.listed: str = manifest["list"]
        """digest of their sorted paths"""
        self.size: int = manifest["shard"]
        """images a shard"""
        self.format: str = manifest["format"]
        self.labels: bool = manifest["labels"]
        self.features: int = manifest["features"]
        """F"""
        self.table: str | None = manifest.get("table")
        """the table that was embedded; None for a folder"""
        self.key: str | None = manifest.get("key")
        """the table's column with the ids of cells"""
        self.labs: dict[str, Any] | None = manifest.get("labs")
        """laboratory → what stands for its images, where the encoder standardises by laboratory"""

    @classmethod
    def open(cls, folder: Path) -> Self:
        """The embeddings in a folder.

        Raises:
            ConfigError: if it holds none.
        """
        try:
            manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
            return cls(folder, manifest)
        except FileNotFoundError:
            raise ConfigError(f"{folder} holds no {MANIFEST}: is it a folder that sslcells embed wrote?") from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{folder / MANIFEST} cannot be read: {type(error).__name__}: {error}") from None

    def begin(self) -> None:
        """Write embeddings.json, and remove the partial files of a killed process."""
        for left in self.folder.glob(".*.partial"):
            with suppress(OSError):
                left.unlink()
        text = json_text(self._manifest, indent=2) + "\n"
        write_atomically(self.folder / MANIFEST, lambda file: file.write(text.encode()))

    @property
    def shards(self) -> int:
        """The number of shards when complete."""
        return -(-self.count // self.size)

    def members(self, number: int) -> range:
        """The images of a shard, as indices in the sorted list."""
        return range(number * self.size, min((number + 1) * self.size, self.count))

    def file(self, number: int) -> Path:
        """The path of a shard."""
        return self.folder / f"part-{number:06}.{'parquet' if self.format == 'parquet' else 'npz'}"

    def written(self) -> list[int]:
        """Numbers of the shards that exist; each is complete, as a shard gets its name after it is written."""
        there = set(patiently(lambda: os.listdir(self.folder), str(self.folder)))
        return [number for number in range(self.shards) if self.file(number).name in there]

    def write(self, number: int, shard: Shard) -> None:
        """Write a shard atomically.

        Raises:
            DataError: if it cannot be written.
        """
        write = _write_parquet if self.format == "parquet" else _write_npz
        target = self.file(number)
        try:
            patiently(lambda: write_atomically(target, lambda file: write(file, shard)), str(target))
        except OSError as error:
            raise DataError(f"{target} cannot be written: {error.strerror or error}") from None

    def read(self, number: int) -> Shard:
        """Read a shard.

        Raises:
            DataError: if it is missing, damaged, or holds other images than it should.
        """
        read = _read_parquet if self.format == "parquet" else _read_npz
        shard = self._opened(number, read)
        self._counted(number, len(shard.id), len(shard.unreadable))
        if not np.isfinite(shard.vector).all():
            raise DataError(f"{self.file(number)} holds vectors that are not finite; embed again with another encoder")
        return shard

    def read_all(self) -> Iterator[Shard]:
        """Every shard, in order.

        Raises:
            ConfigError: if some are not written yet.
            DataError: as `read`.
        """
        self.check_complete()
        return (self.read(number) for number in range(self.shards))

    def check_complete(self) -> None:
        """Raise a ConfigError if some shards are not written yet."""
        there = len(self.written())
        if there < self.shards:
            raise ConfigError(
                f"{self.folder} is not complete: {there} of {self.shards} shards are there; "
                f"the same embed command resumes"
            )

    def unreadable(self) -> Iterator[tuple[str, str]]:
        """Path and reason of every image that could not be read; vectors are not loaded.

        Raises:
            ConfigError: if some shards are not written yet.
            DataError: as `read`.
        """
        return (one for told in self._told() for one in told.unreadable)

    def _told(self) -> Iterator["_Told"]:
        """What each shard says beside its rows."""
        self.check_complete()
        peek = _peek_parquet if self.format == "parquet" else _peek_npz
        for number in range(self.shards):
            told = self._opened(number, peek)
            self._counted(number, told.rows, len(told.unreadable))
            yield told

    def _opened(self, number: int, read: Callable[[Path], T]) -> T:
        file = self.file(number)
        try:
            return read(file)
        except FileNotFoundError:
            raise DataError(f"{file} is missing; the same embed command writes it") from None
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, pa.ArrowException) as error:
            raise DataError(f"{file} is damaged ({error}); delete it, and the same embed command writes it") from None

    def _counted(self, number: int, rows: int, unreadable: int) -> None:
        if rows + unreadable != len(self.members(number)):
            raise DataError(f"{self.file(number)} holds other images than it should; delete it, and embed again")

    def write_unreadable(self) -> int:
        """List the unreadable images in unreadable.csv and return their number; without any, there is no such file."""
        lines = [f'"{_quoted(path)}","{_quoted(why)}"\n' for path, why in self.unreadable()]
        return self._write_list(UNREADABLE, "path,reason\n", lines)

    def write_no_cell(self) -> int:
        """List the images in which no cell was found in no_cell.csv, likewise."""
        lines = [f'"{_quoted(path)}"\n' for told in self._told() for path in told.no_cell]
        return self._write_list(NO_CELL, "path\n", lines)

    def _write_list(self, name: str, head: str, lines: Sequence[str]) -> int:
        target = self.folder / name
        if lines:
            text = head + "".join(lines)
            write_atomically(target, lambda file: file.write(text.encode()))
        else:
            target.unlink(missing_ok=True)
        return len(lines)

    def write_h5ad(self) -> Path:
        """Write all shards as one AnnData file; all are in memory at once."""
        pandas, shards = extra("pandas", "anndata", "--format h5ad"), list(self.read_all())
        index: Any = pandas.Index([path for shard in shards for path in shard.path], name="path")
        columns: dict[str, Any] = {"id": np.concatenate([shard.id for shard in shards])}
        if self.labels:
            columns["label"] = pandas.Categorical([label for shard in shards for label in shard.label or ()])
        for name, column in _columns_of(shards):
            text = pa.types.is_string(column.type)
            columns[name] = pandas.Categorical(column.to_pylist()) if text else column.to_pandas().to_numpy()
        key = columns.get(self.key or "")
        if self.key is not None and key is not None and len({*key}) == len(index) and not pandas.isna(key).any():
            columns = {"path": index.to_numpy(), **columns}
            del columns[self.key]
            index = pandas.Index([str(one) for one in key], name=self.key)
        target = self.folder / "embeddings.h5ad"
        partial = partial_name(target)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # from its own dependencies
            anndata = extra("anndata", "anndata", "--format h5ad")
            table = anndata.AnnData(
                X=np.concatenate([shard.vector for shard in shards]),
                obs=pandas.DataFrame(columns, index=index),
                uns={"encoder": self.encoder},
            )
            table.write_h5ad(partial)
        partial.replace(target)
        return target


def _columns_of(shards: Sequence[Shard]) -> Iterator[tuple[str, pa.ChunkedArray]]:
    """The columns of the embedded table that fit into AnnData's obs; HDF5 takes no / in a name."""
    tables = [shard.more for shard in shards if shard.more is not None and shard.more.num_rows]
    if tables:
        whole = pa.concat_tables(tables, promote_options="permissive")
        for name, column in zip(whole.column_names, whole.columns, strict=True):
            if name != "image_box":
                yield ("table__index" if name == "_index" else name.replace("/", "_")), column


def list_digest(names: Sequence[str]) -> str:
    """A digest that is equal for equal sorted lists of paths."""
    digest = hashlib.blake2b(digest_size=16)
    for name in names:
        digest.update(os.fsencode(name) + b"\0")
    return digest.hexdigest()


def spelt(name: str) -> str:
    r"""A path as text: bytes that are no UTF-8 as \xNN."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _quoted(text: str) -> str:
    return text.replace('"', '""')


def _write_parquet(file: BinaryIO, shard: Shard) -> None:
    flat = pa.array(np.ascontiguousarray(shard.vector).reshape(-1), pa.float32())
    columns: dict[str, Any] = {
        "path": pa.array(shard.path, pa.string()),
        "id": pa.array(shard.id, pa.int64()),
        "vector": pa.FixedSizeListArray.from_arrays(flat, shard.vector.shape[1]),
    }
    if shard.label is not None:
        columns["label"] = pa.array(shard.label, pa.string())
    if shard.more is not None:
        columns |= dict(zip(shard.more.column_names, shard.more.columns, strict=True))
    about = {"unreadable": json_text(shard.unreadable), "no_cell": json_text([*shard.no_cell])}
    pq.write_table(pa.table(columns).replace_schema_metadata(about), file)


def _read_parquet(file: Path) -> Shard:
    table = pq.read_table(file)
    rows = table["vector"].combine_chunks()
    vector = np.asarray(rows.values[rows.offset * rows.type.list_size :]).reshape(-1, rows.type.list_size)
    label = table["label"].to_pylist() if "label" in table.column_names else None
    others = [name for name in table.column_names if name not in OURS]
    more = table.select(others).replace_schema_metadata() if others else None
    told = _told_in(table.num_rows, table.schema)
    names = table["path"].to_pylist()
    return Shard(table["id"].to_numpy(), names, vector, label, told.unreadable, more, told.no_cell)


class _Told(NamedTuple):
    """What a shard says beside its rows."""

    rows: int
    unreadable: list[tuple[str, str]]
    no_cell: list[str]


def _peek_parquet(file: Path) -> _Told:
    with pq.ParquetFile(file) as parquet:
        return _told_in(parquet.metadata.num_rows, parquet.schema_arrow)


def _told_in(rows: int, schema: Any) -> _Told:
    unreadable = [(path, why) for path, why in json.loads(schema.metadata[b"unreadable"])]
    return _Told(rows, unreadable, json.loads(schema.metadata.get(b"no_cell", b"[]")))


def _write_npz(file: BinaryIO, shard: Shard) -> None:
    labels = {} if shard.label is None else {"label": np.array([label or "" for label in shard.label], dtype=str)}
    np.savez(
        file,
        path=np.array(shard.path, dtype=str),
        id=shard.id,
        vector=shard.vector,
        unreadable=np.array(shard.unreadable, dtype=str).reshape(-1, 2),
        no_cell=np.array(shard.no_cell, dtype=str),
        **labels,  # type: ignore[arg-type]
        **_arrays(shard.more),  # type: ignore[arg-type]
    )


def _arrays(more: pa.Table | None) -> dict[str, NDArray[Any]]:
    """The columns of a table as arrays: text empty, and numbers NaN, where it says nothing."""
    arrays: dict[str, NDArray[Any]] = {}
    for name, column in () if more is None else zip(more.column_names, more.columns, strict=True):
        if name == "image_box":
            arrays[_TABLE + name] = np.array(column.to_pylist(), np.int64).reshape(-1, 4)
        elif pa.types.is_string(column.type) or (pa.types.is_boolean(column.type) and column.null_count):
            arrays[_TABLE + name] = np.array([str(one) if one is not None else "" for one in column.to_pylist()], str)
        else:
            arrays[_TABLE + name] = column.to_numpy()
    return arrays


def _table_of(arrays: Any) -> pa.Table | None:
    """The reverse of `_arrays`."""
    columns: dict[str, Any] = {}
    for name in (name for name in arrays.files if name.startswith(_TABLE)):
        values, called = arrays[name], name.removeprefix(_TABLE)
        if values.ndim == 2:
            columns[called] = pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), 4)
        elif values.dtype.kind == "U":
            columns[called] = pa.array([text or None for text in values.tolist()], pa.string())
        else:
            columns[called] = pa.array(values)
    return pa.table(columns) if columns else None


def _read_npz(file: Path) -> Shard:
    with file.open("rb") as opened, np.load(opened) as arrays:  # numpy leaves a damaged file open
        label = [text or None for text in arrays["label"].tolist()] if "label" in arrays.files else None
        told = _told_of(arrays)
        more = _table_of(arrays)
        paths = arrays["path"].tolist()
        return Shard(arrays["id"], paths, arrays["vector"], label, told.unreadable, more, told.no_cell)


def _peek_npz(file: Path) -> _Told:
    with file.open("rb") as opened, np.load(opened) as arrays:  # numpy leaves a damaged file open
        return _told_of(arrays)


def _told_of(arrays: Any) -> _Told:
    unreadable = [(path, why) for path, why in arrays["unreadable"].tolist()]
    no_cell = arrays["no_cell"].tolist() if "no_cell" in arrays.files else []
    return _Told(len(arrays["id"]), unreadable, no_cell)
