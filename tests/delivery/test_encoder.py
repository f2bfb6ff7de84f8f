"""The encoder in Python: what it takes, that it sees what training saw, and its mistakes."""

import json
import subprocess
import sys

import pytest
import torch
from PIL import Image
from trained import make_cells, make_run

import sslcells
from sslcells.augment import Augment
from sslcells.config import ConfigError, load
from sslcells.data import DataError, open_splits
from sslcells.data.folder import list_images
from sslcells.evaluation.encode import encode
from sslcells.models import files, normalisation


def test_every_way_to_give_images_gives_the_same_rows(run, cells):
    encoder = sslcells.load_encoder(run)
    names = list_images(cells)
    paths = [cells / name for name in names]
    pictures = [Image.open(path) for path in paths]
    uint8 = torch.stack([encoder.reader()(str(path)) for path in paths])
    z = sslcells.embed(cells, encoder)
    assert z.shape == (24, 32)
    assert z.dtype == torch.float32
    for other in (
        paths,
        [str(p) for p in paths],
        pictures,
        uint8,
        list(uint8),
        uint8.float() / 255,
        uint8.double() / 255,
    ):
        torch.testing.assert_close(sslcells.embed(other, encoder, batch=7), z, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(sslcells.embed(uint8, run), z)
    torch.testing.assert_close(encoder(pictures[3]).detach(), z[3:4])
    torch.testing.assert_close(sslcells.embed(uint8[3], encoder), z[3:4])
    torch.testing.assert_close(sslcells.embed(paths[3], encoder), z[3:4])
    assert sslcells.embed([], encoder).shape == (0, 32)


def test_images_of_several_sizes_come_out_as_each_alone(run):
    encoder = sslcells.load_encoder(run)
    images = [torch.randint(256, (3, h, w), dtype=torch.uint8) for h, w in ((32, 32), (40, 50), (20, 20))]
    torch.testing.assert_close(encoder(images), torch.cat([encoder(image) for image in images]))


@pytest.mark.parametrize(
    "changes", [["data.size=[40,48]", "data.fit=pad", "data.intensity=full", "data.channels=1"], ["data.size=64"], []]
)
def test_it_sees_what_the_evaluation_in_training_sees(tmp_path, changes):
    cells = make_cells(tmp_path / "cells", 6, size=50)
    overrides = ["data.kind=folder", f"data.path={cells}", "data.size=null", *changes]
    images = open_splits(load(None, overrides).data)["train"]
    folder = make_run(tmp_path / "run", *overrides, channels=images.channels)
    network, _ = files.load(folder)
    run = load(str(folder / "config.yaml"))
    plain = Augment(run.augment, *normalisation(run.model, images.channels)).plain
    seen = encode(images, network, lambda pixels, _: plain(pixels), torch.device("cpu"), 6, 0).z
    torch.testing.assert_close(sslcells.embed(cells, folder), seen, rtol=0, atol=0)


def test_a_run_from_before_the_file_said_how_to_read_is_read_as_its_configuration_says(tmp_path, cells):
    run = make_run(tmp_path / "run", "data.kind=folder", f"data.path={cells}", "data.size=40", "data.fit=stretch")
    spec = json.loads((run / "encoder.json").read_text())
    digest = sslcells.load_encoder(run).digest
    del spec["reading"]
    (run / "encoder.json").write_text(json.dumps(spec))
    encoder = sslcells.load_encoder(run)
    assert (encoder.decoder.size, encoder.decoder.fit) == ((40, 40), "stretch")
    assert encoder.digest == digest
    (run / "config.yaml").unlink()
    assert sslcells.load_encoder(run).decoder.size == (32, 32)


def test_eval_mode_is_given_and_given_back(run):
    encoder = sslcells.load_encoder(run)
    assert not encoder.training
    encoder.train()
    x = torch.rand(4, 3, 32, 32)
    assert torch.equal(sslcells.embed(x, encoder), sslcells.embed(x, run))
    assert encoder.training
    encoder.eval()(x).sum().backward()
    assert all(p.grad is not None for p in encoder.parameters())


def test_named_by_the_folder_its_files_or_the_run(run):
    digests = {
        sslcells.load_encoder(x).digest for x in (run, str(run), run / "encoder.json", run / "encoder.safetensors")
    }
    digests.add(sslcells.load_encoder(load(str(run / "config.yaml"))).digest)
    assert len(digests) == 1
    other = make_run(run.parent / "other", seed=1)
    assert sslcells.load_encoder(other).digest not in digests


def test_mistakes_in_the_run_are_named(run, tmp_path):
    with pytest.raises(ConfigError, match=r"tinny: no such run's folder \(did you mean tiny\?\)"):
        sslcells.load_encoder(run.parent / "tinny")
    with pytest.raises(ConfigError, match=r"holds no encoder\.json"):
        sslcells.load_encoder(run.parent)
    (run / "encoder.safetensors").write_bytes((run / "encoder.safetensors").read_bytes()[:-100])
    with pytest.raises(ConfigError, match="holds no complete encoder"):
        sslcells.load_encoder(run)
    (run / "encoder.json").unlink()
    with pytest.raises(ConfigError, match="has not finished"):
        sslcells.load_encoder(run)


def test_mistakes_in_the_images_are_named(run, cells, tmp_path):
    encoder = sslcells.load_encoder(run)
    with pytest.raises(ConfigError, match=r"no such folder \(did you mean cells\?\)"):
        sslcells.embed(tmp_path / "cels", encoder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="holds no images"):
        sslcells.embed(tmp_path / "empty", encoder)
    (cells / "bad.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"bad\.png: not an image"):
        sslcells.embed(cells, encoder)
    for wrong, message in (
        (torch.zeros(2, 1, 32, 32), r"\(N, 3, H, W\).*shape \(2, 1, 32, 32\)"),
        (torch.zeros(2, 32, 32, 3, dtype=torch.uint8), r"shape \(2, 32, 32, 3\)"),
        (torch.full((2, 3, 32, 32), 200.0), "pixels in 0..1; these go from 200 to 200"),
        (torch.zeros(2, 3, 32, 32, dtype=torch.int64), "not torch.int64"),
        ([object()], "neither a PIL image nor a tensor: object"),
    ):
        with pytest.raises(ValueError, match=message):
            encoder(wrong)


def test_six_channels_come_as_tensors_alone(tmp_path, cells):
    encoder = sslcells.load_encoder(make_run(tmp_path / "six", channels=6))
    assert sslcells.embed(torch.zeros(2, 6, 32, 32), encoder).shape == (2, 32)
    with pytest.raises(ConfigError, match="takes images of 6 channels"):
        sslcells.embed(cells, encoder)


def test_import_is_light():
    code = "import sys, sslcells; sys.exit('torch' in sys.modules or not callable(sslcells.embed))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    with pytest.raises(AttributeError, match="no attribute 'embedd'"):
        _ = sslcells.embedd
