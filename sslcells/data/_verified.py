"""Verifies image files once, and remembers the result, so that no file is decoded twice.

There is one Parquet file for each split and way of reading, beside the images, or in the user's cache folder if that is
read-only. A result is valid while name, size and time of change stay the same. Broken files are not remembered.
"""

import hashlib
import importlib.util
import logging
import os
import time
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import pyarrow as pa
import pyarrow.parquet as pq
import tifffile
from torch.utils.data import DataLoader, Dataset

from sslcells import launcher, values
from sslcells.data import _forked
from sslcells.data._decode import READER, Decoder, Header, Unreadable
from sslcells.data._scan import OURS, Listing
from sslcells.data.loader import with_workers
from sslcells.storage import write_atomically

_READERS = 16
"""processes that verify images; at most one per core"""
_FEW = 4096
"""images that threads verify instead, as processes take a while to begin"""
_BLOCK = 64
"""images that are verified at a time"""
_KEPT = 24
"""Parquet files kept in one folder: three splits, and eight ways to read them"""
_SAVE = 60.0
"""seconds of work that a kill may lose"""
_TELL, _AGAIN = 10.0, 60.0
"""seconds until the expected time is printed, and until it is printed again"""
_FRESH = 2 * 10**9
"""nanoseconds: a file changed so recently may change again with the same time stamp"""

_SCHEMA = pa.schema(
    [
        ("name", pa.binary()),
        ("bytes", pa.int64()),
        ("time", pa.int64()),
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("kind", pa.dictionary(pa.int32(), pa.string())),
        ("pages", pa.int32()),
        ("planes", pa.string()),
        ("part", pa.string()),
        ("um_per_pixel", pa.float64()),
        ("scale_from", pa.dictionary(pa.int32(), pa.string())),
    ]
)

_log = logging.getLogger(__name__)


class Looks:
    """The result for the files of a listing: the header of each, or why it is broken."""

    def __init__(self, headers: list[Header | None], broken: dict[str, str], looked: int) -> None:
        self.headers, self.broken = headers, broken
        self.looked = looked
        """number of files opened; the others were remembered"""


def look(root: Path, listing: Listing, decoder: Decoder, whole: bool, part: str) -> Looks:
    """Read the header of every file, or decode it, unless remembered; `part` names the split's folder."""
    memory = _Memory(root, decoder, whole, part)
    headers = memory.of(listing)
    missing = [i for i, header in enumerate(headers) if header is None]
    names = listing.names
    broken: dict[str, str] = {}
    began = saved = time.monotonic()
    told, every = began, _TELL
    done = 0
    for block in _headers(root, [names[i] for i in missing], decoder, whole):
        for header in block:
            i = missing[done]
            done += 1
            if isinstance(header, Header):
                headers[i] = header
            else:
                broken[names[i]] = header
        now = time.monotonic()
        if now > told + every:
            told, every, left = now, max(every, _AGAIN), (len(missing) - done) * (now - began) / done
            _log.warning(
                "%s: looked at %d of %d images, once: about %d s more (data.verify=header or none takes less)",
                root / part,
                done,
                len(missing),
                left,
            )
        if now > saved + _SAVE:
            memory.keep(listing, headers)
            saved = time.monotonic()
    if len(missing) > len(broken):
        memory.keep(listing, headers)
    return Looks(headers, broken, len(missing))


def headers_of(root: Path, names: Sequence[str], decoder: Decoder) -> list[Header | None]:
    """The headers of files, of which nothing is remembered; None for those that cannot be read."""
    blocks = _headers(root, names, decoder, whole=False)
    return [header if isinstance(header, Header) else None for block in blocks for header in block]


def _headers(root: Path, names: Sequence[str], decoder: Decoder, whole: bool) -> Iterator[list[Header | str]]:
    """The header of each file, or why it is broken, in order.

    Python reads many small files no faster in several threads than in one, so processes read them. A few files are
    read before processes have begun.

    Raises:
        DataError: if a process dies.
    """
    blocks = _Blocks(root, names, decoder, whole)
    workers = min(_READERS, launcher.cores())
    if len(names) < _FEW or workers == 1:
        with ThreadPoolExecutor(workers) as pool:
            yield from pool.map(blocks.__getitem__, range(len(blocks)))
        return
    with with_workers(_from_processes(blocks, workers)) as headers:
        yield from headers


def _from_processes(blocks: "_Blocks", workers: int) -> Generator[list[Header | str], None, None]:
    yield from DataLoader(blocks, batch_size=None, collate_fn=list, **_forked.processes(workers))


class _Blocks(Dataset[list[Header | str]]):
    """The files in blocks: the headers of the files of block `index`, or why one is broken."""

    def __init__(self, root: Path, names: Sequence[str], decoder: Decoder, whole: bool) -> None:
        self._root, self._names, self._decoder, self._whole = root, names, decoder, whole

    def __len__(self) -> int:
        return -(-len(self._names) // _BLOCK)

    def __getitem__(self, index: int) -> list[Header | str]:
        return [self._header(name) for name in self._names[index * _BLOCK : (index + 1) * _BLOCK]]

    def _header(self, name: str) -> Header | str:
        try:
            return self._decoder.header(f"{self._root}/{name}", self._whole)
        except Unreadable as error:
            return str(error)


class _Memory:
    """The results of earlier runs that read the files in the same way."""

    def __init__(self, root: Path, decoder: Decoder, whole: bool, part: str) -> None:
        self._now = time.time_ns()
        way = {
            "reader": READER,
            **asdict(decoder),
            "whole": whole,
            "part": part,
            "pillow": PIL.__version__,
            "tifffile": tifffile.__version__,
            "imagecodecs": importlib.util.find_spec("imagecodecs") is not None,
        }
        name = f"verified-{_digest(repr(sorted(way.items())))}.parquet"
        self._places = [root / OURS / name, cache_folder(root) / name]

    def of(self, listing: Listing) -> list[Header | None]:
        """The remembered header of each unchanged file, from the first place that has an intact Parquet file."""
        for place in self._places:
            with suppress(FileNotFoundError):
                try:
                    return _match(listing, pq.read_table(place, schema=_SCHEMA, memory_map=False))
                except FileNotFoundError:
                    raise
                except Exception as error:  # damaged in any way: verify everything again
                    _log.warning("%s is damaged (%s): verifying the images again", place, _first_line(error))
        return [None] * len(listing.names)

    def keep(self, listing: Listing, headers: Sequence[Header | None]) -> None:
        """Write the results to the first place that can be written."""
        rows = [
            (os.fsencode(name), size, changed, *header.size, *header[1:])
            for name, size, changed, header in zip(listing.names, listing.sizes, listing.times, headers, strict=True)
            if header is not None and not recent(changed, self._now)
        ]
        if not rows:
            return
        columns = [pa.array(column, field.type) for column, field in zip(zip(*rows, strict=True), _SCHEMA, strict=True)]
        table = pa.table(columns, schema=_SCHEMA)
        for place in self._places:
            try:
                place.parent.mkdir(parents=True, exist_ok=True)
                write_atomically(place, lambda file: pq.write_table(table, file, compression="zstd"))
            except OSError as error:
                _log.debug("%s cannot be written: %s", place, error)
                continue
            _forget(place.parent)
            return


def _match(listing: Listing, table: pa.Table) -> list[Header | None]:
    """The remembered header of each file with the same size and time."""
    at = {name: row for row, name in enumerate(table["name"].to_pylist())}
    kinds, planes, parts, origins = (table[key].to_pylist() for key in ("kind", "planes", "part", "scale_from"))
    scales = np.asarray(table["um_per_pixel"]).tolist()
    size, changed, height, width, pages = (
        np.asarray(table[key]).tolist() for key in ("bytes", "time", "height", "width", "pages")
    )
    out: list[Header | None] = []
    for name, now_size, now_changed in zip(listing.names, listing.sizes, listing.times, strict=True):
        row = at.get(os.fsencode(name))
        if row is None or size[row] != now_size or changed[row] != now_changed:
            out.append(None)
        else:
            scale = scales[row], origins[row]
            out.append(Header((height[row], width[row]), kinds[row], pages[row], planes[row], parts[row], *scale))
    return out


def _forget(folder: Path) -> None:
    """Remove the oldest Parquet files, left by other ways of reading."""
    with suppress(OSError):
        files = sorted(folder.glob("verified-*.parquet"), key=lambda file: file.stat().st_mtime, reverse=True)
        for old in files[_KEPT:]:
            old.unlink(missing_ok=True)


def cache_folder(root: Path) -> Path:
    """The place in the user's cache folder for what is remembered of a folder that cannot be written."""
    given = os.environ.get("XDG_CACHE_HOME")
    return values.place(given or "~/.cache") / "sslcells" / _digest(os.path.realpath(root))


def recent(changed: int, now: int | None = None) -> bool:
    """True if a file of this time of change, in nanoseconds, may change again with the same time stamp."""
    return abs((time.time_ns() if now is None else now) - changed) <= _FRESH


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=8).hexdigest()


def _first_line(error: Exception) -> Any:
    return next(iter(str(error).splitlines()), type(error).__name__)
