"""Tables of images: CSV and Parquet files, and which of their columns say what."""

import csv
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq
from numpy.typing import NDArray

from sslcells.config import ConfigError, nearest
from sslcells.data._names import some

KNOWN: Mapping[str, tuple[str, ...]] = {
    "path": ("path", "file", "filename", "file_name", "image", "image_path", "filepath"),
    "label": ("label", "class", "cell_type", "celltype"),
    "split": ("split", "subset", "fold"),
    "site": ("site", "lab", "laboratory", "centre", "center", "hospital"),
    "cell": ("cell_id", "cell"),
    "um_per_pixel": ("um_per_pixel", "µm_per_pixel", "um_per_px", "mpp"),
    "magnification": ("magnification",),
    "source": ("source", "donor", "patient", "subject", "photograph", "slide", "plate"),
}
"""What a column may say → the names that it is looked for by, the first one first, in any letter case."""
_EMPTY = pa.array(["", "NA", "N/A", "NaN", "nan", "NULL", "null", "None"])
"""Cells that say nothing"""
CSV, PARQUET = (".csv", ".tsv", ".txt"), (".parquet", ".pq")
"""Endings of tables"""
_HEADER = 1 << 20
"""characters that hold the header"""
_BLOCK = 1 << 24
"""bytes of a CSV file that are read at a time"""
_SHOWN = 80
"""characters of a cell in a message"""
_UNREADABLE = (OSError, ValueError, MemoryError, pa.ArrowException, csv.Error)


class Table(NamedTuple):
    """A table as it is in its file."""

    file: Path
    columns: pa.Table
    delimiter: str = ""
    """of a CSV file; empty for Parquet"""

    def row(self, index: int) -> str:
        """`row 2` for the first row of a CSV file, below its header, as spreadsheets count; `row 1` of Parquet."""
        return f"row {index + 1 + bool(self.delimiter)}"

    def text(self, name: str) -> pa.ChunkedArray:
        """A column as text without blanks around it, null where it says nothing.

        Raises:
            ConfigError: if its values are no text or numbers, or have line breaks.
        """
        column = self.columns[name]
        if pa.types.is_dictionary(column.type):
            column = column.cast(column.type.value_type)
        if pa.types.is_nested(column.type):
            raise ConfigError(f"{self.file}: column {name!r} holds {column.type}, not text or numbers")
        try:
            trimmed = pc.utf8_trim_whitespace(pc.cast(_whole(column), pa.string()))
        except pa.ArrowInvalid as error:
            raise ConfigError(f"{self.file}: column {name!r} cannot be read as text: {_first(error)}") from None
        except pa.ArrowNotImplementedError:
            raise ConfigError(f"{self.file}: column {name!r} holds {column.type}, not text or numbers") from None
        broken = pc.fill_null(pc.match_substring(trimmed, "\n"), False)
        if pc.any(broken).as_py():
            row = self.row(int(broken.to_numpy().argmax()))
            advice = "; is a quote above it not closed?" if self.delimiter else ""
            raise ConfigError(f"{self.file}: {row} has a line break in column {name!r}{advice}")
        return pc.if_else(pc.is_in(trimmed, _EMPTY), pa.scalar(None, pa.string()), trimmed)

    def numbers(self, name: str) -> NDArray[np.float64]:
        """A column of numbers: (N,) float64, NaN where it says nothing.

        Raises:
            ConfigError: if a cell is not a number; the message names the row.
        """
        text = self.text(name)
        try:
            numbers: NDArray[np.float64] = pc.fill_null(pc.cast(text, pa.float64()), float("nan")).to_numpy()
        except pa.ArrowInvalid:
            cells = enumerate(text.to_pylist())
            return np.array([np.nan if cell is None else self._number(i, name, cell) for i, cell in cells])
        return numbers

    def typed(self) -> pa.Table:
        """All columns as int64, float64, bool or text, null where they say nothing; of CSV by what all cells say.

        Numbers with leading zeros are text, as are dates; nested values are JSON.
        """
        return pa.table({name: _typed(column) for name, column in _named(self.columns)})

    def _number(self, index: int, name: str, cell: str) -> float:
        try:
            if "_" not in cell:
                return float(cell)
        except ValueError:
            pass
        raise ConfigError(f"{self.file}: {self.row(index)} has {name}={cell[:_SHOWN]!r}, which is not a number")


def _whole(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """A column of floats as whole numbers if they are, as pandas makes floats of these beside empty cells."""
    if not pa.types.is_floating(column.type):
        return column
    column = pc.cast(column, pa.float64())
    column = pc.if_else(pc.is_nan(column), pa.scalar(None, pa.float64()), column)
    exact = pc.and_(pc.equal(pc.floor(column), column), pc.less(pc.abs(column), 2.0**53))
    return pc.cast(column, pa.int64()) if pc.all(exact).as_py() is not False else column


def _named(table: pa.Table) -> Iterable[tuple[str, pa.ChunkedArray]]:
    return zip(table.column_names, table.columns, strict=True)


def _typed(column: pa.ChunkedArray) -> pa.ChunkedArray:
    kind = column.type
    if pa.types.is_dictionary(kind):
        return _typed(column.cast(kind.value_type))
    if pa.types.is_boolean(kind):
        return column
    for wanted, is_one in ((pa.int64(), pa.types.is_integer), (pa.float64(), pa.types.is_floating)):
        if is_one(kind):
            with suppress(pa.ArrowInvalid):
                return pc.cast(column, wanted)
    try:
        if pa.types.is_nested(kind):
            raise pa.ArrowNotImplementedError("as text")
        text = pc.cast(column, pa.string())
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        cells = ((one, json.dumps(one, default=str)) for one in column.to_pylist())
        return pa.chunked_array([pa.array([None if one is None else said for one, said in cells], pa.string())])
    trimmed = pc.utf8_trim_whitespace(text)
    text = pc.if_else(pc.is_in(trimmed, _EMPTY), pa.scalar(None, pa.string()), text)
    trimmed = pc.if_else(pc.is_null(text), pa.scalar(None, pa.string()), trimmed)
    if text.null_count < len(text) and not pc.any(pc.match_substring_regex(trimmed, "^[+-]?0[0-9]")).as_py():
        for wanted in (pa.int64(), pa.float64()):
            with suppress(pa.ArrowInvalid):
                return pc.cast(trimmed, wanted)
    return text


def names_of(file: Path) -> tuple[list[str], str]:
    """The names of a table's columns, and a CSV file's delimiter.

    Raises:
        ConfigError: if the file is neither CSV nor Parquet, cannot be read, or names two columns alike.
    """
    suffix = file.suffix.lower()
    try:
        if suffix in PARQUET:
            names, delimiter = [*map(str, pq.read_schema(file).names)], ""
        elif suffix in CSV:
            names, delimiter, _ = _header(file)
        else:
            raise ConfigError(
                f"{file} is neither CSV (.csv, .tsv) nor Parquet (.parquet): save the table as one of them"
            )
    except _UNREADABLE as error:
        raise ConfigError(_cannot(file, error)) from None
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        what = f"two columns called {twice[0]!r}: rename one" if twice[0] else "columns without a name: name them"
        raise ConfigError(f"{file} has {what}, or remove what is not needed")
    return names, delimiter


def _header(file: Path) -> tuple[list[str], str, int]:
    """The first line of a CSV file that is not empty: its cells, and the delimiter that makes most of them.

    The third is 1 if there is a line `sep=;` above it, as Excel writes, else 0.
    """
    with file.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as opened:
        text = opened.read(_HEADER)
    said = re.match(r"sep=([,;\t])\r?\n", text)
    lines = text[said.end() if said else 0 :].lstrip("\r\n").splitlines(keepends=True)
    found = {d: next(csv.reader(lines, delimiter=d), []) for d in (said[1] if said else ",;\t")}
    delimiter = max(found, key=lambda d: len(found[d]))
    if not found[delimiter]:
        raise ConfigError(f"{file} cannot be read as a table: it is empty, without a header line")
    for name in found[delimiter]:
        name.encode()  # raises where it is not UTF-8
    return found[delimiter], delimiter, int(said is not None)


def read(file: Path, wanted: Sequence[str] | None = None) -> Table:
    """The columns of a table, or of it the wanted ones; of CSV every cell as its text.

    Raises:
        ConfigError: as `names_of`, if rows are not as long as the header, if a quote is not closed, or there are none.
    """
    names, delimiter = names_of(file)
    kept = names if wanted is None else [name for name in names if name in wanted]
    try:
        if delimiter:
            _check_quotes(file, delimiter)
            try:
                columns = _read_csv(file, delimiter, kept)
            except pa.ArrowInvalid:
                columns = _read_csv(file, delimiter, kept, threads=False)  # which names the row
        else:
            columns = pq.read_table(file, columns=kept, partitioning=None)
            columns.validate(full=True)
    except _UNREADABLE as error:
        if "Empty CSV" not in str(error):
            raise ConfigError(_cannot(file, error)) from None
        columns = pa.table({})
    if not columns.num_rows:
        raise ConfigError(f"{file} has no rows" + " below its header" * bool(delimiter))
    return Table(file, columns, delimiter)


def _read_csv(file: Path, delimiter: str, kept: Sequence[str], threads: bool = True) -> pa.Table:
    return pyarrow.csv.read_csv(
        file,
        read_options=pyarrow.csv.ReadOptions(block_size=_BLOCK, skip_rows=_header(file)[2], use_threads=threads),
        parse_options=pyarrow.csv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
        convert_options=pyarrow.csv.ConvertOptions(
            column_types=dict.fromkeys(kept, pa.string()), include_columns=kept, strings_can_be_null=False
        ),
    )


def _check_quotes(file: Path, delimiter: str) -> None:
    """Raise a ConfigError if a quote is not closed: it would hide all rows below it."""
    with file.open("rb") as opened:
        if not sum(block.count(b'"') for block in iter(lambda: opened.read(_BLOCK), b"")) % 2:
            return
    began = ended = 0
    with file.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as opened:
        rows = csv.reader(opened, delimiter=delimiter)
        for _ in rows:
            began, ended = ended, rows.line_num
    if ended > began + 1:
        raise ConfigError(f"{file}: a quote in line {began + 1} is not closed, which hides the lines below it")


def find(names: Sequence[str], file: Path, key: str, given: str | None, meaning: str) -> str | None:
    """The column that `given` names; without it the first that KNOWN has for the meaning, or None.

    Raises:
        ConfigError: if there is no column of the given name; `key` is the setting that gave it.
    """
    if given is not None:
        if given not in names:
            raise ConfigError(
                f"{key}={given!r}: {file} has no such column{nearest(given, names)}; it has: {some(names, 20)}"
            )
        return given
    lower = {name.strip().lower(): name for name in reversed(names)}
    return next((lower[name] for name in KNOWN[meaning] if name in lower), None)


def joined(table: Table, columns: Sequence[str]) -> pa.ChunkedArray:
    """Several columns as one of text, such as `plate 1 + well B3`; null where one of them is."""
    texts = [table.text(column) for column in columns]
    return texts[0] if len(texts) == 1 else pc.binary_join_element_wise(*texts, " + ")


def _cannot(file: Path, error: Exception) -> str:
    why, advice = _first(error)[:300], ""
    if isinstance(error, UnicodeError):
        why = "its header line is not UTF-8"
    elif "straddling" in why:
        why = f"a row is longer than {_BLOCK / 2**20:g} MiB; is a quote not closed?"
    if "utf" in why.lower():
        advice = "; save it as UTF-8 (in Excel: CSV UTF-8)"
    return f"{file} cannot be read as a table: {why}{advice}"


def _first(error: Any) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__
