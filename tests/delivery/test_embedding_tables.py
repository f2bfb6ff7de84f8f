"""Embedding the rows of a table: whole images and boxes, with all columns, resumed to the bit, searched by row."""

import csv
import json
import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from test_embedding import LAUNCH, finish, start
from trained import make_cells, make_run

import sslcells
from sslcells.cli import main
from sslcells.config import ConfigError, load
from sslcells.data import open_splits
from sslcells.delivery.search import search
from sslcells.delivery.shards import Embeddings

COLUMNS = "path;label;split;donor;site;cell_id;area;plate;done;path/x;x_min;y_min;x_max;y_max"


@pytest.fixture
def fields(tmp_path):
    """Three fields of 2×2 cells of 32 px, and the table of their boxes; the names of cells are of one row each."""
    folder = tmp_path / "fields"
    cells = make_cells(tmp_path / "cells", 12)
    drawn = [np.asarray(Image.open(file)) for file in sorted(cells.glob("*.png"))]
    folder.mkdir()
    rows = [COLUMNS]
    for i in range(3):
        four = drawn[4 * i : 4 * i + 4]
        Image.fromarray(np.vstack([np.hstack(four[:2]), np.hstack(four[2:])])).save(folder / f"f{i}.png")
        for j in range(4):
            x, y = 32 * (j % 2), 32 * (j // 2)
            about = f"{'xy'[j % 2]};{'train' if i else 'val'};d{i};{'AB'[i // 2]};c{i}{j};{j + 0.5};0{i};true;1"
            rows.append(f"f{i}.png;{about};{x};{y};{x + 32};{y + 32}")
    (folder / "cells.csv").write_text("\n".join(rows) + "\n", encoding="utf-8-sig")
    return folder / "cells.csv"


def embed(run, target, out, *more):
    return main(None, ["embed", str(run), str(target), "--out", str(out), "--workers", "0", "--cpu", *map(str, more)])


def test_boxes_are_embedded_with_all_columns(run, fields, tmp_path):
    for form in ("parquet", "npz"):
        assert embed(run, fields, tmp_path / form, "--shard", "5", "--batch", "2", "--format", form) == 0
        shards = [*Embeddings.open(tmp_path / form).read_all()]
        names = [name for shard in shards for name in shard.path]
        assert names == [f"f{i}.png#c{i}{j}" for i in range(3) for j in range(4)]
        assert [label for shard in shards for label in shard.label] == [*"xy"] * 6
        cut = [Image.open(fields.parent / f"f{i // 4}.png").crop(box) for i, box in enumerate(boxes(shards))]
        z = sslcells.embed(cut, run)
        np.testing.assert_allclose(np.concatenate([shard.vector for shard in shards]), z, rtol=1e-4, atol=1e-5)
        more = pa.concat_tables([shard.more for shard in shards])
        assert more.column_names == [
            "image_file", "image_box", "table_path", "split", "donor", "site", "cell_id", "area", "plate", "done",
            "path/x", "x_min", "y_min", "x_max", "y_max",
        ]  # fmt: skip
        assert more["area"].to_pylist() == [0.5, 1.5, 2.5, 3.5] * 3
        assert more["plate"].to_pylist()[4] == "01"
        assert more["x_max"].type == pa.int64()
        assert more["image_file"].to_pylist()[5] == more["table_path"].to_pylist()[5] == "f1.png"


def boxes(shards):
    return [box for shard in shards for box in shard.more["image_box"].to_pylist()]


def test_a_table_of_the_runs_own_training_is_read_by_its_settings(fields, tmp_path):
    text = fields.read_text(encoding="utf-8-sig").replace("path;label", "where;kind").replace("cell_id", "number")
    other = tmp_path / "tables" / "t.csv"
    other.parent.mkdir()
    other.write_text(text)
    settings = [f"data.path={fields.parent}", "data.path_column=where", "data.label_column=kind"]
    run = make_run(tmp_path / "runs" / "own", "data.kind=table", f"data.table={other}", *settings)
    assert embed(run, other, tmp_path / "own") == 0
    strange = make_run(tmp_path / "runs" / "strange", "data.kind=folder", "data.path=x")
    assert embed(strange, other, tmp_path / "strange") == 2
    assert embed(strange, other, tmp_path / "strange", *settings) == 0
    for out in ("own", "strange"):
        (shard,) = Embeddings.open(tmp_path / out).read_all()
        assert shard.path[1] == "f0.png#32,0,64,32"
        assert shard.label == [*"xy"] * 6


def test_whole_images_bad_rows_and_mistakes(run, fields, tmp_path, capsys):
    table = tmp_path / "t.parquet"
    pq.write_table(pa.table({"file": ["f0.png", "F1.PNG", "f9.png"], "n": [[1], [2], None]}), table)
    assert embed(run, table, tmp_path / "out", f"data.path={fields.parent}") == 2
    assert "1 of 3 rows name no file below" in capsys.readouterr().err
    assert embed(run, table, tmp_path / "out", f"data.path={fields.parent}", "data.on_error=skip") == 0
    (shard,) = Embeddings.open(tmp_path / "out").read_all()
    assert (shard.path, shard.label) == (["f0.png", "f1.png"], [None, None])
    assert shard.more["n"].to_pylist() == ["[1]", "[2]"]
    assert shard.unreadable == [("f9.png", f"name no file below {fields.parent}: f9.png")]
    with (tmp_path / "out" / "unreadable.csv").open(newline="") as opened:
        assert [row["path"] for row in csv.DictReader(opened)] == ["f9.png"]
    (fields.parent / "f2.png").write_bytes(b"")
    beyond = fields.read_text(encoding="utf-8-sig").replace(
        "c03;3.5;00;true;1;32;32;64;64", "c03;3.5;00;true;1;64;64;96;96"
    )
    fields.write_text(beyond)
    assert embed(run, fields, tmp_path / "bad") == 0
    (shard,) = Embeddings.open(tmp_path / "bad").read_all()
    assert dict(shard.unreadable) == {
        "f0.png#c03": "its box [64, 64, 96, 96] lies outside of the image of 64×64 px",
        **{f"f2.png#c2{j}": "empty file" for j in range(4)},
    }
    for arguments, message in (
        ((fields, "--include", "*.png"), "--include and --exclude choose images of a folder"),
        ((fields, "data.size=8"), "data.size is not a choice here"),
        ((fields, "train.workers=8"), "only settings of data can be given"),
        ((fields, "data.label_column=lable"), "did you mean label"),
        ((fields.parent, "data.path=x"), "settings of data are for tables"),
        ((tmp_path / "none.csv",), "no such file"),
    ):
        assert embed(run, arguments[0], tmp_path / "new", *arguments[1:]) == 2, message
        assert message in capsys.readouterr().err
    fields.write_text(beyond.replace("d1", "d7"))
    assert embed(run, fields, tmp_path / "bad") == 2
    assert "was begun with another table, or other settings of it: 12 rows of" in capsys.readouterr().err


def test_what_is_resumed_is_the_same_to_the_bit(run, fields, tmp_path, monkeypatch):
    assert embed(run, fields, tmp_path / "whole", "--shard", "3", "--batch", "2") == 0
    write, written = Embeddings.write, []

    def killed(self, number, shard):
        if len(written) == 1:
            written.clear()
            raise KeyboardInterrupt
        write(self, number, shard)
        written.append(number)

    monkeypatch.setattr(Embeddings, "write", killed)
    for _ in range(2):
        assert embed(run, fields, tmp_path / "killed", "--shard", "3", "--batch", "2") != 0
    monkeypatch.undo()
    assert len([*(tmp_path / "killed").glob("part-*")]) == 2
    assert embed(run, fields, tmp_path / "killed", "--batch", "2") == 0
    for part in sorted((tmp_path / "whole").glob("part-*")):
        assert part.read_bytes() == (tmp_path / "killed" / part.name).read_bytes()


def test_anndata_has_the_table_and_the_cells_as_keys(run, fields, tmp_path):
    anndata = pytest.importorskip("anndata", reason="the anndata extra is not installed")
    assert embed(run, fields, tmp_path / "out", "--shard", "5", "--format", "h5ad") == 0
    made = anndata.read_h5ad(tmp_path / "out" / "embeddings.h5ad")
    assert made.obs.index.name == "cell_id"
    assert [*made.obs.index] == [f"c{i}{j}" for i in range(3) for j in range(4)]
    assert [*made.obs.columns] == [
        "path", "id", "label", "image_file", "table_path", "split", "donor", "site", "area", "plate", "done", "path_x",
        "x_min", "y_min", "x_max", "y_max",
    ]  # fmt: skip
    assert [*made.obs["donor"]][:5] == ["d0"] * 4 + ["d1"]
    assert made.obs["area"].dtype == float
    assert made.X.shape == (12, 32)


def test_search_finds_rows_by_name_and_by_cell(run, fields, tmp_path):
    assert embed(run, fields, tmp_path / "out", "--shard", "5") == 0
    (by_name,), (by_cell,) = (search(str(tmp_path / "out"), [query], k=3, cpu=True) for query in ("f1.png#c12", "c12"))
    assert by_name == by_cell
    assert len(by_cell) == 3
    assert "f1.png#c12" not in [near.path for near in by_cell]
    assert all(near.file == near.path.partition("#")[0] and near.box for near in by_cell)
    assert (tmp_path / "out" / "search" / "neighbours.png").is_file()
    (other,) = search(str(tmp_path / "out"), ["c12"], k=12, sources=str(fields), cpu=True)
    assert {near.file for near in other} == {"f0.png", "f2.png"}
    with pytest.raises(ConfigError, match=r"c99: no such image, neither here .* nor a row of"):
        search(str(tmp_path / "out"), ["c99"], cpu=True)


@pytest.mark.parametrize("form", ["parquet", "npz"])
@pytest.mark.parametrize("way", ["exact", "faiss"])
def test_what_is_found_has_the_columns_of_the_table(run, fields, tmp_path, way, form):
    if way == "faiss":
        pytest.importorskip("faiss", reason="the faiss extra is not installed")
    fields.write_text(fields.read_text(encoding="utf-8-sig").replace("donor", "rank").replace("c11;1.5", "c11;"))
    out = tmp_path / "out"
    assert embed(run, fields, out, "--shard", "5", "--format", form) == 0
    (near,) = search(str(out), ["c12"], k=20, faiss=way == "faiss", cpu=True)
    assert {one.path for one in near} == {f"f{i}.png#c{i}{j}" for i in range(3) for j in range(4)} - {"f1.png#c12"}
    with (out / "search" / "neighbours.csv").open(newline="") as opened:
        found = [*csv.DictReader(opened)]
    assert [*found[0]][:7] == ["query", "rank", "distance", "path", "label", "table_path", "split"]
    assert {"image_file", "image_box"}.isdisjoint(found[0])
    for place, (row, one) in enumerate(zip(found, near, strict=True), 1):
        i, j = map(int, one.table["cell_id"].removeprefix("c"))
        assert (row["rank"], row["path"], row["cell_id"]) == (str(place), one.path, f"c{i}{j}")
        assert (row["table_rank"], row["plate"], row["x_min"]) == (f"d{i}", f"0{i}", str(32 * (j % 2)))
        assert (row["area"] in ("", "nan")) == ((i, j) == (1, 1))
        assert (row["area"] == str(j + 0.5)) == ((i, j) != (1, 1))


def test_a_configuration_that_cannot_be_read(run, fields, tmp_path, capsys):
    (run / "config.yaml").write_text("data: [")
    assert embed(run, fields, tmp_path / "out") == 2
    assert "config.yaml cannot be read: " in capsys.readouterr().err


@pytest.mark.slow
def test_two_ranks_give_what_one_gives(run, fields, tmp_path):
    assert embed(run, fields, tmp_path / "one", "--shard", "3", "--batch", "2") == 0
    two = ["--out", str(tmp_path / "two"), "--shard", "3", "--batch", "2", "--workers", "0"]
    assert "2 ranks" in finish(start(*LAUNCH, "-m", "sslcells", "embed", str(run), str(fields), *two))
    parts = sorted((tmp_path / "one").glob("part-*"))
    assert len(parts) == 4
    for part in parts:
        assert part.read_bytes() == (tmp_path / "two" / part.name).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_a_table_from_the_check_to_the_search(fields, tmp_path, capsys, monkeypatch, kind):
    """Everything that a laboratory with a table of boxes does, with its commands."""
    monkeypatch.chdir(tmp_path)
    table = fields
    if kind == "parquet":
        table = fields.with_suffix(".parquet")
        lines = [line.split(";") for line in fields.read_text(encoding="utf-8-sig").splitlines()]
        pq.write_table(pa.table(dict(zip(lines[0], zip(*lines[1:], strict=True), strict=True))), table)
    assert main(None, ["split", str(table), "--by", "donor", "--stratify", "label"]) == 0
    split = table.with_name(f"{table.stem}_split{table.suffix}")
    settings = [
        "data.kind=table", f"data.table={split}", "data.size=32", "augment.size=32", "model.backbone=small_cnn",
        "model.args={width: 8}", "train.global_batch=4", "train.total_epochs=2", "train.workers=0", "name=run",
        "optim.warmup_epochs=0",
    ]  # fmt: skip
    assert main(None, ["train", "--check", *settings]) == 0
    said = capsys.readouterr().out
    assert (
        "label from label; split from split; source from donor; site from site; cell from cell_id; box from x_min"
        in said
    )
    assert "4 images of 1 source" in said
    assert main(None, ["train", *settings]) == 0
    assert main(None, ["evaluate", "runs/run"]) == 0
    assert json.loads((tmp_path / "runs/run/evaluation.json").read_text())["classes"] == ["x", "y"]
    assert main(None, ["embed", "runs/run", str(split), "--workers", "0", "--cpu"]) == 0
    (shard,) = Embeddings.open(tmp_path / "runs/run/embeddings" / split.stem).read_all()
    splits = open_splits(load("runs/run/config.yaml").data)
    assert {name for images in splits.values() for name in map(images.name, range(len(images)))} == {*shard.path}
    assert main(None, ["search", "runs/run", "c01", "--cpu", "--sources", str(split)]) == 0
    assert main(None, ["export", "runs/run", "--no-onnx"]) == 0
    assert os.path.isfile(tmp_path / "runs/run/export/encoder.json")
