"""Tables of images, written on the fly: what their columns mean, which files they find, and their mistakes."""

import os
import pickle
import unicodedata

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tifffile
import torch
from PIL import Image
from pydantic import ValidationError

from sslcells.config import ConfigError, dump, load
from sslcells.data import DataError, _table, folder, holdout, open_split, open_splits, reading, table
from sslcells.data._columns import read
from sslcells.data._sources import source_id
from sslcells.data.describe import brief, describe
from sslcells.data.subset import Subset

COLUMNS = "path,label,split,donor,slide,site,notes"
ROWS = (
    "a/1.png,mono,train,d1,s1,Bonn,x",
    "a/2.png,lymph,train,d1,s2,Bonn,",
    "a/3.png,,train,,s2,Jena,",
    "b/4.png,mono,Testing,d2,s3,,",
    "b/5.png,baso,valid,d3,s3,Jena,",
    "b/6.png,baso,,d3,s3,Jena,",
)


def write(folder, rows=ROWS, columns=COLUMNS, name="cells.csv", encoding="utf-8"):
    """Images whose grey is their number, and a table of them."""
    for grey in range(1, 7):
        file = folder / ("a" if grey < 4 else "b") / f"{grey}.png"
        file.parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 6), (grey, grey, grey)).save(file)
    (folder / name).write_text("\n".join([columns, *rows]) + "\n", encoding=encoding)
    return folder / name


def opened(file, split="train", **fields):
    return open_split(table.Config(table=str(file), **fields), split)


def names(images):
    return [images.name(i) for i in range(len(images))]


def mistake(file, **fields):
    with pytest.raises(ConfigError) as error:
        opened(file, **fields)
    return str(error.value)


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_columns_by_their_names(tmp_path, kind):
    file = write(tmp_path)
    if kind == "parquet":
        cells = [row.split(",") for row in ROWS]
        columns = {name: pa.array([c[i] or None for c in cells]) for i, name in enumerate(COLUMNS.split(","))}
        columns["label"] = columns["label"].dictionary_encode()
        file = tmp_path / "cells.parquet"
        pq.write_table(pa.table(columns), file)
    splits = open_splits(table.Config(table=str(file)))
    train = splits["train"]
    assert {name: names(images) for name, images in splits.items()} == {
        "train": ["a/1.png", "a/2.png", "a/3.png"],
        "val": ["b/5.png"],
        "test": ["b/4.png"],
    }
    assert {images.classes for images in splits.values()} == {("baso", "lymph", "mono")}
    assert [images.labels.tolist() for images in splits.values()] == [[2, 1, -1], [0], [2]]
    assert train.sources.tolist() == [source_id("d1"), source_id("d1"), source_id("a/3.png")]
    assert train.sourced.tolist() == [True, True, False]
    assert [(images.labs.tolist(), images.lab_names) for images in splits.values()] == [
        ([1, 1, 2], ("Bonn", "Jena")),
        ([2], ("Bonn", "Jena")),
        ([0], ("Bonn", "Jena")),
    ]
    assert [int(train.pixels(i)[0, 0, 0]) for i in range(3)] == [1, 2, 3]
    part = Subset(train, torch.tensor([2, 0]))
    assert (part.labs.tolist(), part.lab_names) == ([2, 1], ("Bonn", "Jena"))


def test_what_is_understood_is_said(tmp_path):
    splits = open_splits(table.Config(table=str(write(tmp_path))))
    text = describe(splits)
    for words in (
        f"train: 3 images of {tmp_path / 'cells.csv'}, rows with split train",
        "columns: path from path; label from label; split from split; source from donor; site from site; "
        "not used: slide, notes",
        "3 classes: baso 0, lymph 1, mono 1; 1 image without one: a/3.png",
        "sources: 2 images of 1 source, such as a/1.png; 1 without one: a/3.png",
        "2 sites: Bonn 2, Jena 1",
        "rows without a split: 1, such as row 7",
        "0 sites; 1 without one: b/4.png",
    ):
        assert words in text, words
    assert "1 source (1 of 3 images without: a/3.png), 2 sites, left out 1 × rows without a split" in brief(splits)


def test_columns_may_be_named(tmp_path):
    rows = ["A\t1.png\tx\tp1\tw1\t7", "A\t2.png\ty\tp1\tw1\t07", "B\t4.png\tx\tp1\tw2\t7"]
    file = write(tmp_path, rows, "fold\tname of file\ttype\tplate\twell\tdonor", name="t.tsv", encoding="utf-8-sig")
    for name in ("1.png", "2.png", "4.png"):
        (tmp_path / ("b" if name == "4.png" else "a") / name).rename(tmp_path / name)
    fields = {"path_column": "name of file", "label_column": "type", "train": "A", "test": "B"}
    images = opened(file, sources="plate+well", **fields)
    assert names(images) == ["1.png", "2.png"]
    assert images.sources.tolist() == [source_id("p1 + w1")] * 2
    assert images.labels.tolist() == [0, 1]
    by_donor = opened(file, **fields)
    assert by_donor.sources.tolist() == [source_id("7"), source_id("07")]  # text as it stands
    assert names(opened(file, "test", **fields)) == ["4.png"]
    assert opened(file, labels="none", **fields).classes == ()


def test_without_columns_the_pattern_and_one_split(tmp_path):
    file = write(tmp_path, [row.split(",")[0] for row in ROWS], "path")
    images = opened(file, source_pattern="^([ab])/")
    assert (len(images), len(set(images.sources.tolist())), images.classes, images.labs) == (6, 2, (), None)
    assert opened(file, "val") is None


def test_whole_numbers_that_pandas_made_floats_are_whole(tmp_path):
    write(tmp_path)
    columns = {"path": ["a/1.png", "a/2.png", "a/3.png"], "donor": [3.0, None, 10.0], "label": [10, 9, 9]}
    pq.write_table(pa.table(columns), tmp_path / "t.parquet")
    images = opened(tmp_path / "t.parquet")
    assert images.sources.tolist() == [source_id("3"), source_id("a/2.png"), source_id("10")]
    assert (images.classes, images.labels.tolist()) == (("9", "10"), [1, 0, 0])


def test_files_are_found_however_they_are_spelt(tmp_path):
    nfc, nfd = (unicodedata.normalize(form, "Müller") for form in ("NFC", "NFD"))
    file = write(tmp_path, [f"{nfc}\\1.png", "./A//2.PNG", f"{tmp_path}/a/3.png"], "path")
    (tmp_path / nfd).mkdir()
    (tmp_path / "a/1.png").rename(tmp_path / nfd / "1.png")
    assert names(opened(file)) == [f"{nfd}/1.png", "a/2.png", "a/3.png"]
    (tmp_path / "a/2.Png").write_bytes((tmp_path / "a/2.png").read_bytes())
    assert "row 3: ./A//2.PNG" in mistake(file)


def test_absolute_paths_alone_need_no_folder(tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    write(images)
    (tmp_path / "t.csv").write_text(f"path\n{images}/a/1.png\n{images}/b/4.png\n")
    assert names(opened(tmp_path / "t.csv")) == ["a/1.png", "b/4.png"]
    assert "does not lie below data.path" in mistake(tmp_path / "t.csv", path=str(images / "a"))


def test_boxes_are_cut_from_the_image(tmp_path):
    field = np.arange(20 * 30 * 3, dtype=np.uint32).reshape(20, 30, 3) % 251
    Image.fromarray(field.astype(np.uint8)).save(tmp_path / "field.png")
    rows = ["field.png,2,3,10,11,c1", "field.png,-4,15,4,23,c2", "field.png,20.2,0.4,27.9,7.9,c3"]
    (tmp_path / "t.csv").write_text("\n".join(["path,x_min,y_min,x_max,y_max,cell_id", *rows]))
    images = opened(tmp_path / "t.csv", size=8)
    assert names(images) == ["field.png#c1", "field.png#c2", "field.png#c3"]
    expected = torch.from_numpy(field.astype(np.uint8)).permute(2, 0, 1)
    assert torch.equal(images.pixels(0), expected[:, 3:11, 2:10])
    assert torch.equal(images.pixels(2), expected[:, :8, 20:28])
    cut = Image.fromarray(field[15:20, :4].astype(np.uint8))
    cut.save(tmp_path / "cut.png")
    (tmp_path / "cut.csv").write_text("path\ncut.png\n")
    assert torch.equal(images.pixels(1), opened(tmp_path / "cut.csv", size=8).pixels(0))
    again = pickle.loads(pickle.dumps(images))
    assert torch.equal(again.pixels(2), images.pixels(2))
    assert "data.size is needed" in mistake(tmp_path / "t.csv")
    as_size = "path,x,y,w,h\nfield.png,2,3,8,8\nfield.png,9,3,8,8\n"
    (tmp_path / "s.csv").write_text(as_size)
    sized = opened(tmp_path / "s.csv", size=8, box=["x", "y", "w", "h"], box_as="size")
    assert torch.equal(sized.pixels(0), images.pixels(0))
    assert "box_as=size" in mistake(tmp_path / "s.csv", size=8, box=["y", "x", "h", "w"])


@pytest.fixture
def field(tmp_path):
    """A field of 20×30 px and the boxes of its cells: one inside, two at its border, one outside, one that is none."""
    pixels = (np.arange(20 * 30 * 3, dtype=np.uint32).reshape(20, 30, 3) % 251).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "field.png")
    rows = ["2,3,10,11,in", "-4,15,4,23,low", "26,0,34,8,right", "40,3,48,11,out", "5,5,5,9,none"]
    text = "\n".join(["path,x_min,y_min,x_max,y_max,cell_id", *(f"field.png,{row}" for row in rows)])
    (tmp_path / "t.csv").write_text(text)
    (tmp_path / "border.csv").write_text("\n".join(text.splitlines()[:4]))
    return torch.from_numpy(pixels).permute(2, 0, 1)


@pytest.mark.parametrize("verify", ["full", "header"])
def test_boxes_beyond_their_image_are_counted_and_named(tmp_path, field, verify):
    kept = opened(tmp_path / "border.csv", size=8, verify=verify)
    assert names(kept) == ["field.png#in", "field.png#low", "field.png#right"]
    said = "2 of 3 boxes reach beyond their image, such as row 3 (field.png), and "
    for rule, words in (("clip", "are cut off there"), ("pad", "its border pixels are repeated")):
        images = opened(tmp_path / "border.csv", size=8, verify=verify, box_outside=rule)
        assert said + words in describe({"train": images})
        assert said + words in brief({"train": images})
        assert torch.equal(images.pixels(0), field[:, 3:11, 2:10])
    padded = torch.nn.functional.pad(field[None].float(), (0, 4, 0, 0), mode="replicate")[0].byte()
    assert torch.equal(images.pixels(2), padded[:, 0:8, 26:34])
    dropped = opened(tmp_path / "border.csv", size=8, verify=verify, box_outside="drop")
    assert names(dropped) == ["field.png#in"]
    assert said + "are left out" in brief({"train": dropped})
    message = mistake(tmp_path / "border.csv", size=8, verify=verify, box_outside="stop")
    assert "2 of 3 rows have a box that reaches beyond its image; data.on_error=skip leaves them out:" in message
    assert "row 3: field.png of 20×30 px, box [-4, 15, 4, 23]" in message


def test_boxes_that_are_none_or_outside_stop_or_are_left_out(tmp_path, field):
    message = mistake(tmp_path / "t.csv", size=8)
    assert "1 of 5 rows have no box of at least 1×1 px" in message
    assert "row 6: x_min, y_min, x_max, y_max = 5, 5, 5, 9" in message
    (tmp_path / "o.csv").write_text((tmp_path / "t.csv").read_text().replace("5,5,5,9", "5,5,6,9"))
    message = mistake(tmp_path / "o.csv", size=8)
    assert "1 of 5 rows have a box outside of their image; data.on_error=skip leaves them out:" in message
    assert "row 5: field.png of 20×30 px, box [40, 3, 48, 11]" in message
    images = opened(tmp_path / "t.csv", size=8, on_error="skip")
    assert names(images) == ["field.png#in", "field.png#low", "field.png#right"]
    text = describe({"train": images})
    assert "broken, left out: 2 images: row 6: have no box of at least 1×1 px: " in text
    assert "left out 2 × broken" in brief({"train": images})
    unseen = opened(tmp_path / "o.csv", size=8, verify="none")
    assert "5 boxes not compared with their image, as data.verify=none" in brief({"train": unseen})
    with pytest.raises(DataError, match=r"field.png#out: its box .* lies outside of the image of 20×30 px"):
        unseen.pixels(3)


def test_the_values_of_a_box_are_its_own(tmp_path, field):
    images = opened(tmp_path / "border.csv", size=8)
    assert np.array_equal(images.values(1), field[:, 15:20, 0:4].permute(1, 2, 0).numpy())
    turned = Image.fromarray(np.ascontiguousarray(np.rot90(field.permute(1, 2, 0).numpy())))
    exif = turned.getexif()
    exif[0x0112] = 6  # lies on its side: a viewer turns it by 90° to the right
    turned.save(tmp_path / "field.png", exif=exif)
    assert np.array_equal(opened(tmp_path / "border.csv", size=8).values(0), images.pixels(0).permute(1, 2, 0).numpy())
    stack = np.arange(4 * 20 * 30, dtype=np.uint16).reshape(4, 20, 30)
    tifffile.imwrite(tmp_path / "field.tif", stack, photometric="minisblack")
    (tmp_path / "s.csv").write_text((tmp_path / "border.csv").read_text().replace(".png", ".tif"))
    images = opened(tmp_path / "s.csv", size=8, channels=4, stack="first")
    assert np.array_equal(images.values(2), stack[:, 0:8, 26:30])


def test_rows_without_a_file_are_left_out_on_request(tmp_path):
    file = write(tmp_path, ["a/1.png,x", "a/9.png,y", ",x", "b/4.png,y"], "path,label")
    assert "2 of 4 rows name no file below" in mistake(file)
    images = opened(file, on_error="skip")
    assert (names(images), images.labels.tolist()) == (["a/1.png", "b/4.png"], [0, 1])
    text = describe({"train": images})
    assert "broken, left out: 2 images: row 3: name no file below" in text
    assert "a/9.png; row 4: " in text
    none = write(tmp_path, ["a/9.png"], "path")
    assert "1 of 1 rows name no file" in mistake(none, on_error="skip")


def test_absolute_paths_of_all_splits_start_from_one_folder(tmp_path):
    for name in ("x/a", "x/b"):
        (tmp_path / name).mkdir(parents=True)
        Image.new("RGB", (8, 6)).save(tmp_path / name / "1.png")
    (tmp_path / "t.csv").write_text(f"path,split\n{tmp_path}/x/a/1.png,train\n{tmp_path}/x/b/1.png,test\n/y/z.png,\n")
    splits = open_splits(table.Config(table=str(tmp_path / "t.csv")))
    assert {name: names(images) for name, images in splits.items()} == {"train": ["a/1.png"], "test": ["b/1.png"]}
    assert splits["train"].sources[0] != splits["test"].sources[0]
    assert names(opened(tmp_path / "t.csv", "test")) == ["b/1.png"]


def test_a_table_is_read_once(tmp_path, monkeypatch):
    file, times = write(tmp_path), []
    monkeypatch.setattr(_table, "read", lambda *a: times.append(a) or read(*a))
    assert len(open_splits(table.Config(table=str(file)))) == 3
    assert len(times) == 1


def test_scales_are_said(tmp_path):
    file = write(tmp_path, ["a/1.png,0.25,40x", "a/2.png,0.5,20", "a/3.png,,"], "path,mpp,magnification")
    text = describe({"train": opened(file)})
    assert (
        "2 of 3 images have one (2 from the table): 0.25 to 0.5 µm per pixel; they are NOT brought to one scale" in text
    )
    assert "1 without one: a/3.png" in text
    assert "magnification: 20, 40; data.um_per_pixel_at_1x says" in text
    bad = write(tmp_path, ["a/1.png,a lot"], "path,mpp")
    assert "row 2 has mpp='a lot', which is not a number" in mistake(bad)


@pytest.mark.parametrize(
    ("rows", "columns", "fields", "expected"),
    [
        (["a/1.png,x"], "pat,label", {}, "no column of paths; name it with data.path_column="),
        (["a/1.png,x"], "path,label", {"label_column": "lable"}, "data.label_column='lable'.*did you mean label"),
        (["a/1.png,x"], "path,path", {}, "two columns called 'path'"),
        (["a/9.png", "a/1.png"], "path", {}, r"1 of 2 rows name no file below .*\n  row 2: a/9.png"),
        (["a/1.png,x", "a\\1.png,y"], "path,label", {}, "row 2 and row 3 are the same image, a/1.png"),
        ([",x"], "path,label", {}, r"1 of 1 rows name no file below .*\n  row 2: no path"),
        (["a/1.png,Mono", "a/2.png,mono"], "path,label", {}, "'Mono' and 'mono' differ only in spelling"),
        (["a/1.png,held", "a/2.png,train"], "path,split", {}, r"none of train, val, test: held \(1 rows\)"),
        (["a/1.png,1"], "path,split", {"train": "2"}, "data.train='2': column split .* has no such value"),
        (["a/1.png"], "path", {"train": "2"}, "no column of splits"),
        (["a/1.png,x,y"], "path,label", {}, "cannot be read as a table: .*Expected 2 columns, got 3"),
        (["a/1.png"], "path", {"path": "nowhere"}, "data.path='nowhere': no such folder"),
        (
            ["a/1.png,5,5,5,9"],
            "path,x_min,y_min,x_max,y_max",
            {"size": 8},
            r"1 of 1 rows have no box of at least 1×1 px; .*box_as=size.*\n  row 2: x_min, .* = 5, 5, 5, 9",
        ),
    ],
)
def test_mistakes(tmp_path, rows, columns, fields, expected):
    with pytest.raises(ConfigError, match=expected):
        opened(write(tmp_path, rows, columns), **fields)


def test_files_that_are_no_tables(tmp_path):
    file = write(tmp_path)
    assert "no such file (did you mean cells.csv?)" in mistake(tmp_path / "cell.csv")
    assert "data.kind=folder reads it" in mistake(tmp_path)
    (tmp_path / "t.xlsx").write_bytes(b"PK")
    assert "neither CSV" in mistake(tmp_path / "t.xlsx")
    (tmp_path / "t.parquet").write_bytes(b"PAR1 no")
    assert "cannot be read as a table" in mistake(tmp_path / "t.parquet")
    (tmp_path / "latin.csv").write_bytes("path,label\na/1.png,Zelle é\n".encode("latin-1"))
    assert "save it as UTF-8" in mistake(tmp_path / "latin.csv")
    (tmp_path / "empty.csv").write_bytes(b"")
    assert "cannot be read as a table" in mistake(tmp_path / "empty.csv")
    (tmp_path / "a/1.png").write_bytes(b"")
    assert "1 of 3 images are broken; data.on_error=skip" in mistake(file)
    skipped = opened(file, on_error="skip")
    assert (names(skipped), skipped.labels.tolist()) == (["a/2.png", "a/3.png"], [1, -1])
    with pytest.raises(ValidationError, match="middle or max"):
        table.Config(table="x", z="each")


def test_a_run_of_a_table_reads_files_as_one_of_a_folder(tmp_path):
    file = write(tmp_path)
    run = load(None, ["data.kind=table", f"data.table={file}", "data.size=7", "data.fit=pad"])
    (tmp_path / "run.yaml").write_text(dump(run))
    assert load(str(tmp_path / "run.yaml")) == run
    same = folder.Config(path=str(tmp_path), size=7, fit="pad")
    assert reading(run.data, 32) == reading(same, 32)
    cropped = open_split(same.model_copy(update={"fit": "crop"}), "train")
    assert torch.equal(opened(file, size=7).pixels(1), cropped.pixels(1))


def test_held_out_by_donor(tmp_path):
    rows = [f"{'a' if i < 4 else 'b'}/{i}.png,{'xy'[i % 2]},d{i // 2}" for i in range(1, 7)]
    splits = holdout.hold_out(open_splits(table.Config(table=str(write(tmp_path, rows, "path,label,donor")))), 0.3)
    assert not {*splits["train"].sources.tolist()} & {*splits["val"].sources.tolist()}
    assert os.path.isfile(tmp_path / "a/1.png")
