"""JPEG files that a device decodes: the pixels, order and errors of processes that decode what they read."""

import io
import json
import logging
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from test_pack import TINY
from test_train import signalled_in, untimed

from sslcells.config import ConfigError, load
from sslcells.data import DataError, folder, open_splits
from sslcells.data._decode import Decoder, on_device
from sslcells.data._decode.on_device import DeviceDecoder, plain
from sslcells.data._smear import draw_smear
from sslcells.data.describe import brief
from sslcells.data.loader import InOrder, read, read_in_parts
from sslcells.data.subset import Subset
from sslcells.delivery import packing
from sslcells.run.interrupt import Stopped
from sslcells.train import train

CPU = torch.device("cpu")
TURNED = Image.Exif()
TURNED[0x0112] = 6
DRAWN_LEVELS, DRAWN_MEAN = 3, 0.5
"""grey levels by which drawn cells may differ where the worker decodes at half the size, at most and on average"""
CUDA_MEAN = 2.0
"""grey levels, on average, by which nvJPEG may differ from libjpeg: torchvision's own tests allow as much"""


def jpeg(image, mode="RGB", **how):
    if not isinstance(image, Image.Image):
        image = Image.fromarray(image)
    file = io.BytesIO()
    image.convert(mode).save(file, "JPEG", **how)
    return file.getvalue()


def noise(rng, height, width):
    """Rings, a ramp and noise: sharp, so that a filter or a rounding that is another one shows."""
    y, x = np.mgrid[:height, :width]
    rings = np.hypot(x - width / 3, y - height / 2) * 9 % 255
    return np.stack([rings, (2 * x + y) % 255, rng.integers(0, 255, (height, width))], -1).astype(np.uint8)


def on(device, data, *how):
    (found,) = DeviceDecoder(*how)([torch.frombuffer(bytearray(data), dtype=torch.uint8)], device)
    return found


def in_worker(data, *how):
    with Image.open(io.BytesIO(data)) as image:
        return Decoder(*how, "percentile").pixels(image)


def test_pixels_are_the_workers_to_the_last_bit():
    rng = np.random.default_rng(5)
    for i in range(48):
        height, width = rng.integers(20, 110, 2)
        size = int(rng.integers(30, 80)), int(rng.integers(30, 80))
        how = (1, 3)[i % 2], size if i % 10 else None, ("crop", "pad", "stretch")[i % 3]
        mode, quality = ("L", "RGB")[i // 2 % 2], int(rng.integers(20, 98))
        data = jpeg(noise(rng, height, width), mode, quality=quality, subsampling=i // 4 % 3, progressive=i % 5 == 0)
        assert plain(data) == data
        found = on(CPU, data, *how)
        assert torch.equal(found, in_worker(data, *how)), (height, width, how)


def test_a_file_that_the_worker_decodes_smaller_differs_by_few_levels():
    cell = draw_smear(3, 0, 0, 290)[:, :289]
    for quality in (60, 95):
        for subsampling in (0, 2):
            data = jpeg(cell, quality=quality, subsampling=subsampling)
            for side in (64, 32):  # decoded by the worker at a half and a quarter
                how = 3, (side, side), "crop"
                off = (on(CPU, data, *how).int() - in_worker(data, *how).int()).abs()
                assert 0 < off.max() <= DRAWN_LEVELS
                assert off.float().mean() <= DRAWN_MEAN


def test_only_plain_files_are_left_to_the_device():
    cell = draw_smear(1, 0, 0, 32)
    whole = jpeg(cell)
    assert plain(whole) == whole
    for data in (whole + bytes(9), jpeg(cell, "L"), jpeg(cell, progressive=True), jpeg(cell, subsampling="4:1:1")):
        assert plain(data) == data
    several, png = io.BytesIO(), io.BytesIO()
    Image.fromarray(cell).save(several, "MPO", save_all=True, append_images=[Image.fromarray(cell)])
    Image.fromarray(cell).save(png, "PNG")
    sampled = whole.index(b"\xff\xc0") + 11
    others = {
        "CMYK": jpeg(cell, "CMYK"),
        "colours as they are": jpeg(cell, keep_rgb=True),
        "turned": jpeg(cell, exif=TURNED),
        "several images": several.getvalue(),
        "PNG": png.getvalue(),
        "cut off": whole[:-40],
        "sampled 3×1": whole[:sampled] + b"\x31" + whole[sampled + 1 :],
        "no header": whole[:3] + whole[-2:],
        "empty": b"",
    }
    assert [name for name, data in others.items() if plain(data) is not None] == []
    assert on_device.read_plain("/dev/null") is None


def test_more_pixels_than_pillow_reads_are_none_of_the_devices(monkeypatch):
    data = jpeg(draw_smear(1, 0, 0, 32))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    assert plain(data) is None


@pytest.fixture(scope="module")
def cells(tmp_path_factory):
    """30 files in two classes: JPEG of several sizes and kinds, each sixth something that a worker decodes."""
    made = tmp_path_factory.mktemp("cells") / "train"
    for i in range(30):
        below = made / "ab"[i % 2]
        below.mkdir(parents=True, exist_ok=True)
        cell = draw_smear(7, i, i % 5, 20 + i % 4)
        if i % 6 == 5:
            Image.fromarray(cell).save(below / f"{i:02}.png")
        else:
            data = jpeg(cell, "L" if i % 7 == 0 else "RGB", subsampling=i % 3, exif=TURNED if i == 8 else Image.Exif())
            (below / f"{i:02}.jpg").write_bytes(data)
    return made.parent


def opened(cells, decode="device", **fields):
    return open_splits(folder.Config(path=str(cells), size=20, decode=decode, **fields))["train"]


ORDER = InOrder([*torch.randperm(30, generator=torch.Generator().manual_seed(3)).tolist(), 5, 5, 7], 9)


def same(ours, theirs):
    ours, theirs = list(ours), list(theirs)
    assert len(ours) == len(theirs) > 1
    for a, b in zip(ours, theirs, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_are_those_of_workers_that_decode(cells, workers):
    expected = list(read(opened(cells, "worker"), ORDER, 0, pin_memory=False))
    same(read(opened(cells), ORDER, workers, False, device=CPU), expected)
    same(read(opened(cells), ORDER, workers, False), expected)


def test_the_device_decodes_each_plain_file_and_no_other(cells, decoded, monkeypatch):
    calls = []
    real = on_device._decoded
    monkeypatch.setattr(on_device, "_decoded", lambda files, device: calls.append(len(files)) or real(files, device))
    monkeypatch.setattr(on_device, "_AT_ONCE", 4000)
    images = opened(cells, verify="header")
    decoded.clear()
    every = InOrder(range(30), 30)
    (batch,) = read(images, every, 0, pin_memory=False, device=CPU)
    others = [i for i in range(30) if not images.name(i).endswith("jpg") or images.name(i).endswith("08.jpg")]
    assert sorted(decoded) == sorted(f"{cells}/{images.name(i)}" for i in others)
    assert sum(calls) == 30 - len(others)
    assert 1 < len(calls) < 15
    assert torch.equal(batch.pixels[3], images.pixels(3))


def test_parts_and_a_part_of_the_images_are_decoded_too(cells, decoded):
    images, index = Subset(opened(cells), torch.arange(29, -1, -2)), InOrder(range(12), 6)
    parts = [part for batch in read_in_parts(images, index, 3, 0, False, CPU) for part in batch]
    there = Subset(opened(cells, "worker"), torch.arange(29, -1, -2))
    same(parts, [part for batch in read_in_parts(there, index, 3, 0, False) for part in batch])
    assert images.device_decoder is not None


def test_a_split_without_any_plain_file(tmp_path):
    for i in range(4):
        Image.fromarray(draw_smear(7, i, 0, 20)).save(tmp_path / f"{i}.png")
    for workers in (0, 1):
        batches = read(opened(tmp_path), InOrder(range(4), 2), workers, False, device=CPU)
        same(batches, read(opened(tmp_path, "worker"), InOrder(range(4), 2), 0, False))
    assert "0 of 4 files are JPEG; plain ones are decoded on the device" in brief({"train": opened(tmp_path)})


@pytest.fixture
def damaged(tmp_path):
    """Four files, of which the third has a wrong table of codes, which its header does not show."""
    for i in range(4):
        (tmp_path / f"{i}.jpg").write_bytes(jpeg(draw_smear(7, i, 0, 24)))
    data = bytearray((tmp_path / "2.jpg").read_bytes())
    at = data.index(b"\xff\xc4") + 5
    data[at : at + 16] = bytes([255] * 16)
    (tmp_path / "2.jpg").write_bytes(data)
    return tmp_path


def test_a_damaged_file_is_named_as_by_a_worker(damaged):
    assert plain((damaged / "2.jpg").read_bytes())
    errors = []
    for decode in ("worker", "device"):
        images = opened(damaged, decode, verify="none")
        with pytest.raises(DataError, match=r"2\.jpg: ") as error:
            list(read(images, InOrder(range(4), 4), 0, False, device=CPU))
        errors.append(str(error.value))
    assert errors[0] == errors[1]


def test_a_file_that_only_the_device_cannot_decode_is_decoded_without_it_and_named(cells, monkeypatch, caplog):
    images = opened(cells)
    hated, real = torch.frombuffer(bytearray(images.plain_jpeg(3)), dtype=torch.uint8), on_device._decoded

    def picky(files, device):
        failed = any(torch.equal(x, hated) for x in files)
        if failed and len(files) == 1:
            return [RuntimeError("NVJPEG_STATUS_JPEG_NOT_SUPPORTED\nmore")]
        return [x for file in files for x in picky([file], device)] if failed else real(files, device)

    monkeypatch.setattr(on_device, "_decoded", picky)
    with caplog.at_level(logging.WARNING):
        same(read(images, ORDER, 0, False, device=CPU), read(images, ORDER, 0, False))
    assert f"{images.name(3)}: not decoded on cpu (NVJPEG_STATUS_JPEG_NOT_SUPPORTED), but by the CPU" in caplog.text


def test_tables_and_shards_are_decoded_on_the_device_too(cells, tmp_path, decoded):
    files = sorted((cells / "train").rglob("*.jpg"))[:8]
    (tmp_path / "cells.csv").write_text("path,label\n" + "".join(f"{file},{i % 2}\n" for i, file in enumerate(files)))
    with tarfile.open(tmp_path / "train-0.tar", "w") as tar:
        for i, file in enumerate(files):
            tar.add(file, f"{i}.jpg")
    for words in (
        ["data.kind=table", f"data.table={tmp_path}/cells.csv"],
        ["data.kind=webdataset", f"data.path={tmp_path}"],
    ):
        words += ["data.size=20", *(["data.verify=header"] if "table" in words[0] else [])]
        here, there = (
            open_splits(load(None, [*words, f"data.decode={d}"]).data)["train"] for d in ("device", "worker")
        )
        order = InOrder(range(8), 4)
        expected = list(read(there, order, 0, False))
        decoded.clear()
        same(read(here, order, 0, False, device=CPU), expected)
        assert len(decoded) == sum(file.name == "08.jpg" for file in files)


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"cache": "ram"}, "decode=device does not go with cache=ram: it keeps what the processes that read decode"),
        ({"um_per_pixel": 0.5}, "um_per_pixel=0.5: images are brought to one scale where they are read"),
        ({"stack": "auto"}, "stack=auto: it reads TIFF files"),
        ({"level": 1}, "level=1: JPEG files are no pyramids"),
        ({"size": None, "verify": "none"}, "decode=device needs size= where images are not verified"),
    ],
)
def test_what_does_not_go_with_it_is_refused(fields, why):
    with pytest.raises(ValueError, match=why):
        folder.Config(**{"path": "cells", "size": 20, "decode": "device", **fields})


def test_boxes_and_packs_are_refused(cells, tmp_path):
    file = next((cells / "train").rglob("*.jpg"))
    (tmp_path / "cells.csv").write_text(f"path,x_min,y_min,x_max,y_max\n{file},2,2,12,12\n")
    words = ["data.kind=table", f"data.table={tmp_path}/cells.csv", "data.size=20", "data.decode=device"]
    with pytest.raises(ConfigError, match=r"data.decode=device: the images are cut from boxes where they are read"):
        open_splits(load(None, words).data)
    with pytest.raises(ConfigError, match=r"data.decode=device is for training on files"):
        packing.pack(str(cells), str(tmp_path / "pack"), ["data.size=20", "data.decode=device"])
    with pytest.raises(ConfigError, match=r"data\.decode"):
        load(None, ["data.kind=pack", f"data.path={tmp_path}", "data.decode=device"])


def test_a_device_that_decodes_nothing_is_refused_before_the_first_step(monkeypatch):
    def without(*_, **__):
        raise RuntimeError("decode_jpegs_cuda: torchvision not compiled with nvJPEG support\nat image.cpp")

    decoder = DeviceDecoder(3, (20, 20), "crop")
    decoder.check(CPU)
    with pytest.raises(ConfigError, match=r"no JPEG on mps: it does so on cpu and cuda; use data.decode=worker$"):
        decoder.check(torch.device("mps"))
    monkeypatch.setattr("torchvision.io.decode_jpeg", without)
    with pytest.raises(
        ConfigError, match=r"on cpu: decode_jpegs_cuda: torchvision not compiled with nvJPEG support; u"
    ):
        decoder.check(CPU)
    monkeypatch.delattr("torchvision.io.decode_jpeg")
    with pytest.raises(ConfigError, match=r"cannot import name 'decode_jpeg'"):
        decoder.check(CPU)


def ending(run):
    made = train(run)
    return untimed(made), load_file(made / "encoder.safetensors")


def words(cells, out, *more):
    plain = ["data.kind=folder", f"data.path={cells}", "data.size=20", "data.verify=header", "evaluate.holdout=0"]
    return [*TINY, *plain, "train.micro_batch=8", f"out={out}", "train.workers=0", *more]


@pytest.mark.slow
def test_a_run_is_that_of_workers_that_decode_and_resumes_exactly(cells, tmp_path):
    rows, weights = ending(load(None, words(cells, tmp_path, "name=worker")))
    run = load(None, words(cells, tmp_path, "data.decode=device"))
    with pytest.raises(Stopped):
        train(run, signalled_in(3, 10))
    with pytest.raises(ConfigError, match=r"data.decode: 'device' → 'worker'"):
        train(load(None, words(cells, tmp_path)))
    again, ours = ending(run)
    assert again == rows
    assert all(torch.equal(weights[key], ours[key]) for key in weights)
    assert json.loads((run.folder / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 4


cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.mark.gpu
@cuda
@pytest.mark.parametrize("size", [None, (64, 64)])
def test_cuda_decodes_what_the_cpu_does_within_its_bound(size):
    device, how = torch.device("cuda", 0), (3, size, "crop")
    for i in range(24):
        side, mode, quality = (64, 97, 200, 360)[i % 4], ("RGB", "L")[i % 5 == 0], (60, 75, 95)[i % 3]
        data = jpeg(draw_smear(3, i, i % 5, side), mode, quality=quality, subsampling=i % 3, progressive=i % 7 == 0)
        here, there = on(CPU, data, *how), on(device, data, *how)
        assert there.device == device
        assert (here.float() - there.cpu().float()).abs().mean() <= CUDA_MEAN
        assert torch.equal(there, on(device, data, *how))


@pytest.mark.gpu
@cuda
def test_resizing_on_cuda_is_that_on_the_cpu_to_the_last_bit():
    rng = np.random.default_rng(5)
    for i in range(30):
        x = torch.from_numpy(noise(rng, *rng.integers(20, 300, 2))).permute(2, 0, 1)
        decoder = DeviceDecoder((1, 3)[i % 2], (48, 80), ("crop", "pad", "stretch")[i % 3])
        here, there = (decoder._resized(x[None].to(device), tuple(x.shape[1:])).cpu() for device in ("cpu", "cuda"))
        assert torch.equal(here, there)


@pytest.mark.gpu
@cuda
def test_a_run_on_cuda_resumes_to_the_last_bit(cells, tmp_path):
    more = ["train.deterministic=true", "train.workers=2", "data.decode=device"]
    rows, weights = ending(load(None, words(cells, tmp_path, *more, "name=whole")))
    run = load(None, words(cells, tmp_path, *more))
    with pytest.raises(Stopped):
        train(run, signalled_in(3, 10))
    again, ours = ending(run)
    assert again == rows
    assert all(torch.equal(weights[key], ours[key]) for key in weights)
