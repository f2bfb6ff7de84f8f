"""Tables of images: CSV and Parquet files, and which of their columns say what."""

import csv
from collections.abc import Mapping, Sequence
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
            ConfigError: if its values are no text or numbers.
        """
        column = self.columns[name]
        if pa.types.is_dictionary(column.type):
            column = column.cast(column.type.value_type)
        if pa.types.is_floating(column.type) and bool(pc.all(pc.equal(pc.floor(column), column)).as_py()):
            column = pc.cast(column, pa.int64(), safe=False)  # whole numbers, which pandas keeps so beside empty cells
        try:
            trimmed = pc.utf8_trim_whitespace(pc.cast(column, pa.string()))
        except pa.ArrowInvalid as error:
            raise ConfigError(f"{self.file}: column {name!r} cannot be read as text: {_first(error)}") from None
        except pa.ArrowNotImplementedError:
            raise ConfigError(f"{self.file}: column {name!r} holds {column.type}, not text or numbers") from None
        return pc.if_else(pc.is_in(trimmed, _EMPTY), pa.scalar(None, pa.string()), trimmed)

    def numbers(self, name: str) -> NDArray[np.float64]:
        """A column of numbers: (N,) float64, NaN where it says nothing.

        Raises:
            ConfigError: if a cell is not a number; the message names the row.
        """
        text = self.text(name)
        try:
            values = pc.cast(text, pa.float64())
        except pa.ArrowInvalid:
            for i, cell in enumerate(text.to_pylist()):
                if cell is not None and not _is_number(cell):
                    raise ConfigError(
                        f"{self.file}: {self.row(i)} has {name}={cell!r}, which is not a number"
                    ) from None
            raise
        numbers: NDArray[np.float64] = pc.fill_null(values, float("nan")).to_numpy()
        return numbers


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return "_" not in cell


def names_of(file: Path) -> tuple[list[str], str]:
    """The names of a table's columns, and a CSV file's delimiter.

    Raises:
        ConfigError: if the file is neither CSV nor Parquet, cannot be read, or names two columns alike.
    """
    suffix = file.suffix.lower()
    try:
        if suffix in (".parquet", ".pq"):
            names, delimiter = [*map(str, pq.read_schema(file).names)], ""
        elif suffix in (".csv", ".tsv", ".txt"):
            with file.open(encoding="utf-8-sig", newline="") as opened:
                header = opened.readline().rstrip("\r\n")
            delimiter = max(",;\t", key=header.count)
            names = next(csv.reader([header], delimiter=delimiter), [])
            if not names:
                raise ConfigError(f"{file} cannot be read as a table: it has no header line")
        else:
            raise ConfigError(
                f"{file} is neither CSV (.csv, .tsv) nor Parquet (.parquet): save the table as one of them"
            )
    except (OSError, UnicodeDecodeError, pa.ArrowInvalid) as error:
        raise ConfigError(f"{file} cannot be read as a table: {_first(error)}{_advice(error)}") from None
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(f"{file} has two columns called {twice[0]!r}: rename one")
    return names, delimiter


def read(file: Path, wanted: Sequence[str] | None = None) -> Table:
    """The columns of a table, or of it the wanted ones; of CSV every cell as its text.

    Raises:
        ConfigError: as `names_of`, and if rows are not as long as the header.
    """
    names, delimiter = names_of(file)
    kept = names if wanted is None else [name for name in names if name in wanted]
    try:
        if not delimiter:
            return Table(file, pq.read_table(file, columns=kept))
        columns = pyarrow.csv.read_csv(
            file,
            read_options=pyarrow.csv.ReadOptions(block_size=1 << 24),
            parse_options=pyarrow.csv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
            convert_options=pyarrow.csv.ConvertOptions(
                column_types=dict.fromkeys(kept, pa.string()), include_columns=kept, strings_can_be_null=False
            ),
        )
    except (OSError, pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise ConfigError(f"{file} cannot be read as a table: {_first(error)}{_advice(error)}") from None
    return Table(file, columns, delimiter)


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


def _advice(error: Exception) -> str:
    return "; save it as UTF-8 (in Excel: CSV UTF-8)" if "utf" in str(error).lower() else ""


def _first(error: Any) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
