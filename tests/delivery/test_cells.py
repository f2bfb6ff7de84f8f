"""Cells cut from fields by masks: the right pixels, the right numbers, and what does not match is named."""

import csv
import signal
import subprocess
import sys
import time

import imagecodecs
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tifffile
import zarr
from PIL import Image
from scipy.ndimage import gaussian_filter

from sslcells import launcher
from sslcells.cli import main
from sslcells.config import ConfigError
from sslcells.data import DataError, open_split, table
from sslcells.data._fields import How, read_field, write_cell
from sslcells.delivery import cells as module
from sslcells.delivery.cell_table import Rule
from sslcells.delivery.cells import cells
from sslcells.delivery.cells_done import FOLDER

SHAPE = (60, 80)
FIELD = np.random.default_rng(0).integers(100, 4000, SHAPE, np.uint16)
MASK = np.zeros(SHAPE, np.uint16)
MASK[10:20, 12:30] = 3
MASK[30:41, 30:35] = 1000
MASK[33:36, 35:40] = 1000
MASK[0:6, 50:60] = 5  # touches the border
MASK[50:52, 60:62] = 9  # small
IDS = (3, 9, 1000)


def rule(**fields):
    return Rule(**({"fov": None, "size": 16, "background": None, "border": "leave-out", "min_area": 0.0} | fields))


def tif(file, values=FIELD, um=0.5, **options):
    options = {"metadata": {}, "resolution": (1e4 / um, 1e4 / um), "resolutionunit": "centimeter"} | options
    file.parent.mkdir(parents=True, exist_ok=True)
    tifffile.imwrite(file, values, **options)


def pair_of(folder, name="a"):
    tif(folder / "fields" / f"{name}.tif")
    tif(folder / "masks" / f"{name}_masks.tif", MASK, metadata=None)


def run(folder, images="fields", masks="masks", out="out", **options):
    """The rows of the table, or the file of CSV, and what was said."""
    said = []
    options = {"rule": rule(), "say": said.append} | options
    given = None if masks is None else str(folder / masks)
    file = cells(str(folder / images), given, str(folder / out), **options)
    return file if file.suffix == ".csv" else pq.read_table(file).to_pylist(), "\n".join(said)


def test_a_row_for_each_cell(tmp_path):
    pair_of(tmp_path)
    rows, said = run(tmp_path)
    assert [row["mask_label"] for row in rows] == [*IDS]
    for row in rows:
        y, x = np.nonzero(row["mask_label"] == MASK)
        assert row["path"] == f"images/a/{row['mask_label']}.tif"
        assert (row["field"], row["cell_id"]) == ("a.tif", f"a:{row['mask_label']}")
        assert (row["area_px"], row["area_um2"], row["um_per_pixel"]) == (len(y), len(y) * 0.25, 0.5)
        assert (row["centroid_x"], row["centroid_y"]) == pytest.approx((x.mean() + 0.5, y.mean() + 0.5))
        edges = [row[f"field_{name}"] for name in ("x_min", "y_min", "x_max", "y_max")]
        assert edges == [x.min(), y.min(), x.max() + 1, y.max() + 1]
    assert "left out: 1 cells that touch the border" in said
    assert "cut off: 1 cells that are larger than the cut" in said
    assert "scale: 0.5 µm per pixel" in said
    assert f"{tmp_path / 'out' / 'cells.parquet'}: 3 cells; sslcells train --config table data.table=" in said
    assert said.endswith("data.channels=1 data.size=16 data.sources=field")


def naive(values, mask, number, side, fill):
    """The cut pixel by pixel, of (H, W)."""
    y, x = np.nonzero(mask == number)
    top, left = (int(np.floor(n.mean() + 0.5 - side / 2 + 0.5)) for n in (y, x))
    out = np.empty((side, side), values.dtype)
    for i in range(side):
        for j in range(side):
            yy, xx = top + i, left + j
            inside = 0 <= yy < values.shape[0] and 0 <= xx < values.shape[1]
            near = values[min(max(yy, 0), values.shape[0] - 1), min(max(xx, 0), values.shape[1] - 1)]
            own = inside and mask[yy, xx] == number
            out[i, j] = near if fill is None or own else fill
    return out


@pytest.mark.parametrize("side", [1, 15, 40])
@pytest.mark.parametrize("fill", [None, 0, 77])
def test_the_cut_is_that_of_the_field(tmp_path, side, fill):
    pair_of(tmp_path)
    rows, _ = run(tmp_path, rule=rule(size=side, background=fill, border="keep"))
    assert [row["mask_label"] for row in rows] == [3, 5, 9, 1000]
    for row in rows:
        cut = tifffile.imread(tmp_path / "out" / row["path"])
        assert np.array_equal(cut, naive(FIELD, MASK, row["mask_label"], side, fill))
        assert cut.dtype == np.uint16


def test_the_field_of_view_is_in_um(tmp_path):
    large = gaussian_filter(np.kron(FIELD, np.ones((2, 2))), 8)
    large = (4000 * (large - large.min()) / np.ptp(large)).astype(np.uint16)
    tif(tmp_path / "fields/40x.tif", large, 0.25)
    tif(tmp_path / "fields/20x.tif", large.reshape(60, 2, 80, 2).mean((1, 3)).astype(np.uint16))
    tif(tmp_path / "masks/20x.tif", MASK)
    tif(tmp_path / "masks/40x.tif", np.kron(MASK, np.ones((2, 2), np.uint16)))
    rows, said = run(tmp_path, rule=rule(fov=12.0, size=None, min_area=2.0))
    assert [(row["field"], row["mask_label"]) for row in rows] == [
        (f, n) for f in ("20x.tif", "40x.tif") for n in (3, 1000)
    ]
    assert [tifffile.imread(tmp_path / "out" / row["path"]).shape for row in rows] == [(24, 24)] * 2 + [(48, 48)] * 2
    assert [row["area_um2"] for row in rows[:2]] == [row["area_um2"] for row in rows[2:]] == [45.0, 17.5]
    assert "left out: 2 cells of less than 2 µm²" in said
    assert said.endswith("data.channels=1 data.um_per_pixel=0.5 data.size=24 data.sources=field")
    config = table.Config(table=str(tmp_path / "out/cells.parquet"), channels=1, um_per_pixel=0.5, size=24)
    images = open_split(config, "train")
    for low, high in ((0, 2), (1, 3)):
        one, other = (images.pixels(i)[0].numpy().astype(float) for i in (low, high))
        step = np.maximum(*(np.abs(np.gradient(one, axis=axis)) for axis in (0, 1)))
        assert (np.abs(one - other) <= 1.5 * step + 6).mean() > 0.97  # what a pixel next to it has
        assert np.abs(one - other).mean() < 8
    assert images.name(0) == "images/20x/3.tif#20x:3"


def test_a_field_without_a_scale_is_named(tmp_path):
    tif(tmp_path / "fields/a.tif", FIELD, 254.0)
    tif(tmp_path / "masks/a.tif", MASK)
    with pytest.raises(ConfigError, match=r"fields/a.tif: its µm per pixel is not known \(TIFF tags say 254 µm"):
        run(tmp_path, rule=rule(fov=12.0, size=None))
    assert not (tmp_path / "out" / "cells.parquet").exists()
    rows, _ = run(tmp_path, rule=rule(fov=12.0, size=None), um_per_pixel=1.0)
    assert tifffile.imread(tmp_path / "out" / rows[0]["path"]).shape == (12, 12)
    rows, _ = run(tmp_path, out="out3", rule=rule(fov=12.0, size=None), um_per_pixel=0.99)
    assert tifffile.imread(tmp_path / "out3" / rows[0]["path"]).shape == (13, 13)  # no less than is asked for
    rows, said = run(tmp_path, out="out2")
    assert (rows[0]["um_per_pixel"], rows[0]["area_um2"]) == (None, None)
    assert "scale: unknown" in said


def ngff(folder, values, axes, labels=None, version="0.4"):
    old = version == "0.4"
    zarr_format = 2 if old else 3

    def image(group, values):
        group.create_array("0", shape=values.shape, chunks=values.shape, dtype=values.dtype)[:] = values
        steps = [1.0 if a in "tcz" else 0.5 for a in axes]
        units = [{"name": a} | ({"unit": "micrometer"} if a in "yx" else {}) for a in axes]
        sets = [{"path": "0", "coordinateTransformations": [{"type": "scale", "scale": steps}]}]
        scales = [{"version": version, "axes": units, "datasets": sets}]
        group.attrs.update({"multiscales": scales} if old else {"ome": {"version": version, "multiscales": scales}})

    image(zarr.open_group(folder, mode="w", zarr_format=zarr_format), values)
    for name, mask in (labels or {}).items():
        image(zarr.open_group(folder / "labels" / name, mode="w", zarr_format=zarr_format), mask)


COLOURS = np.stack([FIELD, FIELD // 2, FIELD // 3], 2)
CHANNELS = np.moveaxis(COLOURS, 2, 0).copy()
EIGHT = (np.dstack([COLOURS, FIELD]) >> 4).astype(np.uint8)
OME = {"axes": "CYX", "PhysicalSizeX": 0.5, "PhysicalSizeY": 0.5}
FIELDS = {
    "grey16.tif": lambda f: tif(f),
    "float.tif": lambda f: tif(f, FIELD.astype(np.float32)),
    "white_is_zero.tif": lambda f: tif(f, photometric="miniswhite"),
    "rgb16.tif": lambda f: tif(f, COLOURS, photometric="rgb"),
    "rgba8.tif": lambda f: tif(f, EIGHT, photometric="rgb", extrasamples=["unassalpha"]),
    "planar.tif": lambda f: tif(f, CHANNELS, photometric="rgb", planarconfig="separate"),
    "channels.ome.tif": lambda f: tif(f, CHANNELS, photometric="minisblack", ome=True, metadata=OME),
    "imagej.tif": lambda f: tif(f, CHANNELS, imagej=True, metadata={"axes": "CYX"}),
    "grey.png": lambda f: Image.fromarray(EIGHT[..., 0]).save(f),
    "deep.png": lambda f: f.write_bytes(imagecodecs.png_encode(COLOURS)),
    "rgb.jpg": lambda f: Image.fromarray(EIGHT[..., :3]).save(f),
    "image.zarr": lambda f: ngff(f, FIELD[None, None], "tcyx"),
    "stack.zarr": lambda f: ngff(f, CHANNELS, "cyx", version="0.5"),
}


@pytest.mark.parametrize("name", FIELDS)
def test_cuts_are_read_as_their_fields(tmp_path, name):
    field = tmp_path / "fields" / name
    field.parent.mkdir()
    FIELDS[name](field)
    tif(tmp_path / "masks" / f"{field.name.split('.')[0]}_seg.tif", MASK)
    rows, said = run(tmp_path, rule=rule(size=81, border="keep"), um_per_pixel=0.5)
    whole = read_field(str(field), How())
    assert [row["mask_label"] for row in rows] == [3, 5, 9, 1000]
    for row in rows:
        assert row["um_per_pixel"] == 0.5
        cut = read_field(str(tmp_path / "out" / row["path"]), How())
        assert (cut.axes, cut.values.dtype, cut.inverted, cut.alpha) == (
            whole.axes, whole.values.dtype, whole.inverted, whole.alpha
        )  # fmt: skip
        assert cut.scale.um == pytest.approx(0.5)
        planes = [cut.values, whole.values]
        if whole.axes != "CYX":
            planes = [np.atleast_3d(p).transpose(2, 0, 1) for p in planes]
        for mine, theirs in zip(*planes, strict=True):
            assert np.array_equal(mine, naive(theirs, MASK, row["mask_label"], 81, None))
    settings = dict(word.removeprefix("data.").split("=") for word in said.splitlines()[-1].split() if "=" in word)
    settings = {key: int(value) if value.isdigit() else value for key, value in settings.items() if key != "table"}
    config = table.Config(table=str(tmp_path / "out/cells.parquet"), **settings)
    assert len(open_split(config, "train")) == 4


MASKS = {
    "a.tif": lambda f: tif(f, MASK),
    "a_masks.tif": lambda f: tif(f, MASK.astype(np.uint32)),
    "a_cp_masks.png": lambda f: Image.fromarray(MASK).save(f),
    "a.labels.tif": lambda f: tif(f, MASK.astype(np.int32)),
    "A_seg_mask.tiff": lambda f: tif(f, MASK.astype(np.float32)),
    "mask_a.tif": lambda f: tif(f, MASK[None], metadata=None, photometric="minisblack"),
    "a.zarr": lambda f: ngff(f, MASK, "yx"),
    "a_labels.ome.zarr": lambda f: ngff(f, MASK[None, None].astype(np.int64), "czyx", version="0.5"),
    "deeper/a_mask.png": lambda f: Image.fromarray(MASK).save(f),
}


@pytest.mark.parametrize("name", MASKS)
def test_masks_are_found_by_their_names(tmp_path, name):
    field = "A.ome.tif" if name.startswith("A") else "a.ome.tif"
    tif(tmp_path / "fields" / field, metadata={"axes": "YX"}, ome=True)
    mask = tmp_path / "masks" / name
    mask.parent.mkdir(parents=True)
    MASKS[name](mask)
    rows, _ = run(tmp_path)
    assert [row["mask_label"] for row in rows] == [*IDS]


def test_masks_beside_their_fields(tmp_path):
    for name in ("a", "b"):
        tif(tmp_path / "x" / f"{name}.tif")
        tif(tmp_path / "x" / f"{name}_seg.tif", MASK)
    tif(tmp_path / "x" / "c.tif")
    tif(tmp_path / "x" / "d_masks.tif", MASK)
    rows, said = run(tmp_path, "x", None)
    assert [row["field"] for row in rows] == ["a.tif"] * 3 + ["b.tif"] * 3
    assert "left out: 1 fields without a mask: c.tif" in said
    assert "left out: 1 masks without a field: d_masks.tif" in said
    with (tmp_path / "out/left_out.csv").open() as file:
        assert [*csv.reader(file)][1:] == [["c.tif", "field without a mask"], ["d_masks.tif", "mask without a field"]]
    again, _ = run(tmp_path, "x", "x", "again")
    assert again == rows


def test_masks_in_a_folder_among_the_fields(tmp_path):
    for site in ("s1", "s2"):
        tif(tmp_path / "x" / site / "a.tif")
        tif(tmp_path / "x" / "masks" / site / "a.tif", MASK)
    rows, _ = run(tmp_path, "x", "x/masks")
    assert [row["cell_id"] for row in rows] == [f"{site}/a:{n}" for site in ("s1", "s2") for n in IDS]


def test_fields_of_one_name_have_the_mask_of_their_folder(tmp_path):
    for site, number in (("s1", 1), ("s2", 2), ("s3", 3)):
        tif(tmp_path / "fields" / site / "a.tif")
        if number < 3:
            tif(tmp_path / "masks" / site / "a_masks.tif", (MASK > 999) * np.uint8(number))
    tif(tmp_path / "masks" / "a_masks.tif", MASK)
    (tmp_path / "t.csv").write_text("path\n" + "\n".join(f"fields/s{n}/a.tif" for n in (1, 2, 3)))
    rows, said = run(tmp_path, "t.csv")
    assert [row["cell_id"] for row in rows] == ["fields/s1/a:1", "fields/s2/a:2"]
    assert "left out: 1 fields without a mask: fields/s3/a.tif" in said
    assert "left out: 1 masks without a field: a_masks.tif" in said


def test_labels_of_ome_zarr(tmp_path):
    ngff(tmp_path / "x/a.zarr", np.moveaxis(COLOURS, 2, 0).copy(), "cyx", {"nuclei": MASK[None]})
    ngff(tmp_path / "x/b.zarr", FIELD, "yx", {"cells": MASK, "nuclei": MASK + (MASK > 0)}, version="0.5")
    with pytest.raises(ConfigError, match=r"b.zarr has several labels; --label names one of: cells, nuclei"):
        run(tmp_path, "x", None)
    with pytest.raises(ConfigError, match=r"a.zarr has no labels called 'cells'; --label names one of: nuclei"):
        run(tmp_path, "x", None, label="cells")
    rows, _ = run(tmp_path, "x", None, label="nuclei")
    assert [row["mask_label"] for row in rows] == [3, 9, 1000, 4, 10, 1001]
    assert {row["um_per_pixel"] for row in rows} == {0.5}


def test_each_cell_has_what_the_table_says_of_its_field(tmp_path):
    for name in ("a", "b"):
        tif(tmp_path / "fields" / f"{name}.tif", FIELD, 254.0)
        tif(tmp_path / "masks" / f"{name}.tif", MASK)
    (tmp_path / "t.csv").write_text(
        "file;donor;site;label;magnification;area_px\nfields/b.tif;d2;Bonn;x;40x;1\nfields\\a.tif;d1;Jena;y;20;2\n"
    )
    options = {"rule": rule(fov=12.0, size=None), "um_per_pixel_at_1x": 10.0}
    rows, said = run(tmp_path, "t.csv", **options)
    assert [(row["field"], row["donor"], row["site"], row["label"], row["um_per_pixel"]) for row in rows] == (
        [("fields/b.tif", "d2", "Bonn", "x", 0.25)] * 3 + [("fields/a.tif", "d1", "Jena", "y", 0.5)] * 3
    )
    assert rows[0]["of_field_area_px"] == "1"
    assert "columns of the fields' table: donor, site, label, magnification, area_px" in said
    assert said.endswith("data.um_per_pixel=0.5 data.size=24")  # the donor is the source
    file, _ = run(tmp_path, "t.csv", out="csv", format="csv", **options)
    as_csv = open_split(table.Config(table=str(file), channels=1, size=24, um_per_pixel=0.5), "train")
    as_parquet = open_split(
        table.Config(table=str(tmp_path / "out/cells.parquet"), channels=1, size=24, um_per_pixel=0.5), "train"
    )
    for images in (as_csv, as_parquet):
        assert (images.classes, images.lab_names) == (("x", "y"), ("Bonn", "Jena"))
        assert images.name(5) == "images/fields/a/1000.tif#fields/a:1000"
    assert all((as_csv.pixels(i) == as_parquet.pixels(i)).all() for i in range(6))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("pat\na.tif", "has no column of paths"),
        ("path\nb.tif", r"1 of 1 rows name no file below .*row 2: b.tif"),
        ("path\na.tif\na.tif", "a.tif has several rows"),
        ("path,donor\n,x", "1 rows have no path"),
        ("path,x_min,y_min,x_max,y_max\na.tif,0,0,2,2", "has boxes already"),
        ("path,um_per_pixel\na.tif,0", "row 2 has um_per_pixel=0; it must be above 0"),
    ],
)
def test_mistakes_in_the_table_of_fields(tmp_path, rows, message):
    tif(tmp_path / "a.tif")
    tif(tmp_path / "masks" / "a.tif", MASK)
    (tmp_path / "t.csv").write_text(rows)
    with pytest.raises(ConfigError, match=message):
        run(tmp_path, "t.csv")


def mask(values, **options):
    return lambda folder: tif(folder / "masks/a_masks.tif", values, **options)


def renamed(name):
    return lambda folder: (folder / "masks/a_masks.tif").rename(folder / name)


def cut_short(name):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:3000])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (mask(MASK[:50]), DataError, r"a_masks.tif has 50×80 px .*a.tif 60×80 px"),
        (mask(COLOURS, photometric="rgb"), DataError, "one number a pixel, no colours"),
        (mask(MASK + np.float32(0.5)), DataError, "float32.*labels are whole numbers"),
        (mask(-MASK.astype(np.int32)), DataError, "labels from -1000 to 0"),
        (mask((MASK > 0).astype(np.uint8) * 255), DataError, "one label 255 has 4 separate parts"),
        (mask(MASK > 0), DataError, "number them first"),
        (mask(MASK * 0), ConfigError, "no cell of 1 fields is left"),
        (cut_short("masks/a_masks.tif"), DataError, r"a_masks.tif: truncated"),
        (cut_short("fields/a.tif"), DataError, r"fields/a.tif: truncated"),
        (renamed("masks/b.tif"), ConfigError, r"none of the 1 fields .* has a mask"),
        (renamed("masks/a_seg.npy"), ConfigError, r"a_seg.npy is not read: save"),
        (lambda p: tif(p / "masks/a_seg.tif", MASK), ConfigError, r"several masks .*a_masks.tif and a_seg.tif"),
        (lambda p: (p / "fields/a.tif").unlink(), ConfigError, "holds no images"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, change, error, message):
    pair_of(tmp_path)
    change(tmp_path)
    with pytest.raises(error, match=message):
        run(tmp_path)
    assert not (tmp_path / "out" / "cells.parquet").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rule": rule(size=0)}, "--size 0 must be above 0"),
        ({"rule": rule(size=None, fov=float("nan"))}, "--fov nan must be above 0"),
        ({"rule": rule(size=None)}, "one of --fov, in µm, and --size, in pixels"),
        ({"rule": rule(min_area=-1.0)}, "--min-area -1 must be 0 or more"),
        ({"rule": rule(background=70000.0)}, r"--background 70000: .*a.tif holds uint16"),
        ({"rule": rule(background=0.5)}, r"--background 0.5: .*a.tif holds uint16"),
        ({"rule": rule(background=float("inf"))}, "--background inf is no number"),
        ({"how": How(level=-1)}, "--level -1 must be 0 or more"),
        ({"out": "fields/out"}, r"--out .*fields/out lies in .*fields"),
        ({"masks": "nothing"}, r"--masks .*nothing: no such folder"),
        ({"images": "nothing"}, r"IMAGES .*nothing: no such folder"),
        ({"um_per_pixel_at_1x": 10.0}, "--um-per-pixel-at-1x 10 is for a table"),
    ],
)
def test_mistakes_in_the_request(tmp_path, options, message):
    pair_of(tmp_path)
    with pytest.raises(ConfigError, match=message):
        run(tmp_path, **options)


def test_what_is_there_is_not_overwritten(tmp_path):
    pair_of(tmp_path)
    rows, _ = run(tmp_path)
    with pytest.raises(ConfigError, match=r"cells.parquet exists already"):
        run(tmp_path)
    other, _ = run(tmp_path, out="other")
    assert other == rows
    each = [(tmp_path / out / rows[0]["path"]).read_bytes() for out in ("out", "other")]
    assert each[0] == each[1]


def fields_of(folder, count=6):
    """Fields and masks that differ."""
    for i in range(count):
        tif(folder / "fields" / f"f{i}.tif", np.roll(FIELD, i, 1))
        tif(folder / "masks" / f"f{i}_masks.tif", np.roll(MASK, i, 1), metadata=None)


def everything(folder):
    """Path → bytes of the files in a folder."""
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def killed_after(monkeypatch, count):
    """The process ends as if it were killed while it writes the cell after `count` others."""
    left = iter(range(count))

    def write(file, *args):
        if next(left, None) is None:
            file.write_bytes(b"half")
            raise KeyboardInterrupt
        write_cell(file, *args)

    monkeypatch.setattr(module, "write_cell", write)
    monkeypatch.setattr(launcher, "cores", lambda: 1)


@pytest.mark.parametrize("format", ["parquet", "csv"])
def test_after_a_kill_it_goes_on_and_gives_the_same(tmp_path, monkeypatch, format):
    fields_of(tmp_path)
    run(tmp_path, out="whole", format=format)
    killed_after(monkeypatch, 7)  # in the third field
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, format=format)
    monkeypatch.setattr(module, "write_cell", write_cell)
    read, seen = module.read_field, []
    monkeypatch.setattr(module, "read_field", lambda file, how: seen.append(file[-6:]) or read(file, how))
    _, said = run(tmp_path, format=format)
    assert seen == [f"f{i}.tif" for i in range(2, 6)]
    assert "going on: 2 of 6 fields were cut before" in said
    assert everything(tmp_path / "out") == everything(tmp_path / "whole")


def test_what_changed_since_the_kill_is_cut_again(tmp_path, monkeypatch):
    fields_of(tmp_path)
    killed_after(monkeypatch, 13)  # in the fifth field
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path)
    monkeypatch.setattr(module, "write_cell", write_cell)
    tif(tmp_path / "masks/f0_masks.tif", np.where(MASK == 3, 4, MASK), metadata=None)
    tif(tmp_path / "fields/f1.tif", FIELD + 1)
    (tmp_path / "out/images/f2/9.tif").write_bytes(b"")
    records = sorted((tmp_path / "out" / FOLDER).glob("*.npz"))
    assert len(records) == 4
    records[0].write_bytes(records[0].read_bytes()[:-40])
    rows, said = run(tmp_path)
    run(tmp_path, out="whole")
    assert everything(tmp_path / "out") == everything(tmp_path / "whole")
    assert [row["mask_label"] for row in rows][:3] == [4, 9, 1000]
    assert "going on: " not in said or "1 of 6" in said


def test_cells_that_were_begun_in_another_way_are_refused(tmp_path, monkeypatch):
    fields_of(tmp_path)
    killed_after(monkeypatch, 7)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path)
    with pytest.raises(ConfigError, match=r"begun in another way: size 16, now 12; background None, now 0.0; choose"):
        run(tmp_path, rule=rule(size=12, background=0.0))
    with pytest.raises(ConfigError, match=r"begun in another way: fields' level 0, now 1"):
        run(tmp_path, how=How(level=1))
    assert (tmp_path / "out" / FOLDER).is_dir()


@pytest.mark.slow
def test_killed_at_any_time(tmp_path):
    """By the system, in the middle of many fields."""
    fields_of(tmp_path, 200)
    arguments = ["cells", str(tmp_path / "fields"), "--masks", str(tmp_path / "masks"), "--size", "16", "--out"]
    assert main(None, [*arguments, str(tmp_path / "whole")]) == 0
    for most in (20, 90):
        process = subprocess.Popen([sys.executable, "-m", "sslcells", *arguments, str(tmp_path / "out")])
        while len([*(tmp_path / "out" / FOLDER).glob("*.npz")]) < most and process.poll() is None:
            time.sleep(0.01)
        process.kill()
        assert process.wait() == -signal.SIGKILL
    assert main(None, [*arguments, str(tmp_path / "out")]) == 0
    assert everything(tmp_path / "out") == everything(tmp_path / "whole")


def test_cells_in_parts_are_counted_and_labels_may_be_large(tmp_path):
    mask = MASK.astype(np.int64)
    mask[MASK == 3] = 2**40
    mask[55:58, 5:9] = 2**40
    tif(tmp_path / "fields/a.tif")
    ngff(tmp_path / "masks/a.zarr", mask, "yx")
    rows, said = run(tmp_path)
    assert [row["mask_label"] for row in rows] == [9, 1000, 2**40]
    assert rows[-1]["area_px"] == 10 * 18 + 12
    assert "1 cells are in several parts that do not touch" in said


def test_a_mask_without_background(tmp_path):
    tif(tmp_path / "fields/a.tif")
    tif(tmp_path / "masks/a.tif", np.where(np.arange(80) < 40, 1, 2)[None].repeat(60, 0).astype(np.uint8))
    rows, _ = run(tmp_path, rule=rule(border="keep"))
    assert [row["area_px"] for row in rows] == [2400, 2400]


def test_fields_of_one_name_do_not_overwrite_each_other(tmp_path):
    pair_of(tmp_path)
    Image.fromarray(FIELD + 1).save(tmp_path / "fields/a.png")
    rows, _ = run(tmp_path)
    assert [row["cell_id"] for row in rows] == [f"{name}:{n}" for name in ("a.png", "a.tif") for n in IDS]
    cuts = [tifffile.imread(tmp_path / "out" / row["path"]) for row in rows]
    assert np.array_equal(cuts[0], cuts[3] + 1)


def test_a_table_of_columns_of_parquet(tmp_path):
    pair_of(tmp_path)
    columns = {"path": ["fields/a.tif"], "donor": pa.array([7], pa.int64()), "um_per_pixel": [0.25]}
    pq.write_table(pa.table(columns), tmp_path / "t.parquet")
    rows, _ = run(tmp_path, "t.parquet")
    assert [(row["donor"], row["um_per_pixel"]) for row in rows] == [(7, 0.25)] * 3


def test_the_command(tmp_path, capsys, monkeypatch):
    pair_of(tmp_path)
    monkeypatch.chdir(tmp_path)
    arguments = ["cells", "fields", "--masks", "masks", "--out", "out"]
    assert main(None, [*arguments, "--fov", "8", "--background", "0", "--format", "csv"]) == 0
    assert "out/cells.csv: 3 cells" in capsys.readouterr().out
    assert tifffile.imread("out/images/a/3.tif").shape == (16, 16)
    assert main(None, [*arguments, "--fov", "8"]) == 2
    assert capsys.readouterr().err.startswith("sslcells: out/cells.csv exists already")
    for wrong in ([], ["--fov", "8", "--size", "8"], ["--fov", "8", "--background", "black"]):
        with pytest.raises(SystemExit) as status:
            main(None, [*arguments, *wrong])
        assert status.value.code == 2
    assert "'black' is neither keep nor a number" in capsys.readouterr().err
