"""`sslcells split`: what it writes, what it says, and that a training reads it."""

import csv
import os
import random
import re

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from sslcells.cli import main
from sslcells.config import ConfigError
from sslcells.delivery.split import split


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


def random_table(dice):
    """A few cells of donors on slides at sites, some of it unknown, some images twice, and a split that may leak."""
    count = dice.randint(4, 40)
    some = {name: [f"{name}{i}" for i in range(dice.randint(4, 40))] for name in ("donor", "slide")}
    some |= {"label": ["x", "y", "z"][: dice.randint(1, 3)], "site": ["A", "B", "C"][: dice.randint(2, 3)]}
    some |= {"split": ["train", "val", "test"]}
    unknown = dice.choice([0, 0.1])
    columns = {"path": [f"{i if dice.random() < 0.97 else 0}.png" for i in range(count)]}
    for name, values in some.items():
        columns[name] = [None if dice.random() < unknown else dice.choice(values) for _ in range(count)]
    return columns


def leaks(columns, by, split):
    """Values of a column in more than one split, counted anew."""
    seen = {}
    for value, part in zip(columns[by], columns[split], strict=True):
        if value and part:
            seen.setdefault(value, set()).add(part)
    return sum(len(parts) > 1 for parts in seen.values()), len(seen)


@pytest.mark.parametrize("tables", [range(30), pytest.param(range(30, 1300), marks=pytest.mark.slow)])
def test_1000_random_tables_share_nothing(tmp_path, monkeypatch, tables):
    monkeypatch.setattr(os, "fsync", lambda file: None)
    divided = left_out = 0
    for seed in tables:
        dice = random.Random(seed)
        before = random_table(dice)
        parquet = dice.random() < 0.5
        file, out = tmp_path / f"t.{'parquet' if parquet else 'csv'}", tmp_path / f"o.{'parquet' if parquet else 'csv'}"
        (pq.write_table if parquet else pyarrow.csv.write_csv)(pa.table(before), file)
        by = dice.choice([["donor"], ["slide"], ["donor", "slide"]])
        site, said = dice.choice([None, "site"]), []
        try:
            split(str(file), by, dice.choice([None, "label"]), site, out=str(out), seed=seed, say=said.append)
        except ConfigError as error:
            assert re.search(r"groups of .* cannot fill|no rows are left to train on", str(error))  # noqa: PT017
            continue
        after = (pq.read_table if parquet else pyarrow.csv.read_csv)(out).to_pydict()
        divided += 1
        made = ["split", *(name for name in after if name.startswith("split_"))]
        for name in made:
            for key in (*by, "path"):
                assert leaks(after, key, name)[0] == 0, (seed, name, key)
        assert {*after["split"]} == {"train", "val", "test"}
        for left in {*before["site"]} - {None} if site else ():
            left_out += 1
            at = [value == left for value in before["site"]]
            of = after[f"split_{left}"]
            assert {part for part, inside in zip(of, at, strict=True) if inside} == {"test"}
            assert {part or None for part, inside in zip(of, at, strict=True) if not inside} <= {"train", "val", None}
            assert not any(p for p, where in zip(of, before["site"], strict=True) if where is None)
            assert "train" in of
        for key in (*by, "path"):
            count, of = leaks(before, key, "split")
            assert f"{count} of {of} values of {key} are in several splits" in said[0]
            assert f"0 of {leaks(after, key, 'split')[1]} values of {key} are in several splits" in said[1]
    assert divided >= (1000 if len(tables) > 1000 else 0.8 * len(tables))
    assert left_out > 0.5 * len(tables)
