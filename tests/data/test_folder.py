"""Folders of files that PIL and tifffile write on the fly, and the real one where it is there."""

import contextlib
import errno
import logging
import os
import pickle
import re
import socket
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image
from pydantic import ValidationError

from sslcells import storage
from sslcells.config import ConfigError
from sslcells.data import DataError, folder, open_split
from sslcells.data._sources import source_id

RED, GREEN, WHITE = (200, 30, 40), (20, 180, 60), (255, 255, 255)


def image(file: Path, size=(8, 8), colour=RED, mode="RGB", **options) -> Path:
    """Write an image of one colour; `size` is PIL's (width, height)."""
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(file, **options)
    return file


def opened(path: Path, split="train", **fields) -> folder.FolderImages:
    images = open_split(folder.Config(path=str(path), **fields), split)
    assert isinstance(images, folder.FolderImages)
    return images


def names(images: folder.FolderImages) -> list[str]:
    return [images.name(i) for i in range(len(images))]


def only(file: Path, **fields) -> torch.Tensor:
    """The pixels of the one image of a folder."""
    images = opened(file.parent, **fields)
    assert names(images) == [file.name]
    return images.pixels(0)


def mistake(path: Path, split="train", **fields) -> str:
    with pytest.raises(ConfigError) as error:
        open_split(folder.Config(path=str(path), **fields), split)
    return str(error.value)


@pytest.fixture
def blood(tmp_path: Path) -> Path:
    """TRAIN and TEST with classes; one class is missing from each."""
    for name in ("TRAIN/b/2.png", "TRAIN/b/10.png", "TRAIN/a/deep/er/1.png", "TRAIN/loose.png"):
        image(tmp_path / name)
    for name in ("TEST/c/1.png", "TEST/b/1.png", "TEST_SIMPLE/a/1.png"):
        image(tmp_path / name)
    return tmp_path


# --- what is found -------------------------------------------------------------------------------------------------


def test_splits_by_their_usual_names(blood):
    train, test = opened(blood), opened(blood, "test")
    assert names(train) == ["TRAIN/a/deep/er/1.png", "TRAIN/b/10.png", "TRAIN/b/2.png", "TRAIN/loose.png"]
    assert names(test) == ["TEST/b/1.png", "TEST/c/1.png"]
    assert open_split(folder.Config(path=str(blood)), "val") is None


def test_class_numbers_agree_between_splits(blood):
    train, test = opened(blood), opened(blood, "test")
    assert train.classes == test.classes == ("a", "b", "c")
    assert train.labels.tolist() == [0, 1, 1, -1]
    assert test.labels.tolist() == [1, 2]
    assert train.labels.dtype == train.sources.dtype == torch.int64


def test_classes_that_differ_in_letter_case_are_refused(tmp_path):
    image(tmp_path / "train/Mono/1.png")
    image(tmp_path / "test/mono/1.png")
    assert "the classes 'Mono' and 'mono' differ only in spelling" in mistake(tmp_path)
    assert len(opened(tmp_path, labels="none")) == 1


def test_known_junk_is_no_image_and_no_class_and_counted(tmp_path):
    for name in ("a/1.png", "a/@eaDir/1.png/SYNOPHOTO_THUMB.jpg", "__MACOSX/a/1.png", "a/1_cp_masks.png"):
        image(tmp_path / name)
    for name in ("cells_masks/1.png", "Thumbnails/1.png", "masks_of_two/2.png"):
        image(tmp_path / name)
    images = opened(tmp_path)
    assert (names(images), images.classes) == (["a/1.png", "masks_of_two/2.png"], ("a", "masks_of_two"))
    assert images.found.ignored["thumbnails, masks and what systems leave"][0] == 5


def test_named_splits_win_over_found_ones(blood):
    assert names(opened(blood, "test", test="TEST_SIMPLE")) == ["TEST_SIMPLE/a/1.png"]
    assert names(opened(blood, "val", val="TEST_SIMPLE/")) == ["TEST_SIMPLE/a/1.png"]
    assert opened(blood, "test", test="TEST_SIMPLE").classes == ("a", "b")


def test_a_named_split_may_lie_deeper(tmp_path):
    image(tmp_path / "images/fit/a/1.png")
    image(tmp_path / "images/held/a/1.png")
    held = opened(tmp_path, "test", train="images/fit", test="./images/held")
    assert names(held) == ["images/held/a/1.png"]
    assert (held.classes, held.labels.tolist()) == (("a",), [0])


@pytest.mark.parametrize("name", ["val", "Valid", "VALIDATION"])
def test_names_of_the_validation_split(tmp_path, name):
    image(tmp_path / "Train/1.png")
    image(tmp_path / name / "1.png")
    assert names(opened(tmp_path, "val")) == [f"{name}/1.png"]


def test_without_splits_the_whole_tree_is_train(tmp_path):
    image(tmp_path / "donor/1.png")
    image(tmp_path / "0.png")
    images = opened(tmp_path)
    assert names(images) == ["0.png", "donor/1.png"]
    assert (images.classes, images.labels.tolist(), images.labelled) == (("donor",), [-1, 0], False)
    assert open_split(folder.Config(path=str(tmp_path)), "test") is None


def test_labels_none(blood):
    images = opened(blood, labels="none")
    assert images.classes == ()
    assert images.labels.tolist() == [-1] * 4


def test_only_image_files_that_show(tmp_path):
    for name in ("1.JPG", "2.jpeg", "3.PNG", "4.tif", "5.TIFF", "6.bmp", "7.webp", "ünï.png"):
        image(tmp_path / name)
    for name in (".hidden.png", ".thumbs/1.png", "junk/.x.png"):
        image(tmp_path / name)
    for name in ("Thumbs.db", "table.csv", "notes.txt", "mask.npy", "jpg"):
        (tmp_path / name).write_text("no image")
    images = opened(tmp_path)
    assert names(images) == ["1.JPG", "2.jpeg", "3.PNG", "4.tif", "5.TIFF", "6.bmp", "7.webp", "ünï.png"]
    assert images.classes == ()  # junk/ holds no image that shows
    assert all(images.pixels(i).shape == (3, 8, 8) for i in range(8))


def test_the_order_is_not_the_file_systems(blood, monkeypatch):
    expected = names(opened(blood))
    scandir = os.scandir

    class Reversed:
        def __init__(self, path):
            with scandir(path) as entries:
                self.entries = sorted(entries, key=lambda entry: entry.name, reverse=True)

        def __enter__(self):
            return iter(self.entries)

        def __exit__(self, *error):
            pass

    monkeypatch.setattr(os, "scandir", Reversed)
    assert names(opened(blood)) == expected


def test_links_are_followed_but_not_in_circles(tmp_path):
    image(tmp_path / "store/a/1.png")
    (tmp_path / "set").mkdir()
    (tmp_path / "set/a").symlink_to(tmp_path / "store/a")
    (tmp_path / "set/up").symlink_to(tmp_path / "set")
    (tmp_path / "set/2.png").symlink_to(tmp_path / "store/a/1.png")
    assert names(opened(tmp_path / "set")) == ["2.png", "a/1.png"]


@pytest.mark.parametrize("name", ["loop", "loop.png"])
def test_a_link_to_itself_stops_no_listing(tmp_path, name):
    image(tmp_path / "a/1.png")
    (tmp_path / "a" / name).symlink_to(name)
    (tmp_path / name).symlink_to(name)
    if name == "loop":
        assert names(opened(tmp_path)) == ["a/1.png"]
    else:
        assert f"loop.png: a broken link: it leads to {name}" in mistake(tmp_path)
        assert names(opened(tmp_path, on_error="skip")) == ["a/1.png"]


def test_links_that_lead_to_each_other_end(tmp_path):
    image(tmp_path / "one/1.png")
    image(tmp_path / "two/2.png")
    (tmp_path / "one/to").symlink_to(tmp_path / "two")
    (tmp_path / "two/to").symlink_to(tmp_path / "one")
    assert names(opened(tmp_path)) == ["one/1.png", "one/to/2.png", "two/2.png", "two/to/1.png"]


def special(file: Path, kind: str) -> None:
    """A FIFO, a socket, or where one may make it a device."""
    if kind == "FIFO":
        os.mkfifo(file)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as opened, contextlib.chdir(file.parent):  # a path of theirs is short
            opened.bind(file.name)
    else:
        file.symlink_to("/dev/zero")


@pytest.mark.parametrize("kind", ["FIFO", "socket", "device"])
@pytest.mark.parametrize("stack", [None, "auto"])
@pytest.mark.parametrize("verify", ["full", "header", "none"])
def test_what_is_no_file_is_not_opened(tmp_path, kind, stack, verify):
    special(tmp_path / "1.png", kind)
    options = {"stack": stack, "channels": 1, "size": 8, "verify": verify}
    if verify != "none":
        assert f"1.png: a {kind}" in mistake(tmp_path, **options)
    else:
        with pytest.raises(DataError, match=f"1.png: a {kind}.*, not a file"):
            opened(tmp_path, **options).pixels(0)


def test_a_broken_link_is_called_so(tmp_path):
    image(tmp_path / "1.png")
    (tmp_path / "2.png").symlink_to(tmp_path / "gone.png")
    (tmp_path / "3.png").symlink_to("/gone/too/3.png")
    message = mistake(tmp_path)
    assert f"2.png: a broken link: it leads to {tmp_path}/gone.png" in message
    assert "3.png: a broken link: it leads to /gone/too/3.png" in message


# --- sizes ---------------------------------------------------------------------------------------------------------


def halves(file: Path) -> Path:
    """40×20: left quarter red, middle green, right quarter red."""
    picture = Image.new("RGB", (40, 20), GREEN)
    picture.paste(RED, (0, 0, 10, 20))
    picture.paste(RED, (30, 0, 40, 20))
    picture.save(file)
    return file


def colour(pixels: torch.Tensor, y: int, x: int) -> tuple[int, ...]:
    return tuple(pixels[:, y, x].tolist())


def test_crop_keeps_the_centre(tmp_path):
    pixels = only(halves(tmp_path / "1.png"), size=10)
    assert pixels.shape == (3, 10, 10)
    assert (pixels.int() - torch.tensor(GREEN).view(3, 1, 1)).abs().max() < 16  # bicubic looks a little over the cut


def test_stretch_keeps_everything(tmp_path):
    pixels = only(halves(tmp_path / "1.png"), size=(10, 16), fit="stretch")
    assert pixels.shape == (3, 10, 16)
    assert (colour(pixels, 5, 0), colour(pixels, 5, 8), colour(pixels, 5, 15)) == (RED, GREEN, RED)


@pytest.mark.parametrize("channels", [1, 3])
def test_pad_goes_on_with_the_border(tmp_path, channels):
    picture = Image.new("RGB", (40, 20), GREEN)
    picture.paste(RED, (0, 10, 40, 20))
    picture.save(tmp_path / "1.png")
    pixels = only(tmp_path / "1.png", size=40, fit="pad", channels=channels)
    assert pixels.shape == (channels, 40, 40)
    assert torch.equal(pixels[:, 0], pixels[:, 12])
    assert torch.equal(pixels[:, 39], pixels[:, 27])
    assert not torch.equal(pixels[:, 0], pixels[:, 39])


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_shrinking_does_not_alias(tmp_path, suffix):
    stripes = np.zeros((256, 256), np.uint8)
    stripes[:, ::2] = 255
    Image.fromarray(stripes).save(tmp_path / f"1.{suffix}", quality=95)
    pixels = only(tmp_path / f"1.{suffix}", size=32, channels=1).float()
    assert pixels[:, 4:-4, 4:-4].sub(127.5).abs().max() < 6


def test_jpeg_is_not_decoded_too_small(tmp_path):
    stripes = np.zeros((256, 256), np.uint8)
    stripes[:, np.arange(256) // 8 % 2 == 1] = 255
    Image.fromarray(stripes).save(tmp_path / "1.jpg", quality=95)
    assert only(tmp_path / "1.jpg", size=64, channels=1).float().std() > 110


def test_own_size_must_be_one_size(tmp_path):
    image(tmp_path / "a/1.png", (8, 6))
    assert opened(tmp_path).pixels(0).shape == (3, 6, 8)
    image(tmp_path / "a/2.png", (8, 7))
    for verify in ("full", "header", "none"):
        message = mistake(tmp_path, verify=verify)
        assert "a/1.png is 6×8" in message
        assert "a/2.png is 7×8" in message
        assert "data.size=" in message
    assert opened(tmp_path, size=5).pixels(1).shape == (3, 5, 5)


# --- modes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "value", "suffix", "expected"),
    [
        ("RGB", RED, "png", RED),
        ("L", 77, "png", (77, 77, 77)),
        ("1", 1, "tif", WHITE),
        ("P", 0, "png", (0, 0, 0)),
        ("LA", (10, 0), "png", WHITE),
        ("LA", (10, 255), "png", (10, 10, 10)),
        ("RGBA", (*RED, 0), "png", WHITE),
        ("RGBA", (*RED, 255), "webp", RED),
        ("RGBA", (0, 0, 0, 51), "tif", (204, 204, 204)),
        ("CMYK", (0, 255, 255, 0), "tif", (255, 0, 0)),
        ("CMYK", (0, 255, 255, 0), "jpg", (255, 0, 0)),
        ("YCbCr", (120, 128, 128), "jpg", (120, 120, 120)),
    ],
)
def test_modes_become_rgb(tmp_path, mode, value, suffix, expected):
    options = {"lossless": True} if suffix == "webp" else {"quality": 100} if suffix == "jpg" else {}
    file = image(tmp_path / f"1.{suffix}", colour=value, mode=mode, **options)
    found = torch.tensor(colour(only(file), 4, 4))
    assert (found - torch.tensor(expected)).abs().max() <= (2 if suffix == "jpg" else 0)


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "CMYK", "P"])
def test_modes_become_grey(tmp_path, mode):
    pixels = only(image(tmp_path / "1.tif", mode=mode, colour=None), channels=1)
    assert (pixels.shape, pixels.dtype) == ((1, 8, 8), torch.uint8)


@pytest.mark.parametrize("transparency", [0, bytes([0, 255])])
def test_transparent_palette_is_white(tmp_path, transparency):
    picture = Image.new("P", (8, 8), 0)
    picture.putpalette([*RED, *GREEN])
    picture.paste(1, (4, 0, 8, 8))
    picture.save(tmp_path / "1.png", transparency=transparency)
    pixels = only(tmp_path / "1.png")
    assert (colour(pixels, 0, 0), colour(pixels, 0, 7)) == (WHITE, GREEN)


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif"])
def test_exif_orientation(tmp_path, suffix):
    picture = Image.new("RGB", (32, 16), GREEN)
    picture.paste(RED, (0, 0, 16, 16))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90° clockwise: left becomes top
    picture.save(tmp_path / f"1.{suffix}", exif=exif)
    for verify in ("full", "header"):
        pixels = only(tmp_path / f"1.{suffix}", verify=verify)
        assert pixels.shape == (3, 32, 16)
        assert pixels[0, 2, 8] > 150 > 60 > pixels[0, 29, 8]


def test_header_and_pixels_agree_on_turned_images(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    image(tmp_path / "turned.jpg", (32, 16), exif=exif)
    image(tmp_path / "upright.jpg", (16, 32))
    for verify in ("full", "header"):
        assert len(opened(tmp_path, verify=verify)) == 2


def ramp(dtype, low, high) -> np.ndarray:
    return np.linspace(low, high, 64 * 64).reshape(64, 64).astype(dtype)


@pytest.mark.parametrize("dtype", [np.uint16, np.int16, np.int32, np.float32])
def test_percentiles_of_deep_images(tmp_path, dtype):
    values = ramp(dtype, 500, 3000)  # 12-bit data in a larger type
    values[0, 0] = 32000  # a hot pixel
    tifffile.imwrite(tmp_path / "1.tif", values)
    pixels = only(tmp_path / "1.tif", channels=1)[0].float()
    expected = torch.from_numpy(ramp(np.float64, 0, 255)).float()
    assert (pixels - expected)[1:].abs().max() < 2
    assert pixels[0, 0] == 255


@pytest.mark.parametrize(("dtype", "high"), [(np.uint16, 65535), (np.float32, 1.0)])
def test_full_range_of_deep_images(tmp_path, dtype, high):
    tifffile.imwrite(tmp_path / "1.tif", ramp(dtype, 0, high / 2))
    pixels = only(tmp_path / "1.tif", channels=1, intensity="full")[0].float()
    assert (pixels - torch.from_numpy(ramp(np.float64, 0, 127.5)).float()).abs().max() < 1


def test_deep_png_and_big_endian_tiff(tmp_path):
    values = ramp(np.uint16, 1000, 2000)
    Image.fromarray(values).save(tmp_path / "1.png")
    tifffile.imwrite(tmp_path / "2.tif", values, byteorder=">")
    images = opened(tmp_path, channels=1)
    assert torch.equal(images.pixels(0), images.pixels(1))
    assert images.pixels(0).float().std() > 60


def test_even_images_are_black(tmp_path):
    tifffile.imwrite(tmp_path / "1.tif", np.full((8, 8), 900, np.uint16))
    assert only(tmp_path / "1.tif").eq(0).all()


@pytest.mark.parametrize("compression", ["raw", "tiff_lzw", "tiff_deflate", "tiff_adobe_deflate", "packbits", "jpeg"])
def test_compressed_tiff(tmp_path, compression):
    file = image(tmp_path / "1.tif", colour=128, mode="L", compression=compression)
    assert (only(file).int() - 128).abs().max() <= 1


def test_first_page_of_many(tmp_path):
    tifffile.imwrite(
        tmp_path / "1.tif", np.stack([np.full((8, 8), v, np.uint8) for v in (11, 22, 33)]), photometric="minisblack"
    )
    assert only(tmp_path / "1.tif").eq(11).all()


# --- broken images -------------------------------------------------------------------------------------------------


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    """Two good images and three that are cut short, empty, and no image."""
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    for name in ("cut.jpg", "good.jpg", "more.png"):
        Image.fromarray(noise).save(tmp_path / name)
    whole = (tmp_path / "cut.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.tif").write_text("not pixels")
    return tmp_path


def test_broken_images_stop_the_run(damaged):
    message = mistake(damaged)
    assert "3 of 5 images are broken" in message
    assert re.search(r"cut\.jpg: .*truncated", message)
    assert "empty.png: empty file" in message
    assert "text.tif: not an image" in message
    assert "on_error=skip" in message
    assert "good" not in message


def test_broken_images_are_skipped_aloud(damaged, caplog):
    with caplog.at_level(logging.WARNING):
        images = opened(damaged, on_error="skip")
    assert names(images) == ["good.jpg", "more.png"]
    assert images.skipped.keys() == {"cut.jpg", "empty.png", "text.tif"}
    assert images.skipped["empty.png"] == "empty file"
    assert len(images.labels) == len(images.sources) == 2
    assert "3 of 5 images are left out" in caplog.text


def test_header_sees_no_cut(damaged):
    assert opened(damaged, verify="header", on_error="skip").skipped.keys() == {"empty.png", "text.tif"}


@pytest.mark.parametrize("suffix", ["png", "tif", "bmp", "webp"])
def test_cut_short_is_broken_in_every_format(tmp_path, suffix):
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    file = tmp_path / f"1.{suffix}"
    Image.fromarray(noise).save(file)
    file.write_bytes(file.read_bytes()[:-2000])
    assert "1 of 1 images are broken" in mistake(tmp_path)


def test_ten_broken_images_are_named(tmp_path):
    for i in range(130):
        (tmp_path / f"{i:03}.png").write_text("x")
    image(tmp_path / "good.png")
    message = mistake(tmp_path)
    assert "130 of 131" in message
    assert message.count("not an image") == 10
    assert "000.png" in message


def test_nothing_left_to_skip_to(tmp_path):
    (tmp_path / "1.png").touch()
    assert "1 of 1 images are broken:" in mistake(tmp_path, on_error="skip")


def test_an_image_that_goes_later_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "PATIENCE", 0.2)
    file = image(tmp_path / "a/1.png")
    images = opened(tmp_path)
    file.unlink()
    with pytest.raises(DataError, match=r"a/1\.png: No such file"):
        images.pixels(0)


def test_believed_images_fail_when_read(damaged):
    images = opened(damaged, verify="none", size=8)
    assert len(images) == 5
    with pytest.raises(DataError, match=r"cut\.jpg.*truncated"):
        images.pixels(0)


# --- sources -------------------------------------------------------------------------------------------------------


def test_without_sources_each_image_is_its_own(blood):
    ids = torch.cat([opened(blood).sources, opened(blood, "test").sources])
    assert ids.unique().numel() == 6
    assert (ids >= 0).all()


def test_sources_of_a_table_agree_between_splits(blood):
    rows = ["path;source", "TRAIN\\b\\2.png;s1", "./TRAIN/b/10.png;s2", "TEST/b/1.png;s1", "TRAIN/loose.png;"]
    (blood / "sources.csv").write_text("\n".join(rows), encoding="utf-8-sig")
    train, test = opened(blood, sources="sources.csv"), opened(blood, "test", sources=str(blood / "sources.csv"))
    assert train.sources[2] == test.sources[0] == source_id("s1")
    assert train.sources.unique().numel() == 4
    assert train.sources[3] == source_id("TRAIN/loose.png")


def test_source_ids_never_change():
    assert source_id("BloodImage_00139.jpg") == SOURCE_139


SOURCE_139 = 1666303363671110339


def test_sources_by_pattern(tmp_path):
    for name in ("d1_a.png", "d1_b.png", "d2_a.png", "stray.png"):
        image(tmp_path / name)
    ids = opened(tmp_path, source_pattern=r"(d\d+)_").sources.tolist()
    assert ids == [source_id(s) for s in ("d1", "d1", "d2", "stray.png")]


def test_the_table_goes_before_the_pattern(tmp_path):
    image(tmp_path / "d1_a.png")
    image(tmp_path / "d1_b.png")
    (tmp_path / "s.csv").write_text("file,slide\nd1_a.png,other\n")
    ids = opened(
        tmp_path, sources="s.csv", sources_path_column="file", sources_column="slide", source_pattern=r"^(d\d)"
    ).sources
    assert ids.tolist() == [source_id("other"), source_id("d1")]


def test_a_table_of_other_images(blood):
    (blood / "s.csv").write_text("path,source\nb/2.png,x\nb/10.png,x\n")
    message = mistake(blood, sources="s.csv")
    assert "only 0 of 4 images" in message
    assert "'TRAIN/a/deep/er/1.png'" in message
    assert "'b/2.png'" in message


def test_half_of_the_sources_must_be_known(tmp_path):
    for name in ("d1.png", "d2.png", "x.png", "y.png"):
        image(tmp_path / name)
    assert len(opened(tmp_path, source_pattern=r"(d\d)")) == 4
    image(tmp_path / "z.png")
    message = mistake(tmp_path, source_pattern=r"(d\d)")
    assert "only 2 of 5 images get a source: 'x.png'" in message
    assert "data.source_pattern=" in message


@pytest.mark.parametrize(
    ("text", "fields", "expected"),
    [
        ("path,sorce\n1.png,x\n", {}, "did you mean sorce?"),
        ("path,source\n1.png,x\n", {"sources_path_column": "paht"}, "sources_path_column='paht'"),
        ("", {}, "it is empty"),
        ("path,source\n1.png,x\n1.png,y\n", {}, "1.png two sources: x and y"),
        ("path,source\n1.png,x\n", {"sources": "t.csv"}, "'t.csv': no such file"),
        (b"path,source\n\xff\xfe", {}, "cannot be read"),
    ],
)
def test_mistakes_in_a_table(tmp_path, text, fields, expected):
    image(tmp_path / "1.png")
    (tmp_path / "s.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    assert expected in mistake(tmp_path, **{"sources": "s.csv", **fields})


# --- mistakes ------------------------------------------------------------------------------------------------------


def test_wrong_paths(blood):
    assert f"no folder {blood.name + 'x'!r} (did you mean {blood.name}?)" in mistake(Path(f"{blood}x"))
    assert "no folder 'nowhere'" in mistake(blood / "nowhere" / "at" / "all")
    assert "is a file" in mistake(blood / "TRAIN/loose.png")
    (blood / "x.npz").touch()
    assert "data.kind=medmnist" in mistake(blood / "x.npz")


def test_no_images(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "notes.txt").touch()
    assert "holds no images" in mistake(tmp_path)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"train": "train"}, "data.train='train'.*did you mean TRAIN"),
        ({"test": "TEST_SIMPEL"}, "did you mean TEST_SIMPLE.*there are: TEST, TEST_SIMPLE, TRAIN"),
        ({"train": "."}, "they would share images"),
        ({"val": "TRAIN/b"}, "val split, .*lies in the train split"),
        ({"val": "TEST"}, "they would share images"),
    ],
)
def test_wrong_splits(blood, fields, expected):
    assert re.search(expected, mistake(blood, **fields))


def test_unclear_splits(tmp_path):
    image(tmp_path / "val/1.png")
    image(tmp_path / "images/1.png")
    assert "holds val but no folder called train" in mistake(tmp_path)
    assert names(opened(tmp_path, train="images")) == ["images/1.png"]
    image(tmp_path / "valid/1.png")
    assert "val and valid: set data.val= to one of them" in mistake(tmp_path, train="images")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may list every folder")
def test_a_closed_folder(blood):
    (blood / "TRAIN/a").chmod(0)
    assert "TRAIN/a/ cannot be listed: Permission denied" in mistake(blood)
    (blood / "TRAIN/a").chmod(0o755)


def test_a_folder_below_that_cannot_be_listed_is_named(tmp_path, monkeypatch):
    image(tmp_path / "1.png")
    image(tmp_path / "mine/2.png")
    scandir = os.scandir

    def closed(path):
        if "mine" in str(path):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", closed)
    assert f"{tmp_path}/mine/ cannot be listed: Permission denied" in mistake(tmp_path)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"size": 0}, "greater than or equal to 1"),
        ({"size": "big"}, "such as 128, or"),
        ({"size": [1, 2, 3]}, "at most 2 items"),
        ({"channels": 2}, "channels=2 are not colours"),
        ({"source_pattern": "(a"}, "not a regular expression"),
        ({"source_pattern": "(a)(b)"}, "needs one group in parentheses, the source; it has 2"),
        ({"path": ""}, "at least 1 character"),
    ],
)
def test_wrong_fields(fields, expected):
    with pytest.raises(ValidationError, match=expected):
        folder.Config(**{"path": "x", **fields})


def test_one_number_is_a_square():
    config = folder.Config(path="x", size=64)
    assert config.size == (64, 64)
    assert folder.Config(**config.model_dump(mode="json")) == config


# --- workers -------------------------------------------------------------------------------------------------------


def test_travels_to_workers_in_few_bytes(tmp_path):
    for i in range(300):
        image(tmp_path / f"some/deeper/folder/{i}.png", (1, 1))
    images = opened(tmp_path, verify="none", size=4)
    sent = pickle.dumps(images)
    path = len("some/deeper/folder/000.png")
    assert len(sent) < 300 * (path + 8 + 8 + 8) + 3000  # path, offset, label, source
    again = pickle.loads(sent)
    assert names(again) == names(images)
    assert torch.equal(again.pixels(299), images.pixels(299))


# --- the real folder -----------------------------------------------------------------------------------------------


@pytest.mark.realdata
def test_the_kaggle_folder_by_its_path_alone(realdata):
    if not (realdata / "blood-cells").is_dir():
        pytest.skip(f"no blood-cells in {realdata}")
    test = opened(realdata / "blood-cells", "test", sources="sources.csv")
    assert test.classes == ("EOSINOPHIL", "LYMPHOCYTE", "MONOCYTE", "NEUTROPHIL")
    assert test.labels.bincount().tolist() == [623, 620, 620, 624]
    assert test.pixels(0).shape == (3, 120, 160)
    train = opened(realdata / "blood-cells", sources="sources.csv", verify="none", size=96)
    assert train.labels.bincount().tolist() == [2497, 2483, 2478, 2499]
    assert train.pixels(5).shape == (3, 96, 96)
    photographs = [set(images.sources.tolist()) for images in (train, test)]
    assert [len(found) for found in photographs] == [279, 72]
