"""What data sets of image files share: the fields that say how files are read, and their check at the start."""

import logging
from collections.abc import Set
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from sslcells.config import ConfigError, Section
from sslcells.data._decode import Decoder, Fit, Size
from sslcells.data._decode.axes import Planes, Stack
from sslcells.data._decode.meaning import Intensity
from sslcells.data._planes import to_look_at
from sslcells.data._scan import Listing
from sslcells.data._sources import check_pattern
from sslcells.data._verified import Looks, look

_SHOWN = 10  # broken images in one message

_log = logging.getLogger(__name__)


def _height_width(value: Any) -> Any:
    if isinstance(value, int):
        return value, value
    if value is None or isinstance(value, (list, tuple)):
        return value
    raise ValueError("should be pixels, such as 128, or [height, width]")


class Files(Section):
    """Fields of every data set of image files: how files become pixels, and how they are checked."""

    size: Annotated[
        tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]] | None, BeforeValidator(_height_width)
    ] = None
    """Resize images to this many pixels: one number, or [height, width]; none if all files have the same size."""
    fit: Fit = "crop"
    """`crop` cuts off the ends of the longer side, `pad` repeats the border pixels, `stretch` distorts the image."""
    channels: int = Field(3, ge=1, le=12)
    """Convert images to grey (1) or RGB (3), transparent parts to white. With `stack`: channels in the files."""
    stack: Stack | None = None
    """For TIFF files whose channels are not colours (fluorescence): the axis, `first` (C, H, W), `last` or `auto`."""
    intensity: Intensity = "percentile"
    """Scaling of images above 8 bit, and of each channel of a stack, to 0..255. `percentile`: between its own
    `percentiles` (the three colours on one scale); `full`: over `range`, the same for every image."""
    percentiles: tuple[Annotated[float, Field(ge=0, le=100)], Annotated[float, Field(ge=0, le=100)]] = (0.1, 99.9)
    """Percentiles of an image, or of a channel of a stack, that become 0 and 255."""
    range: tuple[float, float] | None = None
    """With `intensity: full`: the values that become 0 and 255, such as [0, 4095] for 12 bits; none: the range that
    the file or its type names, and images that leave more than three quarters of it empty are refused."""
    z: Planes = "middle"
    """Planes that a file calls Z or T: read the `middle` one, their maximum (`max`), or `each` as an image of its own,
    called file#t0z3, all of one source."""
    level: int = Field(0, ge=0)
    """Level of pyramids (OME-TIFF, OME-Zarr): 0 is the largest, each next one smaller."""
    um_per_pixel: float | None = Field(None, gt=0)
    """Scale that all images are brought to, in µm per pixel; `size` is then cut from the centre of each, and where an
    image is smaller its border pixels are repeated. none: images are not brought to one scale."""
    um_per_pixel_default: float | None = Field(None, gt=0)
    """µm per pixel of images of which neither a table nor the file says it; none: they are refused."""
    verify: Literal["full", "header", "none"] = "full"
    """Check at the start: decode every image once (`full`), read only headers, or check nothing."""
    on_error: Literal["stop", "skip"] = "stop"
    """On broken images at the start: stop, or leave them out with a warning."""
    cache: Literal["none", "ram"] = "none"
    """`ram` keeps decoded images in memory, shared by all processes of a machine, as far as `cache_gib` goes."""
    cache_gib: float = Field(4.0, gt=0)
    """With `cache: ram`: GiB of memory on each machine, for train first; other images are decoded each time."""
    decode: Literal["worker", "device"] = "worker"
    """`device`: plain JPEG files of train (8 bit, grey or YCbCr, upright) are decoded and resized on the device that
    trains, by nvJPEG on CUDA; other files, and all images for figures and embeddings, by the processes that read."""

    @model_validator(mode="after")
    def _channels(self) -> Self:
        if self.stack is None and self.channels not in (1, 3):
            raise ValueError(
                f"channels={self.channels} are not colours: use stack=auto, first or last to read them from TIFF files"
            )
        if self.percentiles[0] >= self.percentiles[1]:
            raise ValueError(f"percentiles={list(self.percentiles)}: the first must be below the second")
        if self.range is not None and self.range[0] >= self.range[1]:
            raise ValueError(f"range={list(self.range)}: the first must be below the second")
        if self.range is not None and self.intensity != "full":
            raise ValueError(f"range={list(self.range)} is for intensity=full, not for intensity={self.intensity}")
        return self

    @model_validator(mode="after")
    def _scale(self) -> Self:
        if self.um_per_pixel is None:
            if self.um_per_pixel_default is not None:
                raise ValueError(
                    f"um_per_pixel_default={self.um_per_pixel_default:g} has no use without um_per_pixel, the scale "
                    f"that images are brought to"
                )
            return self
        if self.size is None:
            raise ValueError(f"um_per_pixel={self.um_per_pixel:g} needs size=, the pixels of that scale to cut")
        if self.fit == "stretch":
            raise ValueError(f"fit=stretch distorts images, and um_per_pixel={self.um_per_pixel:g} keeps their scale")
        return self

    @model_validator(mode="after")
    def _on_device(self) -> Self:
        if self.decode == "worker":
            return self
        for field, why in {
            "cache": "it keeps what the processes that read decode",
            "stack": "it reads TIFF files, not JPEG",
            "level": "JPEG files are no pyramids",
            "um_per_pixel": "images are brought to one scale where they are read",
        }.items():
            if getattr(self, field) != Files.model_fields[field].default:
                raise ValueError(f"decode=device does not go with {field}={getattr(self, field)}: {why}; decode=worker")
        if self.size is None and self.verify == "none":
            raise ValueError("decode=device needs size= where images are not verified: they could differ in size")
        return self

    def decoder(self) -> Decoder:
        """The decoder that these fields describe."""
        scaling = (self.intensity, self.stack, self.percentiles, self.range)
        scale = (self.um_per_pixel, self.um_per_pixel_default)
        return Decoder(self.channels, self.size, self.fit, *scaling, self.z, self.level, *scale)


def one_group(pattern: str | None) -> str | None:
    """The pattern; a ValueError unless it is a regular expression with one group, the source."""
    if pattern is not None:
        check_pattern(pattern)
    return pattern


def one_lab(pattern: str | None) -> str | None:
    """As `one_group`, where the group is the laboratory."""
    if pattern is not None:
        check_pattern(pattern, "the laboratory")
    return pattern


def verify(
    config: Files, root: Path, listing: Listing, decoder: Decoder, folder: str, asked: Set[str] = frozenset()
) -> Looks:
    """Check the images as `verify` says, and read at least the headers of those that are asked for.

    Raises:
        ConfigError: on broken images, unless `on_error` is `skip`.
    """
    decoder = replace(decoder, um_per_pixel=None, um_per_pixel_default=None)  # files are not decoded again for another
    names = listing.names
    if config.verify == "none" and config.size is not None:
        asked = {*to_look_at(names, decoder), *asked}
        some = look(root, listing.only(asked), decoder, False, f"{folder} sets") if asked else Looks([], {}, 0)
        headers = iter(some.headers)
        return Looks([next(headers) if name in asked else None for name in names], {}, some.looked)
    looks = look(root, listing, decoder, config.verify == "full", folder)
    broken = looks.broken
    if broken and (config.on_error == "stop" or len(broken) == len(names)):
        shown = [f"  {root / name}: {reason}" for name, reason in list(broken.items())[:_SHOWN]]
        more = ["  …"] if len(broken) > _SHOWN else []
        advice = "; data.on_error=skip leaves them out" if len(broken) < len(names) else ""
        title = f"{len(broken)} of {len(names)} images are broken{advice}:"
        raise ConfigError("\n".join([title, *shown, *more]))
    if broken:
        name, reason = next(iter(broken.items()))
        _log.warning("%d of %d images are left out, such as %s: %s", len(broken), len(names), root / name, reason)
    if config.size is None:
        sizes: dict[Size, str] = {}
        for name, header in zip(names, looks.headers, strict=True):
            if header is not None:
                sizes.setdefault(header.size, name)
        if len(sizes) > 1:
            one, other = [f"{root / name} is {h}×{w}" for (h, w), name in list(sizes.items())[:2]]
            raise ConfigError(f"images have several sizes (height × width): {one}, {other}; set data.size=")
    return looks
