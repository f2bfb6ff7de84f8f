"""Packs: written once, whole or not at all, read as the data set that they were made of."""

import json
import os
import pickle
import signal

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from test_train import signalled_in, untimed
from trained import make_cells

from sslcells.cli import main
from sslcells.config import ConfigError, load
from sslcells.data import DataError, _checksums, _rows, open_splits, pack, reading
from sslcells.data._rows import Rows
from sslcells.data.loader import InOrder, read, read_readable
from sslcells.delivery import packing
from sslcells.run.interrupt import Stopped
from sslcells.train import train


@pytest.fixture(scope="module")
def cells(tmp_path_factory):
    """Two classes in train and val, with a source for most."""
    folder = tmp_path_factory.mktemp("cells")
    make_cells(folder / "train", 50, classes=("a", "b"))
    make_cells(folder / "val", 7, classes=("b", "c"))
    lines = [f"train/a/cell_{i:06}.png,s{i // 4}" for i in range(0, 50, 2)]
    lines += [f"train/b/cell_{i:06}.png,s{i // 4}" for i in range(1, 31, 2)]
    lines += [f"val/b/cell_{i:06}.png,v" for i in range(0, 7, 2)] + ["val/c/cell_000001.png,v"]
    (folder / "sources.csv").write_text("path,source\n" + "\n".join(lines))
    return folder


CHANGES = ("data.sources=sources.csv", "data.size=[24,20]")


@pytest.fixture
def packed(cells, tmp_path):
    packing.pack(str(cells), str(tmp_path / "pack"), CHANGES, shard=None)
    return tmp_path / "pack"


def opened(path, **fields):
    return open_splits(pack.Config(path=str(path), **fields))


def small_shards(monkeypatch, images=8):
    """Shards of so many images of 3×24×20 px."""
    monkeypatch.setattr(packing, "SHARD", 1)
    monkeypatch.setattr(packing, "MIB", images * 3 * 24 * 20)


def test_a_pack_is_the_data_set_that_it_was_made_of(cells, packed):
    run = load(None, ["data.kind=folder", f"data.path={cells}", *CHANGES])
    before, after = open_splits(run.data), opened(packed)
    assert before.keys() == after.keys() == {"train", "val"}
    for name, images in before.items():
        same = after[name]
        assert [same.name(i) for i in range(len(same))] == [images.name(i) for i in range(len(images))]
        assert (same.classes, same.channels, same.labs) == (images.classes, 3, None)
        for field in ("labels", "sources", "sourced"):
            assert torch.equal(getattr(same, field), getattr(images, field)), field
        for i in range(len(images)):
            assert torch.equal(same.pixels(i), images.pixels(i))
    assert reading(pack.Config(path=str(packed)), 64) == reading(run.data, 64)


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_those_of_the_folder_in_any_order(cells, tmp_path, monkeypatch, workers):
    small_shards(monkeypatch)
    packing.pack(str(cells), str(tmp_path / "pack"), CHANGES)
    assert len(list((tmp_path / "pack").glob("train-*.npy"))) == 7
    run = load(None, ["data.kind=folder", f"data.path={cells}", *CHANGES])
    order = InOrder([*torch.randperm(50).tolist(), 3, 3, 49, 48, 3], 11)
    for a, b in zip(
        read(open_splits(run.data)["train"], order, workers, pin_memory=False),
        read(opened(tmp_path / "pack")["train"], order, workers, pin_memory=False),
        strict=True,
    ):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_shards_are_plain_arrays_with_a_table(cells, packed):
    manifest = json.loads((packed / "pack.json").read_text())
    assert manifest["shape"] == [3, 24, 20]
    array = np.load(packed / "train-000000.npy", mmap_mode="r")
    assert (array.shape, array.dtype) == ((50, 3, 24, 20), np.uint8)
    table = pq.read_table(packed / "train.parquet").to_pydict()
    assert table["path"][:2] == ["train/a/cell_000000.png", "train/a/cell_000002.png"]
    assert table["class"][0] == "a"


def test_a_killed_pack_goes_on(cells, tmp_path, monkeypatch):
    small_shards(monkeypatch)
    out, write, count = tmp_path / "pack", packing._write_shard, 0

    class Killed(BaseException):
        pass

    def killed(*args):
        nonlocal count
        count += 1
        if count == 4:
            raise Killed
        return write(*args)

    monkeypatch.setattr(packing, "_write_shard", killed)
    with pytest.raises(Killed):
        packing.pack(str(cells), str(out), CHANGES)
    with pytest.raises(ConfigError, match=r"is not complete: 3 of 8 shards are written; the command that began"):
        opened(out)
    (out / ".train-000003.npy.x.partial").write_bytes(b"left")
    finished = {file: file.stat().st_ino for file in out.glob("*.npy")}
    packing.pack(str(cells), str(out), CHANGES)
    assert count == 4 + 5
    assert finished == {file: file.stat().st_ino for file in finished}
    assert not list(out.glob("*.partial"))
    packing.pack(str(cells), str(tmp_path / "whole"), CHANGES)
    for file in sorted((tmp_path / "whole").glob("[tv]*")):
        assert (out / file.name).read_bytes() == file.read_bytes(), file.name


def flip(file, at=-1):
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)


DAMAGES = {
    "train-000000.npy": (lambda f: f.unlink(), "is missing; the command that packed the images writes it again"),
    "val-000000.npy": (flip, "is damaged: its SHA-256 is another"),
    "train.parquet": (lambda f: f.write_bytes(f.read_bytes()[:-9]), r"is damaged: it has [\d,]+ bytes, not [\d,]+"),
    "pack.json": (lambda f: f.write_bytes(f.read_bytes()[:-9]), r"pack.json is damaged \(JSONDecodeError"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_named_and_the_same_command_mends_it(cells, packed, name):
    damage, words = DAMAGES[name]
    opened(packed)
    whole = (packed / name).read_bytes()
    damage(packed / name)
    with pytest.raises(ConfigError, match=words) as error:
        opened(packed)
    assert name in str(error.value)
    if name != "pack.json":
        packing.pack(str(cells), str(packed), CHANGES)
        assert (packed / name).read_bytes() == whole
        opened(packed)


def test_checksums_are_computed_once(packed, monkeypatch):
    seen = []
    digest = _checksums._digest
    monkeypatch.setattr(_checksums, "_digest", lambda file: seen.append(file.name) or digest(file))
    for file in packed.iterdir():
        os.utime(file, ns=(0, 10**18))
    opened(packed)
    assert sorted(seen) == ["train-000000.npy", "train.parquet", "val-000000.npy", "val.parquet"]
    seen.clear()
    opened(packed)
    assert not seen
    os.utime(packed / "val-000000.npy", ns=(0, 2 * 10**18))
    opened(packed)
    assert seen == ["val-000000.npy"]
    (packed / ".sslcells" / "checksums.json").write_text("[damaged")
    opened(packed, verify="size")
    assert len(seen) == 1
    opened(packed)
    assert len(seen) == 5


def test_a_shard_that_ends_early_while_it_is_read_is_an_error(packed):
    images = opened(packed)["train"]
    images.pixels(0)
    with (packed / "train-000000.npy").open("r+b") as file:
        file.truncate(30 * 3 * 24 * 20)
    assert images.pixels(20).shape == (3, 24, 20)
    with pytest.raises(DataError, match=r"train-000000.npy ends at byte 43,200, within an image; it was longer when"):
        list(read(images, InOrder(range(50), 50), 0, pin_memory=False))
    (batch,) = read_readable(images, InOrder(range(25, 35), 10), 0, pin_memory=False)
    assert batch.image == [25, 26, 27, 28]
    assert [index for index, _ in batch.unreadable] == [29, 30, 31, 32, 33, 34]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["data.size=16"], "shape, data.size; choose another folder"),
        (["data.intensity=full"], "reading, data.intensity"),
        (["data.size=[24,20]", "data.labels=none"], "the images of train, 50 there and 50 now"),
    ],
)
def test_another_data_set_is_refused(cells, packed, changes, words):
    with pytest.raises(ConfigError, match="holds a pack of other images or settings") as error:
        packing.pack(str(cells), str(packed), [CHANGES[0], "data.size=[24,20]", *changes])
    assert words in str(error.value)


def test_mistakes_are_one_line(cells, packed, tmp_path, capsys):
    Image.new("RGB", (9, 9)).save(cells / "train" / "a" / "small.png")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").touch()
    wanted = {
        (str(cells), "--out", str(tmp_path / "p")): "images have several sizes (height × width)",
        (str(cells), "--out", str(tmp_path / "other"), "--size", "8"): "is not empty (thesis.txt) and holds no pack",
        (str(cells), "--out", str(tmp_path / "p"), "--size", "8xx"): "data.size=",
        (str(cells), "--out", str(tmp_path / "p"), "optim.lr=1"): "pack takes changes to the section data alone",
        (str(packed), "--out", str(tmp_path / "p")): "is a pack; copy the folder as it is",
        (str(cells / "nothing"), "--out", str(tmp_path / "p")): "has no folder 'nothing'",
        (str(cells), "--out", str(tmp_path / "p"), "--size", "8", "--shard", "0"): "--shard 0 should be at least 1 MiB",
    }
    try:
        for arguments, words in wanted.items():
            assert main("pack", [*arguments]) == 2
            assert words in capsys.readouterr().err
    finally:
        (cells / "train" / "a" / "small.png").unlink()
    for path, words in ((cells, "it has no pack.json"), (tmp_path / "pak", "no such folder (did you mean pack?)")):
        with pytest.raises(ConfigError) as error:
            opened(path)
        assert words in str(error.value)
    manifest = json.loads((packed / "pack.json").read_text())
    (packed / "pack.json").write_text(json.dumps(manifest | {"format": 2}))
    with pytest.raises(ConfigError, match="has format 2, and this version of sslcells reads 1"):
        opened(packed)


def test_a_broken_image_is_named(tmp_path, capsys):
    make_cells(tmp_path / "cells", 9)
    file = tmp_path / "cells" / "cell_000003.jpg"
    Image.effect_noise((300, 300), 90).save(file)
    file.with_suffix(".png").unlink()
    file.write_bytes(file.read_bytes()[:-30_000])
    arguments = [str(tmp_path / "cells"), "--out", str(tmp_path / "pack"), "--size", "32"]
    assert main("pack", arguments) == 1
    assert "cell_000003.jpg: " in capsys.readouterr().err
    assert main("pack", [*arguments, "data.on_error=skip"]) == 0
    train = opened(tmp_path / "pack")["train"]
    assert len(train) == 8
    assert "cell_000003.jpg" in train.found.broken


def test_rows_are_read_in_few_pieces_and_end_with_the_process_that_opened_them(tmp_path, monkeypatch):
    monkeypatch.setattr(_rows, "_GAP", 20)
    monkeypatch.setattr(_rows, "_OPEN", 2)
    monkeypatch.setattr(_rows, "_MOST", 5)
    arrays = np.random.default_rng(0).integers(0, 256, (4, 30, 10), dtype=np.uint8)
    for i, array in enumerate(arrays):
        (tmp_path / f"{i}").write_bytes(b"head" + array.tobytes())
    rows = Rows([str(tmp_path / f"{i}") for i in range(4)], [4] * 4, 10)
    reads = []
    plain = os.preadv
    monkeypatch.setattr(os, "preadv", lambda f, pieces, at: reads.append(at) or plain(f, pieces, at))
    file = np.random.default_rng(1).integers(0, 4, 60)
    row = np.random.default_rng(2).integers(0, 30, 60)
    out = torch.empty(60, 10, dtype=torch.uint8)
    rows.read(file.tolist(), row.tolist(), out)
    assert np.array_equal(out.numpy(), arrays[file, row])
    assert len(reads) < 40
    assert len(rows.files._opened) == 2
    again = pickle.loads(pickle.dumps(rows))
    again.read([3], [29], out[:1])
    assert np.array_equal(out[0].numpy(), arrays[3, 29])


TINY = [
    "augment.size=16",
    "model.backbone=small_cnn",
    "model.args={width: 8}",
    "method.hidden=16",
    "method.dimension=8",
    "train.global_batch=16",
    "train.total_steps=4",
    "log.every_steps=2",
    "checkpoint.every_steps=2",
    "evaluate.pictures=false",
    "evaluate.k=3",
]


def ending(folder):
    return load_file(folder / "encoder.safetensors"), untimed(folder), (folder / "encoder.json").read_bytes()


@pytest.fixture(scope="module")
def trained(cells, tmp_path_factory):
    """A run on the folder, whole, and its words."""
    out = tmp_path_factory.mktemp("trained")
    words = [*TINY, "data.kind=folder", f"data.path={cells}", *CHANGES, "train.workers=0", f"out={out}", "name=folder"]
    return ending(train(load(None, words)))


def same(a, b):
    assert a[1:] == b[1:]
    assert all(torch.equal(a[0][key], b[0][key]) for key in a[0] | b[0])


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_run_on_the_pack_is_the_run_on_the_folder(trained, packed, tmp_path, workers):
    words = [*TINY, "data.kind=pack", f"data.path={packed}", f"train.workers={workers}", f"out={tmp_path}"]
    same(ending(train(load(None, words))), trained)


@pytest.mark.parametrize("first", ["folder", pytest.param("pack", marks=pytest.mark.slow)])
def test_a_run_goes_on_from_the_folder_to_the_pack_and_back(trained, cells, packed, tmp_path, first):
    of = {
        "folder": ["data.kind=folder", f"data.path={cells}", *CHANGES],
        "pack": ["data.kind=pack", f"data.path={packed}"],
    }
    rest = [*TINY, "train.workers=0", f"out={tmp_path}"]
    with pytest.raises(Stopped):
        train(load(None, [*rest, *of[first]]), signalled_in(3, signal.SIGUSR1))
    second = next(kind for kind in of if kind != first)
    same(ending(train(load(None, [*rest, *of[second]]))), trained)


def test_a_run_of_the_folder_refuses_the_pack_of_another_size(cells, tmp_path):
    rest = [*TINY, "train.workers=0", f"out={tmp_path}"]
    with pytest.raises(Stopped):
        train(load(None, [*rest, "data.kind=folder", f"data.path={cells}", *CHANGES]), signalled_in(1, signal.SIGUSR1))
    packing.pack(str(cells), str(tmp_path / "pack"), [CHANGES[0], "data.size=16"])
    with pytest.raises(ConfigError, match=r"another configuration \(data.size: \[24, 20\] → \[16, 16\]\)"):
        train(load(None, [*rest, "data.kind=pack", f"data.path={tmp_path / 'pack'}"]))


def test_sites_boxes_and_several_labels_are_kept(tmp_path):
    make_cells(tmp_path, 4)
    rows = [
        f"cell_{i:06}.png,{'ab'[i % 2]},{site},c{i},0,0,{9 + i},20"
        for i, site in enumerate(("Bonn", "", "Jena", "Bonn"))
    ]
    (tmp_path / "cells.csv").write_text("\n".join(["path,label,site,cell_id,x_min,y_min,x_max,y_max", *rows]))
    packing.pack(str(tmp_path / "cells.csv"), str(tmp_path / "pack"), size="16x12")
    (table,) = open_splits(
        load(None, ["data.kind=table", f"data.table={tmp_path / 'cells.csv'}", "data.size=[16,12]"]).data
    ).values()
    (images,) = opened(tmp_path / "pack").values()
    assert images.lab_names == ("Bonn", "Jena")
    assert images.labs.tolist() == [1, 0, 2, 1]
    assert [images.name(i) for i in range(4)] == [f"cell_{i:06}.png#c{i}" for i in range(4)]
    assert all(torch.equal(images.pixels(i), table.pixels(i)) for i in range(4))
    assert images.pixels(0).shape == (3, 16, 12)

    drawn = np.random.default_rng(0)
    of = {f"{split}_images": drawn.integers(0, 256, (9, 28, 28), dtype=np.uint8) for split in ("train", "test")}
    of |= {f"{split}_labels": drawn.integers(0, 2, (9, 5)) for split in ("train", "test")}
    np.savez(tmp_path / "chest.npz", **of)
    packing.pack(str(tmp_path / "chest.npz"), str(tmp_path / "chest"))
    splits = opened(tmp_path / "chest")
    assert splits.keys() == {"train", "test"}
    for name, images in splits.items():
        assert np.array_equal(images.targets, of[f"{name}_labels"])
        assert np.array_equal(images.pixels(3)[0], of[f"{name}_images"][3])
    assert reading(pack.Config(path=str(tmp_path / "chest")), 24)["size"] == [24, 24]


def test_check_says_what_a_pack_holds(packed, capsys):
    words = [*TINY, "--config", "pack", f"data.path={packed}"]
    assert main("train", ["--check", *words]) == 0
    out = capsys.readouterr().out
    assert f"train: 50 images of {packed}, packed from " in out
    assert "sources: 40 images of 13 sources" in out
