"""Axes are believed: channels, Z and T of OME-TIFF, ImageJ and OME-Zarr; sets of files; levels of pyramids."""

import json
import multiprocessing
import sys
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
import zarr
from PIL import Image

import sslcells
from sslcells.config import ConfigError, load
from sslcells.data import describe, folder, open_split, open_splits
from sslcells.data._decode import Decoder, Unreadable
from sslcells.delivery.embedding import embed_folder
from sslcells.train import train

SIZE = {"T": 2, "Z": 5, "C": 3, "Y": 12, "X": 16}


def volume(axes: str, dtype=np.uint8) -> np.ndarray:
    """Random numbers with these axes."""
    random = np.random.default_rng(len(axes))
    return random.integers(0, np.iinfo(dtype).max, [SIZE[a] for a in axes], dtype, endpoint=True)


def ome(file: Path, axes: str, dtype=np.uint8, **options) -> np.ndarray:
    values = volume(axes, dtype)
    tifffile.imwrite(file, values, ome=True, photometric="minisblack", metadata={"axes": axes}, **options)
    return values


def imagej(file: Path, axes: str, dtype=np.uint8) -> np.ndarray:
    values = volume(axes, dtype)
    tifffile.imwrite(file, values, imagej=True, metadata={"axes": axes})
    return values


def ngff(folder: Path, axes: str, version: str = "0.4", levels: int = 1, dtype=np.uint8, part: str = "") -> np.ndarray:
    """An OME-Zarr image, whose next levels hold every second pixel."""
    values = volume(axes, dtype)
    old = version == "0.4"
    group = zarr.open_group(folder / part, mode="a", zarr_format=2 if old else 3)
    for level in range(levels):
        small = values[..., :: 2**level, :: 2**level]
        array = group.create_array(str(level), shape=small.shape, chunks=(1,) * (small.ndim - 2) + (8, 8), dtype=dtype)
        array[:] = small
    kinds = {"t": "time", "c": "channel"}
    scales = {
        "axes": [{"name": a.lower(), "type": kinds.get(a.lower(), "space")} for a in axes],
        "datasets": [{"path": str(level)} for level in range(levels)],
    }
    if old:
        group.attrs["multiscales"] = [{"version": version, **scales}]
    else:
        group.attrs["ome"] = {"version": version, "multiscales": [scales]}
    return values


WRITERS = {"x.ome.tif": ome, "x.tif": imagej, "x.zarr": ngff}


def opened(path: Path, **fields) -> folder.FolderImages:
    images = open_split(folder.Config(path=str(path), **fields), "train")
    assert isinstance(images, folder.FolderImages)
    return images


def names(images) -> list[str]:
    return [images.name(i) for i in range(len(images))]


@pytest.mark.parametrize("axes", ["CYX", "ZCYX", "TZCYX", "TCYX"])
@pytest.mark.parametrize("file", WRITERS)
@pytest.mark.parametrize("z", ["middle", "max", "each"])
def test_channels_are_channels_and_planes_are_planes(tmp_path, file, axes, z):
    values = WRITERS[file](tmp_path / file, axes)
    whole = values.reshape(*(SIZE[a] if a in axes else 1 for a in "TZCYX"))
    images = opened(tmp_path, channels=3, stack="auto", intensity="full", z=z)
    if z != "each" or axes == "CYX":
        want = {
            "middle": whole[whole.shape[0] // 2, whole.shape[1] // 2],
            "max": whole.max((0, 1)),
            "each": whole[0, 0],
        }
        assert names(images) == [file]
        assert np.array_equal(images.pixels(0), want[z])
        assert np.array_equal(images.values(0), want[z])
        return
    planes = [(t, k) for t in range(whole.shape[0]) for k in range(whole.shape[1])]
    assert len(images) == len(planes)
    letters = [a for a in "TZ" if a in axes]
    for i, (t, k) in enumerate(planes):
        place_of = {"T": t, "Z": k}
        place = "".join(f"{a.lower()}{place_of[a]}" for a in letters)
        assert images.name(i) == f"{file}#{place}"
        assert np.array_equal(images.pixels(i), whole[t, k])
    assert images.sources.unique().numel() == 1  # planes of one file are one source


@pytest.mark.parametrize("file", WRITERS)
def test_without_a_stack_channels_are_refused_and_planes_are_read(tmp_path, file):
    WRITERS[file](tmp_path / file, "CYX", dtype=np.uint16)
    with pytest.raises(ConfigError, match=r"uint16 \(3, 12, 16\) CYX: 3 channels are not colours: set data.stack=auto"):
        opened(tmp_path, channels=1)
    sub = tmp_path / "sub"
    sub.mkdir()
    planes = WRITERS[file](sub / file, "ZYX")
    image = opened(sub, channels=1)
    assert np.array_equal(image.pixels(0)[0], planes[2])
    assert ", middle of Z 5" in image.header(0).kind
    with pytest.raises(ConfigError, match=r"12×16 values of 5×12×16 \(ZYX\): data.stack=first or last takes an axis"):
        opened(sub, channels=5, stack="auto")
    as_channels = opened(sub, channels=5, stack="first", intensity="full")
    assert np.array_equal(as_channels.pixels(0), planes)


def test_samples_and_channels_of_ome_colours(tmp_path):
    values = volume("ZYXC").astype(np.uint8)
    tifffile.imwrite(tmp_path / "x.ome.tif", values, ome=True, photometric="rgb", metadata={"axes": "ZYXS"})
    pixels = opened(tmp_path, channels=3).pixels(0)
    assert np.array_equal(pixels.permute(1, 2, 0), values[2])


def test_one_block_of_an_imagej_hyperstack_is_read_in_part(tmp_path):
    """ImageJ writes one page for all planes of a file above 4 GB."""
    values = imagej(tmp_path / "x.tif", "ZCYX", np.uint16)
    with tifffile.TiffFile(tmp_path / "x.tif") as tiff:
        description = tiff.pages[0].description
    tifffile.imwrite(tmp_path / "y.tif", values[0, 0], description=description, metadata=None, byteorder=">")
    with tifffile.TiffFile(tmp_path / "y.tif") as tiff:
        start = tiff.pages[0].dataoffsets[0]
    whole = (tmp_path / "y.tif").read_bytes()[:start] + values.astype(">u2").tobytes()
    (tmp_path / "y.tif").write_bytes(whole)
    decoder = Decoder(3, None, "crop", "percentile", "auto", (0.0, 100.0), z="middle")
    assert np.array_equal(decoder.values(str(tmp_path / "y.tif")), values[2])
    (tmp_path / "y.tif").write_bytes(whole[:-500])
    with pytest.raises(Unreadable):
        decoder(str(tmp_path / "y.tif"))


# --- several files, one image --------------------------------------------------------------------------------------


def ome_set(folder: Path, files: int = 3, planes: int = 2, images: int = 1, missing: str = "") -> np.ndarray:
    """A set of files f0.ome.tif, …, each with the metadata of all: (images, C, Y, X) values, C = files × planes.

    With several images each file holds one of them, as positions of a stage.
    """
    folder.mkdir(parents=True, exist_ok=True)
    channels = planes if images > 1 else files * planes
    values = np.random.default_rng(0).integers(0, 256, (images, channels, 12, 16), np.uint8)
    body = ""
    for image in range(images):
        ids = "".join(f'<Channel ID="Channel:{image}:{c}" SamplesPerPixel="1"/>' for c in range(channels))
        data = ""
        for c in range(channels):
            file = image if images > 1 else c // planes
            data += (f'<TiffData IFD="{c % planes}" FirstC="{c}" FirstZ="0" FirstT="0" PlaneCount="1">'
                     f'<UUID FileName="f{file}.ome.tif">urn:uuid:{file}</UUID></TiffData>')  # fmt: skip
        body += (f'<Image ID="Image:{image}"><Pixels ID="Pixels:{image}" DimensionOrder="XYCZT" Type="uint8" '
                 f'SizeX="16" SizeY="12" SizeC="{channels}" SizeZ="1" SizeT="1">{ids}{data}'
                 '</Pixels></Image>')  # fmt: skip
    for file in range(files):
        xml = (f'<?xml version="1.0" encoding="UTF-8"?><OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06" '
               f'UUID="urn:uuid:{file}">{body}</OME>')  # fmt: skip
        with tifffile.TiffWriter(folder / f"f{file}.ome.tif") as writer:
            for plane in range(planes):
                page = values[file, plane] if images > 1 else values[0, file * planes + plane]
                writer.write(page, description=xml if plane == 0 else None, metadata=None, contiguous=False)
    if missing:
        (folder / missing).unlink()
    return values


@pytest.mark.parametrize("verify", ["full", "header", "none"])
def test_a_set_of_ome_files_is_one_image(tmp_path, verify):
    values = ome_set(tmp_path / "a")
    ome_set(tmp_path / "b")
    fields = {"channels": 6, "stack": "auto", "intensity": "full", "size": [12, 16], "verify": verify}
    for _ in range(2):  # the second time the headers are remembered
        images = opened(tmp_path, **fields)
        assert names(images) == ["a/f0.ome.tif", "b/f0.ome.tif"]
        assert images.labels.tolist() == [0, 1]
        assert np.array_equal(images.pixels(0), values[0])
    assert "further files of OME-TIFF sets: 4, such as a/f1.ome.tif" in describe.describe({"train": images})
    assert folder.list_images(tmp_path, folder.Config(path=".", **fields).decoder()) == names(images)


def test_positions_of_a_set_are_images(tmp_path):
    values = ome_set(tmp_path, images=3)
    images = opened(tmp_path, channels=2, stack="auto", intensity="full")
    assert names(images) == ["f0.ome.tif", "f1.ome.tif", "f2.ome.tif"]
    for i in range(3):
        assert np.array_equal(images.pixels(i), values[i])


def test_a_set_that_is_not_whole_is_refused(tmp_path):
    ome_set(tmp_path, missing="f1.ome.tif")
    with pytest.raises(ConfigError, match=r"a part of it is missing: f1.ome.tif"):
        opened(tmp_path, channels=6, stack="auto")


def test_a_part_in_another_folder_is_not_opened(tmp_path):
    ome_set(tmp_path, files=1)
    file = tmp_path / "f0.ome.tif"
    text = file.read_bytes().replace(b'FileName="f0.ome.tif">urn:uuid:0', b'FileName="../sec.tif">urn:uuid:7')
    file.write_bytes(text)
    with pytest.raises(ConfigError, match=r"a part of it lies in another folder: '\.\./sec\.tif'"):
        opened(tmp_path, channels=2, stack="auto")


def test_metadata_in_a_companion_file(tmp_path):
    values = ome_set(tmp_path)
    with tifffile.TiffFile(tmp_path / "f0.ome.tif") as tiff:
        xml = tiff.ome_metadata
    (tmp_path / "all.companion.ome").write_text(xml.replace('UUID="urn:uuid:0"', 'UUID="urn:uuid:all"'))
    for i in range(3):
        only = (f'<?xml version="1.0"?><OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06" '
                f'UUID="urn:uuid:{i}"><BinaryOnly MetadataFile="all.companion.ome" UUID="urn:uuid:all"/>'
                '</OME>')  # fmt: skip
        with tifffile.TiffWriter(tmp_path / f"f{i}.ome.tif") as writer:
            for plane in range(2):
                page = values[0, 2 * i + plane]
                writer.write(page, description=only if plane == 0 else None, metadata=None, contiguous=False)
    images = opened(tmp_path, channels=6, stack="auto", intensity="full")
    assert names(images) == ["f0.ome.tif"]
    assert np.array_equal(images.pixels(0), values[0])
    (tmp_path / "all.companion.ome").unlink()
    with pytest.raises(ConfigError, match=r"a part of it is missing: all.companion.ome"):
        opened(tmp_path, channels=6, stack="auto")


# --- pyramids and OME-Zarr -----------------------------------------------------------------------------------------


def test_a_level_of_an_ome_tiff(tmp_path):
    values = volume("CYX")
    with tifffile.TiffWriter(tmp_path / "x.ome.tif", ome=True) as writer:
        writer.write(values, subifds=1, photometric="minisblack", metadata={"axes": "CYX"})
        writer.write(values[:, ::2, ::2], subfiletype=1, photometric="minisblack")
    for level, want in ((0, values), (1, values[:, ::2, ::2])):
        image = opened(tmp_path, channels=3, stack="auto", intensity="full", level=level)
        assert np.array_equal(image.pixels(0), want)
        assert image.header(0).size == want.shape[1:]
    with pytest.raises(ConfigError, match=r"level 2 of 2: data.level is at most 1"):
        opened(tmp_path, channels=3, stack="auto", level=2)


def test_level_of_a_file_without_levels(tmp_path):
    Image.new("L", (8, 9)).save(tmp_path / "1.png")
    with pytest.raises(ConfigError, match=r"no pyramid, and data.level is 1"):
        opened(tmp_path, level=1)


@pytest.mark.parametrize("version", ["0.4", "0.5"])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_a_level_of_ome_zarr(tmp_path, version, dtype):
    values = ngff(tmp_path / "a" / "x.zarr", "TCZYX", version, levels=3, dtype=dtype)
    ngff(tmp_path / "b" / "y.ome.zarr", "TCZYX", version, levels=3, dtype=dtype)
    for level in range(3):
        images = opened(tmp_path, channels=3, stack="auto", intensity="full", level=level)
        assert names(images) == ["a/x.zarr", "b/y.ome.zarr"]
        assert (images.classes, images.labels.tolist()) == (("a", "b"), [0, 1])
        want = values[1, :, 2, :: 2**level, :: 2**level]
        assert np.array_equal(images.values(0), want)
        scaled = np.rint(want / np.iinfo(dtype).max * 255)
        assert np.array_equal(images.pixels(0), scaled)
    with pytest.raises(ConfigError, match=r"level 3 of 3"):
        opened(tmp_path, channels=3, stack="auto", level=3)


@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_images_of_a_plate_are_images_and_its_labels_are_not(tmp_path, version):
    path = tmp_path / "cells" / "plate.zarr"
    plates = zarr.open_group(path, mode="w", zarr_format=2 if version == "0.4" else 3)
    for well in ("A/1", "B/2"):
        plates.require_group(well)
        for field in ("0", "1"):
            ngff(path, "CYX", version, part=f"{well}/{field}")
    ngff(path, "CYX", version, part="A/1/0/labels/cells")
    images = opened(tmp_path / "cells", channels=3, stack="auto", intensity="full")
    assert names(images) == [f"plate.zarr/{well}/{field}" for well in ("A/1", "B/2") for field in "01"]
    assert images.classes == ()
    assert folder.class_of("train/a/plate.zarr/A/1/0") == "a"
    assert folder.class_of("plate.zarr/A/1/0") is None
    assert np.array_equal(images.pixels(3), volume("CYX"))


def test_ome_zarr_at_the_top_of_the_folder_is_no_class(tmp_path):
    ngff(tmp_path / "x.zarr", "YX")
    images = opened(tmp_path, channels=1)
    assert (names(images), images.classes, images.labels.tolist()) == (["x.zarr"], (), [-1])
    assert np.array_equal(images.pixels(0)[0], volume("YX"))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda z: (z / ".zattrs").write_text("{"), ".zattrs is damaged"),
        (lambda z: (z / ".zattrs").unlink(), "a folder without OME-Zarr metadata"),
        (lambda z: edit(z, axes=[{"name": "w"}]), r"the axes \['w'\]"),
        (lambda z: edit(z, datasets=[{"path": "../../x"}]), "the path '../../x'"),
        (lambda z: edit(z, datasets=[]), "level 0 of 0"),
        (lambda z: edit(z, axes=[{"name": "y"}, {"name": "x"}]), r"it has 3 axes where its metadata name \['y', 'x'\]"),
        (lambda z: (z / "0" / ".zarray").unlink(), "."),
        (lambda z: (z / "0" / "0.0.0").write_bytes(b"no chunk"), "."),
        (lambda z: resized(z, [2**20, 2**20, 2**20]), "GiB, and one image may take 0.5"),
    ],
)
def test_damaged_ome_zarr_is_named(tmp_path, damage, words):
    ngff(tmp_path / "x.zarr", "CYX")
    damage(tmp_path / "x.zarr")
    with pytest.raises(ConfigError, match=f"x.zarr: .*{words}"):
        opened(tmp_path, channels=3, stack="auto")


def edit(folder: Path, **fields) -> None:
    content = json.loads((folder / ".zattrs").read_text())
    content["multiscales"][0].update(fields)
    (folder / ".zattrs").write_text(json.dumps(content))


def resized(folder: Path, shape: list[int]) -> None:
    content = json.loads((folder / "0" / ".zarray").read_text())
    (folder / "0" / ".zarray").write_text(json.dumps(content | {"shape": shape}))


def test_an_image_without_any_chunk_is_refused(tmp_path):
    """Zarr writes no chunk of zeros, so some may be absent; but not all."""
    values = ngff(tmp_path / "x.zarr", "CYX")
    (tmp_path / "x.zarr/0/1.0.0").unlink()
    values[1, :8, :8] = 0
    assert np.array_equal(opened(tmp_path, channels=3, stack="auto").values(0), values)
    for chunk in (tmp_path / "x.zarr/0").glob("[0-9]*"):
        chunk.unlink()
    with pytest.raises(ConfigError, match=r"x.zarr: all of its chunks are missing"):
        opened(tmp_path, channels=3, stack="first")


def test_without_the_library_ome_zarr_says_what_to_install(tmp_path, monkeypatch):
    ngff(tmp_path / "x.zarr", "YX")
    monkeypatch.setitem(sys.modules, "zarr", None)
    with pytest.raises(ConfigError, match=r"OME-Zarr needs the library zarr: pip install 'sslcells\[zarr\]'"):
        opened(tmp_path, channels=1)


def test_ome_zarr_is_read_by_processes_that_are_forked(tmp_path):
    """Its library has a thread of its own, which a fork does not copy."""
    ngff(tmp_path / "x.zarr", "YX")
    images = opened(tmp_path, channels=1)
    want = images.pixels(0)
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert torch.equal(pool.apply_async(images.pixels, (0,)).get(timeout=60), want)


# --- the encoder reads as the training did -------------------------------------------------------------------------


@pytest.mark.slow
def test_an_encoder_reads_planes_and_levels_as_its_training_did(tmp_path, capsys):
    for i in range(8):
        (tmp_path / "cells").mkdir(exist_ok=True)
        ngff(tmp_path / "cells" / f"{i}.zarr", "ZCYX", levels=2, dtype=np.uint16)
    run = load(
        "configs/channels_folder.yaml",
        [
            *(f"data.path={tmp_path / 'cells'}", "data.channels=3", "data.z=each", "data.level=1", "data.size=16"),
            *("data.intensity=full", "data.range=[0,65535]", "augment.size=16", f"out={tmp_path}", "name=zarr"),
            *("model.backbone=test_resnet", "method.hidden=16", "method.dimension=8", "train.global_batch=8"),
            *("train.total_steps=2", "train.workers=1", "evaluate.k=3"),
        ],
    )
    made = train(run)
    encoder = sslcells.load_encoder(made)
    assert encoder.decoder == run.data.decoder()
    vectors = sslcells.embed(tmp_path / "cells", encoder)
    assert len(vectors) == 8 * 5
    images = open_splits(run.data)["train"]
    torch.testing.assert_close(encoder(images.pixels(7)[None]), vectors[7:8], rtol=1e-4, atol=1e-5)
    one = sslcells.embed(tmp_path / "cells" / "1.zarr", encoder)
    torch.testing.assert_close(one, vectors[5:10], rtol=1e-4, atol=1e-5)
    with pytest.raises(
        sslcells.errors.UserError, match=r"it holds several planes: name one of them, such as 1.zarr#z0"
    ):
        sslcells.embed([tmp_path / "cells" / "1.zarr"], encoder)
    assert embed_folder(str(made), str(tmp_path / "cells"), workers=0, cpu=True)
