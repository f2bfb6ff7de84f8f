"""Augmentation for cells: no up or down, the cell stays in view, colour and stain vary as between laboratories."""

import math
from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from sslcells.augment._draws import Draws
from sslcells.augment._operations import blur, linear_colour, odd, on_some, stain_jitter, warp
from sslcells.config import Recipe


class Config(Recipe):
    """Strengths of the recipe."""

    recipe: Literal["cells"] = "cells"
    min_scale: float = Field(0.4, gt=0, le=1)
    """Smallest crop, as a part of the image's area; the middle of the image stays in the crop's middle half."""
    max_scale: float = Field(1.0, gt=0, le=1)
    """Largest crop."""
    rotate: bool = True
    """Turn by any angle."""
    colour: float = Field(0.4, ge=0, le=1)
    """Brightness, contrast and saturation change by up to this part, hue by up to a quarter of it of the circle."""
    stain: Literal["giemsa", "haematoxylin-eosin", "none"] = "giemsa"
    """Which dyes the stain jitter takes apart, in images of three channels."""
    stain_strength: float = Field(0.3, ge=0, le=1)
    """The density of each dye changes by up to this part."""
    grey: float = Field(0.2, ge=0, le=1)
    """Probability that an image of three channels loses its colour."""
    blur: float = Field(0.3, ge=0, le=1)
    """Probability of a blur, sigma up to 2 % of the size."""

    @model_validator(mode="after")
    def _scales(self) -> Self:
        if self.min_scale > self.max_scale:
            raise ValueError(f"min_scale={self.min_scale} is above max_scale={self.max_scale}")
        return self


def views(config: Config, x: Tensor, draws: Draws) -> Tensor:
    """(N, C, H, W) in 0..1 → (N, C, S, S)."""
    side = draws.uniform(config.min_scale, config.max_scale).sqrt()
    ratio = draws.uniform(-0.1, 0.1).exp()
    half = torch.stack([side * ratio, side / ratio], 1)
    slack = torch.minimum((1 - half).clamp_min(0), half / 2)
    centre = slack * torch.stack([draws.uniform(-1, 1), draws.uniform(-1, 1)], 1)
    angle = draws.uniform(0, 2 * math.pi) if config.rotate else torch.zeros(len(draws))
    flip = torch.stack([draws.chance(0.5), draws.chance(0.5)], 1)
    x = warp(x, config.size, centre, half, angle, flip)
    if x.shape[1] == 3 and config.stain != "none":
        s = config.stain_strength
        amount = torch.stack([draws.uniform(1 - s, 1 + s) for _ in range(3)], 1)
        base = torch.stack([draws.uniform(-s / 10, s / 10) for _ in range(3)], 1)
        x = stain_jitter(x, config.stain, amount, base)
    c = config.colour
    saturation = torch.where(draws.chance(config.grey), 0.0, draws.uniform(1 - c, 1 + c))
    brightness, contrast = draws.uniform(1 - c, 1 + c), draws.uniform(1 - c, 1 + c)
    x = linear_colour(x, brightness, contrast, saturation, draws.uniform(-c / 4, c / 4) * 2 * math.pi)
    sigma = draws.uniform(0.3, max(0.6, 0.02 * config.size))
    return on_some(x, draws.chance(config.blur), lambda y, s: blur(y, s, odd(0.08 * config.size)), sigma)
