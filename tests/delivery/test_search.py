"""The search: as brute force has it, without the query and its source; the picture, the table, and the mistakes."""

import csv
import os
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from trained import make_cells, make_run

import sslcells
from sslcells.cli import main
from sslcells.data.folder import list_images
from sslcells.delivery import search as module
from sslcells.delivery.search import search


@pytest.fixture
def embedded(run, tmp_path):
    """A run, its folder of images, and embeddings in several shards."""
    cells = make_cells(tmp_path / "cells", 60, classes=("blast", "lymphocyte"))
    assert main(None, ["embed", str(run), str(cells), "--shard", "13", "--workers", "0", "--cpu"]) == 0
    return run, cells


def brute_force(run, cells, query, k, left_out):
    """Paths and distances by numpy in float64, one image at a time."""
    names = list_images(cells)
    z = sslcells.embed(cells, run).double().numpy()
    q = sslcells.embed(query, run).double().numpy()[0]
    distance = {
        name: 1 - row @ q / (np.linalg.norm(row) * np.linalg.norm(q))
        for name, row in zip(names, z, strict=True)
        if not left_out(name)
    }
    nearest = sorted(distance, key=distance.get)[:k]
    return nearest, [distance[name] for name in nearest]


@pytest.mark.parametrize("way", ["exact", "faiss", "faiss lists"])
def test_it_finds_what_brute_force_finds(embedded, way, tmp_path, monkeypatch):
    run, cells = embedded
    if way != "exact":
        pytest.importorskip("faiss", reason="the faiss extra is not installed")
    if way == "faiss lists":
        monkeypatch.setattr(module, "_SMALL", 1)
        monkeypatch.setattr(module.math, "sqrt", lambda n: 0.5)
    outside = tmp_path / "outside.png"
    Image.fromarray(np.random.default_rng(0).integers(256, size=(40, 32, 3), dtype=np.uint8)).save(outside)
    inside = [cells / name for name in list_images(cells)[5:40:17]]
    for _ in range(2):  # the index is made, then read
        queries = [outside, *inside]
        found = search(run, queries, k=7, faiss=way != "exact", cpu=True)
        for query, near in zip(queries, found, strict=True):
            names, distances = brute_force(run, cells, query, 7, lambda name, q=query: cells / name == q)
            np.testing.assert_allclose([one.distance for one in near], distances, atol=1e-5)
            assert len({one.path for one in near}) == 7
            z = dict(zip(names, distances, strict=True))
            for one in near:  # the drawings repeat, and equal ones may change places
                assert one.path in z or one.distance == pytest.approx(distances[-1], abs=1e-5)
                assert one.label == one.path.split("/")[0]


def test_of_equal_ones_the_first_path_comes_first(embedded, monkeypatch):
    run, cells = embedded
    read, one = module.Embeddings.read, torch.eye(1, 32)

    def equal(self, number):
        shard = read(self, number)
        return shard._replace(vector=one.numpy().repeat(len(shard.path), 0))

    monkeypatch.setattr(module.Embeddings, "read", equal)
    names, ids = list_images(cells), module.source_finder(None, None)
    embeddings = module.find_embeddings(str(run))
    (near,) = module.exactly(embeddings, 2 * one, ids([names[3]]), 20, ids, torch.device("cpu"))
    assert [found.path for found in near] == [*names[:3], *names[4:21]]
    assert {found.distance for found in near} == {0.0}


def test_images_of_the_querys_source_are_left_out(embedded, tmp_path):
    run, cells = embedded
    names = list_images(cells)
    (tmp_path / "sources.csv").write_text("path,source\n" + "".join(f"{n},s{i % 3}\n" for i, n in enumerate(names)))
    query = names[4]
    (near,) = search(str(run), [query], k=100, sources=str(tmp_path / "sources.csv"), cpu=True)
    assert {one.path for one in near} == {name for i, name in enumerate(names) if i % 3 != 1}
    (near,) = search(str(run), [query], k=100, source_pattern=r"^(\w+)/", cpu=True)
    assert {one.label for one in near} == {"lymphocyte"}
    (near,) = search(str(run), [query], k=100, cpu=True)
    assert {one.path for one in near} == set(names) - {query}
    assert [one.distance for one in near] == sorted(one.distance for one in near)


def test_by_faiss_too_the_querys_source_is_left_out(embedded):
    pytest.importorskip("faiss", reason="the faiss extra is not installed")
    run, cells = embedded
    (near,) = search(str(run), [list_images(cells)[4]], k=20, source_pattern=r"^(\w+)/", faiss=True, cpu=True)
    assert len(near) == 20
    assert {one.label for one in near} == {"lymphocyte"}


def test_the_table_and_the_picture(embedded, tmp_path, capsys):
    run, cells = embedded
    names = list_images(cells)
    (cells / names[9]).rename(cells / "gone")
    out = tmp_path / "found"
    queries = [str(cells / names[0]), names[1]]
    assert main(None, ["search", str(run), *queries, "--k", "59", "--out", str(out), "--cpu"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("distance") == 2
    assert names[9] in printed
    with (out / "neighbours.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["rank"] for row in rows] == [str(i) for i in range(1, 60)] * 2
    with Image.open(out / "neighbours.png") as picture:
        assert picture.width > 21 * 150
        assert picture.height > 2 * 150


def test_mistakes_are_named(embedded, tmp_path, capsys):
    run, cells = embedded
    query = str(cells / list_images(cells)[0])
    folder = run / "embeddings" / "cells"
    other, bare = make_run(run.parent / "other", seed=1), tmp_path / "bare"
    bare.mkdir()
    (tmp_path / "wrong.csv").write_text("picture,origin\na,b\n")
    (tmp_path / "broken.png").write_bytes(b"x")
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "loop.png").symlink_to("loop.png")
    for arguments, status, message in (
        ((run.parent / "tin", query), 2, "no such run's folder (did you mean tiny?)"),
        ((bare, query), 2, "neither a folder of embeddings nor a run"),
        ((other, query), 2, "has no embeddings yet: sslcells embed"),
        ((folder, query, "--encoder", other), 2, "holds embeddings of another encoder"),
        ((run, query[:-5] + ".png"), 2, "no such image"),
        ((run, cells), 2, "is a folder; a query is an image"),
        ((run, tmp_path / "broken.png"), 1, "broken.png: not an image"),
        ((run, tmp_path / "pipe.png"), 2, "pipe.png is a FIFO, a socket or a device; a query is an image"),
        ((run, tmp_path / "loop.png"), 2, "loop.png is a broken link, to loop.png"),
        ((run, query, "--k", "0"), 2, "--k 0 should be at least 1"),
        ((run, query, "--sources", tmp_path / "wrng.csv"), 2, "no such file (did you mean wrong.csv?)"),
        ((run, query, "--sources", tmp_path / "wrong.csv"), 2, "it has: picture, origin"),
        ((run, query, "--source-pattern", "a"), 2, "needs one group in parentheses"),
    ):
        assert main(None, ["search", *map(str, arguments), "--cpu"]) == status, message
        assert message in capsys.readouterr().err
    (folder / "part-000002.parquet").rename(tmp_path / "away")
    assert main(None, ["search", str(run), query]) == 2
    assert "is not complete: 4 of 5 shards are there" in capsys.readouterr().err
    (tmp_path / "away").rename(folder / "part-000002.parquet")
    shutil.copytree(folder, run / "embeddings" / "more")
    assert main(None, ["search", str(run), query]) == 2
    assert "has several embeddings; name one of them" in capsys.readouterr().err
    run.rename(run.parent / "moved")
    assert main(None, ["search", str(run.parent / "moved" / "embeddings" / "more"), query]) == 2
    assert "is not where it was" in (error := capsys.readouterr().err)
    assert "--encoder RUN" in error


def test_rows_that_are_not_finite_are_nobodys_neighbours(embedded, monkeypatch):
    run, cells = embedded
    read = module.Embeddings.read

    def spoilt(self, number):
        shard = read(self, number)
        vector = np.array(shard.vector)
        vector[0] = np.nan
        return shard._replace(vector=vector)

    monkeypatch.setattr(module.Embeddings, "read", spoilt)
    (near,) = search(str(run), [list_images(cells)[4]], k=100, cpu=True)
    assert len(near) == 60 - 1 - 5
    assert torch.tensor([one.distance for one in near]).isfinite().all()
