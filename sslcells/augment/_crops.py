"""Shared by the recipes: drawing crops, and cropping, rotating and blurring cells."""

import math
from typing import Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from sslcells.augment._draws import Draws
from sslcells.augment._operations import blur, on_some, warp
from sslcells.config import Recipe


class Crops(Recipe):
    """A recipe that crops."""

    min_scale: float = Field(0.4, gt=0, le=1)
    """Smallest crop, as a fraction of the image's area."""
    max_scale: float = Field(1.0, gt=0, le=1)
    """Largest crop, as a fraction of the image's area."""

    @model_validator(mode="after")
    def _scales(self) -> Self:
        if self.min_scale > self.max_scale:
            raise ValueError(f"min_scale={self.min_scale} is above max_scale={self.max_scale}")
        return self


_TRIES = 10
_RATIO = 3 / 4, 4 / 3
"""narrowest and widest crop, width by height"""


def random_resized_crop(config: Crops, height: int, width: int, draws: Draws) -> Tensor:
    """Crops as torchvision's RandomResizedCrop draws them: (N, 4) left, top, width and height, in whole pixels.

    Area and ratio are drawn up to ten times until the crop fits into the image; otherwise it is the largest centred
    crop with an allowed ratio. Trimming crops that do not fit would make large crops too frequent.
    """
    low, high = map(math.log, _RATIO)
    found = torch.zeros(len(draws), dtype=torch.bool)
    ratio = min(max(width / height, _RATIO[0]), _RATIO[1])
    whole = (width, round(width / ratio)) if width / height < ratio else (round(height * ratio), height)
    size = torch.tensor([whole], dtype=torch.float32).repeat(len(draws), 1)  # (N, 2) width and height
    for _ in range(_TRIES):
        area = height * width * draws.uniform(config.min_scale, config.max_scale)
        ratios = draws.uniform(low, high).exp()
        tried = torch.stack([(area * ratios).sqrt(), (area / ratios).sqrt()], 1).round()
        fits = ((tried >= 1) & (tried <= torch.tensor([width, height]))).all(1)
        size = torch.where((fits & ~found)[:, None], tried, size)
        found |= fits
    room = torch.tensor([width, height]) - size
    at = (torch.stack([draws.uniform(), draws.uniform()], 1) * (room + 1)).floor().minimum(room)
    return torch.cat([torch.where(found[:, None], at, (room / 2).floor()), size], 1)


class CellCrops(Crops):
    """A recipe for cells: the centre of the image stays in the middle half of the crop, and orientation is random."""

    rotate: bool = True
    """Rotate by a random angle."""
    blur: float = Field(0.3, ge=0, le=1)
    """Probability of a blur, with sigma up to 2 % of the size, or 0.6 pixels if that is more."""


def cropped(config: CellCrops, x: Tensor, draws: Draws, zoom: float = 0.0) -> Tensor:
    """A crop for each view, rotated and mirrored: (B, C, H, W), as `warp` takes them → (V·B, C, S, S).

    With `zoom`, it is larger or smaller by up to exp(zoom).

    A crop keeps the image's aspect ratio up to a factor of exp(±0.1), and has the drawn area; it is not trimmed to fit.
    Where it reaches beyond the image, the image is reflected.
    """
    side = draws.uniform(config.min_scale, config.max_scale).sqrt()
    if zoom:
        side = side * draws.uniform(-zoom, zoom).exp()
    ratio = draws.uniform(-0.1, 0.1).exp()
    half = torch.stack([side * ratio, side / ratio], 1)
    slack = torch.minimum((1 - half).clamp_min(0), half / 2)
    centre = slack * torch.stack([draws.uniform(-1, 1), draws.uniform(-1, 1)], 1)
    angle = draws.uniform(0, 2 * math.pi) if config.rotate else torch.zeros(len(draws))
    flip = torch.stack([draws.chance(0.5), draws.chance(0.5)], 1)
    return warp(x, config.size, centre, half, angle, flip)


def blurred(config: CellCrops, x: Tensor, draws: Draws) -> Tensor:
    """Blur some of the images: (N, C, S, S) → the same."""
    most = max(0.6, 0.02 * config.size)
    sigma = draws.uniform(0.3, most)
    return on_some(x, draws.chance(config.blur), lambda y, s: blur(y, s, most), sigma)
