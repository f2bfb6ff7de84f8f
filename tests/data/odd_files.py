"""Writes damaged and odd image files, the same ones for the same seed, and reads them in a process that is watched."""

import json
import random
import resource
import signal
import struct
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path

import imagecodecs
import numpy as np
import tifffile
from PIL import Image

SECONDS = 60
"""after which a file counts as a hang"""


def _pillow(mode: str, format: str, **options) -> bytes:
    noise = np.random.default_rng(0).integers(0, 256, (24, 30, 4), np.uint8)
    out = BytesIO()
    Image.fromarray(noise[..., :3]).convert(mode).save(out, format, **options)
    return out.getvalue()


def _tiff(values: np.ndarray, **options) -> bytes:
    out = BytesIO()
    tifffile.imwrite(out, values, **({"metadata": None} | options))
    return out.getvalue()


def sound() -> dict[str, bytes]:
    """One whole file of each kind, name → content."""
    random_ = np.random.default_rng(1)
    deep = random_.integers(0, 4096, (24, 30, 3), np.uint16)
    eight, grey = (deep >> 4).astype(np.uint8), np.ascontiguousarray(deep[..., 0])
    planes = random_.integers(0, 4096, (2, 3, 24, 30), np.uint16)
    black = {"photometric": "minisblack"}
    return {
        "rgb.png": _pillow("RGB", "PNG"),
        "palette.png": _pillow("P", "PNG"),
        "bits.png": _pillow("1", "PNG"),
        "deep.png": imagecodecs.png_encode(deep),
        "grey.png": imagecodecs.png_encode(grey),
        "rgb.jpg": _pillow("RGB", "JPEG"),
        "cmyk.jpg": _pillow("CMYK", "JPEG"),
        "rgb.webp": _pillow("RGB", "WEBP", lossless=True),
        "rgb.bmp": _pillow("RGB", "BMP"),
        "plain.tif": _tiff(grey),
        "float.tif": _tiff(grey.astype(np.float32)),
        "lzw.tif": _tiff(deep, photometric="rgb", compression="lzw", predictor=True),
        "deflate.tif": _tiff(deep, photometric="rgb", compression="zlib", rowsperstrip=5),
        "jpeg.tif": _tiff(eight, photometric="rgb", compression="jpeg"),
        "tiled.tif": _tiff(deep, photometric="rgb", tile=(16, 16), compression="zstd"),
        "big.tif": _tiff(grey, bigtiff=True),
        "apart.tif": _tiff(np.moveaxis(deep, 2, 0), photometric="rgb", planarconfig="separate"),
        "palette.tif": _pillow("P", "TIFF"),
        "fax.tif": _pillow("1", "TIFF", compression="group4"),
        "cmyk.tif": _pillow("CMYK", "TIFF"),
        "pages.tif": b"".join([_tiff(planes[0], contiguous=False, **black)]),
        "z.ome.tif": _tiff(planes, ome=True, metadata={"axes": "ZCYX"}, **black),
        "hyper.tif": _tiff(planes, imagej=True, metadata={"axes": "ZCYX"}),
        "shaped.tif": _tiff(planes, metadata={}, **black),
    }


# --- damage: bytes and a random generator → other bytes ------------------------------------------------------------


def _flipped(data: bytes, draw: random.Random, within: int | None = None) -> bytes:
    out = bytearray(data)
    for _ in range(draw.choice([1, 2, 5, 30])):
        out[draw.randrange(min(len(out), within or len(out)))] = draw.randrange(256)
    return bytes(out)


def _in_the_head(data: bytes, draw: random.Random) -> bytes:
    return _flipped(data, draw, 300)


def _at_the_end(data: bytes, draw: random.Random) -> bytes:
    cut = max(0, len(data) - 300)
    return data[:cut] + _flipped(data[cut:], draw)


def _cut(data: bytes, draw: random.Random) -> bytes:
    return data[: draw.randrange(len(data))]


def _without_a_head(data: bytes, draw: random.Random) -> bytes:
    return data[draw.randrange(1, 200) :]


def _with_a_hole(data: bytes, draw: random.Random) -> bytes:
    at = draw.randrange(len(data))
    return data[:at] + bytes(draw.randrange(1, 400)) + data[at + draw.choice([0, 100, 400]) :]


def _of_numbers(data: bytes, draw: random.Random) -> bytes:
    """Some 16 or 32 bits become a very large, a very small or a negative number."""
    out = bytearray(data)
    for _ in range(draw.choice([1, 3, 10])):
        at = draw.randrange(max(1, len(out) - 4))
        value = draw.choice([0, 1, 0x7FFF, 0xFFFF, 0x10000, 0x7FFFFFFF, 0xFFFFFFFF, 0x80000000, draw.randrange(2**32)])
        out[at : at + 4] = struct.pack(draw.choice("<>") + "I", value)
    return bytes(out[: len(data)])


def _of_tags(data: bytes, draw: random.Random) -> bytes:
    """A TIFF's tags get other numbers, types or counts; a PNG's header other sizes, with the checksum that fits."""
    out = bytearray(data)
    if data[:4] == b"\x89PNG":
        width, height = (draw.choice([0, 1, 31, 70000, 10**6, 2**31 - 1]) for _ in "wh")
        out[16:24] = struct.pack(">II", width, height)
        if draw.random() < 0.5:
            out[24], out[25] = draw.choice([1, 2, 4, 8, 16]), draw.choice([0, 2, 3, 4, 6])
        out[29:33] = struct.pack(">I", zlib.crc32(bytes(out[12:29])))
        return bytes(out)
    if data[:2] not in (b"II", b"MM") or data[2:4] not in (b"*\0", b"\0*"):
        return _of_numbers(data, draw)
    order = "<" if data[:2] == b"II" else ">"
    at = struct.unpack(f"{order}I", data[4:8])[0]
    count = struct.unpack(f"{order}H", data[at : at + 2])[0]
    for _ in range(draw.choice([1, 2, 4])):
        entry = at + 2 + 12 * draw.randrange(count)
        where, form, value = draw.choice(
            [
                (8, "I", draw.choice([0, 1, 3, 8, 16, 64, 1000, 65535, 10**6, 2**31, 2**32 - 1])),
                (8, "I", draw.randrange(len(data))),
                (8, "I", draw.randrange(40)),
                (4, "I", draw.choice([0, 2, 1000, 2**28, 2**32 - 1])),
                (2, "H", draw.randrange(20)),
                (0, "H", draw.choice([256, 257, 258, 259, 262, 273, 277, 279, 284, 317, 320, 322, 324, 330, 339])),
            ]
        )
        out[entry + where : entry + where + struct.calcsize(f"{order}{form}")] = struct.pack(f"{order}{form}", value)
    if draw.random() < 0.2:  # the next directory is one that was already read
        end = at + 2 + 12 * count
        out[end : end + 4] = struct.pack(f"{order}I", at)
    return bytes(out)


DAMAGE: list[Callable[[bytes, random.Random], bytes]] = [
    *(_flipped, _in_the_head, _at_the_end, _cut, _without_a_head, _with_a_hole, _of_numbers, _of_tags, _of_tags)
]


# --- files that take much more than they are -----------------------------------------------------------------------


def _raw_tiff(width: int, height: int, strip: bytes, bits: int = 8, compression: int = 8, pages: int = 1) -> bytes:
    out = bytearray(struct.pack("<2sHI", b"II", 42, 8 + len(strip) + len(strip) % 2) + strip + b"\0" * (len(strip) % 2))
    for page in range(pages):
        tags = [(256, width), (257, height), (258, bits), (259, compression), (262, 1), (273, 8), (277, 1),
                (278, height), (279, len(strip))]  # fmt: skip
        out += struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", tag, 4, 1, v) for tag, v in tags)
        out += struct.pack("<I", len(out) + 4 if page < pages - 1 else 0)
    return bytes(out)


def _zeros(gigabytes: float) -> bytes:
    """A zlib stream of zeros, of which every MiB is packed in the same way."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    block = packer.compress(bytes(2**20)) + packer.flush(zlib.Z_FULL_FLUSH)
    count = int(gigabytes * 1024)
    checksum = (count * 2**20 % 65521) << 16 | 1
    return b"\x78\xda" + block * count + b"\x03\0" + struct.pack(">I", checksum)


def _png(width: int, height: int, chunks: list[tuple[bytes, bytes]], depth: int = 8, colour: int = 2) -> bytes:
    head = (b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    out = b"\x89PNG\r\n\x1a\n"
    for name, body in [head, *chunks, (b"IEND", b"")]:
        out += struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
    return out


def _ome(text: str, values: np.ndarray) -> bytes:
    return _tiff(values, description=text, photometric="minisblack", metadata=None)


def _ome_sized(axes: dict[str, int]) -> str:
    sizes = " ".join(f'Size{axis}="{n}"' for axis, n in axes.items())
    return (f'<?xml version="1.0"?><OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06"><Image ID="Image:0">'
            f'<Pixels ID="Pixels:0" DimensionOrder="XYCZT" Type="uint8" {sizes}><TiffData/></Pixels></Image>'
            '</OME>')  # fmt: skip


def bombs() -> dict[str, bytes]:
    """Small files that would take gigabytes, or a very long time."""
    many = _zeros(1.25)
    small = np.zeros((8, 9), np.uint8)
    entities = "".join(f'<!ENTITY a{i} "{f"&a{i - 1};" * 10}">' for i in range(1, 12))
    laughs = f'<?xml version="1.0"?><!DOCTYPE OME [<!ENTITY a0 "ha">{entities}]><OME>&a11;</OME>'
    return {
        "inflates.tif": _raw_tiff(64, 64, many),
        "large.tif": _raw_tiff(50000, 50000, many),
        "just_under.tif": _raw_tiff(20000, 20000, many),
        "deep_just_under.tif": _raw_tiff(15000, 15000, many, bits=16),
        "sparse.tif": _raw_tiff(20000, 20000, b"", compression=1),
        "wide.tif": _raw_tiff(2**31 - 1, 1, b"x" * 100, compression=1),
        "claims.tif": _raw_tiff(20000, 20000, b"x" * 100, compression=1),
        "pages.tif": _raw_tiff(16, 16, bytes(256), compression=1, pages=60000),
        "pages.ome.tif": _ome(_ome_sized({"X": 9, "Y": 8, "C": 1, "Z": 10**9, "T": 1}), small),
        "planes.ome.tif": _ome(_ome_sized({"X": 9, "Y": 8, "C": 10**6, "Z": 10**6, "T": 10**6}), small),
        "laughs.ome.tif": _ome(laughs, small),
        "deep.ome.tif": _ome(f"<OME>{'<a>' * 200000}{'</a>' * 200000}</OME>", small),
        "hyper.tif": _ome("ImageJ=1.54\nimages=1000000000\nslices=1000000000\nhyperstack=true\n", small),
        "shaped.tif": _ome('{"shape": [1000000000, 8, 9]}', small),
        "large.png": _png(50000, 50000, [(b"IDAT", many)]),
        "deep.png": _png(12000, 12000, [(b"IDAT", many)], depth=16),
        "deep_large.png": _png(13000, 13000, [(b"IDAT", many)], depth=16, colour=6),
        "inflates.png": _png(64, 64, [(b"IDAT", many)]),
        "deep_inflates.png": _png(64, 64, [(b"IDAT", many)], depth=16),
        "text.png": _png(8, 8, [(b"zTXt", b"a\0\0" + many), (b"IDAT", zlib.compress(bytes(200)))]),
        "text_deep.png": _png(8, 8, [(b"zTXt", b"a\0\0" + many), (b"IDAT", zlib.compress(bytes(392)))], depth=16),
        "profile.png": _png(8, 8, [(b"iCCP", b"a\0\0" + many), (b"IDAT", zlib.compress(bytes(200)))]),
        "large.bmp": struct.pack("<2sIHHIIiiHHIIiiII", b"BM", 60, 0, 0, 54, 40, 60000, 60000, 1, 24, 0, 0, 0, 0, 0, 0),
        "large.webp": b"RIFF\x1a\0\0\0WEBPVP8L\x0d\0\0\0/\xff\xff\xff\x0f" + bytes(8),
        "empty.png": b"",
        "nothing.tif": b"II*\0",
        "names_itself.tif": b"II*\0\x08\0\0\0\0\0\x08\0\0\0",
    }


# --- OME-Zarr ------------------------------------------------------------------------------------------------------


def zarr_files() -> dict[str, bytes]:
    """The files of a sound OME-Zarr folder, relative path → content."""
    fields = {"zarr_format": 2, "shape": [3, 24, 30], "chunks": [1, 24, 30], "dtype": "<u2", "order": "C",
              "fill_value": 0, "filters": None, "compressor": {"id": "zlib", "level": 1}}  # fmt: skip
    scales = {"axes": [{"name": a} for a in "cyx"], "datasets": [{"path": "0"}], "version": "0.4"}
    chunk = np.random.default_rng(2).integers(0, 4096, (24, 30), np.uint16)
    return {
        ".zgroup": b'{"zarr_format": 2}',
        ".zattrs": json.dumps({"multiscales": [scales]}).encode(),
        "0/.zarray": json.dumps(fields).encode(),
        **{f"0/{c}.0.0": zlib.compress((chunk + c).tobytes()) for c in range(3)},
    }


def zarr_bombs() -> dict[str, dict[str, bytes]]:
    """Folders that would take gigabytes, as name → files."""
    whole = zarr_files()
    fields = json.loads(whole["0/.zarray"])
    return {
        "inflates.zarr": whole | {"0/0.0.0": _zeros(1.25)},
        "large.zarr": whole | {"0/.zarray": json.dumps(fields | {"shape": [2, 10**6, 10**6]}).encode()},
        "chunks.zarr": whole | {"0/.zarray": json.dumps(fields | {"chunks": [1, 10**6, 10**6]}).encode()},
        "many.zarr": whole | {"0/.zarray": json.dumps(fields | {"chunks": [1, 1, 1], "shape": [2, 9**5, 2]}).encode()},
        "nested.zarr": whole | {".zattrs": b"[" * 10**5},
    }


def write(folder: Path, count: int, seed: int, large: bool = True) -> int:
    """Write `count` files and folders, sound ones and with `large` bombs among them. Returns their number."""
    draw = random.Random(seed)
    whole = sound()
    folder.mkdir(parents=True, exist_ok=True)
    files = {f"sound_{name}": data for name, data in whole.items()}
    folders = {"sound.zarr": zarr_files()}
    if large:
        files |= {f"bomb_{name}": data for name, data in bombs().items()}
        folders |= {f"bomb_{name}": content for name, content in zarr_bombs().items()}
    for name, data in files.items():
        (folder / name).write_bytes(data)
    for name, content in folders.items():
        _write_folder(folder / name, content)
    made = len(files) + len(folders)
    names = list(whole)
    while made < count:
        if made % 20 == 0:
            content = zarr_files()
            hit = draw.choice(list(content))
            _write_folder(folder / f"{made:04}.zarr", content | {hit: draw.choice(DAMAGE)(content[hit], draw)})
        else:
            name = draw.choice(names)
            (folder / f"{made:04}_{name}").write_bytes(draw.choice(DAMAGE)(whole[name], draw))
        made += 1
    return made


def _write_folder(folder: Path, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


# --- the process that reads them -----------------------------------------------------------------------------------


def read(folder: Path) -> Iterator[dict]:
    """Read every file in every way; yields what became of it, how long it took, and the memory since the beginning."""
    from sslcells.data._decode import Decoder, Unreadable

    ways = [
        Decoder(3, (16, 16), "crop", "percentile"),
        Decoder(1, None, "crop", "full", range=(0, 4095), z="max"),
        Decoder(3, (16, 16), "pad", "percentile", "auto", z="each"),
    ]
    before = _mebibytes()
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        began, outcome = time.monotonic(), []
        signal.alarm(SECONDS * len(ways))
        for way in ways:
            for ask in ((way.header, True), *([(way.values,)] if way is ways[0] else [])):
                try:
                    ask[0](str(path), *ask[1:])
                    outcome.append("read")
                except Unreadable as error:
                    outcome.append(str(error) or "without a reason")
        signal.alarm(0)
        taken = time.monotonic() - began
        yield {"name": path.name, "outcome": outcome, "seconds": taken, "MiB": _mebibytes() - before}


def _mebibytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    for row in read(Path(sys.argv[1])):
        print(json.dumps(row), flush=True)
