"""A trained encoder in Python: the network together with the preparation of its images."""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn

from sslcells.augment import resized
from sslcells.config import ConfigError, Run, load
from sslcells.data import Decoder, reading
from sslcells.evaluation.encode import check_finite
from sslcells.models import files, width
from sslcells.names import CONFIG
from sslcells.run.folder import check_is_there
from sslcells.standardise import standard_of
from sslcells.storage import is_file
from sslcells.values import place

Picture = Tensor | Image.Image
Pictures = Picture | Sequence[Picture]
"""A tensor (N, C, H, W) or (C, H, W), uint8 or float in 0..1; a PIL image; or a sequence of images of any sizes."""
Lab = str | Tensor | None
"""Where images were taken: the name of a laboratory that the encoder knows; or what `Encoder.laboratory` measured, (P,)
or for N images (N, P); None for an encoder that does not standardise by laboratory."""


class Prepared(NamedTuple):
    """Images as the network takes them."""

    x: Tensor
    """(N, C, S, S) float32"""
    failed: Tensor
    """(N,) bool: the standardisation looked for a cell and found none; all false if it looks for none"""


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

    @property
    def by_lab(self) -> bool:
        """True if images need to know their laboratory."""
        return self.standard is not None and self.standard.by_lab

    def forward(self, images: Pictures, lab: Lab = None) -> Tensor:
        """Images → (N, F) float32 on the encoder's device.

        Raises:
            ValueError: if they are not images, or have another number of channels; or if the encoder standardises by
                laboratory, and `lab` is missing or unknown.
        """
        return self.features_of(self.prepared(images, lab))

    def features_of(self, prepared: Prepared) -> Tensor:
        """(N, F) float32 of images that `prepared` returned."""
        features: Tensor = self.backbone(prepared.x).float()
        return features

    def prepare(self, images: Pictures, lab: Lab = None) -> Tensor:
        """Images → (N, C, S, S) float32, standardised, resized and normalised, on the encoder's device.

        Raises:
            ValueError: as `forward`.
        """
        return self.prepared(images, lab).x

    def prepared(self, images: Pictures, lab: Lab = None) -> Prepared:
        """As `prepare`, and in which images no cell was found.

        Raises:
            ValueError: as `forward`.
        """
        groups = self._stacked(images)
        rows = self._rows(lab, sum(map(len, groups)))
        if not groups:
            nothing = self.mean.new_zeros(0, self.channels, self.size, self.size)
            return Prepared(nothing, torch.zeros(0, dtype=torch.bool, device=nothing.device))
        each = [None] * len(groups) if rows is None else torch.split(rows, [len(group) for group in groups])
        parts = [self._normalised(group, of) for group, of in zip(groups, each, strict=True)]
        return Prepared(*map(torch.cat, zip(*parts, strict=True)))

    def laboratory(self, images: Pictures) -> Tensor:
        """(P,) what stands for the images of a new laboratory, from some of them, about a hundred: see `Lab`.

        Raises:
            ValueError: if they are not images, or one alone, or the encoder does not standardise by laboratory.
        """
        if self.standard is None or not self.standard.by_lab:
            raise ValueError("this encoder does not standardise by laboratory: it needs to know none")
        groups = self._stacked(images)
        if (count := sum(map(len, groups))) < 2:
            raise ValueError(f"a laboratory is measured on several of its images, about a hundred; here is {count}")
        with torch.no_grad():
            return torch.tensor(self.standard.laboratory(self._in_range(group) for group in groups)["row"])

    def _rows(self, lab: Lab, count: int) -> Tensor | None:
        """(count, P) what stands for the images of a laboratory; None if images go by themselves."""
        if self.standard is None or not self.standard.by_lab:
            if lab is not None:
                raise ValueError("lab= is for encoders that standardise by laboratory; this one takes each image alone")
            return None
        if lab is None:
            known = ", ".join(self.standard.spec.get("labs") or ()) or "none"
            raise ValueError(
                f"this encoder standardises by laboratory (standardise.by=lab), and that of these images is not said: "
                f"give lab=NAME (known: {known}), or of a new one lab=encoder.laboratory(some of its images)"
            )
        row = self.standard.row(lab) if isinstance(lab, str) else lab
        return row.expand(count, -1) if row.ndim == 1 else row

    def _stacked(self, images: Pictures) -> list[Tensor]:
        """Images as (n, C, H, W) each: all in one if they are of one size, else one by one."""
        if isinstance(images, Tensor):
            return [images if images.ndim == 4 else images[None]]
        pixels = [self.pixels(image) for image in ([images] if isinstance(images, Image.Image) else images)]
        if len({(x.shape, x.dtype) for x in pixels}) == 1:
            return [torch.stack(pixels)]
        return [x[None] for x in pixels]

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

    def _normalised(self, pixels: Tensor, rows: Tensor | None) -> Prepared:
        """(N, C, H, W) uint8 or float in 0..1, and rows (N, P) of their laboratories → (N, C, S, S)."""
        x, failed = self._in_range(pixels), torch.zeros(len(pixels), dtype=torch.bool, device=self.mean.device)
        if self.standard is not None:
            x, _, failed = self.standard.found(x, rows)
        return Prepared((resized(x, self.size, *self._whole) - self.mean) / self.std, failed)

    def _in_range(self, pixels: Tensor) -> Tensor:
        """(N, C, H, W) uint8 or float in 0..1 → the same as float32 on the encoder's device."""
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
        return x


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


def sides(encoder: Encoder) -> tuple[int, int]:
    """Height and width of the pixels that the exported programs take."""
    if encoder.standard is None or encoder.reading["size"] is None:
        return encoder.size, encoder.size
    height, width = encoder.reading["size"]
    return int(height), int(width)


def finite(rows: Tensor, encoder: Encoder) -> Tensor:
    """Return features (N, F) unchanged.

    Raises:
        NotFinite: if some are NaN or infinite.
    """
    check_finite(rows, encoder=f"the encoder {encoder.digest}")
    return rows


def find_run(path: str | os.PathLike[str]) -> Path:
    """Find the folder of an encoder from its path, or from the path of one of its two files.

    Raises:
        ConfigError: if there is none, with the most similar name that exists.
    """
    folder = place(path)
    if folder.name in (files.SPEC, files.WEIGHTS) and is_file(folder):
        folder = folder.parent
    check_is_there(folder, path)
    if not is_file(folder / files.SPEC) and is_file(folder / CONFIG):
        raise ConfigError(f"{path} holds no {files.SPEC}: the run has not finished; its own command resumes it")
    return folder


def _reading_of(folder: Path, size: int) -> dict[str, Any]:
    """How files are read, from the configuration beside an encoder.json that does not say it."""
    config = folder / CONFIG
    return reading(load(str(config)).data if is_file(config) else None, size)


def _digest(folder: Path, spec: dict[str, Any], how: dict[str, Any]) -> str:
    with (folder / files.WEIGHTS).open("rb") as weights:
        whole = hashlib.file_digest(weights, "sha256")
    what = {k: v for k, v in spec.items() if k not in {"timm_version", "reading"}} | {"reading": how}
    whole.update(json.dumps(what, sort_keys=True).encode())
    return whole.hexdigest()[:16]
