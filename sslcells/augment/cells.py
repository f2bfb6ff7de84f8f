"""Augmentation for cells: any orientation, the cell stays in view, colour and stain vary as between laboratories."""

import math
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from sslcells.augment._crops import CellCrops, blurred, cropped
from sslcells.augment._draws import Draws
from sslcells.augment._operations import linear_colour
from sslcells.augment._stain import stain_jitter


class Config(CellCrops):
    """Strengths of the recipe."""

    recipe: Literal["cells"] = "cells"
    colour: float = Field(0.4, ge=0, le=1)
    """Brightness, contrast and saturation change by up to this fraction; hue by up to a quarter of it, in turns."""
    stain: Literal["giemsa", "haematoxylin-eosin", "none"] = "giemsa"
    """Dyes that the stain jitter separates, in images with three channels; `none` turns it off."""
    stain_strength: float = Field(0.3, ge=0, le=1)
    """The density of each dye changes by up to this fraction."""
    grey: float = Field(0.2, ge=0, le=1)
    """Probability of turning an image with three channels grey."""


def views(config: Config, x: Tensor, draws: Draws) -> Tensor:
    """(B, C, H, W) uint8, or float in 0..1 → (V·B, C, S, S)."""
    x = cropped(config, x, draws)
    if x.shape[1] == 3 and config.stain != "none":
        s = config.stain_strength
        amount = torch.stack([draws.uniform(1 - s, 1 + s) for _ in range(3)], 1)
        base = torch.stack([draws.uniform(-s / 10, s / 10) for _ in range(3)], 1)
        x = stain_jitter(x, config.stain, amount, base)
    c = config.colour
    saturation = torch.where(draws.chance(config.grey), 0.0, draws.uniform(1 - c, 1 + c))
    brightness, contrast = draws.uniform(1 - c, 1 + c), draws.uniform(1 - c, 1 + c)
    x = linear_colour(x, brightness, contrast, saturation, draws.uniform(-c / 4, c / 4) * 2 * math.pi)
    return blurred(config, x, draws)
