"""A trained encoder in Python: the network together with the preparation of its images."""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from sslcells.augment import resized
from sslcells.config import ConfigError, Run, load
from sslcells.data import DataError, Decoder, Unreadable, reading
from sslcells.data.folder import expanded, list_images, nearest_folder
from sslcells.data.loader import Readable
from sslcells.evaluation.encode import check_finite, encode_batches, eval_mode
from sslcells.models import files, width
from sslcells.standardise import standard_of
from sslcells.storage import is_file, is_folder
from sslcells.values import place

Picture = Tensor | Image.Image
Pictures = Picture | Sequence[Picture]
"""A tensor (N, C, H, W) or (C, H, W), uint8 or float in 0..1; a PIL image; or a sequence of images of any sizes."""


class Encoder(nn.Module):
    """Images of any size → features (N, F) float32; images are standardised, resized and normalised as in training.

    `backbone` is the bare network, which takes what `prepare` returns. Gradients flow; `sslcells.embed` computes none.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, backbone: nn.Module, spec: dict[str, Any], reading: dict[str, Any], digest: str) -> None:
        super().__init__()
        self.backbone = backbone
        self.channels: int = spec["channels"]
        self.size: int = spec["size"]
        self.features = width(backbone, self.channels, self.size)
        """F"""
        self.reading = reading
        """how files become pixels: size, fit, intensity, stack, percentiles, range, z, level, um_per_pixel"""
        self.decoder = _decoder(self.channels, reading)
        """reads files and PIL images; None if the channels are neither grey nor RGB, nor those of a stack of files"""
        self._whole: tuple[str, float] = spec.get("interpolation", "bilinear"), spec.get("crop", 1.0)
        self.digest = digest
        """equal for equal weights and preprocessing"""
        self.standard = standard_of(spec.get("standardise"))
        """brings images to what the encoder learned with; None if it takes them as they are"""
        self.register_buffer("mean", torch.tensor(spec["mean"])[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(spec["std"])[:, None, None], persistent=False)

    def forward(self, images: Pictures) -> Tensor:
        """Images → (N, F) float32 on the encoder's device.

        Raises:
            ValueError: if they are not images, or have another number of channels.
        """
        features: Tensor = self.backbone(self.prepare(images)).float()
        return features

    def prepare(self, images: Pictures) -> Tensor:
        """Images → (N, C, S, S) float32, standardised, resized and normalised, on the encoder's device.

        Raises:
            ValueError: as `forward`.
        """
        if isinstance(images, Tensor):
            batch = images if images.ndim == 4 else images[None]
            return self._normalised(batch)
        pixels = [self.pixels(image) for image in ([images] if isinstance(images, Image.Image) else images)]
        if not pixels:
            return self.mean.new_zeros(0, self.channels, self.size, self.size)
        if len({(x.shape, x.dtype) for x in pixels}) == 1:
            return self._normalised(torch.stack(pixels))
        return torch.cat([self._normalised(x[None]) for x in pixels])

    def pixels(self, image: Picture) -> Tensor:
        """One image of any size as (C, H, W): a tensor as it is, a PIL image decoded as image files are.

        Raises:
            ConfigError, ValueError: if it is not an image that the encoder takes.
        """
        if isinstance(image, Tensor):
            return image
        if not isinstance(image, Image.Image):
            raise ValueError(
                f"neither a PIL image nor a tensor: {type(image).__name__}; for numpy: PIL.Image.fromarray(x)"
            )
        if self.reader().stack is not None:
            raise ValueError(
                f"PIL images have 3 channels; the encoder takes {self.channels}: give it TIFF files or tensors"
            )
        return self.reader().pixels(image.copy())

    def reader(self) -> Decoder:
        """The decoder.

        Raises:
            ConfigError: if image files cannot have this number of channels.
        """
        if self.decoder is None:
            raise ConfigError(
                f"the encoder takes images of {self.channels} channels; files and PIL images are read as 1 or 3: "
                f"give it tensors (N, {self.channels}, H, W)"
            )
        return self.decoder

    def _normalised(self, pixels: Tensor) -> Tensor:
        """(N, C, H, W) uint8 or float in 0..1 → (N, C, S, S)."""
        if pixels.ndim != 4 or pixels.shape[1] != self.channels:
            raise ValueError(
                f"the encoder takes images (N, {self.channels}, H, W) or ({self.channels}, H, W); "
                f"these have the shape {tuple(pixels.shape)}"
            )
        pixels = pixels.to(self.mean.device, non_blocking=True)
        if pixels.dtype == torch.uint8:
            x = pixels.float() / 255
        elif pixels.is_floating_point():
            x = pixels.float()
            low, high = (x.min().item(), x.max().item()) if x.numel() else (0.0, 1.0)
            if not (low >= 0 and high <= 1):
                raise ValueError(
                    f"float images are pixels in 0..1; these go from {low:.4g} to {high:.4g}. uint8 images are 0..255; "
                    f"give normalised images to encoder.backbone"
                )
        else:
            raise ValueError(f"images are uint8 or float in 0..1, not {pixels.dtype}")
        if self.standard is not None:
            x = self.standard(x)
        return (resized(x, self.size, *self._whole) - self.mean) / self.std


def _decoder(channels: int, reading: dict[str, Any]) -> Decoder | None:
    stack, size = reading.get("stack"), reading["size"]
    if stack is None and channels not in (1, 3):
        return None
    low, high = reading.get("percentiles", (0.1, 99.9))  # older files name neither these nor the rest
    size = None if size is None else (int(size[0]), int(size[1]))
    span = reading.get("range")
    span = None if span is None else (float(span[0]), float(span[1]))
    more = {"z": reading.get("z", "middle"), "level": reading.get("level", 0)}
    more |= {key: reading.get(key) for key in ("um_per_pixel", "um_per_pixel_default")}
    return Decoder(channels, size, reading["fit"], reading["intensity"], stack, (low, high), span, **more)


def load_encoder(run: str | os.PathLike[str] | Run, device: str | torch.device = "cpu") -> Encoder:
    """Load the encoder of a run's folder, or of an exported one, in eval mode.

    >>> import sslcells, torch
    >>> encoder = sslcells.load_encoder("runs/quickstart")
    >>> images = torch.zeros(5, 3, 48, 48, dtype=torch.uint8)
    >>> features = encoder(images)
    >>> features.shape == (5, encoder.features)
    True

    Raises:
        ConfigError: if there is no such folder, or no complete encoder in it.
    """
    folder = find_run(run.folder if isinstance(run, Run) else run)
    backbone, spec = files.load(folder)
    how = spec.get("reading") or _reading_of(folder, spec["size"])
    return Encoder(backbone, spec, how, _digest(folder, spec, how)).eval().to(device)


def embed(
    images: str | os.PathLike[str] | Pictures | Sequence[str | os.PathLike[str]],
    encoder: "Encoder | str | os.PathLike[str]",
    batch: int = 64,
) -> Tensor:
    """Compute the features of images: (N, F) float32 on the CPU, one row an image, in their order.

    `images` is a folder, whose images at any depth are sorted by path; a file; a list of files; or what an Encoder
    takes. `encoder` is an Encoder or a run's folder; it runs in eval mode, without gradients, on `batch` images at a
    time.

    >>> import sslcells
    >>> vectors = sslcells.embed("cells", "runs/quickstart")
    >>> len(vectors)  # the folder "cells" holds two images
    2

    Raises:
        ConfigError: if there is no such folder, image or encoder.
        DataError: if a file cannot be read, naming it, or the encoder gives features that are not finite.
        ValueError: if tensors are not images, or have another number of channels.
    """
    if not isinstance(encoder, Encoder):
        encoder = load_encoder(encoder)
    network = encoder
    with eval_mode(network):
        encoded = encode_batches(_parts(images, network, batch), lambda part: network(part.pixels))
        rows = [finite(z.cpu(), network) for _, z in encoded if z is not None]
    return torch.cat(rows) if rows else torch.zeros(0, network.features)


def finite(rows: Tensor, encoder: Encoder) -> Tensor:
    """Return features (N, F) unchanged.

    Raises:
        NotFinite: if some are NaN or infinite.
    """
    check_finite(rows, encoder=f"the encoder {encoder.digest}")
    return rows


def _parts(images: Any, encoder: Encoder, batch: int) -> Iterator[Readable]:
    """The images, `batch` at a time; a file is opened when its part is read."""
    if isinstance(images, (str, os.PathLike)):
        images = _files(Path(images), encoder.decoder)
    elif isinstance(images, Image.Image) or (isinstance(images, Tensor) and images.ndim == 3):
        images = [images]
    for start in range(0, len(images), batch):
        part = images[start : start + batch]
        if not isinstance(part, Tensor):
            part = [
                _opened(x, encoder.reader()) if isinstance(x, (str, os.PathLike)) else encoder.pixels(x) for x in part
            ]
        yield Readable(len(part), list(range(start, start + len(part))), part, [])


def _opened(file: str | os.PathLike[str], decoder: Decoder) -> Tensor:
    try:
        return decoder(os.fspath(file))
    except Unreadable as error:
        raise DataError(f"{file}: {error}") from None


def _files(path: Path, decoder: Decoder | None) -> list[Path]:
    """The images of the path if it is a file or OME-Zarr, else the image files below it, sorted by path."""
    path = place(path)
    if is_file(path) or path.suffix.lower() == ".zarr":
        names = [path.name] if decoder is None else expanded(path.parent, [path.name], decoder)
        return [path.parent / name for name in names]
    return [path / name for name in list_images(path, decoder)]


def find_run(path: str | os.PathLike[str]) -> Path:
    """Find the folder of an encoder from its path, or from the path of one of its two files.

    Raises:
        ConfigError: if there is none, with the most similar name that exists.
    """
    folder = place(path)
    if folder.name in (files.SPEC, files.WEIGHTS) and is_file(folder):
        folder = folder.parent
    if not is_folder(folder):
        raise ConfigError(f"{path}: no such run's folder{nearest_folder(folder)}")
    if not is_file(folder / files.SPEC) and is_file(folder / "config.yaml"):
        raise ConfigError(f"{path} holds no {files.SPEC}: the run has not finished; its own command resumes it")
    return folder


def _reading_of(folder: Path, size: int) -> dict[str, Any]:
    """How files are read, from the configuration beside an encoder.json that does not say it."""
    config = folder / "config.yaml"
    return reading(load(str(config)).data if is_file(config) else None, size)


def _digest(folder: Path, spec: dict[str, Any], how: dict[str, Any]) -> str:
    with (folder / files.WEIGHTS).open("rb") as weights:
        whole = hashlib.file_digest(weights, "sha256")
    what = {k: v for k, v in spec.items() if k not in {"timm_version", "reading"}} | {"reading": how}
    whole.update(json.dumps(what, sort_keys=True).encode())
    return whole.hexdigest()[:16]
