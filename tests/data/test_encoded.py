"""WebDataset's shards and Hugging Face's Parquet files: pixels as from files, what is said of them, mistakes."""

import io
import json
import os
import pickle
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from test_pack import TINY, ending, same
from test_train import signalled_in
from trained import make_cells

from sslcells.config import ConfigError, load
from sslcells.data import DataError, folder, open_splits, parquet, reading, webdataset
from sslcells.data._sources import source_id
from sslcells.data.describe import describe
from sslcells.data.loader import InOrder, read
from sslcells.delivery import packing
from sslcells.run.interrupt import Stopped
from sslcells.train import train

CLASSES = ("lymph", "mono")


@pytest.fixture(scope="module")
def cells(tmp_path_factory):
    made = tmp_path_factory.mktemp("cells")
    make_cells(made / "train", 36, classes=CLASSES)
    make_cells(made / "val", 6, classes=CLASSES)
    return made


def files_of(cells, split):
    """Bytes and class of the images of a split, in the order of the folder."""
    return [(file.read_bytes(), file.parent.name) for file in sorted((cells / split).rglob("*.png"))]


def add(tar, name, data):
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def write_tar(file, samples, first=0, words=None):
    """A shard with an image, a class and a JSON for each sample."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w") as tar:
        for i, (data, name) in enumerate(samples, first):
            add(tar, f"cells/{i:05}.png", data)
            if words is None:
                add(tar, f"cells/{i:05}.cls", str(CLASSES.index(name)).encode())
                about = {"cell": {"type": name}, "donor": f"d{i // 3}"}
                add(tar, f"cells/{i:05}.json", json.dumps(about if i % 5 else about | {"donor": None}).encode())
    return file


def write_parquet(file, samples, group=5, **columns):
    """A file as Hugging Face's datasets writes it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    names = {"names": list(CLASSES), "_type": "ClassLabel"}
    features = {"image": {"_type": "Image"}, "label": names, "donor": {"dtype": "string", "_type": "Value"}}
    table = pa.table(
        {
            "image": pa.array([{"bytes": data, "path": None} for data, _ in samples]),
            "label": pa.array([CLASSES.index(name) for _, name in samples], pa.int64()),
            "donor": [f"d{i // 3}" for i in range(len(samples))],
            **columns,
        },
    ).replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, file, row_group_size=group)
    return file


@pytest.fixture(scope="module")
def made(cells, tmp_path_factory):
    """kind → folder with the same images in the same order in two train shards, and one of val."""
    root = tmp_path_factory.mktemp("made")
    whole, val = files_of(cells, "train"), files_of(cells, "val")
    write_tar(root / "tar" / "cells-train-000.tar", whole[:20])
    write_tar(root / "tar" / "cells-train-001.tar", whole[20:], first=20)
    write_tar(root / "tar" / "cells-val-000.tar", val)
    write_parquet(root / "parquet" / "data" / "train-00000-of-00002.parquet", whole[:20])
    write_parquet(root / "parquet" / "data" / "train-00001-of-00002.parquet", whole[20:])
    write_parquet(root / "parquet" / "data" / "validation-00000-of-00001.parquet", val)
    return {"webdataset": root / "tar", "parquet": root / "parquet"}


KINDS = {"webdataset": webdataset, "parquet": parquet}
kinds = pytest.mark.parametrize("kind", KINDS)


def opened(kind, path, **fields):
    return open_splits(KINDS[kind].Config(path=str(path), **fields))


def mistake(kind, path, **fields):
    with pytest.raises(ConfigError) as error:
        opened(kind, path, **fields)
    return str(error.value)


@kinds
@pytest.mark.parametrize("workers", [0, 2])
def test_pixels_and_labels_are_those_of_the_files(cells, made, kind, workers):
    names = {"class_names": CLASSES} if kind == "webdataset" else {}
    splits = opened(kind, made[kind], size=20, **names)
    plain = open_splits(folder.Config(path=str(cells), size=20))
    assert splits.keys() == plain.keys() == {"train", "val"}
    assert all(images.classes == CLASSES for images in splits.values())
    order = InOrder(torch.randperm(36, generator=torch.Generator().manual_seed(0)).tolist(), 7)
    images = pickle.loads(pickle.dumps(splits["train"]))
    for a, b in zip(read(images, order, workers, False), read(plain["train"], order, 0, False), strict=True):
        assert torch.equal(a.pixels, b.pixels)
        assert torch.equal(a.label, b.label)
    assert torch.equal(splits["val"].labels, plain["val"].labels)
    assert reading(KINDS[kind].Config(path="x", size=20), 9)["size"] == [20, 20]


def test_names_sources_and_labels_of_json(made):
    splits = opened("webdataset", made["webdataset"], label="json.cell.type", source="json.donor")
    train = splits["train"]
    assert train.name(20) == "cells-train-001.tar#cells/00020.png"
    assert train.classes == CLASSES
    assert train.sources[:6].tolist() == [
        source_id(s)
        for s in ("cells-train-000.tar#cells/00000.png", *["d0"] * 2, "d1", "d1", "cells-train-000.tar#cells/00005.png")
    ]
    assert train.sourced[:6].tolist() == [False, True, True, True, True, False]
    train = opened("parquet", made["parquet"], source_column="donor")["train"]
    assert train.name(20) == "train-00001-of-00002.parquet#0"
    assert train.sources[:3].tolist() == [source_id("d0")] * 3
    assert "columns: image from image; label from label; source from donor" in describe({"train": train})
    assert "groups of up to 5: sampler.block=5" in describe({"train": train})


def test_shards_are_listed_once(cells, tmp_path, monkeypatch):
    seen = []
    listed = webdataset._listed
    monkeypatch.setattr(webdataset, "_listed", lambda file: seen.append(file.name) or listed(file))
    whole = files_of(cells, "train")
    for i in range(2):
        os.utime(write_tar(tmp_path / f"{i}.tar", whole[9 * i : 9 * i + 9], 9 * i), ns=(0, 10**18))
    first = opened("webdataset", tmp_path)["train"]
    assert sorted(seen) == ["0.tar", "1.tar"]
    seen.clear()
    again = opened("webdataset", tmp_path)["train"]
    assert not seen
    assert [again.name(i) for i in range(18)] == [first.name(i) for i in range(18)]
    assert torch.equal(again.pixels(17), first.pixels(17))
    os.utime(write_tar(tmp_path / "1.tar", whole[9:12], 9), ns=(0, 2 * 10**18))
    assert len(opened("webdataset", tmp_path)["train"]) == 12
    assert seen == ["1.tar"]


def test_row_groups_are_kept_within_a_budget(made, monkeypatch):
    train = opened("parquet", made["parquet"])["train"]
    reads = []
    plain = pq.ParquetFile.read_row_group
    monkeypatch.setattr(pq.ParquetFile, "read_row_group", lambda self, g, **k: reads.append(g) or plain(self, g, **k))
    for i in range(36):
        train.pixels(i)
    assert reads == [0, 1, 2, 3, 0, 1, 2, 3]
    reads.clear()
    train.pixels(0)
    assert not reads
    monkeypatch.setattr(parquet, "_KEPT", 1)
    again = pickle.loads(pickle.dumps(train))
    for i in (7, 8, 0, 1):
        again.pixels(i)
    assert reads == [1, 0]
    assert len(again._kept) == 1


@kinds
def test_mistakes_are_one_line(cells, made, tmp_path, kind):
    whole = files_of(cells, "train")
    write = write_tar if kind == "webdataset" else write_parquet
    end = {"webdataset": "tar", "parquet": "parquet"}[kind]
    assert "no such folder" in mistake(kind, tmp_path / "nothing")
    assert f"no .{end} file in it, at any depth" in mistake(kind, cells)
    assert "fits none of the files" in mistake(kind, made[kind], train="trian*")
    assert "data.train and data.val both take" in mistake(kind, made[kind], train="*train*0*", val="*train*0*")
    file = write(tmp_path / f"a.{end}", whole[:3])
    file.write_bytes(b"no archive at all" * 99)
    assert f"a.{end}" in mistake(kind, tmp_path)
    write(tmp_path / f"a.{end}", [whole[0], whole[-1]])
    assert "a label is 1, and there are names for 0 to 0" in mistake(kind, tmp_path, class_names=("one",))
    for fields in ({"verify": "full"}, {"z": "each"}):
        with pytest.raises(ValidationError):
            KINDS[kind].Config(path="x", **fields)


def test_mistakes_in_samples_and_columns(cells, tmp_path):
    whole = files_of(cells, "train")
    with tarfile.open(write_tar(tmp_path / "t" / "a.tar", whole[:3]), "a") as tar:
        add(tar, "cells/00001.jpg", whole[0][0])
    assert "cells/00001 has several images, .png and .jpg; say with data.image= which" in mistake(
        "webdataset", tmp_path / "t"
    )
    assert len(opened("webdataset", tmp_path / "t", image="png")["train"]) == 3
    words = mistake("webdataset", tmp_path / "t", image="png", label="json.cell")
    assert "cells/00000.json has cell={'type': 'lymph'}, which is no text or whole number" in words
    for label in ("cell", "jpg"):
        with pytest.raises(
            ValidationError, match=r"should be cls, txt, or a field of the JSON, such as json.cell_type"
        ):
            webdataset.Config(path="x", label=label)
    file = tmp_path / "p" / "a.parquet"
    write_parquet(file, whole[:4], mask=pa.array([b"1"] * 4))
    assert "has 2 columns of bytes; say with data.image_column=" in mistake("parquet", tmp_path / "p")
    assert "no such column (did you mean donor?)" in mistake(
        "parquet", tmp_path / "p", image_column="image", source_column="doner"
    )
    assert "no such column (did you mean label?)" in mistake(
        "parquet", tmp_path / "p", image_column="image", label_column="labl"
    )
    pq.write_table(pa.table({"path": ["a.png"]}), file)
    assert "has 0 columns of images; data.kind=table reads a table of paths: path" in mistake("parquet", tmp_path / "p")


def test_images_that_cannot_be_read_are_named(cells, tmp_path):
    whole = files_of(cells, "train")
    file = write_tar(tmp_path / "t" / "a.tar", [whole[0], (b"no image", CLASSES[0]), whole[2]])
    train = opened("webdataset", tmp_path / "t")["train"]
    with pytest.raises(DataError, match=r"^a.tar#cells/00001.png: not an image$"):
        train.pixels(1)
    file.write_bytes(file.read_bytes()[:600])
    with pytest.raises(DataError, match=r"a.tar#cells/00002.png: .*a.tar ends at byte 600, within an image"):
        train.pixels(2)
    write_parquet(tmp_path / "p" / "a.parquet", [whole[0], (None, CLASSES[0])])
    train = opened("parquet", tmp_path / "p")["train"]
    with pytest.raises(DataError, match=r"^a.parquet#1: it has no bytes, perhaps only the path of a file$"):
        train.pixels(1)
    small = io.BytesIO()
    Image.new("RGB", (9, 7)).save(small, "png")
    write_parquet(tmp_path / "p" / "a.parquet", [whole[0], (small.getvalue(), CLASSES[0])])
    train = opened("parquet", tmp_path / "p")["train"]
    with pytest.raises(DataError, match=r"^a.parquet#1 is 7×9, the first image 32×32; set data.size=$"):
        train.pixels(1)


@kinds
def test_a_pack_of_them_has_the_same_pixels(cells, made, tmp_path, kind):
    packing.pack(str(made[kind]), str(tmp_path / "pack"), [f"data.kind={kind}", "data.size=20"])
    packed = open_splits(load(None, ["data.kind=pack", f"data.path={tmp_path / 'pack'}"]).data)["train"]
    plain = open_splits(folder.Config(path=str(cells), size=20))["train"]
    assert all(torch.equal(packed.pixels(i), plain.pixels(i)) for i in range(36))


@pytest.mark.slow
@kinds
def test_a_run_in_blocks_resumes_exactly(made, tmp_path, kind):
    words = [
        *TINY,
        f"data.kind={kind}",
        f"data.path={made[kind]}",
        "data.size=20",
        "sampler.block=5",
        f"out={tmp_path}",
    ]
    whole = ending(train(load(None, [*words, "name=whole", "train.workers=0"])))
    with pytest.raises(Stopped):
        train(load(None, [*words, "train.workers=1"]), signalled_in(3, 10))
    same(ending(train(load(None, [*words, "train.workers=2", "data.cache=ram"]))), whole)
