"""µm per pixel: read from files, tables and configuration; images brought to one scale before anything is cut."""

import json
import os

import numpy as np
import pytest
import tifffile
import zarr
from PIL import Image
from pydantic import ValidationError

from sslcells.config import ConfigError
from sslcells.data import folder, open_split, reading, table
from sslcells.data._decode import Decoder, Unreadable
from sslcells.data._decode.pixel_size import field
from sslcells.data.describe import describe
from sslcells.delivery.encoder import _decoder

GREY = np.random.default_rng(0).integers(0, 4096, (24, 32), np.uint16)
DECODER = Decoder(1, None, "crop", "percentile")


def ome(file, x=0.5, y=None, unit="µm"):
    sizes = {"PhysicalSizeX": x, "PhysicalSizeXUnit": unit, "PhysicalSizeY": x if y is None else y}
    tifffile.imwrite(file, GREY, ome=True, metadata={"axes": "YX", **sizes, "PhysicalSizeYUnit": unit})


def imagej(file, per_unit=2.0, unit="micron"):
    tifffile.imwrite(file, GREY, imagej=True, resolution=(per_unit, per_unit), metadata={"axes": "YX", "unit": unit})


def tags(file, x, y=None, unit="centimeter", **options):
    resolution = (x, x if y is None else y)
    tifffile.imwrite(file, GREY, metadata=None, resolution=resolution, resolutionunit=unit, **options)


def ngff(folder, um=0.5, unit="micrometer", version="0.4", of_image=1.0):
    group = zarr.open_group(folder, mode="w", zarr_format=2 if version == "0.4" else 3)
    for level in range(2):
        small = GREY[:: 2**level, :: 2**level]
        group.create_array(str(level), shape=small.shape, chunks=small.shape, dtype=small.dtype)[:] = small
    axes = [{"name": a, "type": "space"} | ({"unit": unit} if unit else {}) for a in "yx"]

    def scaled(factor):
        return [{"type": "scale", "scale": [factor, factor]}]

    sets = [{"path": str(n), "coordinateTransformations": scaled(um * 2**n / of_image)} for n in range(2)]
    image = {"axes": axes, "datasets": sets, "coordinateTransformations": scaled(of_image)}
    if version == "0.4":
        group.attrs["multiscales"] = [{"version": version, **image}]
    else:
        group.attrs["ome"] = {"version": version, "multiscales": [image]}


def png(file, dpi):
    Image.fromarray(GREY).save(file, dpi=(dpi, dpi))


def jpeg(file, dpi):
    Image.fromarray((GREY >> 4).astype(np.uint8)).save(file, dpi=(dpi, dpi))


@pytest.mark.parametrize(
    ("name", "writer", "options", "um", "origin"),
    [
        ("x.ome.tif", ome, {}, 0.5, "OME"),
        ("x.ome.tif", ome, {"x": 325.0, "unit": "nm"}, 0.325, "OME"),
        ("x.ome.tif", ome, {"x": 0.5, "y": 0.25}, 0, "not square"),
        ("x.ome.tif", ome, {"x": 1.0, "unit": "pixel"}, 0, "OME names the unit 'pixel'"),
        ("x.tif", imagej, {}, 0.5, "ImageJ"),
        ("x.tif", imagej, {"per_unit": 4.0, "unit": "\\u00B5m"}, 0.25, "ImageJ"),
        ("x.tif", imagej, {"per_unit": 0.004, "unit": "nm"}, 0.25, "ImageJ"),
        ("x.tif", imagej, {"unit": "pixel"}, 0, ""),
        ("x.tif", imagej, {"per_unit": 72.0, "unit": "inch"}, 0, ""),
        ("x.tif", tags, {"x": 20000}, 0.5, "TIFF tags"),
        ("x.tif", tags, {"x": 50800, "unit": "inch"}, 0.5, "TIFF tags"),
        ("x.tif", tags, {"x": 20000, "y": 40000}, 0, "not square"),
        ("x.tif", tags, {"x": 2, "unit": "none"}, 0, ""),
        *(("x.tif", tags, {"x": n, "unit": "inch"}, 0, f"TIFF tags say {n} dpi") for n in (72, 96, 300, 1200)),
        ("x.tif", tags, {"x": 1}, 0, "not a microscope's"),
        ("x.svs.tif", tags, {"x": 1, "unit": "none", "description": "Aperio v1\n240x|AppMag = 20|MPP = 0.4990"}, 0.499,
         "Aperio"),
        ("x.zarr", ngff, {}, 0.5, "OME-Zarr"),
        ("x.zarr", ngff, {"version": "0.5", "um": 250.0, "unit": "nanometer"}, 0.25, "OME-Zarr"),
        ("x.zarr", ngff, {"of_image": 0.5}, 0.5, "OME-Zarr"),
        ("x.zarr", ngff, {"unit": None}, 0, "OME-Zarr names no unit"),
        ("x.png", png, {"dpi": 50800}, 0.5, "its dpi"),
        ("x.png", png, {"dpi": 96}, 0, "its dpi say 96"),
        ("x.jpg", jpeg, {"dpi": 300}, 0, "its dpi say 300 dpi"),
    ],
)  # fmt: skip
def test_what_a_file_says_of_its_pixels(tmp_path, name, writer, options, um, origin):
    writer(tmp_path / name, **options)
    header = DECODER.header(str(tmp_path / name))
    assert header.um_per_pixel == pytest.approx(um, rel=1e-3)
    assert origin in header.scale_from
    assert bool(header.scale_from) == bool(origin)
    wanted = Decoder(1, (8, 8), "crop", "percentile", um_per_pixel=0.5)
    if um:
        wanted(str(tmp_path / name))
    else:
        with pytest.raises(Unreadable, match=r"its µm per pixel is not known.* and data.um_per_pixel is 0.5"):
            wanted(str(tmp_path / name))


def test_a_level_has_its_own_scale(tmp_path):
    with tifffile.TiffWriter(tmp_path / "x.ome.tif", ome=True) as writer:
        sizes = {"axes": "YX", "PhysicalSizeX": 0.5, "PhysicalSizeY": 0.5}
        writer.write(np.tile(GREY, (8, 8)), subifds=1, metadata=sizes)
        writer.write(np.tile(GREY, (4, 4)), subfiletype=1)
    ngff(tmp_path / "x.zarr")
    for name in ("x.ome.tif", "x.zarr"):
        for level in (0, 1):
            header = Decoder(1, None, "crop", "percentile", level=level).header(str(tmp_path / name))
            assert header.um_per_pixel == pytest.approx(0.5 * 2**level)


def test_each_image_of_a_file_has_its_own_scale(tmp_path):
    with tifffile.TiffWriter(tmp_path / "x.ome.tif", ome=True) as writer:
        for um in (0.5, 0.25):
            writer.write(GREY, metadata={"axes": "YX", "PhysicalSizeX": um, "PhysicalSizeY": um})
    assert DECODER.header(str(tmp_path / "x.ome.tif")).um_per_pixel == 0.5


def drawn(um, height=60.0, width=80.0, turned=0.0):
    """A field of this many µm with two cells, each pixel the mean of what it covers: (H, W) uint16."""
    fine = 4
    y, x = np.mgrid[: int(height / um * fine), : int(width / um * fine)] * (um / fine) + um / fine / 2
    out = np.full(y.shape, 200.0)
    for cy, cx, radius, grey in ((20.0, 30.0, 6.0, 3000.0), (40.0, 52.0, 4.0, 3000.0)):
        out += grey / (1 + np.exp((np.hypot(y - cy, x - cx) - radius) / 0.3))
    return out.reshape(out.shape[0] // fine, fine, out.shape[1] // fine, fine).mean((1, 3)).astype(np.uint16)


def centre(image):
    weight = (image > 128).astype(float)
    y, x = np.mgrid[: image.shape[0], : image.shape[1]]
    return np.array([(y * weight).sum(), (x * weight).sum()]) / weight.sum()


def write_pair(place):
    """The same cells at 20× (0.5 µm per pixel) and 40× (0.25)."""
    place.mkdir(exist_ok=True)
    for name, um in (("20x.tif", 0.5), ("40x.tif", 0.25)):
        tifffile.imwrite(
            place / name, drawn(um), metadata=None, resolution=(1e4 / um, 1e4 / um), resolutionunit="centimeter"
        )


@pytest.mark.parametrize("target", [0.25, 0.4, 0.5, 1.0])
def test_two_magnifications_agree(tmp_path, target):
    write_pair(tmp_path)
    config = folder.Config(path=str(tmp_path), channels=1, size=int(50 / target), um_per_pixel=target)
    images = open_split(config, "train")
    low, high = (images.pixels(i)[0].numpy().astype(float) for i in (0, 1))
    assert np.abs(centre(low) - centre(high)).max() < 0.5
    assert np.abs(low - high).mean() < 3


def test_boxes_are_of_the_file_and_cut_a_field_in_um(tmp_path):
    write_pair(tmp_path)
    rows = ["path,x_min,y_min,x_max,y_max"]
    for name, um in (("20x.tif", 0.5), ("40x.tif", 0.25)):
        rows += [",".join([name, *(f"{v / um:g}" for v in box)]) for box in ((24, 14, 36, 26), (48, 36, 56, 44))]
    (tmp_path / "t.csv").write_text("\n".join(rows))
    config = table.Config(table=str(tmp_path / "t.csv"), channels=1, size=32, um_per_pixel=0.5)
    images = open_split(config, "train")
    each = [images.pixels(i)[0].numpy().astype(float) for i in range(4)]
    for low, high in ((each[0], each[2]), (each[1], each[3])):
        assert np.abs(centre(low) - 15.5).max() < 0.5  # the cell is in the middle
        assert np.abs(centre(low) - centre(high)).max() < 0.5
        assert np.abs(low - high).mean() < 3
    radius = [np.sqrt((low > 128).sum() / np.pi) * 0.5 for low in each[:2]]
    assert radius == pytest.approx([6.0, 4.0], abs=0.5)
    as_they_are = open_split(table.Config(table=str(tmp_path / "t.csv"), channels=1, size=24), "train")
    assert as_they_are.pixels(0).shape == (1, 24, 24)  # without a scale the box is resized


def test_images_without_a_scale_are_named(tmp_path):
    write_pair(tmp_path)
    tags(tmp_path / "screen.tif", 72, unit="inch")
    png(tmp_path / "b.png", 96)
    fields = {"path": str(tmp_path), "channels": 1, "size": 16, "um_per_pixel": 0.5}
    for verify in ("full", "header", "none"):
        with pytest.raises(ConfigError) as error:
            open_split(folder.Config(**fields, verify=verify), "train")
        for words in (
            "data.um_per_pixel=0.5, and 2 of 4 images do not say how large their pixels are:",
            "  b.png: its dpi say 96 dpi, which is not a microscope's",
            "  screen.tif: TIFF tags say 72 dpi",
            "data.um_per_pixel_default=",
        ):
            assert words in str(error.value)
    images = open_split(folder.Config(**fields, um_per_pixel_default=1.0), "train")
    text = describe({"train": images})
    assert (
        "scale: 4 of 4 images have one (2 from TIFF tags, 2 from data.um_per_pixel_default): 0.25 to 1 µm per pixel, "
        "brought to 0.5"
    ) in text
    del fields["um_per_pixel"]
    text = describe({"train": open_split(folder.Config(**fields), "train")})
    assert (
        "scale: 2 of 4 images have one (2 from TIFF tags): 0.25 to 0.5 µm per pixel; they are NOT brought to one "
        "scale: set data.um_per_pixel; 2 without one: b.png, screen.tif"
    ) in text


def test_a_table_comes_before_files_and_the_default(tmp_path):
    write_pair(tmp_path)
    tags(tmp_path / "screen.tif", 72, unit="inch")
    tags(tmp_path / "other.tif", 72, unit="inch")
    (tmp_path / "t.csv").write_text("path,mpp,magnification\n20x.tif,1,\n40x.tif,,\nscreen.tif,,20x\nother.tif,,\n")
    fields = {"table": str(tmp_path / "t.csv"), "channels": 1, "size": 16, "um_per_pixel": 0.5}
    with pytest.raises(ConfigError, match=r"2 of 4 images do not say"):
        open_split(table.Config(**fields), "train")
    with pytest.raises(ConfigError, match=r"1 of 4 images do not say.*\n  other.tif"):
        open_split(table.Config(**fields, um_per_pixel_at_1x=10), "train")
    for verify in ("full", "none"):
        config = table.Config(**fields, um_per_pixel_at_1x=10, um_per_pixel_default=0.25, verify=verify)
        images = open_split(config, "train")
        assert images._files._scales.tolist() == [1.0, 0.25, 0.5, 0.25]
        assert (
            "4 of 4 images have one (2 from the table, 1 from TIFF tags, 1 from data.um_per_pixel_default): 0.25 to 1"
        ) in "".join(images.found.scales)
        whole = Image.fromarray(Decoder(1, None, "crop", "percentile")(str(tmp_path / "20x.tif"))[0].numpy())
        assert np.array_equal(images.pixels(0)[0], field(whole, (16, 16), 0.5))


@pytest.mark.parametrize(
    ("rows", "fields", "message"),
    [
        ("20x.tif,0", {}, "row 2 has um_per_pixel=0; it must be above 0"),
        ("20x.tif,-1", {}, "row 2 has um_per_pixel=-1; it must be above 0"),
        ("20x.tif,inf", {}, "row 2 has um_per_pixel=inf; it must be above 0"),
        ("20x.tif,half", {}, "row 2 has um_per_pixel='half', which is not a number"),
        ("20x.tif,0.5", {"um_per_pixel_at_1x": 10}, "has no column called magnification"),
    ],
)
def test_mistakes_in_a_table(tmp_path, rows, fields, message):
    write_pair(tmp_path)
    (tmp_path / "t.csv").write_text(f"path,um_per_pixel\n{rows}\n")
    with pytest.raises(ConfigError, match=message):
        open_split(table.Config(table=str(tmp_path / "t.csv"), channels=1, size=16, **fields), "train")


def test_cells_of_one_file_have_one_scale(tmp_path):
    write_pair(tmp_path)
    (tmp_path / "t.csv").write_text("path,mpp,cell_id\n20x.tif,0.5,1\n20x.tif,0.25,2\n")
    with pytest.raises(ConfigError, match=r"20x.tif have different µm per pixel, 0.5 in row 2 and 0.25 in another"):
        open_split(table.Config(table=str(tmp_path / "t.csv"), channels=1), "train")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"um_per_pixel": 0.5}, "needs size="),
        ({"um_per_pixel": 0.5, "size": 8, "fit": "stretch"}, "fit=stretch distorts images"),
        ({"um_per_pixel": 0}, "greater than 0"),
        ({"um_per_pixel_default": 0.5}, "no use without um_per_pixel"),
    ],
)
def test_settings_that_contradict(fields, message):
    with pytest.raises(ValidationError, match=message):
        folder.Config(path="x", **fields)


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("factor", [0.3, 0.5, 0.9, 1.7, 2.0, 4.0])
def test_a_field_is_cut_from_the_image_at_that_scale(mode, factor):
    image = Image.fromarray(np.kron(GREY >> 4, np.ones((6, 6))).astype(np.uint8)).convert(mode)
    size = (12, 14)
    high, wide = round(image.height / factor), round(image.width / factor)
    box = (0, 0, wide * factor, high * factor) if wide * factor <= image.width else None
    if box is None or high * factor > image.height:
        high, wide = int(image.height / factor), int(image.width / factor)
        box = (0, 0, wide * factor, high * factor)
    whole = np.asarray(image.resize((wide, high), Image.Resampling.BICUBIC, box=box)).astype(int)
    top, left = high // 3, wide // 3
    centre = ((top + size[0] / 2) * factor, (left + size[1] / 2) * factor)
    cut = field(image, size, factor, centre).astype(int)
    assert np.abs(cut - whole[top : top + size[0], left : left + size[1]]).max() <= 1


def test_a_field_of_the_same_scale_is_a_copy():
    image = Image.fromarray((GREY >> 4).astype(np.uint8))
    values = np.asarray(image)
    assert np.array_equal(field(image, (24, 32), 1.0), values)
    assert np.array_equal(field(image, (10, 8), 1.0), values[7:17, 12:20])
    assert np.array_equal(field(image, (10, 8), 1.0 + 1e-9), values[7:17, 12:20])
    assert np.array_equal(field(image, (4, 4), 1.0, (3.2, 5.9)), values[1:5, 4:8])


def test_outside_of_an_image_its_border_is_repeated():
    image = Image.fromarray((GREY >> 4).astype(np.uint8))
    values = np.asarray(image)
    out = field(image, (30, 40), 1.0)
    assert np.array_equal(out, np.pad(values, ((3, 3), (4, 4)), mode="edge"))
    corner = field(image, (8, 8), 1.0, (0, 0))
    assert np.array_equal(corner, np.pad(values[:4, :4], ((4, 0), (4, 0)), mode="edge"))
    for factor in (0.01, 100.0):
        assert field(image, (5, 7), factor, (23.9, 31.9)).shape == (5, 7)
    tiny = Image.fromarray(np.full((1, 1), 7, np.uint8))
    assert np.array_equal(field(tiny, (3, 3), 50.0), np.full((3, 3), 7))


def test_stacks_and_colours_are_scaled_too(tmp_path):
    planes = np.stack([drawn(0.25)] * 4)
    resolution = {"resolution": (40000, 40000), "resolutionunit": "centimeter"}
    tifffile.imwrite(tmp_path / "s.tif", planes, photometric="minisblack", metadata={"axes": "CYX"}, **resolution)
    tifffile.imwrite(tmp_path / "c.tif", np.moveaxis(planes[:3], 0, 2).copy(), photometric="rgb", **resolution)
    stack = Decoder(4, (40, 50), "crop", "percentile", "auto", um_per_pixel=0.5)(str(tmp_path / "s.tif"))
    colour = Decoder(3, (40, 50), "crop", "percentile", um_per_pixel=0.5)(str(tmp_path / "c.tif"))
    tifffile.imwrite(tmp_path / "g.tif", planes[0], metadata=None, **resolution)
    grey = Decoder(1, (40, 50), "crop", "percentile", um_per_pixel=0.5)(str(tmp_path / "g.tif"))
    assert stack.shape == (4, 40, 50)
    assert all(np.array_equal(plane, grey[0]) for plane in (*stack, *colour))


def test_a_jpeg_is_not_decoded_at_a_fraction_of_its_scale(tmp_path):
    image = Image.fromarray(np.kron(drawn(0.5) >> 4, np.ones((5, 5))).astype(np.uint8))
    image.save(tmp_path / "x.jpg", quality=95)
    Image.fromarray(np.asarray(image)).save(tmp_path / "x.png")
    decoder = Decoder(1, (40, 40), "crop", "percentile", um_per_pixel=1.0)
    each = [decoder(str(tmp_path / name), 0.1).numpy().astype(int) for name in ("x.jpg", "x.png")]
    assert np.abs(each[0] - each[1]).max() < 8


def test_an_encoder_keeps_the_scale():
    config = folder.Config(path="x", size=32, um_per_pixel=0.5, um_per_pixel_default=0.4)
    how = json.loads(json.dumps(reading(config, 32)))
    decoder = _decoder(3, how)
    assert (decoder.um_per_pixel, decoder.um_per_pixel_default) == (0.5, 0.4)
    assert "um_per_pixel" not in reading(folder.Config(path="x", size=32), 32)  # as in encoders of before


def test_what_is_known_of_a_file_is_remembered(tmp_path):
    write_pair(tmp_path / "a")
    fields = {"path": str(tmp_path / "a"), "channels": 1, "size": 16}
    for file in (tmp_path / "a").iterdir():
        os.utime(file, (1e9, 1e9))
    first = open_split(folder.Config(**fields, um_per_pixel=0.5), "train")
    second = open_split(folder.Config(**fields, um_per_pixel=0.25), "train")
    assert (first.found.looked, second.found.looked) == (2, 0)
    assert second.found.scales == [line.replace("brought to 0.5", "brought to 0.25") for line in first.found.scales]
