"""SHA-256 of large files, computed once: a file of the same size and time of change is not read again.

The results lie beside the files, or in the user's cache folder if that is read-only.
"""

import hashlib
import json
import logging
import os
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from sslcells import launcher
from sslcells.data._scan import OURS
from sslcells.data._verified import cache_folder, recent
from sslcells.storage import json_text, write_atomically

_FILE = "checksums.json"
_BLOCK = 2**22
_TELL = 10.0
"""seconds until the expected time is printed"""
_log = logging.getLogger(__name__)


def wrong(folder: Path, expected: Mapping[str, tuple[int, str]], whole: bool = True) -> dict[str, str]:
    """Name → why, for the files of a folder that are not of these sizes in bytes and, if `whole`, SHA-256s."""
    now = time.time_ns()
    bad: dict[str, str] = {}
    stats: dict[str, tuple[int, int]] = {}
    for name, (size, _) in expected.items():
        try:
            stat = os.stat(folder / name)
        except OSError as error:
            bad[name] = "missing" if isinstance(error, FileNotFoundError) else str(error.strerror)
            continue
        stats[name] = stat.st_size, stat.st_mtime_ns
        if stat.st_size != size:
            bad[name] = f"damaged: it has {stat.st_size:,} bytes, not {size:,}"
    if not whole:
        return bad
    places = [folder / OURS / _FILE, cache_folder(folder) / _FILE]
    known = _remembered(places)
    left = [name for name in expected if name not in bad and known.get(name) != [*stats[name], expected[name][1]]]
    for name, digest in _digests(folder, left, sum(expected[name][0] for name in left)).items():
        if digest == expected[name][1]:
            known[name] = [*stats[name], digest]
        else:
            known.pop(name, None)
            bad[name] = "damaged: its SHA-256 is another" if len(digest) == 64 else digest
    if left:
        _remember(places, {name: row for name, row in known.items() if not recent(row[1], now)})
    return bad


def _digests(folder: Path, names: Sequence[str], total: int) -> dict[str, str]:
    """SHA-256 of each file, or why it cannot be read."""
    out: dict[str, str] = {}
    began, told, done = time.monotonic(), False, 0
    with ThreadPoolExecutor(min(8, launcher.cores())) as pool:
        for name, (digest, size) in zip(names, pool.map(lambda name: _digest(folder / name), names), strict=True):
            out[name], done = digest, done + size
            now = time.monotonic()
            if not told and now > began + _TELL and done:
                told, seconds = True, (total - done) * (now - began) / done
                _log.warning("%s: verifying %d files, once: about %d s more", folder, len(names), seconds)
    return out


def _digest(file: Path) -> tuple[str, int]:
    sha, size = hashlib.sha256(), 0
    try:
        with file.open("rb") as opened:
            while block := opened.read(_BLOCK):
                sha.update(block)
                size += len(block)
    except OSError as error:
        return str(error.strerror), size
    return sha.hexdigest(), size


def _remembered(places: Sequence[Path]) -> dict[str, list[Any]]:
    for place in places:
        with suppress(OSError, ValueError):
            known = json.loads(place.read_text(encoding="utf-8"))
            if isinstance(known, dict):
                return {str(name): row for name, row in known.items() if isinstance(row, list) and len(row) == 3}
    return {}


def _remember(places: Sequence[Path], known: Mapping[str, list[Any]]) -> None:
    text = json_text(dict(known)).encode()
    for place in places:
        with suppress(OSError):
            place.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(place, lambda file: file.write(text))
            return
