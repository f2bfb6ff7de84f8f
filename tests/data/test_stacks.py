"""TIFF files whose channels are not colours: where these are, how they are scaled, and from folder to embedding."""

import importlib
import sys

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

import sslcells
from sslcells.cli import main
from sslcells.config import ConfigError, load
from sslcells.data import open_split
from sslcells.data._decode import Decoder, Unreadable
from sslcells.delivery.embedding import embed_folder
from sslcells.delivery.shards import Embeddings
from sslcells.run.metrics import read_metrics
from sslcells.train import train


def planes(channels=5, height=20, width=24, dtype=np.uint16, seed=0):
    """(C, H, W), each channel in a range of its own."""
    random = np.random.default_rng(seed)
    top = np.iinfo(dtype).max
    return (random.random((channels, height, width)) * (top // (np.arange(channels)[:, None, None] + 2))).astype(dtype)


def decoder(channels, stack="auto", size=None, fit="crop", intensity="full", **options):
    return Decoder(channels, size, fit, intensity, stack, **options)


def read(tmp_path, array, like, **options):
    file = tmp_path / "x.tif"
    tifffile.imwrite(file, array, **options)
    assert like.header(str(file)).size == tuple(like(str(file)).shape[1:])
    return like(str(file))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5, 12])
def test_channels_first_or_last(tmp_path, channels, dtype):
    x = planes(channels, dtype=dtype)
    want = torch.from_numpy(np.rint(x / np.iinfo(dtype).max * 255).astype(np.uint8))
    for array, stack in ((x, "first"), (x.transpose(1, 2, 0), "last")):
        for options in ({"photometric": "minisblack"}, {"photometric": "minisblack", "compression": "zlib"}):
            assert torch.equal(read(tmp_path, array, decoder(channels, "auto"), **options), want)
            if channels > 1:
                assert torch.equal(read(tmp_path, array, decoder(channels, stack), **options), want)


@pytest.mark.parametrize("compression", ["lzw", "jpegxl"])
def test_compressions_that_need_imagecodecs(tmp_path, compression, monkeypatch):
    x = planes(5)
    lossless = {"compressionargs": {"lossless": True}} if compression == "jpegxl" else {}
    want = torch.from_numpy(np.rint(x / 65535 * 255).astype(np.uint8))
    compressed = {"photometric": "minisblack", "compression": compression, **lossless}
    assert torch.equal(read(tmp_path, x, decoder(5), **compressed), want)
    monkeypatch.setitem(sys.modules, "imagecodecs", None)  # as where it is not installed
    for name in [name for name in sys.modules if name.startswith("tifffile")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr("sslcells.data._decode.tiff.tifffile", importlib.import_module("tifffile"))
    with pytest.raises(Unreadable, match=r"requires the 'imagecodecs' package: pip install imagecodecs"):
        decoder(5)(str(tmp_path / "x.tif"))


def test_pages_ome_and_samples_say_where_the_channels_are(tmp_path):
    x = planes(3, 3, 8, np.uint8)  # three channels of three rows: only the file can tell
    ome = read(tmp_path, x, decoder(3), ome=True, metadata={"axes": "CYX"}, photometric="minisblack")
    assert torch.equal(ome, torch.from_numpy(x))
    y = planes(4, 8, 4, np.uint8)
    samples = read(tmp_path, y, decoder(4), photometric="minisblack", planarconfig="separate")
    assert torch.equal(samples, torch.from_numpy(y))
    with tifffile.TiffWriter(tmp_path / "pages.tif") as writer:
        for plane in planes(4):
            writer.write(plane, contiguous=False, metadata=None)
    assert decoder(4)(str(tmp_path / "pages.tif")).shape == (4, 20, 24)


@pytest.mark.parametrize(
    ("shape", "stack", "words"),
    [
        ((5, 9, 5), "auto", "5×9×5 values: the channels may be first or last; set data.stack=first or last"),
        ((4, 9, 8), "auto", "4×9×8 values: 5 channels are not the first or last"),
        ((5, 9, 8), "last", "5×9×8 values: 5 channels are not the last"),
        ((9, 8), "auto", "9×8 values, not 5 channels"),
        ((2, 5, 9, 8), "first", "2×5×9×8 values, not 5 channels of one plane"),
    ],
)
def test_what_cannot_be_is_named(tmp_path, shape, stack, words):
    tifffile.imwrite(tmp_path / "x.tif", np.zeros(shape, np.uint16), photometric="minisblack")
    for look in (decoder(5, stack), decoder(5, stack).header):
        with pytest.raises(Unreadable, match=words.replace("(", r"\(")):
            look(str(tmp_path / "x.tif"))
    assert decoder(5, "first")(_written(tmp_path, (5, 9, 5))).shape == (5, 9, 5)
    assert decoder(5, "last")(_written(tmp_path, (5, 9, 5))).shape == (5, 5, 9)


def _written(tmp_path, shape):
    tifffile.imwrite(tmp_path / "y.tif", np.zeros(shape, np.uint16), photometric="minisblack")
    return str(tmp_path / "y.tif")


def test_files_that_are_no_tiff(tmp_path):
    (tmp_path / "a.tif").write_bytes(b"\x89PNG and so on")
    (tmp_path / "b.tif").write_bytes(b"")
    tifffile.imwrite(tmp_path / "c.tif", planes(), metadata=None)
    (tmp_path / "d.tif").write_bytes((tmp_path / "c.tif").read_bytes()[:3000])
    for name, words in (("a", "not a TIFF file"), ("b", "empty file"), ("d", "."), ("none", "No such file")):
        with pytest.raises(Unreadable, match=words):
            decoder(5)(str(tmp_path / f"{name}.tif"))


def test_every_channel_of_every_image_has_its_own_percentiles(tmp_path):
    x = planes(height=64, width=64)
    x[:, 0, 0] = 65535  # a hot pixel
    wide = read(tmp_path, x, decoder(5, intensity="percentile", percentiles=(1.0, 99.0))).float()
    assert (wide.amax((1, 2)) == 255).all()
    assert (wide.mean((1, 2)) - 127.5).abs().max() < 5
    scaled = read(tmp_path, x * 0 + x[:1], decoder(5, intensity="percentile")).float()
    assert torch.equal(scaled, scaled[:1].expand(5, -1, -1))
    black = read(tmp_path, np.zeros((5, 8, 9), np.uint16), decoder(5, intensity="percentile"))
    assert not black.any()


@pytest.mark.parametrize("fit", ["crop", "pad", "stretch"])
def test_size_and_fit_as_for_pictures(tmp_path, fit):
    x = planes(3, 30, 40, np.uint8)
    stacked = read_any(tmp_path, x, Decoder(3, (16, 16), fit, "full", "first"))
    assert stacked.shape == (3, 16, 16)
    picture = read_any(tmp_path, x.transpose(1, 2, 0), Decoder(3, (16, 16), fit, "full"), photometric="rgb")
    assert (stacked.int() - picture.int()).abs().max() <= 1


def read_any(tmp_path, array, like, photometric="minisblack"):
    tifffile.imwrite(tmp_path / "x.tif", array, photometric=photometric)
    return like(str(tmp_path / "x.tif"))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"channels": 5}, "channels=5 are not colours: use stack=auto, first or last"),
        ({"channels": 13, "stack": "auto"}, "less than or equal to 12"),
        ({"percentiles": [99, 1]}, "the first must be below the second"),
        ({"channels": 5, "stack": "middle"}, "'auto', 'first' or 'last'"),
    ],
)
def test_wrong_fields(fields, words):
    with pytest.raises(ConfigError, match=words):
        load(None, ["data.kind=folder", "data.path=x", *(f"data.{k}={v}" for k, v in fields.items())])


@pytest.fixture
def tiffs(tmp_path):
    root = tmp_path / "cells"
    for i in range(24):
        below = root / ("a", "b")[i % 2]
        below.mkdir(parents=True, exist_ok=True)
        tifffile.imwrite(below / f"{i:02}.tif", planes(5, 40, 36, seed=i), photometric="minisblack")
    return root


@pytest.mark.slow
def test_from_a_folder_of_five_channels_to_embeddings(tmp_path, tiffs, capsys):
    run = load(
        "configs/channels_folder.yaml",
        [
            *(f"data.path={tiffs}", "data.size=32", "augment.size=32", f"out={tmp_path}", "name=five"),
            *("model.backbone=test_resnet", "method.hidden=16", "method.dimension=8", "train.global_batch=8"),
            *("train.total_steps=2", "train.workers=0", "evaluate.k=3", "log.every_steps=1"),
        ],
    )
    made = train(run)
    assert [r["step"] for r in read_metrics(made) if "loss" in r] == [1, 2]
    encoder = sslcells.load_encoder(made)
    assert encoder.channels == 5
    assert encoder.decoder == run.data.decoder()
    vectors = sslcells.embed(tiffs, encoder)
    assert vectors.shape == (24, encoder.features)
    assert vectors.isfinite().all()
    one = open_split(run.data, "train").pixels(3)
    torch.testing.assert_close(encoder(one[None]), vectors[3:4], rtol=1e-4, atol=1e-5)
    shards = Embeddings.open(embed_folder(str(made), str(tiffs), workers=0, cpu=True))
    assert shards.count == 24
    picture = Image.new("RGB", (8, 8))
    with pytest.raises(ValueError, match="the encoder takes 5: give it TIFF files or tensors"):
        encoder([picture])
    assert main("search", [str(made), str(tiffs / "a" / "00.tif"), "--k", "2", "--cpu"]) == 0
    assert ".tif" in capsys.readouterr().out
    assert main("evaluate", [str(made)]) == 0
    assert main("export", [str(made), "--no-onnx"]) == 0
