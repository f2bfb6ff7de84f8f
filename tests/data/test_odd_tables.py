"""Odd and damaged tables: each is read right, or refused in one line that names it; nothing hangs."""

import datetime
import decimal
import random
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from sslcells.config import ConfigError
from sslcells.data import DataError, open_splits, read_table, table
from sslcells.data._columns import read
from sslcells.data.describe import brief, describe
from sslcells.delivery.split import split

LONG = "x" * 200_000


def cells(file, column="label"):
    return read(file).text(column).to_pylist()


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"\xef\xbb\xbfpath;label\r\n1;a\r\n", ["a"]),
        (b"path\tlabel\n1\ta;b\n", ["a;b"]),
        (b"path,label\r1,a\r2,b\r", ["a", "b"]),
        (b'\n\npath,label\n\n1,"a, b"\n\n', ["a, b"]),
        (b'path,label,"notes, all"\n1,a,"x\ny"\n2,b,\n', ["a", "b"]),
        (b"sep=;\r\npath;label\r\n1;a,b\r\n", ["a,b"]),
        (b'path,label\n1,5" disk\n', ['5" disk']),
        (b"path,label\n1, a \n2,NaN\n3,1e9\n4,007\n", ["a", None, "1e9", "007"]),
        (f"path,label\n1,{LONG}\n".encode(), [LONG]),
        (b"\xff\xfep\x00a\x00t\x00h\x00", "header line is not UTF-8; save it as UTF-8"),
        ("path,größe,label\n1,2,a\n".encode("latin-1"), "header line is not UTF-8; save it as UTF-8"),
        (b"path,label\n1,\xe9\n", "invalid UTF8 data; save it as UTF-8"),
        (b'path,label\n1,a\n2,"b\n3,c\n', "a quote in line 3 is not closed, which hides the lines below it"),
        (b'path,label,notes\n1,a,x\n2,b,"c\n3,c,d\n', "a quote in line 3 is not closed"),
        (b'path,label\n1,"a\n2,"\n3,c\n', "row 2 has a line break in column 'label'; is a quote above it not closed?"),
        (b"path,label\n1,a\n2,b,c\n", "Row #3: Expected 2 columns, got 3"),
        (b"path,label,,\n1,a,,\n", "has columns without a name: name them"),
        (b"path,label", "has no rows below its header"),
        (b"\n\n", "is empty, without a header line"),
        (f"path,{LONG}\n".encode(), "cannot be read as a table"),
        (b'path,label\n1,"' + b"x" * (1 << 25) + b'"\n', "a row is longer than 16 MiB; is a quote not closed?"),
    ],
)
def test_csv(tmp_path, content, expected):
    (tmp_path / "t.csv").write_bytes(content)
    if isinstance(expected, str):
        with pytest.raises(ConfigError) as error:
            cells(tmp_path / "t.csv")
        assert expected in str(error.value)
        assert str(tmp_path / "t.csv") in str(error.value)
        assert len(str(error.value)) < 600
    else:
        assert cells(tmp_path / "t.csv") == expected


UTC = datetime.UTC


@pytest.mark.parametrize(
    ("column", "expected"),
    [
        ([3.0, None, 10.0], ["3", None, "10"]),
        ([3.0, float("nan"), 10.0], ["3", None, "10"]),
        ([0.5, 2.0], ["0.5", "2"]),
        ([float("inf"), 1.0], ["inf", "1"]),
        ([1e9, 2.0], ["1000000000", "2"]),
        ([1e300, 2.0], ["1e+300", "2"]),
        (np.array([1, 2.5], np.float16), ["1", "2.5"]),
        ([True, None], ["true", None]),
        ([b"a", b"b"], ["a", "b"]),
        ([decimal.Decimal("1.50"), None], ["1.50", None]),
        ([datetime.date(2020, 1, 2), None], ["2020-01-02", None]),
        ([datetime.datetime(2020, 1, 2, tzinfo=UTC), None], ["2020-01-02 00:00:00.000000Z", None]),
        (pa.array(["a", None]).dictionary_encode(), ["a", None]),
        (pa.array(["a", " "], pa.large_string()), ["a", None]),
        (pa.array([None, None]), [None, None]),
        ([b"a", b"\xff"], "column 'label' cannot be read as text: Invalid UTF8"),
        ([[1], [2]], "column 'label' holds list<element: int64>, not text or numbers"),
        ([{"a": 1}, {"a": 2}], "column 'label' holds struct<a: int64>, not text or numbers"),
        (["a\nb", "c"], "row 1 has a line break in column 'label'"),
    ],
)
def test_parquet(tmp_path, column, expected):
    labels = pa.array(column)
    pq.write_table(pa.table({"label": labels, "path": ["1"] * len(labels)}), tmp_path / "t.parquet")
    if isinstance(expected, str):
        with pytest.raises(ConfigError) as error:
            cells(tmp_path / "t.parquet")
        assert expected in str(error.value)
    else:
        assert cells(tmp_path / "t.parquet") == expected


def test_numbers_are_read_as_python_does(tmp_path):
    (tmp_path / "t.csv").write_text("x,y\n+1.5,1\n 2e3 ,\n١٢,2\n,3\n")
    assert read(tmp_path / "t.csv").numbers("x").tolist()[:3] == [1.5, 2000, 12]
    (tmp_path / "t.csv").write_text('x,y\n"1,5",1\n')
    with pytest.raises(ConfigError, match="row 2 has x='1,5', which is not a number"):
        read(tmp_path / "t.csv").numbers("x")


NAMES = [
    "path",
    "label",
    "split",
    "donor",
    "site",
    "x_min",
    "y_min",
    "x_max",
    "y_max",
    "cell_id",
    "mpp",
    "magnification",
]
PATHS = ["1.png", "2.png", "./1.png", ".\\2.png", "3.PNG", "nein.png", "", "NaN", "a\x00b", "../1.png", "/1.png", LONG]
CELLS = [
    "", "a", "A", "train", "val", "test", "TEST", "0", "1", "2.5", "1e9", "-3", "NaN", "inf", "2020-01-01", "ä", "a\nb",
    '"', "'", "20x", "#", "\x00", "1_0", "٣", "None", "true", LONG,
]  # fmt: skip


FAIR = {
    "path": [form.format(i) for i in range(1, 40) for form in ("{}.png", "./{}.png", ".\\{}.png")],
    "split": ["train", "val"], "x_min": ["0", "-2"], "y_min": ["1"],
    "x_max": ["5", "6.5"], "y_max": ["4", "9"], "cell_id": [*map(str, range(1000))], "mpp": ["0.25", "0.5"],
    "magnification": ["20x", "40"], "label": ["a", "b"], "donor": [*map(str, range(20)), ""], "site": ["S", "T"],
}  # fmt: skip


def cell(dice, name, odd):
    """A cell as it should be, or with the probability `odd` any other."""
    if dice.random() < odd:
        return dice.choice(PATHS if name == "path" else CELLS)
    return dice.choice(FAIR.get(name, ["x"]))


def odd_csv(dice):
    """Columns of usual names and odd cells, with anything wrong that a hand or a program may get wrong."""
    odd = dice.choice([0, 0, 0.02, 0.2])
    names = list(dict.fromkeys(["path", "cell_id", "donor", *dice.sample(NAMES, dice.randint(0, 8))]))
    if dice.random() < 3 * odd:
        names.append(dice.choice(["", "", "x", " label ", "path"]))
    separator = dice.choice([",", ";", "\t", ",", *"|" * (odd > 0)])
    rows = [names, *([cell(dice, name, odd) for name in names] for _ in range(dice.choice([1, 5, 40])))]
    if dice.random() < odd:
        rows[-1] = rows[-1][:-1]
    quoted = dice.random() < 0.5
    text = dice.choice(["\n", "\r\n", "\r"]).join(
        separator.join(f'"{one}"' if quoted and dice.random() > odd / 20 else one for one in row) for row in rows
    )
    content = text.encode(dice.choice(["utf-8", "utf-8-sig", *["utf-16", "latin-1"] * (odd > 0)]), "replace")
    return b"sep=" + separator.encode() + b"\n" + content if dice.random() < 0.05 else content


def odd_parquet(dice, file):
    """Columns of any type, nested ones too."""
    count = dice.choice([0, 1, 3, 20])
    kinds = [
        lambda: dice.choice(CELLS),
        lambda: dice.choice([1, 2, 10**9, -1]),
        lambda: dice.choice([1.0, float("nan"), 1e300, float("inf")]),
        lambda: dice.choice([b"a", b"\xff"]),
        lambda: [1, 2],
        lambda: {"a": [1]},
        lambda: datetime.datetime(2020, 1, 1),
        lambda: dice.choice([True, False]),
        lambda: decimal.Decimal("1.5"),
        lambda: None,
    ]
    odd = dice.choice([0, 0, 0.1, 0.5])
    columns = {}
    for name in dict.fromkeys(["path", "cell_id", "donor", *dice.sample(NAMES, dice.randint(0, 8))]):
        kind = dice.choice(kinds)
        values = [kind() if dice.random() < odd else cell(dice, name, odd / 5) for _ in range(count)]
        try:
            columns[name] = pa.array([kind() for _ in range(count)] if dice.random() < odd / 2 else values)
        except (pa.ArrowInvalid, pa.ArrowTypeError):  # of several types: pyarrow writes no such column
            columns[name] = pa.array([str(value) for value in values])
        if pa.types.is_string(columns[name].type) and dice.random() < 0.2:
            columns[name] = columns[name].dictionary_encode()
    pq.write_table(pa.table(columns), file)
    content = bytearray(file.read_bytes())
    if dice.random() < odd:
        for _ in range(dice.randint(1, 8)):
            content[dice.randrange(len(content))] = dice.randrange(256)
    return bytes(content[: dice.randrange(len(content))] if dice.random() < odd / 5 else content)


def used(file, folder, dice):
    """Everything that reads a table."""
    config = table.Config(
        table=str(file), size=8, verify="none", on_error=dice.choice(["stop", "skip"]), path=str(folder)
    )
    splits = open_splits(config)
    describe(splits)
    brief(splits)


@pytest.mark.parametrize("part", range(8))
def test_1000_odd_tables_give_one_line_or_success(tmp_path, part):
    for i in range(1, 40):
        Image.new("RGB", (8, 6), (i, i, i)).save(tmp_path / f"{i}.png")
    lines = []
    done = {"open": 0, "sources": 0, "split": 0}
    for seed in range(125 * part, 125 * part + 125):
        dice = random.Random(seed)
        file = tmp_path / ("t.csv" if seed % 2 else "t.parquet")
        file.write_bytes(odd_csv(dice) if seed % 2 else odd_parquet(dice, file))
        began = time.monotonic()
        for name, use in (
            ("open", lambda: used(file, tmp_path, dice)),  # noqa: B023
            ("sources", lambda: read_table(file)),  # noqa: B023
            ("split", lambda: split(str(file), ["donor"], out=str(tmp_path / "out.csv"), say=lambda line: None)),  # noqa: B023
        ):
            try:
                use()
                done[name] += 1
            except (ConfigError, DataError) as error:
                lines.append(len(str(error).splitlines()))
        assert time.monotonic() - began < 20
    assert max(lines) <= 7  # a title, the first five rows, and …
    assert min(done.values()) > 20, done
    assert max(done.values()) < 115, done
