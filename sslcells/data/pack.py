"""A pack, which `sslcells pack` wrote: images decoded once, in shards of fixed-size uint8 arrays, with their table."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from pydantic import Field
from torch import Tensor

from sslcells.config import ConfigError, Section
from sslcells.data import SPLITS, DataError, ImageSet
from sslcells.data._checksums import wrong
from sslcells.data._found import Clock, Found
from sslcells.data._names import some
from sslcells.data._packed import Packed
from sslcells.data._rows import Rows
from sslcells.data.folder import nearest_folder
from sslcells.storage import is_folder, patiently
from sslcells.values import place

MANIFEST = "pack.json"
FORMAT = 1
"""Version of the files of a pack. A pack of a later version is refused."""


class Config(Section):
    """A folder that `sslcells pack` wrote; pixels, labels and sources are those of the data set that it packed."""

    kind: Literal["pack"] = "pack"
    """Images that `sslcells pack` decoded, read many times faster than files."""
    path: str = Field(min_length=1)
    """The folder of the pack."""
    verify: Literal["full", "size"] = "full"
    """Check at the start: the SHA-256 of every shard, once (`full`), or only that it is there in its size."""


class File(NamedTuple):
    """A file of a pack, as its manifest lists it."""

    name: str
    bytes: int
    sha256: str


class Part(NamedTuple):
    """A split of a pack, as its manifest describes it."""

    images: int
    table: File
    shards: list[File]
    """as many as are finished; all but the last one have `Manifest.shard` images"""
    content: str
    """digest of the names, labels, sources and sites"""
    sourced: bool
    """True if some sources are known"""
    targets: bool
    """True if images may have several labels"""
    broken: dict[str, str]
    """name → reason, for images that were left out"""


class Manifest(NamedTuple):
    """What pack.json says."""

    source: dict[str, Any]
    """the data section of the configuration that was packed"""
    reading: dict[str, Any] | None
    """how an encoder trained on the images reads files; None for data sets that are no files"""
    where: str
    """where the images were"""
    shape: tuple[int, int, int]
    """(C, H, W)"""
    shard: int
    """images in a shard"""
    classes: tuple[str, ...]
    sites: tuple[str, ...] | None
    """names of the laboratories; None if the data set does not say"""
    splits: dict[str, Part]

    @property
    def row(self) -> int:
        """Bytes of an image."""
        return int(np.prod(self.shape))

    def shards(self, split: str) -> int:
        """Number of shards of a split when it is complete."""
        return -(-self.splits[split].images // self.shard)

    @property
    def missing(self) -> int:
        """Number of shards that are not written yet."""
        return sum(self.shards(split) - len(part.shards) for split, part in self.splits.items())


def read_manifest(folder: Path) -> Manifest:
    """What the pack.json in a folder says.

    Raises:
        ConfigError: if there is none, or it is damaged or of a later version.
    """
    file = folder / MANIFEST
    try:
        given = json.loads(patiently(lambda: file.read_text(encoding="utf-8"), str(file)))
        if given["format"] != FORMAT:
            raise ConfigError(
                f"{file} has format {given['format']!r}, and this version of sslcells reads {FORMAT}: update sslcells, "
                f"or pack the images again"
            )
        given.pop("format"), given.pop("sslcells")
        given["shape"], given["classes"] = tuple(given["shape"]), tuple(given["classes"])
        given["sites"] = None if given["sites"] is None else tuple(given["sites"])
        given["splits"] = {name: _part(part) for name, part in given["splits"].items()}
        return Manifest(**given)
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{file} is damaged ({type(error).__name__}: {error}); pack the images again, or copy it from where it is "
            f"whole"
        ) from None


def _part(given: Mapping[str, Any]) -> Part:
    shards = [File(**shard) for shard in given["shards"]]
    return Part(**{**given, "table": File(**given["table"]), "shards": shards})


class PackImages(ImageSet):
    """One split of a pack; images lie in its shards as (N, C, H, W) uint8, in the format of NumPy's .npy files."""

    def __init__(self, folder: Path, manifest: Manifest, split: str, table: pa.Table, found: Found) -> None:
        part = manifest.splits[split]
        files = [str(folder / shard.name) for shard in part.shards]
        self._rows = Rows(files, [_start(Path(file), manifest, i, part) for i, file in enumerate(files)], manifest.row)
        self._shard = manifest.shard
        self._names = Packed(names_in(table))
        self.shape = manifest.shape
        self.channels = self.shape[0]
        self.classes = manifest.classes
        self.labels = _ids(table, "label")
        self.sources = _ids(table, "source")
        self.sourced = torch.from_numpy(table["sourced"].to_numpy().astype(bool)) if part.sourced else None
        if part.targets:
            self.targets = torch.tensor(table["targets"].to_pylist(), dtype=torch.uint8)
        if manifest.sites is not None:
            self.labs, self.lab_names = _ids(table, "site"), manifest.sites
        self.found = found

    def pixels(self, index: int) -> Tensor:
        """Image `index`: (C, H, W) uint8.

        Raises:
            DataError: if its shard can no longer be read; the message names it.
        """
        assert self.shape is not None
        out = torch.empty(1, *self.shape, dtype=torch.uint8)
        self.fill([index], out)
        return out[0]

    def fill(self, indices: Sequence[int], out: Tensor) -> None:
        """Read images into `out`, (B, C, H, W) uint8, in the order of the shards and in large pieces."""
        shard, row = np.divmod(np.asarray(indices, np.int64), self._shard)
        rows = self._rows
        try:
            patiently(lambda: rows.read(shard.tolist(), row.tolist(), out), rows.files.names[int(shard[0])])
        except OSError as error:
            raise DataError(f"{error.filename}: {error.strerror}") from None
        except EOFError as error:
            raise DataError(f"{error}; it was longer when the pack was opened") from None

    def name(self, index: int) -> str:
        """The image's name in the data set that was packed."""
        return self._names[index]


def open_splits(config: Config, wanted: Sequence[str] = SPLITS) -> dict[str, ImageSet]:
    """Those of the wanted splits that the pack has. Only their tables are in memory.

    Raises:
        ConfigError: if there is no pack, it is not complete, or a file of it is missing or damaged.
    """
    folder = place(config.path)
    manifest = _manifest(config, folder)
    return {split: _opened(config, folder, manifest, split) for split in wanted if split in manifest.splits}


def _opened(config: Config, folder: Path, manifest: Manifest, split: str) -> PackImages:
    clock = Clock()
    part = manifest.splits[split]
    files = {file.name: (file.bytes, file.sha256) for file in (part.table, *part.shards)}
    bad = wrong(folder, files, whole=config.verify == "full")
    if bad:
        first = next(iter(bad))
        more = f", and {len(bad) - 1} more: {some([*bad][1:])}" if len(bad) > 1 else ""
        raise ConfigError(
            f"{folder / first} is {bad[first]}{more}; the command that packed the images writes it again: sslcells "
            f"pack … --out {folder}"
        )
    clock.lap("verifying")
    table = _table(folder / part.table.name, part)
    found = Found(where=f"{folder}, packed from {manifest.where}", broken=part.broken, seconds=clock.laps)
    images = PackImages(folder, manifest, split, table, found)
    clock.lap("reading")
    return images


def source_of(config: Section) -> dict[str, Any]:
    """The data section that a pack's images have: that of the data set that was packed; of others their own.

    So a run goes on from the pack of its images. A pack that is no longer there has its own.
    """
    if isinstance(config, Config):
        try:
            return read_manifest(place(config.path)).source
        except ConfigError:
            pass
    return config.model_dump(mode="json")


def reading_of(config: Config) -> dict[str, Any] | None:
    """How an encoder trained on the pack reads files; None if the packed images were no files."""
    return read_manifest(place(config.path)).reading


def names_in(table: pa.Table) -> list[str]:
    """The names of the images in a pack's table; those that are no text are kept as bytes."""
    names: list[Any] = table["path"].to_pylist()
    return [name if isinstance(name, str) else name.decode("utf-8", "surrogateescape") for name in names]


def _manifest(config: Config, folder: Path) -> Manifest:
    if not is_folder(folder):
        what = "is a file, not the folder of a pack" if folder.exists() else f"no such folder{nearest_folder(folder)}"
        raise ConfigError(f"data.path={config.path!r}: {what}")
    if not (folder / MANIFEST).is_file():
        raise ConfigError(
            f"data.path={config.path!r}: it has no {MANIFEST}; sslcells pack IMAGES --out FOLDER makes a pack, and "
            f"data.kind=folder reads image files"
        )
    manifest = read_manifest(folder)
    if manifest.missing:
        total = sum(map(manifest.shards, manifest.splits))
        raise ConfigError(
            f"{folder} is not complete: {total - manifest.missing} of {total} shards are written; the command that "
            f"began it goes on: sslcells pack … --out {folder}"
        )
    return manifest


def _table(file: Path, part: Part) -> pa.Table:
    try:
        table = pq.read_table(file, memory_map=False)
    except (OSError, pa.ArrowInvalid) as error:
        raise ConfigError(f"{file} cannot be read: {next(iter(str(error).splitlines()), error)}") from None
    if table.num_rows != part.images:
        raise ConfigError(f"{file} has {table.num_rows:,} rows, and {MANIFEST} says {part.images:,}: pack again")
    return table


def _ids(table: pa.Table, column: str) -> Tensor:
    return torch.from_numpy(table[column].to_numpy().astype(np.int64))


def _start(file: Path, manifest: Manifest, number: int, part: Part) -> int:
    """The byte at which the images of a shard start.

    Raises:
        ConfigError: if its header is not that of the images that the manifest names.
    """
    count = min(manifest.shard, part.images - number * manifest.shard)
    try:
        with file.open("rb") as opened:
            np.lib.format.read_magic(opened)
            shape, by_column, dtype = np.lib.format.read_array_header_1_0(opened)
            if shape == (count, *manifest.shape) and dtype == np.uint8 and not by_column:
                return opened.tell()
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file} cannot be read: {error}") from None
    raise ConfigError(f"{file} holds {dtype} {shape}, and {MANIFEST} says uint8 {(count, *manifest.shape)}: pack again")
