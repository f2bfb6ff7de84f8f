"""Embedding a folder: each image once whatever is killed, the same on any number of ranks, what is broken listed."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from trained import make_cells, make_run

import sslcells
from sslcells.cli import main
from sslcells.config import dump, load
from sslcells.data.folder import FolderImages, class_of, list_images
from sslcells.delivery import embedding
from sslcells.delivery.shards import Embeddings
from sslcells.run.lock import TAKING

ROOT = Path(__file__).parent.parent.parent
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(ROOT / "launch" / "cpu2.yaml")]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


def start(*command):
    return subprocess.Popen(
        command, env=ENVIRONMENT, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip


def finish(process):
    out, _ = process.communicate(timeout=240)
    assert process.returncode == 0, out
    return out


def rows(folder):
    """path → (id, vector, label) of all shards, and how often each path is there."""
    found, times = {}, {}
    for shard in Embeddings.open(folder).read_all():
        for i, (path, number) in enumerate(zip(shard.path, shard.id.tolist(), strict=True)):
            found[path] = number, shard.vector[i], shard.label[i] if shard.label else None
            times[path] = times.get(path, 0) + 1
    return found, times


def embed(run, cells, out, *more):
    return main(None, ["embed", str(run), str(cells), "--out", str(out), "--workers", "0", "--cpu", *more])


@pytest.mark.parametrize("form", ["parquet", "npz"])
def test_every_image_is_there_once_with_its_vector_and_label(run, cells, tmp_path, capsys, form):
    assert embed(run, cells, tmp_path / "out", "--shard", "10", "--batch", "4", "--format", form) == 0
    out = capsys.readouterr().out
    assert "24 images of 32 features in 3 shards" in out
    assert "images/s" in out
    found, times = rows(tmp_path / "out")
    names = list_images(cells)
    assert list(found) == names
    assert set(times.values()) == {1}
    assert [number for number, _, _ in found.values()] == list(range(24))
    assert [label for _, _, label in found.values()] == [name.split("/")[0] for name in names]
    z = sslcells.embed(cells, run)
    np.testing.assert_allclose(np.stack([vector for _, vector, _ in found.values()]), z, rtol=1e-5, atol=1e-6)
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        TAKING,
        "embeddings.json",
        *(f"part-00000{i}.{form}" for i in range(3))
    }  # fmt: skip


def test_any_reader_of_parquet_reads_it(run, cells, tmp_path):
    assert embed(run, cells, tmp_path / "out", "--no-labels") == 0
    table = pq.read_table(tmp_path / "out" / "part-000000.parquet")
    assert table.column_names == ["path", "id", "vector"]
    assert str(table.schema.field("vector").type) == "fixed_size_list<element: float>[32]"


def test_by_default_beside_the_run_and_again_is_nothing_to_do(run, cells, capsys):
    for _ in range(2):
        assert main(None, ["embed", str(run), str(cells), "--workers", "0", "--cpu"]) == 0
    shard = run / "embeddings" / "cells" / "part-000000.parquet"
    assert "24 images, 24 of them already" in capsys.readouterr().out
    assert shard.is_file()


def test_broken_images_are_listed_and_sizes_may_differ(run, cells, tmp_path, capsys):
    (cells / "blast" / "broken.png").write_bytes(b"")
    (cells / "cut, off.png").write_bytes((cells / "blast" / "cell_000000.png").read_bytes()[:300])
    Image.fromarray(np.zeros((50, 20, 3), dtype=np.uint8)).save(cells / "tall.png")
    assert embed(run, cells, tmp_path / "out", "--shard", "5", "--batch", "2") == 0
    assert f"2 could not be read: {tmp_path / 'out' / 'unreadable.csv'}" in capsys.readouterr().out
    with (tmp_path / "out" / "unreadable.csv").open(newline="") as file:
        listed = {row["path"]: row["reason"] for row in csv.DictReader(file)}
    assert listed.keys() == {"blast/broken.png", "cut, off.png"}
    assert listed["blast/broken.png"] == "empty file"
    found, _ = rows(tmp_path / "out")
    assert found.keys() | listed.keys() == set(list_images(cells))
    assert not found.keys() & listed.keys()
    assert found["tall.png"][2] is None


def test_nothing_readable_is_no_success(run, tmp_path, capsys):
    (tmp_path / "cells").mkdir()
    (tmp_path / "cells" / "1.png").write_bytes(b"")
    os.mkfifo(tmp_path / "cells" / "2.png")
    (tmp_path / "cells" / "3.png").symlink_to("3.png")
    for _ in range(2):  # also where the shards are there already
        assert embed(run, tmp_path / "cells", tmp_path / "out") == 1
        message = f"none of the 3 images below {tmp_path / 'cells'} could be read, such as 1.png: empty file"
        assert message in capsys.readouterr().err
    listed = (tmp_path / "out" / "unreadable.csv").read_text()
    assert '"2.png","a FIFO (named pipe), not a file"' in listed
    assert '"3.png","a broken link: it leads to 3.png"' in listed


def test_a_folder_of_results_that_is_a_link_to_itself(run, cells, tmp_path, capsys):
    (tmp_path / "out").symlink_to("out")
    assert embed(run, cells, tmp_path / "out") == 2
    assert "out cannot be written" in capsys.readouterr().err


def test_a_shard_of_broken_images_alone(run, tmp_path):
    for i in range(3):
        make_cells(tmp_path / "cells", 1)
        (tmp_path / "cells" / f"a{i}.png").write_bytes(b"")
    for form in ("parquet", "npz"):
        assert embed(run, tmp_path / "cells", tmp_path / form, "--shard", "3", "--format", form) == 0
        found, _ = rows(tmp_path / form)
        assert list(found) == ["cell_000000.png"]


def test_a_folder_that_goes_away_is_no_broken_image(run, cells, tmp_path, capsys, monkeypatch):
    def away(self, index):
        if cells.exists():
            cells.rename(tmp_path / "moved")
        raise embedding.DataError("no such file")

    monkeypatch.setattr(FolderImages, "pixels", away)
    assert embed(run, cells, tmp_path / "out") == 1
    assert f"{cells} is gone" in capsys.readouterr().err
    assert not list((tmp_path / "out").glob("part-*"))
    monkeypatch.undo()
    (tmp_path / "moved").rename(cells)
    assert embed(run, cells, tmp_path / "out") == 0
    assert len(rows(tmp_path / "out")[0]) == 24


@pytest.mark.slow
def test_killed_twice_each_image_is_there_once(run, tmp_path):
    cells = make_cells(tmp_path / "cells", 2000)
    killed_twice(run, cells, tmp_path / "out", 2000, "--shard", "50")


def killed_twice(run, cells, out, count, *more):
    """Kill an embedding twice while it works, then let it end; no shard that was there may be made again."""
    command = [sys.executable, "-m", "sslcells", "embed", str(run), str(cells), "--out", str(out), "--cpu", *more]
    made = {}
    for part in (1 / 4, 1 / 2):
        process = start(*command)
        while len(there := sorted(out.glob("part-*"))) < part * count / int(more[1]):
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.005)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        made = {shard: shard.stat().st_mtime_ns for shard in there} | made
    assert len(there) < Embeddings.open(out).shards
    (out / ".part-000099.parquet.deadbeef.partial").write_bytes(b"half")
    assert "of them already" in finish(start(*command))
    assert {shard: shard.stat().st_mtime_ns for shard in made} == made
    found, times = rows(out)
    assert list(found) == list_images(cells)
    assert len(found) == count
    assert set(times.values()) == {1}
    assert [number for number, _, _ in found.values()] == list(range(count))
    assert not list(out.glob(".*.partial"))


@pytest.mark.slow
def test_a_hundred_thousand_killed_twice_each_image_is_there_once(tmp_path):
    run = make_run(tmp_path / "run", "augment.size=16", "data.size=16")
    cells = make_cells(tmp_path / "cells", 100_000, size=16, classes=tuple("abcdefghij"))
    killed_twice(run, cells, tmp_path / "out", 100_000, "--shard", "1000", "--batch", "500")


@pytest.mark.slow
def test_two_ranks_give_what_one_gives_and_go_on_from_what_it_left(run, tmp_path):
    cells = make_cells(tmp_path / "cells", 90, classes=("a", "b"))
    (cells / "bad.png").write_bytes(b"bad")
    assert embed(run, cells, tmp_path / "one", "--shard", "8") == 0
    assert embed(run, cells, tmp_path / "two", "--shard", "8") == 0
    for number in (0, 3, 4, 5, 11):
        (tmp_path / "two" / f"part-{number:06}.parquet").unlink()
    (tmp_path / "two" / "unreadable.csv").unlink()
    out = finish(start(*LAUNCH, "-m", "sslcells", "embed", str(run), str(cells), "--out", str(tmp_path / "two")))
    assert "2 ranks" in out
    assert "90 images of 32 features in 12 shards" in out
    one, two = rows(tmp_path / "one"), rows(tmp_path / "two")
    assert list(one[0]) == list(two[0])
    assert one[1] == two[1]
    for path in one[0]:
        np.testing.assert_array_equal(one[0][path][1], two[0][path][1])
    assert (tmp_path / "two" / "unreadable.csv").read_text() == (tmp_path / "one" / "unreadable.csv").read_text()


def test_asked_to_stop_it_says_how_to_go_on(run, cells, tmp_path, capsys, monkeypatch):
    write = Embeddings.write

    def write_and_be_asked(self, number, shard):
        write(self, number, shard)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Embeddings, "write", write_and_be_asked)
    assert embed(run, cells, tmp_path / "out", "--shard", "8") == 143
    assert "stopped by SIGTERM with 1 of 3 shards; the same command resumes" in capsys.readouterr().err
    monkeypatch.undo()
    assert embed(run, cells, tmp_path / "out") == 0
    assert len(rows(tmp_path / "out")[0]) == 24


def test_anndata_holds_all(run, cells, tmp_path):
    pytest.importorskip("anndata", reason="the anndata extra is not installed")
    assert embed(run, cells, tmp_path / "out", "--shard", "10", "--format", "h5ad") == 0
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "out" / "embeddings.h5ad") as file:
        np.testing.assert_allclose(file["X"][:], sslcells.embed(cells, run), rtol=1e-5, atol=1e-6)
        assert [path.decode() for path in file["obs/path"][:]] == list_images(cells)
        assert sorted(x.decode() for x in file["obs/label/categories"][:]) == ["blast", "lymphocyte"]


def test_mistakes_are_named(run, cells, tmp_path, capsys):
    out = tmp_path / "out"
    (tmp_path / "empty").mkdir()
    assert embed(run, cells, out, "--shard", "10") == 0
    other = make_run(run.parent / "other", seed=1)
    six = make_run(run.parent / "six", channels=6)
    capsys.readouterr()
    for arguments, message in (
        ((run.parent / "tin", cells, out), "no such run's folder (did you mean tiny?)"),
        ((run, tmp_path / "cels", out), "no such folder (did you mean cells?)"),
        ((run, tmp_path / "empty", out), "holds no images"),
        ((other, cells, out), "holds embeddings of another encoder"),
        ((run, cells / "blast", out), "begun with other images: 24 below"),
        ((run, cells, cells / "here"), "lies in"),
        ((run, cells, out, "--shard", "20"), "begun with --shard 10, not 20"),
        ((run, cells, out, "--format", "npz"), "begun with --format parquet, not npz"),
        ((run, cells, out, "--shard", "0"), "--shard 0 should be at least 1"),
        ((six, cells, out), "takes images of 6 channels"),
    ):
        assert embed(*arguments) == 2, message
        assert message in capsys.readouterr().err


def test_a_damaged_shard_is_named(run, cells, tmp_path, capsys):
    for form in ("parquet", "npz"):
        assert embed(run, cells, tmp_path / form, "--shard", "10", "--format", form) == 0
        damaged = tmp_path / form / f"part-000001.{form}"
        whole = damaged.read_bytes()
        damaged.write_bytes(whole[:-30])
        assert embed(run, cells, tmp_path / form) == (1 if form == "parquet" else 2)
        embed(run, cells, tmp_path / form, "--format", form)
        assert f"{damaged} is damaged" in capsys.readouterr().err
        damaged.write_bytes((tmp_path / form / f"part-000002.{form}").read_bytes())
        assert embed(run, cells, tmp_path / form, "--format", form) == 1
        assert "other images than it should" in capsys.readouterr().err


def test_another_that_works_on_it_is_named(run, cells, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    lock = embedding.Lock(out)
    try:
        assert embed(run, cells, out) == 2
    finally:
        lock.release()
    assert "is in use by" in (error := capsys.readouterr().err)
    assert "--out" in error


def test_labels_are_the_first_folder_below_a_split():
    names = "a/x/1.png", "train/b/2.png", "Test/c/3.png", "train/4.png", "5.png"
    assert [class_of(name) for name in names] == ["a", "b", "c", None, None]
    assert [class_of(name, lab_above=True) for name in names] == ["x", None, None, None, None]


def test_classes_lie_below_laboratories_where_they_did_in_training(run, cells, tmp_path):
    """The laboratory was taken for the class."""
    above = load(None, ["data.kind=folder", "data.path=x", "data.lab_folder=above"])
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "config.yaml").write_text(dump(above), encoding="utf-8")
    (tmp_path / "labs").mkdir()
    shutil.copytree(cells, tmp_path / "labs" / "north")
    assert embed(tmp_path / "run", tmp_path / "labs", tmp_path / "out") == 0
    found, _ = rows(tmp_path / "out")
    assert {path: label for path, (_, _, label) in found.items()} == {
        f"north/{name}": name.split("/")[0] for name in list_images(cells)
    }


def test_names_that_are_no_utf8(run, cells, tmp_path):
    os.rename(os.fsencode(cells / "blast" / "cell_000000.png"), os.fsencode(cells) + b"/blast/cell_\xff.png")
    for form in ("parquet", "npz"):
        assert embed(run, cells, tmp_path / form, "--format", form) == 0
        assert "blast/cell_\\xff.png" in rows(tmp_path / form)[0]
    assert json.loads((tmp_path / "npz" / "embeddings.json").read_text())["count"] == 24
    assert torch.isfinite(torch.from_numpy(next(iter(rows(tmp_path / "npz")[0].values()))[1])).all()
