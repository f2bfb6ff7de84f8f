"""Sources of images, as numbers that are the same in every split and every process."""

import hashlib
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from sslcells.config import ConfigError
from sslcells.data._columns import KNOWN, find, names_of, read
from sslcells.data._names import respelt, some, tidy


def source_id(source: str) -> int:
    """A stable 63-bit number for the name of a source."""
    digest = hashlib.blake2b(source.encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def source_ids(images: Iterable[str], sources: Iterable[str | None]) -> Tensor:
    """(N,) int64; an image without a known source is its own source.

    A source may be the path of an image, such as the original of augmented copies; then both share a number.
    """
    ids = [source_id(image if source is None else source) for image, source in zip(images, sources, strict=True)]
    return torch.tensor(ids, dtype=torch.int64)


def look_up_sources(images: Sequence[str], table: dict[str, str], pattern: str | None) -> list[str | None]:
    """The source of each image (path relative to data.path): from the table, or else from the pattern.

    The table may spell an image in another way: backslashes, Unicode NFC for NFD, and other letter case, if only one
    of its paths and one image can be meant.
    """
    search = re.compile(pattern).search if pattern is not None else lambda image: None
    spelt = respelt(images, table) if table else {}
    found: list[str | None] = []
    for image in images:
        source = table.get(spelt.get(image, image))
        if source is None and (match := search(image)):
            source = match[1]
        found.append(source)
    return found


def check_pattern(pattern: str, what: str = "the source") -> None:
    """Raise a ValueError unless this is a regular expression with one group, which is `what`."""
    try:
        groups = re.compile(pattern).groups
    except re.error as error:
        raise ValueError(f"not a regular expression: {error}") from None
    if groups != 1:
        raise ValueError(f"needs one group in parentheses, {what}; it has {groups}")


def read_table(
    file: Path, path_column: str | None = None, source_column: str | None = None, key: str = "data.sources"
) -> dict[str, str]:
    """Read image path → source from a CSV or Parquet file; without a name the columns are found by usual names.

    Paths get forward slashes; rows without a path or a source are skipped. `key` is the setting that named the file.

    Raises:
        ConfigError: if the file cannot be read, lacks a column, or gives one image two sources.
    """
    names, _ = names_of(file)
    columns = []
    for what, given in (("path", path_column), ("source", source_column)):
        setting = f"{key}_path_column" if what == "path" else f"{key}_column"
        column = find(names, file, setting, given, what)
        if column is None:
            raise ConfigError(
                f"{key}={str(file)!r} has no column called {', '.join(KNOWN[what])}; it has: {some(names, 20)}"
            )
        columns.append(column)
    read_in = read(file, columns)
    paths, sources = (read_in.text(column).to_pylist() for column in columns)
    table: dict[str, str] = {}
    for path, source in zip(map(_tidied, paths), sources, strict=True):
        if path is not None and source is not None and table.setdefault(path, source) != source:
            raise ConfigError(f"{key}={str(file)!r} gives {path} two sources: {table[path]} and {source}")
    return table


def _tidied(path: str | None) -> str | None:
    return None if path is None else tidy(path)
