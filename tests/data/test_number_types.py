"""Every number type in every layout and container: each read back to the right pixels, or refused by name."""

import builtins
import re
import struct
import zlib
from itertools import product

import imagecodecs
import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from sslcells.data._decode import Decoder, Unreadable

HEIGHT, WIDTH = 32, 48

# number type, and the values that mean black and white
TYPES = {
    "uint8": (np.uint8, 0, 255),
    "10 bit": (np.uint16, 0, 1023),
    "12 bit": (np.uint16, 0, 4095),
    "14 bit": (np.uint16, 0, 16383),
    "16 bit": (np.uint16, 0, 65535),
    "int16": (np.int16, -1000, 3000),
    "float32": (np.float32, 0, 1),
    "float64": (np.float64, 0, 1),
    "float32 of 12 bit": (np.float32, 0, 4095),
    "float64 far from 0": (np.float64, 1e9, 1e9 + 50),
    "uint32": (np.uint32, 0, 100_000),
}
LAYOUTS = (
    *("grey", "white is zero", "grey and alpha", "RGB", "RGB, colours apart", "RGBA", "RGBA, colours apart"),
    *("RGBA, multiplied", "RGB and more", "palette"),
)
STORAGES = {
    "uncompressed": {},
    "big endian": {"byteorder": ">"},
    "strips": {"rowsperstrip": 5},
    "lzw": {"compression": "lzw"},
    "deflate": {"compression": "zlib"},
    "predictor": {"compression": "lzw", "predictor": True},
    "zstd": {"compression": "zstd"},
    "jpeg": {"compression": "jpeg", "compressionargs": {"level": 100}, "subsampling": (1, 1)},
    "tiled": {"tile": (16, 16)},
    "tiled lzw": {"tile": (16, 32), "compression": "lzw"},
    "BigTIFF": {"bigtiff": True},
}


def drawn(channels: int) -> np.ndarray:
    """(H, W, channels) float64 from 0 to 1: ramps, each of another direction."""
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH]
    ramps = [x / (WIDTH - 1), y / (HEIGHT - 1), 1 - x / (WIDTH - 1), (x + y) / (WIDTH + HEIGHT - 2)]
    return np.stack(ramps[:channels], 2)


def opacity() -> np.ndarray:
    """(H, W) from 0 to 1; the corners, where the ramps end, are opaque, and one row cannot be seen."""
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH]
    alpha = 0.5 + 0.5 * np.abs(np.sin(x / 7.0) * np.cos(y / 5.0))
    alpha[:4], alpha[-4:], alpha[HEIGHT // 2] = 1, 1, 0
    return alpha


def typed(share: np.ndarray, name: str) -> np.ndarray:
    dtype, low, high = TYPES[name]
    values = low + share * (float(high) - low)
    return values.astype(dtype) if np.dtype(dtype).kind == "f" else np.rint(values).astype(dtype)


def opaque(share: np.ndarray, name: str) -> np.ndarray:
    """Opacity in the same number type: white's number is opaque, of signed types the largest, of floats 1."""
    dtype, _, high = TYPES[name]
    kind = np.dtype(dtype).kind
    top = 1 if kind == "f" else np.iinfo(dtype).max if kind == "i" or dtype == np.uint32 else high
    return (share * top).astype(dtype) if kind == "f" else np.rint(share * top).astype(dtype)


def case(layout: str, name: str) -> tuple[np.ndarray, np.ndarray, dict] | None:
    """What lies in the file, (H, W, 3) or (H, W, 1) float64 0..255 that it means, and how tifffile writes it."""
    dtype = TYPES[name][0]
    if layout == "palette":
        if dtype not in (np.uint8, np.uint16) or name not in ("uint8", "16 bit"):
            return None
        colours = np.random.default_rng(0).integers(0, 256, (3, 2 ** (8 * np.dtype(dtype).itemsize)), np.uint8)
        index = typed(drawn(1)[..., 0], name)
        options = {"photometric": "palette", "colormap": colours.astype(np.uint16) * 257}
        return index, colours.T[index].astype(float), options
    colours = 3 if layout.startswith("RGB") else 1
    share = drawn(colours)
    values, meant = typed(share, name), share * 255
    options = {"photometric": "rgb" if colours == 3 else "minisblack", "planarconfig": "contig"}
    if layout == "white is zero":
        return typed(1 - share, name)[..., 0], meant, {"photometric": "miniswhite"}
    if "alpha" in layout or "RGBA" in layout:
        alpha = opacity()
        if np.dtype(dtype).kind == "u":  # what lies in the file is rounded
            top = TYPES[name][2]
            alpha, meant = np.rint(alpha * top) / top, np.rint(share * top) / top * 255
        meant = meant * alpha[..., None] + 255 * (1 - alpha[..., None])
        if "multiplied" in layout:
            if TYPES[name][1] != 0:
                return None
            values = typed(share * alpha[..., None], name)
        values = np.concatenate([values, opaque(alpha, name)[..., None]], 2)
        options["extrasamples"] = ["assocalpha" if "multiplied" in layout else "unassalpha"]
    if layout == "RGB and more":
        values = np.concatenate([values, values[..., :1]], 2)
        options["extrasamples"] = ["unspecified"]
    if "apart" in layout:
        values, options["planarconfig"] = np.moveaxis(values, 2, 0), "separate"
    if values.shape[-1] == 1:
        values, options = values[..., 0], {"photometric": "minisblack"}
    return np.ascontiguousarray(values), meant, options


def decoders(name: str, channels: int) -> dict[str, Decoder]:
    _, low, high = TYPES[name]
    return {
        "percentile": Decoder(channels, None, "crop", "percentile", percentiles=(0.0, 100.0)),
        "range": Decoder(channels, None, "crop", "full", range=(low, high)),
        "full": Decoder(channels, None, "crop", "full"),
    }


def written(file, values, **options) -> bool:
    """Whether tifffile can write this at all."""
    try:
        tifffile.imwrite(file, values, metadata=None, **options)
    except (ValueError, TypeError, NotImplementedError, RuntimeError):
        return False
    return True


def check(file, name: str, meant: np.ndarray, what: str, within: float = 1.0, palette: bool = False) -> None:
    channels = meant.shape[2]
    plain = name in ("uint8", "16 bit", "float32", "float64") or palette
    for way, decoder in decoders(name, channels).items():
        if way == "full" and not plain:
            with pytest.raises(Unreadable, match=str(np.dtype(TYPES[name][0]))) as refused:
                decoder(str(file))
            with pytest.raises(Unreadable, match=re.escape(str(refused.value))):
                decoder.header(str(file), whole=True)
            assert f"({HEIGHT}, {WIDTH}" in str(refused.value), what
            assert "data.range" in str(refused.value)
            continue
        pixels = decoder(str(file)).permute(1, 2, 0).double().numpy()
        worst = np.abs(pixels - meant).max()
        assert worst <= within, f"{what}, {way}: off by {worst}"
        assert decoder.header(str(file)).size == (HEIGHT, WIDTH)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", TYPES)
def test_tiff(tmp_path, name, layout):
    made = case(layout, name)
    if made is None:
        pytest.skip("there is no such file")
    values, meant, options = made
    count = 0
    for storage, more in STORAGES.items():
        file = tmp_path / "1.tif"
        if storage == "jpeg" and (layout not in ("grey", "RGB") or name != "uint8"):
            continue  # tifffile writes no others that mean what they say
        if written(file, values, **options, **more):
            count += 1
            # A colour that was multiplied by its opacity, and rounded, is known to fewer levels.
            within = 4 if storage == "jpeg" else 2 if "multiplied" in layout else 1
            check(file, name, meant, f"{name}, {layout}, {storage}", within, palette=layout == "palette")
    assert count >= 8


@pytest.mark.parametrize("layout", ["grey", "RGB", "grey and alpha", "RGBA"])
@pytest.mark.parametrize("name", ["uint8", "10 bit", "12 bit", "14 bit", "16 bit"])
def test_png(tmp_path, name, layout):
    values, meant, _ = case(layout, name)
    for level in (0, 9):
        (tmp_path / "1.png").write_bytes(imagecodecs.png_encode(values, level=level))
        check(tmp_path / "1.png", name, meant, f"{name}, {layout}")


@pytest.mark.parametrize("depth", [1, 2, 4, 8])
@pytest.mark.parametrize("palette", [False, True])
@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_few_bits(tmp_path, depth, palette, suffix):
    """Pillow writes 1 to 8 bits of a palette, and 1 or 8 of grey; the packed TIFFs below have the others."""
    top = 2**depth - 1
    index = np.rint(drawn(1)[..., 0] * top).astype(np.uint8)
    colours = np.random.default_rng(0).integers(0, 256, (256, 3), np.uint8)
    if palette:
        image = Image.frombytes("P", (WIDTH, HEIGHT), index.tobytes())
        image.putpalette(colours[: top + 1].tobytes())
        meant = colours[index].astype(float)
        image.save(tmp_path / f"1.{suffix}", **({"bits": depth} if suffix == "png" else {}))
    else:
        image = Image.fromarray(np.rint(index * (255 / top)).astype(np.uint8))
        (image.convert("1", dither=0) if depth == 1 else image).save(tmp_path / f"1.{suffix}")
        meant = np.rint(index * (255 / top))[..., None]
    check(tmp_path / f"1.{suffix}", "uint8", meant, f"{depth} bit {suffix}", within=0)


def packed_tiff(file, values: np.ndarray, bits: int, photometric: int) -> None:
    """A grey TIFF whose samples are packed to `bits` each, each row from a new byte: few libraries write it."""
    each = ((values[..., None] >> np.arange(bits - 1, -1, -1)) & 1).astype(np.uint8).reshape(len(values), -1)
    strip = np.packbits(each, axis=1).tobytes()
    height, width = values.shape
    tags = [(256, width), (257, height), (258, bits), (259, 1), (262, photometric), (273, 8), (277, 1), (278, height),
            (279, len(strip))]  # fmt: skip
    directory = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", tag, 4, 1, v) for tag, v in tags)
    strip += b"\0" * (len(strip) % 2)
    file.write_bytes(struct.pack("<2sHI", b"II", 42, 8 + len(strip)) + strip + directory + struct.pack("<I", 0))


@pytest.mark.parametrize("photometric", [0, 1])
@pytest.mark.parametrize("bits", [1, 2, 4, 6, 10, 12, 14])
def test_packed_bits_are_what_full_means(tmp_path, bits, photometric):
    """Where the file itself names 12 bits, `full` needs no range, and white is zero where it says so."""
    share = drawn(1)[..., 0]
    values = np.rint((share if photometric else 1 - share) * (2**bits - 1)).astype(np.uint16)
    packed_tiff(tmp_path / "1.tif", values, bits, photometric)
    meant = np.rint(share * (2**bits - 1)) / (2**bits - 1) * 255
    meant = 255 - np.rint((1 - share) * (2**bits - 1)) / (2**bits - 1) * 255 if not photometric else meant
    for decoder in decoders("uint8", 1).values():
        if decoder.range is None:
            assert np.abs(decoder(str(tmp_path / "1.tif"))[0].double().numpy() - meant).max() <= 1


def test_bits_that_ome_names_are_what_full_means(tmp_path):
    values = typed(drawn(1)[..., 0] / 8, "12 bit")  # a dim image of a camera of 12 bits
    full = decoders("12 bit", 1)["full"]
    for bits, most in ((12, 255 / 8), (16, 255 / 128)):
        tifffile.imwrite(tmp_path / "1.ome.tif", values, metadata={"axes": "YX", "SignificantBits": bits})
        assert abs(int(full(str(tmp_path / "1.ome.tif")).max()) - most) <= 1
    tifffile.imwrite(tmp_path / "1.ome.tif", values, metadata={"axes": "YX", "SignificantBits": 8})
    with pytest.raises(Unreadable, match=r"uint16 \(32, 48\) from 0 to 512: more than the 8 significant bits"):
        full(str(tmp_path / "1.ome.tif"))


@pytest.mark.parametrize("name", ["uint8", "12 bit", "16 bit", "int16", "float32"])
@pytest.mark.parametrize("photometric", ["minisblack", "miniswhite"])
@pytest.mark.parametrize("way", ["first", "last"])
def test_stacks(tmp_path, name, photometric, way):
    share = drawn(4)
    values = typed(share if photometric == "minisblack" else 1 - share, name)
    values = values if way == "last" else np.moveaxis(values, 2, 0)
    tifffile.imwrite(tmp_path / "1.tif", values, photometric=photometric, metadata=None)
    _, low, high = TYPES[name]
    for options in ({"percentiles": (0.0, 100.0)}, {"range": (low, high)}):
        decoder = Decoder(4, None, "crop", "full" if "range" in options else "percentile", way, **options)
        assert np.abs(decoder(str(tmp_path / "1.tif")).permute(1, 2, 0).double().numpy() - share * 255).max() <= 1


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("stack", [None, "first"])
def test_tiff_is_turned_upright(tmp_path, orientation, stack):
    values = typed(drawn(1)[..., 0], "12 bit")
    tag = (274, "H", 1, orientation, False)
    tifffile.imwrite(tmp_path / "1.tif", values, extratags=[tag], metadata=None)
    eight = typed(drawn(1)[..., 0], "uint8")
    Image.fromarray(eight).save(tmp_path / "8.tif", tiffinfo={274: orientation})
    exif = Image.Exif()
    exif[274] = orientation
    Image.fromarray(eight).save(tmp_path / "1.png", exif=exif)
    deep, shallow = Decoder(1, None, "crop", "full", stack, range=(0, 4095)), Decoder(1, None, "crop", "full")
    upright = shallow(str(tmp_path / "1.png"))
    assert torch.equal(shallow(str(tmp_path / "8.tif")), upright)
    assert (deep(str(tmp_path / "1.tif")).int() - upright.int()).abs().max() <= 1
    assert deep.header(str(tmp_path / "1.tif")).size == tuple(upright.shape[1:])


# --- what is not finite, and what is not read ----------------------------------------------------------------------


@pytest.mark.parametrize("way", ["percentile", "full"])
def test_values_that_are_not_finite_count_in_no_percentile(tmp_path, way):
    values = typed(drawn(1)[..., 0], "float32 of 12 bit") + 1000
    values[3, :6] = [np.nan, np.nan, np.nan, -np.inf, np.inf, np.inf]
    tifffile.imwrite(tmp_path / "1.tif", values)
    options = {"percentiles": (0.0, 100.0)} if way == "percentile" else {"range": (1000, 5095)}
    pixels = Decoder(1, None, "crop", way, **options)(str(tmp_path / "1.tif"))[0]
    assert pixels[3, :6].tolist() == [0, 0, 0, 0, 255, 255]
    assert np.abs(pixels[4:].double().numpy() - drawn(1)[4:, :, 0] * 255).max() <= 1
    tifffile.imwrite(tmp_path / "1.tif", np.full((8, 9), np.nan, np.float32))
    with pytest.raises(Unreadable, match=r"float32 \(8, 9\): none of its values is finite"):
        Decoder(1, None, "crop", way, **options)(str(tmp_path / "1.tif"))


def test_an_image_of_which_most_is_even_keeps_what_is_in_it(tmp_path):
    values = np.full((64, 64), 100, np.uint16)
    values[5, 5:8] = [200, 300, 400]
    tifffile.imwrite(tmp_path / "1.tif", values)
    pixels = Decoder(1, None, "crop", "percentile")(str(tmp_path / "1.tif"))[0]
    assert pixels[5, 4:9].tolist() == [0, 85, 170, 255, 0]


def test_full_refuses_what_would_lose_grey_levels_but_not_a_black_image(tmp_path):
    full = Decoder(1, None, "crop", "full")
    tifffile.imwrite(tmp_path / "1.tif", np.full((8, 9), 900, np.uint16))
    with pytest.raises(Unreadable) as error:
        full(str(tmp_path / "1.tif"))
    assert str(error.value) == (
        "uint16 (8, 9) from 900 to 900: less than a quarter of 0 to 65535, of which grey levels would be lost: set "
        "data.range=[black, white], or data.intensity=percentile, such as [0, 1023]"
    )
    tifffile.imwrite(tmp_path / "1.tif", np.zeros((8, 9), np.uint16))
    assert not full(str(tmp_path / "1.tif")).any()


@pytest.mark.parametrize(
    ("values", "options", "words"),
    [
        (
            np.zeros((8, 9), np.complex64),
            {},
            r"complex64 \(8, 9\): numbers of a type",
        ),
        (np.zeros((8, 9, 4), np.uint16), {"photometric": "separated"}, r"uint16 \(8, 9, 4\) YXS: SEPARATED"),
        (np.zeros((8, 9, 3), np.uint16), {"photometric": "cielab"}, r"uint16 \(8, 9, 3\) YXS: CIELAB of 3"),
        (np.zeros((8, 9), np.uint16), {"photometric": "cfa"}, r"uint16 \(8, 9\) YX: CFA of 1"),
        (
            np.zeros((8, 9, 5), np.uint16),
            {"photometric": "minisblack", "planarconfig": "contig"},
            r"uint16 \(8, 9, 5\) YXS: 5 channels are not colours: set data.stack=auto data.channels=5",
        ),
    ],
)
def test_what_is_not_read_is_named_by_type_and_shape(tmp_path, values, options, words):
    tags = []
    if options.get("photometric") == "cfa":
        tags = [(33421, "H", 2, (2, 2), False), (33422, "B", 4, b"\0\1\1\2", False)]
    tifffile.imwrite(tmp_path / "1.tif", values, metadata=None, extratags=tags, **options)
    for look in (Decoder(3, None, "crop", "percentile"), Decoder(3, None, "crop", "percentile").header):
        with pytest.raises(Unreadable, match=words):
            look(str(tmp_path / "1.tif"))


def test_a_transparent_colour_of_a_deep_png(tmp_path):
    """The colour that PNG's chunk tRNS names is white, as in 8 bit."""
    values = typed(drawn(1)[..., 0], "16 bit")
    data = imagecodecs.png_encode(values)
    named = int(values[0, 7])
    chunk = struct.pack(">I4sH", 2, b"tRNS", named)
    end = data.index(b"IDAT") - 4
    chunk += struct.pack(">I", zlib.crc32(chunk[4:]))
    (tmp_path / "1.png").write_bytes(data[:end] + chunk + data[end:])
    pixels = Decoder(1, None, "crop", "full")(str(tmp_path / "1.png"))[0].numpy()
    assert (pixels[:, 7] == 255).all()
    assert np.abs(pixels[:, :6] - drawn(1)[:, :6, 0] * 255).max() <= 1


@pytest.mark.parametrize(("mode", "seed"), list(product(["L", "RGB", "RGBA", "LA", "P", "1", "CMYK"], [0, 1])))
@pytest.mark.parametrize("suffix", ["tif", "png", "bmp", "webp", "jpg"])
def test_eight_bits_are_what_pillow_reads(tmp_path, mode, seed, suffix):
    """Ordinary files of 8 bits keep their pixels, whichever library reads them."""
    noise = np.random.default_rng(seed).integers(0, 256, (20, 24, 4), np.uint8)
    image = Image.fromarray(noise).convert(mode) if mode != "CMYK" else Image.fromarray(noise[..., :3]).convert(mode)
    file = tmp_path / f"1.{suffix}"
    try:
        image.save(file, **({"compression": ["raw", "jpeg"][seed]} if suffix == "tif" and mode in ("L", "RGB") else {}))
    except (OSError, ValueError):
        pytest.skip("there is no such file")
    for channels in (1, 3):
        opened = Image.open(file)
        if opened.has_transparency_data:
            opened = Image.alpha_composite(Image.new("RGBA", opened.size, "white"), opened.convert("RGBA"))
        want = np.asarray(opened.convert("L" if channels == 1 else "RGB")).reshape(20, 24, channels)
        assert np.array_equal(Decoder(channels, None, "crop", "percentile")(str(file)).permute(1, 2, 0).numpy(), want)


def test_a_picture_is_opened_once(tmp_path, monkeypatch):
    Image.new("RGB", (9, 9)).save(tmp_path / "a.jpg")
    opened, plain = [], builtins.open
    monkeypatch.setattr(builtins, "open", lambda file, *a, **k: opened.append(file) or plain(file, *a, **k))
    decoder = Decoder(3, None, "crop", "percentile")
    for read in (decoder, decoder.header, decoder.values):
        opened.clear()
        read(str(tmp_path / "a.jpg"))
        assert opened == [str(tmp_path / "a.jpg")]
