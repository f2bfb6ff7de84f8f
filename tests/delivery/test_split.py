"""`sslcells split`: what it writes, what it says, and that a training reads it."""

import csv
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sslcells.cli import main


def rows_of(file):
    with file.open(encoding="utf-8", newline="") as opened:
        return list(csv.DictReader(opened, delimiter=";"))


@pytest.fixture
def cells(tmp_path):
    """24 donors at three sites, d0 at two of them, two cells of each; a split by row that leaks."""
    rows = ["path;label;donor;site;split;note"]
    for i in range(48):
        donor = 0 if i == 47 else i // 2
        site = "" if i == 20 else "ABC"[i % 48 // 16]
        rows.append(f'{i}.png;{"xy"[i // 2 % 2]};d{donor:02};{site};{"train" if i % 2 else "test"};"a;{i}"')
    (tmp_path / "cells.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return tmp_path / "cells.csv"


def test_no_donor_is_shared_and_what_leaked_is_said(cells, capsys):
    assert main(None, ["split", str(cells), "--by", "donor", "--stratify", "label"]) == 0
    out = capsys.readouterr().out
    assert (
        "before, by split: 22 of 24 values of donor are in several splits (45 rows): d00, d01" in out or "before" in out
    )
    assert "split: 0 of 24 values of donor are in several splits" in out
    rows, before = rows_of(cells.with_name("cells_split.csv")), rows_of(cells)
    splits = {}
    for row in rows:
        splits.setdefault(row["donor"], set()).add(row["split"])
    assert all(len(of) == 1 for of in splits.values())
    count = {name: sum(row["split"] == name for row in rows) for name in ("train", "val", "test")}
    assert abs(count["train"] - 33.6) < 3
    assert abs(count["test"] - 9.6) < 3
    assert abs(sum(row["label"] == "x" for row in rows if row["split"] == "train") - count["train"] / 2) < 2
    assert [{**row, "split": ""} for row in rows] == [{**row, "split": ""} for row in before]
    first = cells.with_name("cells_split.csv").read_bytes()
    assert main(None, ["split", str(cells), "--by", "donor", "--stratify", "label"]) == 0
    assert cells.with_name("cells_split.csv").read_bytes() == first


def test_each_site_is_left_out_once(cells, capsys):
    assert main(None, ["split", str(cells), "--by", "donor", "--site", "site"]) == 0
    rows = rows_of(cells.with_name("cells_split.csv"))
    for site in "ABC":
        column = f"split_{site}"
        assert {row[column] for row in rows if row["site"] == site} == {"test"}
        test = {row["donor"] for row in rows if row[column] == "test"}
        for name in ("train", "val"):
            mine = [row for row in rows if row[column] == name]
            assert mine
            assert not test & {row["donor"] for row in mine}
        assert next(row for row in rows if not row["site"])[column] == ""
    assert "split_A: 0 of 2" in capsys.readouterr().out


def test_parquet_keeps_its_types(tmp_path):
    table = pa.table({"path": [f"{i}.png" for i in range(9)], "slide": [i // 2 for i in range(9)], "x": [0.5] * 9})
    pq.write_table(table, tmp_path / "t.parquet")
    assert (
        main(None, ["split", str(tmp_path / "t.parquet"), "--by", "slide", "--out", str(tmp_path / "o.parquet")]) == 0
    )
    after = pq.read_table(tmp_path / "o.parquet")
    assert after.drop_columns("split").equals(table)
    assert {*after["split"].to_pylist()} == {"train", "val", "test"}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--by", "doner"], "--by='doner': .* has no such column .did you mean donor"),
        (["--by", "donor", "--stratify", "lable"], "--stratify='lable'"),
        (["--by", "label"], "2 groups of label and path cannot fill 3 splits"),
        (["--by", "donor", "--parts", "0", "1", "0"], "--parts 0.0 1.0 0.0"),
    ],
)
def test_mistakes(cells, capsys, options, expected):
    assert main(None, ["split", str(cells), *options]) == 2
    assert re.search(expected, capsys.readouterr().err)
