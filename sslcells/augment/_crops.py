"""What recipes share: a random crop's bounds, and how cells are cropped, turned and blurred."""

import math
from typing import Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from sslcells.augment._draws import Draws
from sslcells.augment._operations import blur, odd, on_some, warp
from sslcells.config import Recipe


class Crops(Recipe):
    """A recipe that crops."""

    min_scale: float = Field(0.4, gt=0, le=1)
    """Smallest crop, as a part of the image's area."""
    max_scale: float = Field(1.0, gt=0, le=1)
    """Largest crop."""

    @model_validator(mode="after")
    def _scales(self) -> Self:
        if self.min_scale > self.max_scale:
            raise ValueError(f"min_scale={self.min_scale} is above max_scale={self.max_scale}")
        return self


class CellCrops(Crops):
    """A recipe for cells: the middle of the image stays in the crop's middle half, and there is no up or down."""

    rotate: bool = True
    """Turn by any angle."""
    blur: float = Field(0.3, ge=0, le=1)
    """Probability of a blur, sigma up to 2 % of the size."""


def cropped(config: CellCrops, x: Tensor, draws: Draws) -> Tensor:
    """A crop of each image, turned and mirrored: (N, C, H, W) → (N, C, S, S)."""
    side = draws.uniform(config.min_scale, config.max_scale).sqrt()
    ratio = draws.uniform(-0.1, 0.1).exp()
    half = torch.stack([side * ratio, side / ratio], 1)
    slack = torch.minimum((1 - half).clamp_min(0), half / 2)
    centre = slack * torch.stack([draws.uniform(-1, 1), draws.uniform(-1, 1)], 1)
    angle = draws.uniform(0, 2 * math.pi) if config.rotate else torch.zeros(len(draws))
    flip = torch.stack([draws.chance(0.5), draws.chance(0.5)], 1)
    return warp(x, config.size, centre, half, angle, flip)


def blurred(config: CellCrops, x: Tensor, draws: Draws) -> Tensor:
    """Some of the images blurred: (N, C, S, S) → the same."""
    sigma = draws.uniform(0.3, max(0.6, 0.02 * config.size))
    return on_some(x, draws.chance(config.blur), lambda y, s: blur(y, s, odd(0.08 * config.size)), sigma)
