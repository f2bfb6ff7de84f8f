"""Sources of images, as numbers that are the same in every split and every process."""

import csv
import hashlib
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from sslcells.config import ConfigError, nearest
from sslcells.data._names import respelt, tidy


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


def check_pattern(pattern: str) -> None:
    """Raise a ValueError unless this is a regular expression with one group, the source."""
    try:
        groups = re.compile(pattern).groups
    except re.error as error:
        raise ValueError(f"not a regular expression: {error}") from None
    if groups != 1:
        raise ValueError(f"needs one group in parentheses, the source; it has {groups}")


def read_table(file: Path, path_column: str, source_column: str) -> dict[str, str]:
    """Read image path → source from a CSV with a header line and commas, semicolons or tabs.

    Paths get forward slashes; rows without a source are skipped.

    Raises:
        ConfigError: if the file cannot be read, lacks a column, or gives one image two sources.
    """
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"data.sources={str(file)!r} cannot be read: {error}") from None
    lines = text.splitlines()
    header = lines[0] if lines else ""
    rows = csv.DictReader(lines, delimiter=max(",;\t", key=header.count))
    columns = list(rows.fieldnames or ())
    for key, column in (("sources_path_column", path_column), ("sources_column", source_column)):
        if column not in columns:
            raise ConfigError(
                f"data.{key}={column!r}: {file} has no such column{nearest(column, columns)}; "
                f"it has: {', '.join(columns) or 'none, it is empty'}"
            )
    table: dict[str, str] = {}
    for row in rows:
        path, source = tidy(row[path_column] or ""), row[source_column]
        if source and table.setdefault(path, source) != source:
            raise ConfigError(f"data.sources={str(file)!r} gives {path} two sources: {table[path]} and {source}")
    return table
