"""`sslcells pack`: decodes every image of a data set once, into shards that training reads many times faster."""

import hashlib
import logging
import os
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from rich.console import Console

from sslcells import __version__, launcher
from sslcells.config import ConfigError, Section, load
from sslcells.data import FILES, Batch, DataError, ImageSet, open_splits, reading
from sslcells.data._checksums import wrong
from sslcells.data.listing import PATHS
from sslcells.data.loader import InOrder, read, with_workers
from sslcells.data.pack import FORMAT, MANIFEST, File, Manifest, Part, read_manifest
from sslcells.run.lock import Lock
from sslcells.run.progress import bars
from sslcells.storage import is_file, json_text, write_atomically
from sslcells.values import place

SHARD = 256
"""MiB of a shard: the most that a kill costs"""
MIB = 2**20
_BATCH = 64
"""images that a process decodes at a time"""

_log = logging.getLogger(__name__)


def pack(
    source: str,
    out: str,
    overrides: Sequence[str] = (),
    config: str | None = None,
    size: str | None = None,
    shard: int | None = None,
    workers: int | None = None,
) -> Path:
    """Pack the data set at `source` into the folder `out`, and return it; a pack that was begun goes on.

    `overrides` are of the section `data`, `config` is a file or recipe with that section, `size` is data.size, and
    `shard` is in MiB.

    Raises:
        ConfigError: if the data set or `out` does not allow it, or `out` holds a pack of other images.
        DataError: if an image cannot be read, or a shard cannot be written.
    """
    data = _data(source, overrides, config, size)
    splits = open_splits(data)
    folder = place(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = Lock(folder, otherwise="choose another --out")
    except OSError as error:
        raise ConfigError(f"--out {folder} cannot be written: {error}") from None
    try:
        tables = {name: _table(images) for name, images in splits.items()}
        fresh = _fresh(source, data, splits, tables, shard)
        made = _go_on(folder, fresh, shard is not None)
        for left in folder.glob(".*.partial"):
            with suppress(OSError):
                left.unlink()
        for name, table in tables.items():
            _write_table(folder, made, name, table)
        _write_manifest(folder, made)
        workers = max(1, launcher.cores() - 1) if workers is None else workers
        _shards(folder, made, splits, workers)
    except OSError as error:
        raise DataError(f"{error.filename or folder} cannot be written: {error.strerror or error}") from None
    finally:
        lock.release()
    _say(folder, made)
    return folder


def _data(source: str, overrides: Sequence[str], config: str | None, size: str | None) -> Section:
    """The data section of `source`."""
    others = [word for word in overrides if not word.startswith("data.")]
    if others:
        raise ConfigError(f"{others[0]}: pack takes changes to the section data alone, such as data.size=128")
    sized = [] if size is None else [f"data.size={_height_width(size)}"]
    kinds = [word.partition("=")[2] for word in overrides if word.startswith("data.kind=")]
    kind = kinds[-1] if kinds else load(config, overrides).data.kind if config else _kind(source)  # type: ignore[attr-defined]
    key = {"table": "table", "torchvision": "root"}.get(kind, "path")
    found = [f"data.kind={kind}", *([] if kind == "synthetic" else [f"data.{key}={source}"])]
    # Every image is decoded for the pack: doing it before, to verify it, would take as long again.
    skips = any(word.replace(" ", "") == "data.on_error=skip" for word in overrides)
    verify = ["data.verify=header"] if kind in ("folder", "table") and not skips else []
    data = load(config, [*found, *verify, *overrides, *sized]).data
    if data.kind == "pack":  # type: ignore[attr-defined]
        raise ConfigError(f"{source} is a pack; copy the folder as it is")
    if getattr(data, "decode", "worker") == "device":
        raise ConfigError("data.decode=device is for training on files; a pack is decoded where they are read")
    return data


def _height_width(size: str) -> str:
    """`128` as it is, `96x128` as [96,128]."""
    return f"[{size.replace('x', ',')}]" if "x" in size else size


def _kind(source: str) -> str:
    file = place(source)
    if (file / MANIFEST).exists():
        return "pack"
    suffix = file.suffix.lower()
    if file.is_file() and suffix == ".npz":
        return "medmnist"
    return "table" if file.is_file() else "folder"


def _fresh(
    source: str, data: Section, splits: Mapping[str, ImageSet], tables: Mapping[str, pa.Table], shard: int | None
) -> Manifest:
    """The manifest of a pack without any shard."""
    shapes = {name: tuple(images.pixels(0).shape) for name, images in splits.items()}
    if len({*shapes.values()}) > 1:
        each = ", ".join(f"{name} {'×'.join(map(str, shape))}" for name, shape in shapes.items())
        raise ConfigError(f"the splits have images of different sizes ({each}); give one size with --size")
    train = splits["train"]
    channels, height, width = shapes["train"]
    if shard is not None and shard < 1:
        raise ConfigError(f"--shard {shard} should be at least 1 MiB")
    parts = {
        name: Part(
            images=len(images),
            table=File(f"{name}.parquet", 0, ""),
            shards=[],
            content=_content(tables[name]),
            sourced=images.sourced is not None,
            targets=images.targets is not None,
            broken={} if images.found is None else dict(images.found.broken),
        )
        for name, images in splits.items()
    }
    of_files = getattr(data, "kind", "") in FILES
    return Manifest(
        source=data.model_dump(mode="json"),
        reading=reading(data, height) if of_files else None,
        where=os.path.abspath(place(source)),
        shape=(channels, height, width),
        shard=max(1, ((shard or SHARD) * MIB) // (channels * height * width)),
        classes=train.classes,
        sites=None if train.labs is None else train.lab_names,
        splits=parts,
    )


def _table(images: ImageSet) -> pa.Table:
    """What is known of the images of a split: one row an image."""
    names = [images.name(i) for i in range(len(images))]
    try:
        paths = pa.array(names, pa.string())
    except UnicodeEncodeError:
        paths = pa.array([name.encode("utf-8", "surrogateescape") for name in names], pa.binary())
    labels = images.labels.numpy()
    named = [images.classes[label] if label >= 0 else None for label in labels.tolist()]
    columns: dict[str, Any] = {
        "path": paths,
        "label": labels,
        "class": pa.array(named, pa.string()),
        "source": images.sources.numpy(),
        "sourced": np.zeros(len(images), bool) if images.sourced is None else images.sourced.numpy(),
        "site": np.zeros(len(images), np.int64) if images.labs is None else images.labs.numpy(),
    }
    if images.targets is not None:
        columns["targets"] = pa.array(images.targets.tolist(), pa.list_(pa.uint8()))
    return pa.table(columns)


def _content(table: pa.Table) -> str:
    digest = hashlib.sha256()
    for name, column in zip(table.column_names, table.columns, strict=True):
        digest.update(f"{name}\0{column.to_pylist()!r}\0".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


_MAY_DIFFER = ("where", "splits", "source")


def _go_on(folder: Path, fresh: Manifest, shard_given: bool) -> Manifest:
    """The pack that was begun in a folder, with the shards that are whole; `fresh` if there is none.

    Raises:
        ConfigError: if it is of other images or another way to read them, or there are other files in the folder.
    """
    if not is_file(folder / MANIFEST):
        if others := sorted(name for name in os.listdir(folder) if not name.startswith(".") and name != "lock.json"):
            raise ConfigError(f"--out {folder} is not empty ({others[0]}) and holds no pack; choose a new folder")
        return fresh
    before = read_manifest(folder)
    if not any(part.shards for part in before.splits.values()):
        return fresh
    differs = [f for f in Manifest._fields if f not in _MAY_DIFFER and getattr(before, f) != getattr(fresh, f)]
    if not shard_given and "shard" in differs:
        differs.remove("shard")
    paths = {key.partition(".")[2] for key in PATHS}
    keys = before.source.keys() | fresh.source.keys()
    of_data = [k for k in keys if k not in paths and before.source.get(k) != fresh.source.get(k)]
    differs += [f"data.{key}" for key in sorted(of_data)]
    for name in before.splits.keys() | fresh.splits.keys():
        old, new = before.splits.get(name), fresh.splits.get(name)
        if old is None or new is None or (old.images, old.content) != (new.images, new.content):
            count = [0 if part is None else part.images for part in (old, new)]
            differs.append(f"the images of {name}, {count[0]:,} there and {count[1]:,} now")
    if differs:
        raise ConfigError(
            f"--out {folder} holds a pack of other images or settings: {', '.join(differs)}; choose another folder, or "
            f"remove it"
        )
    return _whole(folder, before._replace(where=fresh.where, source=fresh.source))


def _whole(folder: Path, before: Manifest) -> Manifest:
    """The manifest with the shards that are whole."""
    listed = {file.name: (file.bytes, file.sha256) for part in before.splits.values() for file in part.shards}
    bad = wrong(folder, listed)
    for name, why in bad.items():
        _log.warning("%s is %s: packing its images again", folder / name, why)
    whole = {
        name: part._replace(shards=[file for file in part.shards if file.name not in bad])
        for name, part in before.splits.items()
    }
    return before._replace(splits=whole)


def _write_table(folder: Path, made: Manifest, split: str, table: pa.Table) -> None:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    file = _write(folder / f"{split}.parquet", lambda out: out.write(memoryview(sink.getvalue())))
    made.splits[split] = made.splits[split]._replace(table=file)


def _write_manifest(folder: Path, made: Manifest) -> None:
    splits = {
        name: {**part._asdict(), "table": part.table._asdict(), "shards": [file._asdict() for file in part.shards]}
        for name, part in made.splits.items()
    }
    text = json_text({"format": FORMAT, "sslcells": __version__, **made._asdict(), "splits": splits}, indent=1) + "\n"
    write_atomically(folder / MANIFEST, lambda file: file.write(text.encode()))


def _shards(folder: Path, made: Manifest, splits: Mapping[str, ImageSet], workers: int) -> None:
    """Write the shards that are missing, and the manifest after each."""
    there = {file.name for part in made.splits.values() for file in part.shards}
    left = [(name, k) for name in splits for k in range(made.shards(name)) if _shard_name(name, k) not in there]
    with bars(Console(stderr=True)) as bar:
        advance = bar("images to pack", sum(len(_members(made, *one)) for one in left))
        for name, images in splits.items():
            numbers = [k for split, k in left if split == name]
            order = InOrder([i for k in numbers for i in _members(made, name, k)], _BATCH)
            with with_workers(read(images, order, workers, pin_memory=False)) as batches:
                pixels = _Images(batches, made.shape, advance)
                for k in numbers:
                    shape = len(_members(made, name, k)), *made.shape
                    file = _write_shard(folder / _shard_name(name, k), pixels, shape)
                    shards = sorted([*made.splits[name].shards, file])
                    made.splits[name] = made.splits[name]._replace(shards=shards)
                    _write_manifest(folder, made)


def _shard_name(split: str, number: int) -> str:
    return f"{split}-{number:06}.npy"


def _members(made: Manifest, split: str, number: int) -> range:
    return range(number * made.shard, min((number + 1) * made.shard, made.splits[split].images))


class _Images:
    """The pixels of batches as one sequence, of which any number is taken at a time."""

    def __init__(self, batches: Iterator[Batch], shape: tuple[int, ...], tell: Callable[[int], None]) -> None:
        self._batches, self._shape, self._tell = batches, shape, tell
        self._left = np.empty((0, *shape), np.uint8)

    def take(self, count: int) -> Iterator[NDArray[np.uint8]]:
        """The next `count` images, in pieces: (n, C, H, W) uint8.

        Raises:
            ConfigError: if an image has another size.
        """
        while count:
            if not len(self._left):
                self._left = next(self._batches).pixels.numpy()
                if self._left.shape[1:] != self._shape:
                    there, first = ("×".join(map(str, shape)) for shape in (self._left.shape[1:], self._shape))
                    raise ConfigError(f"an image is {there}, the first one {first}: give one size with --size")
            piece, self._left = self._left[:count], self._left[count:]
            count -= len(piece)
            self._tell(len(piece))
            yield piece


class _Hashed:
    """Writes to a file, and computes the SHA-256 of what is written."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._sha, self._size = file, hashlib.sha256(), 0

    def write(self, data: Any) -> int:
        self._sha.update(data)
        self._size += memoryview(data).nbytes
        return self._file.write(data)

    def done(self, name: str) -> File:
        """What a manifest says of the file."""
        return File(name, self._size, self._sha.hexdigest())


def _write(target: Path, write: Callable[[_Hashed], object]) -> File:
    """Write a file atomically."""
    files: list[File] = []

    def hashed(file: BinaryIO) -> None:
        out = _Hashed(file)
        write(out)
        files.append(out.done(target.name))

    write_atomically(target, hashed)
    return files[0]


def _write_shard(file: Path, images: _Images, shape: tuple[int, ...]) -> File:
    """Write a shard of (N, C, H, W) uint8."""

    def write(out: _Hashed) -> None:
        header = {"descr": "|u1", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(out, header)
        for piece in images.take(shape[0]):
            out.write(np.ascontiguousarray(piece))

    return _write(file, write)


def _say(folder: Path, made: Manifest) -> None:
    images = sum(part.images for part in made.splits.values())
    mib = images * made.row / MIB
    splits = ", ".join(f"{name} {part.images:,}" for name, part in made.splits.items())
    size = "×".join(map(str, made.shape))
    print(f"{folder}: {images:,} images of {size} uint8 ({splits}), {mib:,.4g} MiB in {_count(made)} shards")
    print(f"train on it: sslcells train --config pack data.path={shlex.quote(str(folder))}")


def _count(made: Manifest) -> int:
    return sum(map(made.shards, made.splits))
