"""TIFF files through tifffile: their tags say what the numbers mean, which axes there are, which files are a set."""

import logging
import os
import struct
from types import TracebackType
from typing import Any, Self

import numpy as np
import tifffile
from numpy.typing import NDArray
from tifffile import COMPRESSION, EXTRASAMPLE, PHOTOMETRIC

from sslcells.data._decode import ome
from sslcells.data._decode.axes import MOST, check_level
from sslcells.data._decode.meaning import Alpha, Meaning, said
from sslcells.data._decode.pixel_size import Scale, of_tiff

MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")

_ORIENTATION = 274
_GREY = (PHOTOMETRIC.MINISBLACK, PHOTOMETRIC.MINISWHITE)
_PILLOWS = (PHOTOMETRIC.SEPARATED, PHOTOMETRIC.YCBCR)
"""colours that Pillow converts, up to 8 bits"""
_MOST_PAGES = 2**20
_MOST_XML = 2**26
"""bytes of a companion file that are read"""

# What tifffile tells its log is found out here and said in an error; it would print it for every damaged file.
logging.getLogger("tifffile").addHandler(logging.NullHandler())
logging.getLogger("tifffile").propagate = False


class Tiff:
    """The series of a TIFF file that holds its image, as an `axes.Source`."""

    def __init__(self, file: str, level: int = 0) -> None:
        self._opened = _opened(file)
        try:
            self.base = _series(self._opened, file)
            check_level(level, len(self.base.levels))
            self.series = self.base.levels[level]
            self.page: Any = self.series.keyframe
            _decodable(self.page)
            whole = zip(self.series.axes, self.series.shape, strict=True)
            kept = [(axis, int(n)) for axis, n in whole if n != 1 or axis in "YX"]
            self.axes = "".join(axis for axis, _ in kept)
            self.shape = tuple(n for _, n in kept)
            self.dtype = self.series.dtype
        except BaseException:
            self._opened.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._opened.close()

    def load(self, at: dict[str, int]) -> NDArray[Any]:
        """The values at these places; only the pages that hold them are read."""
        page_axes = zip(self.page.axes, self.page.shape, strict=True)
        inner = tuple(int(n) for axis, n in page_axes if n != 1 or axis in "YX")
        count = len(self.axes) - len(inner)
        outer = self.shape[:count]
        paged = self.shape[count:] == inner and int(np.prod(outer)) == len(self.series)
        if not paged or any(axis in self.axes[count:] for axis in at):
            return self._whole(at)
        index = tuple(at.get(axis, slice(None)) for axis in self.axes[:count])
        numbers = np.arange(len(self.series)).reshape(outer)[index]
        pages = [self.series[int(n)] for n in numbers.ravel()]
        _present(pages)
        each = [_array(page).reshape(inner) for page in pages]
        values = each[0] if len(each) == 1 else np.stack(each)
        return values.reshape(*numbers.shape, *inner)

    def _whole(self, at: dict[str, int]) -> NDArray[Any]:
        """Of a series whose planes are not its pages: all of it is read."""
        index = tuple(at.get(axis, slice(None)) for axis in self.axes)
        _present(_pages(self.series))
        if self.series.dataoffset is not None and self.page.is_memmappable:  # one block, of which a part is wanted
            end, size = self.series.dataoffset + self.series.nbytes, self._opened.filehandle.size
            if end > size:
                raise ValueError(f"truncated: it names {end} bytes and has {size}")
            return np.array(self.series.asarray(out="memmap").reshape(self.shape)[index])
        if self.series.nbytes > MOST:
            raise ValueError(f"{said(self.dtype, self.shape)} {self.axes}: its planes cannot be read one by one")
        values: NDArray[Any] = self.series.asarray(maxworkers=1).reshape(self.shape)
        return values[index]

    def meaning(self, stack: bool = False) -> Meaning:
        """What the tags say of the samples of a grey or colour image, or of the channels of a stack.

        Raises:
            ValueError: with type, shape and the name of the colours, if they are not grey, RGB or a palette.
        """
        page, photometric = self.page, self.page.photometric
        bits = self._bits()
        orientation = self._orientation()
        inverted = photometric == PHOTOMETRIC.MINISWHITE
        samples = int(self.shape[self.axes.index("S")]) if "S" in self.axes else 1
        what = f"{said(self.dtype, self.shape)} {self.axes}"
        if stack:
            if photometric == PHOTOMETRIC.PALETTE:
                raise ValueError(f"{what}: its numbers are places in a palette of colours, not intensities")
            return Meaning(inverted=inverted, bits=bits, orientation=orientation)
        if (photometric == PHOTOMETRIC.PALETTE and samples == 1) or self.pillows:
            return Meaning(3, orientation=orientation)
        colours = 3 if photometric == PHOTOMETRIC.RGB else 1
        if photometric not in (*_GREY, PHOTOMETRIC.RGB) or samples < colours:
            raise ValueError(f"{what}: {_name(photometric)} of {samples} samples is not read")
        extra = tuple(page.extrasamples)
        alpha: Alpha = "none"
        if samples > colours:
            first = extra[0] if extra else EXTRASAMPLE.UNASSALPHA if samples == 4 else EXTRASAMPLE.UNSPECIFIED
            alpha = {EXTRASAMPLE.ASSOCALPHA: "premultiplied", EXTRASAMPLE.UNASSALPHA: "straight"}.get(first, "none")  # type: ignore[assignment]
            if colours == 1 and (alpha == "none" or samples > 2):
                raise ValueError(
                    f"{what}: {samples} channels are not colours: set data.stack=auto data.channels={samples}"
                )
        return Meaning(colours, alpha, inverted, bits, orientation)

    def coloured(self, values: NDArray[Any]) -> NDArray[Any]:
        """(H, W, 1) places in the palette → (H, W, 3) uint8, if there is one; other values as they are."""
        if self.page.photometric != PHOTOMETRIC.PALETTE:
            return values
        palette = self.page.colormap
        if palette is None or palette.ndim != 2 or palette.shape[0] != 3:
            raise ValueError(f"{said(values.dtype, values.shape)}: its palette is missing")
        if values.dtype.kind not in "bu" or int(values.max(initial=0)) >= palette.shape[1]:
            raise ValueError(f"{said(values.dtype, values.shape)}: its palette has {palette.shape[1]} colours only")
        eight = palette if palette.max(initial=0) < 256 else palette >> 8  # some files keep 8 bits in the 16
        coloured: NDArray[Any] = eight.T.astype(np.uint8)[values[..., 0].astype(np.intp)]
        return coloured

    @property
    def pillows(self) -> bool:
        """True for the 8-bit colours that Pillow converts to RGB: CMYK and YCbCr, of a file of one page."""
        return self.page.photometric in _PILLOWS and self.dtype == np.uint8 and self.axes in ("YXS", "SYX")

    def kind(self) -> str:
        """Such as `TIFF RGB 16 bit`."""
        photometric, bits = self.page.photometric, np.max(self.page.bitspersample)
        alpha = "A" if EXTRASAMPLE.UNASSALPHA in self.page.extrasamples else ""
        alpha = "a" if EXTRASAMPLE.ASSOCALPHA in self.page.extrasamples else alpha
        grey = "black and white" if bits == 1 else "grey and alpha" if alpha else "grey"
        names = {PHOTOMETRIC.RGB: f"RGB{alpha}", PHOTOMETRIC.PALETTE: "palette", PHOTOMETRIC.SEPARATED: "CMYK"}
        colours = grey if photometric in _GREY else names.get(photometric, _name(photometric))
        dtype = np.dtype(self.dtype)
        number = f"{bits} bit" if dtype.kind in "bu" else f"{bits} bit signed" if dtype.kind == "i" else str(dtype)
        return f"TIFF {colours} {number}"

    def part_of(self, file: str) -> str:
        """The first file of the set that this one belongs to, where it is another one; else empty."""
        files = list(dict.fromkeys(_filename(page) for page in _pages(self.base) if page is not None))
        own = os.path.basename(file)
        return "" if not files or own == files[0] else files[0]

    def scale(self) -> Scale:
        """µm per pixel of the level."""
        whole = of_tiff(self._opened, self.base)
        widths = [s.shape[s.axes.index("X")] for s in (self.base, self.series)]
        return whole._replace(um=whole.um * widths[0] / widths[1])

    def others(self) -> int:
        """Further series of the file, which are not read, such as thumbnails; positions of OME-TIFF count as such."""
        return len(self._opened.series) - 1

    def _bits(self) -> int | None:
        """Significant bits, where the file names fewer than its type has, or OME names them."""
        each = {int(n) for n in np.atleast_1d(self.page.bitspersample)}
        if np.dtype(self.dtype).kind in "bu" and max(each) < 8 * np.dtype(self.dtype).itemsize:
            return max(each)
        if self.base.kind == "ome" and np.dtype(self.dtype).kind == "u":
            named = {x.get("SignificantBits", "") for x in ome.pixels(self._opened.ome_metadata)}
            text = named.pop() if len(named) == 1 else ""
            if text.isdigit() and 0 < int(text) <= 8 * np.dtype(self.dtype).itemsize:
                return int(text)
        return None

    def _orientation(self) -> int:
        tag = self.page.tags.get(_ORIENTATION) if hasattr(self.page, "tags") else None
        return int(tag.value) if tag is not None and tag.value in range(1, 9) else 1


def _opened(file: str) -> Any:
    """The opened file; of an OME-TIFF set whose metadata lie in another file with these."""
    try:
        _ends(file)
        opened = tifffile.TiffFile(file)
    except tifffile.TiffFileError as error:
        raise ValueError("empty file" if not os.path.getsize(file) else f"damaged TIFF: {error}") from error
    try:
        if not opened.pages:
            raise ValueError("damaged TIFF: no image in it")
        if not opened.is_ome:
            return opened
        root = ome.parsed(opened.ome_metadata)
        master = next((x.get("MetadataFile", "") for x in root if ome.tag(x) == "BinaryOnly"), None)
        if master is None:
            _siblings(root, file)
            return opened
        beside = _beside(file, master)
        opened.close()
        if master.lower().endswith((".tif", ".tiff")):
            opened = tifffile.TiffFile(beside)
            text = opened.ome_metadata
        else:
            if os.path.getsize(beside) > _MOST_XML:
                raise ValueError(f"its metadata in {master} are larger than {_MOST_XML >> 20} MiB")
            with open(beside, encoding="utf-8") as companion:
                text = companion.read()
            opened = tifffile.TiffFile(file, omexml=text)
        _siblings(ome.parsed(text), beside if master.lower().endswith((".tif", ".tiff")) else file)
        return opened
    except BaseException:
        opened.close()
        raise


def _series(opened: Any, file: str) -> Any:
    """The first series that has pages in this file: of OME-TIFF sets each file may hold another position."""
    found = opened.series
    if not found:
        raise ValueError("damaged TIFF: no image in it")
    if opened.is_ome and found[0].kind != "ome":
        raise ValueError("its OME metadata do not describe the images in it")
    if opened.is_imagej and found[0].kind not in ("imagej", "ome"):
        raise ValueError("its ImageJ metadata do not describe the images in it")
    own = os.path.basename(file)
    several = len(found) > 1 and found[0].kind == "ome"
    mine = [s for s in found if any(p is not None and _filename(p) == own for p in _pages(s))] if several else []
    return mine[0] if mine else found[0]


def _siblings(root: Any, file: str) -> None:
    """Raise unless the other files of an OME-TIFF set lie beside this one: tifffile would put zeros in their place."""
    own = root.get("UUID")
    for element in root.iter():
        sizes = [int(element.get(f"Size{axis}", 1)) for axis in "CZT"] if ome.tag(element) == "Pixels" else []
        if sizes and np.prod([float(n) for n in sizes]) > _MOST_PAGES:  # tifffile would make a list of them all
            raise ValueError(f"its OME metadata name {'×'.join(map(str, sizes))} planes (C, Z, T)")
        name = element.get("FileName")
        another = name is not None and name.lower() != os.path.basename(file).lower()
        if ome.tag(element) == "UUID" and another and (own is None or element.text != own):
            _ends(_beside(file, name))


def _ends(file: str) -> None:
    """Raise where the list of pages leads back to itself: tifffile would follow it for ever."""
    with open(file, "rb") as opened:
        head = opened.read(16)
        order = "<" if head[:2] == b"II" else ">"
        big = head[2:4] in (b"+\0", b"\0+")
        number, count, tag = ("Q", "Q", 20) if big else ("I", "H", 12)
        width, counted = struct.calcsize(number), struct.calcsize(f"<{count}")
        at, seen = _number(head[8:16] if big else head[4:8], order + number), set[int]()
        while at:
            if at in seen or len(seen) >= _MOST_PAGES:
                raise ValueError("damaged TIFF: its list of pages leads back to itself" if at in seen
                                 else f"it has more than {_MOST_PAGES} pages")  # fmt: skip
            seen.add(at)
            opened.seek(at)
            tags = _number(opened.read(counted), order + count)
            end = at + counted + tags * tag
            if tags == 0 or end > 2**62:
                return
            opened.seek(end)
            at = _number(opened.read(width), order + number)


def _number(data: bytes, form: str) -> int:
    """One number; 0 where the file has ended."""
    return int(struct.unpack(form, data)[0]) if len(data) == struct.calcsize(form) else 0


def _beside(file: str, name: str) -> str:
    """The path of another file of the same set."""
    other = os.path.join(os.path.dirname(file), name)
    if not name or os.path.basename(name) != name or "\\" in name:
        raise ValueError(f"a part of it lies in another folder: {name!r}")
    if not os.path.isfile(other):
        raise ValueError(f"a part of it is missing: {name}")
    return other


def _pages(series: Any) -> list[Any]:
    return [series[i] for i in range(len(series))]


def _filename(page: Any) -> str:
    return str(page.parent.filename)


def _decodable(page: Any) -> None:
    """Raise where tifffile would answer with an empty array."""
    if page.dtype is None or page._dtype is None:
        raise ValueError(
            f"{_name(page.sampleformat)} of {page.bitspersample} bits {tuple(page.shape)}: a type that is not read"
        )


def _array(page: Any) -> NDArray[Any]:
    """The values of a page; the other files of a set are open only for this."""
    file = page.parent.filehandle
    closed = file.closed
    if closed:
        file.open()
    try:
        values: NDArray[Any] = page.asarray(maxworkers=1)
    finally:
        if closed:
            file.close()
    return values


def _present(pages: list[Any]) -> None:
    """Raise where pages, strips or tiles are not in the file: tifffile would put zeros in their place."""
    missing = sum(page is None for page in pages)
    if missing:
        raise ValueError(f"{missing} of its {len(pages)} pages are missing")
    for page in pages:
        offsets, counts = page.dataoffsets, page.databytecounts
        if not len(offsets) or len(offsets) != len(counts) or 0 in counts or 0 in offsets:
            raise ValueError("strips or tiles of it are missing")
        key = page.keyframe
        alone = key.compression == COMPRESSION.NONE and not key.is_tiled  # tifffile joins strips that follow another
        expected = len(offsets) if alone else int(np.prod([int(n) for n in key.chunked]))
        if len(offsets) < expected:
            raise ValueError(f"{expected - len(offsets)} of its {expected} strips or tiles are missing")
        ends = max(int(o) + int(n) for o, n in zip(offsets, counts, strict=True))
        size = page.parent.filehandle.size
        if ends > size:
            raise ValueError(f"truncated: it names {ends} bytes and has {size}")


def _name(value: Any) -> str:
    return str(getattr(value, "name", value))
