"""`sslcells split`: divide a table into splits that share no donor, slide or photograph."""

import csv
import io
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from sslcells.config import ConfigError
from sslcells.data import SPLITS
from sslcells.data._columns import Table, find, read
from sslcells.data._names import some, tidy
from sslcells.data.grouping import divide, groups_of
from sslcells.storage import is_file, write_atomically
from sslcells.values import place

Ints = NDArray[np.int64]
Values = list[str | None]


def split(
    table: str,
    by: Sequence[str],
    stratify: str | None = None,
    site: str | None = None,
    parts: Sequence[float] = (0.7, 0.1, 0.2),
    column: str = "split",
    seed: int = 0,
    out: str | None = None,
    say: Callable[[str], None] = print,
) -> Path:
    """Write the table with a column of splits that share no value of the columns `by`; returns the new file.

    Rows that share a value of any of these columns, or a path, are in one split; rows without a value share none.
    With `site` there is a further column for each site, whose test is that site; rows that share a group with it, or
    have no site, are in none of its splits. The same table, seed and shares give the same splits.

    Raises:
        ConfigError: if the table has no such column, or fewer groups than splits.
    """
    file = place(table)
    if not is_file(file):
        raise ConfigError(f"{table}: no such file")
    if min(parts) < 0 or parts[0] == 0 or sum(part > 0 for part in parts) < 2:
        raise ConfigError(f"--parts {' '.join(map(str, parts))}: shares are 0 or more, of train and one other above 0")
    whole = read(file)
    names = whole.columns.column_names
    keys = {name: _values(whole, name, names, "--by") for name in by}
    path = find(names, file, "--path", None, "path")
    paths = [[None if p is None else tidy(p) for p in whole.text(path).to_pylist()]] if path is not None else []
    kind = None if stratify is None else _numbered(_values(whole, stratify, names, "--stratify"))
    sites = None if site is None else _values(whole, site, names, "--site")
    group = groups_of([*keys.values(), *paths])
    named = keys | dict(zip(["path"], paths, strict=False))
    if column in names:
        say(f"before, by {column}: " + leaked(whole.text(column).to_pylist(), named))
    made = {column: _parts(group, kind, named, np.arange(len(group)), parts, seed)}
    for left in sorted({value for value in sites or () if value is not None}):
        made[f"{column}_{left}"] = _without(left, sites or [], group, kind, named, parts, seed)
    for name, values in made.items():
        say(f"{name}: {leaked(values, named)}")
        counts = Counter(values)
        none = f"; {counts[None]:,} rows in none" if counts[None] else ""
        say("  " + ", ".join(f"{part} {counts[part]:,}" for part in SPLITS) + none)
    target = place(out) if out is not None else file.with_name(f"{file.stem}_split{file.suffix}")
    try:
        _write(whole, made, target)
    except OSError as error:
        raise ConfigError(f"--out {target} cannot be written: {error}") from None
    where = "" if target.parent.resolve() == file.parent.resolve() else f" data.path={file.parent}"
    say(f"{target}: sslcells train --config table data.table={target}{where} data.split_column={column}")
    return target


def leaked(split_of: Sequence[str | None], keys: dict[str, Values]) -> str:
    """How many values of each column are in more than one split, and how many rows have one of them."""
    said = []
    for name, values in keys.items():
        seen: dict[str, set[str]] = {}
        for part, value in zip(split_of, values, strict=True):
            if part is not None and value is not None:
                seen.setdefault(value, set()).add(part)
        shared = {value for value, of in seen.items() if len(of) > 1}
        rows = sum(part is not None and value in shared for part, value in zip(split_of, values, strict=True))
        text = f"{len(shared):,} of {len(seen):,} values of {name} are in several splits"
        said.append(text + (f" ({rows:,} rows): {some(sorted(shared))}" if shared else ""))
    return "; ".join(said)


def _values(table: Table, name: str, names: Sequence[str], option: str) -> Values:
    column = find(names, table.file, option, name, "source")
    values: Values = table.text(str(column)).to_pylist()
    return values


def _numbered(values: Values) -> Ints:
    at = {value: i for i, value in enumerate(sorted({v for v in values if v is not None}))}
    return np.array([-1 if value is None else at[value] for value in values], np.int64)


def _parts(
    group: Ints, kind: Ints | None, keys: dict[str, Values], rows: Ints, parts: Sequence[float], seed: int
) -> Values:
    """The split of each of these rows; None for the others."""
    of, inside = np.unique(group[rows], return_inverse=True)
    used = [name for name, share in zip(SPLITS, parts, strict=True) if share > 0]
    if len(of) < len(used):
        raise ConfigError(
            f"{len(of)} groups of {' and '.join(keys)} cannot fill {len(used)} splits ({', '.join(used)})"
        )
    kinds = np.full(len(rows), -1)
    if kind is not None:
        known = kind[rows] >= 0
        kinds[known] = np.unique(kind[rows][known], return_inverse=True)[1]
    part = divide(inside, kinds, _names(inside, keys, rows, len(of)), [share for share in parts if share > 0], seed)
    out: Values = [None] * len(group)
    for row, p in zip(rows.tolist(), part.tolist(), strict=True):
        out[row] = used[p]
    return out


def _names(group: Ints, keys: dict[str, Values], rows: Ints, count: int) -> list[str]:
    """A name for each group that the order of the rows does not change: its smallest value, or its first row."""
    names: list[str | None] = [None] * count
    for values in keys.values():
        for g, row in zip(group.tolist(), rows.tolist(), strict=True):
            value, named = values[row], names[g]
            if value is not None and (named is None or value < named):
                names[g] = value
    return [f"row {g}" if name is None else name for g, name in enumerate(names)]


def _without(
    site: str,
    sites: Values,
    group: Ints,
    kind: Ints | None,
    keys: dict[str, Values],
    parts: Sequence[float],
    seed: int,
) -> Values:
    """Splits with one site as test, and train and val of the others, without the groups that the site has too."""
    test = np.array([value == site for value in sites])
    known = np.array([value is not None for value in sites])
    rest = np.flatnonzero(known & ~test & ~np.isin(group, group[test]))
    if not len(rest):
        raise ConfigError(f"--site: without {site} no rows are left to train on")
    out = _parts(group, kind, keys, rest, [*parts[:2], 0], seed)
    for row in np.flatnonzero(test).tolist():
        out[row] = "test"
    return out


def _write(table: Table, made: dict[str, Values], target: Path) -> None:
    """The table with these columns, which replace those of the same name."""
    columns = table.columns
    for name, values in made.items():
        cells = pa.array(values, pa.string())
        at = columns.column_names.index(name) if name in columns.column_names else None
        columns = columns.append_column(name, cells) if at is None else columns.set_column(at, name, cells)
    if not table.delimiter:
        write_atomically(target, lambda file: pq.write_table(columns, file))
        return
    text = io.StringIO()
    rows = csv.writer(text, delimiter=table.delimiter, lineterminator="\n")
    rows.writerow(columns.column_names)
    rows.writerows(zip(*(column.to_pylist() for column in columns.columns), strict=True))
    write_atomically(target, lambda file: file.write(text.getvalue().encode()))
