"""SimCLR's augmentation for natural images, arXiv 2002.05709, appendix A: crop, flip, colour, grey, blur."""

import math
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from sslcells.augment._crops import Crops, random_resized_crop
from sslcells.augment._draws import Draws
from sslcells.augment._operations import blur, colour_jitter, grey, on_some, warp


class Config(Crops):
    """Defaults as in the paper."""

    recipe: Literal["simclr"] = "simclr"
    min_scale: float = Field(0.08, gt=0, le=1)
    """Smallest crop, as a fraction of the image's area."""
    strength: float = Field(1.0, ge=0, le=1.25)
    """Strength of the colour distortion, s in the paper, which uses 0.5 on CIFAR-10."""
    blur: float = Field(0.5, ge=0, le=1)
    """Probability of the blur, with sigma up to 0.9 % of the size; the paper uses none on CIFAR-10."""
    flip: float = Field(0.5, ge=0, le=1)
    """Probability of a horizontal flip."""


def views(config: Config, x: Tensor, draws: Draws) -> Tensor:
    """(B, C, H, W) uint8, or float in 0..1 → (V·B, C, S, S)."""
    height, width = x.shape[-2:]
    crop, whole = random_resized_crop(config, height, width, draws), torch.tensor([width, height])
    half, centre = crop[:, 2:] / whole, (2 * crop[:, :2] + crop[:, 2:]) / whole - 1
    mirrored = torch.stack([draws.chance(config.flip), torch.zeros(len(draws), dtype=torch.bool)], 1)
    x = warp(x, config.size, centre, half, torch.zeros(len(draws)), mirrored)
    s = config.strength
    factors = [draws.uniform(1 - 0.8 * s, 1 + 0.8 * s).clamp_min(0) for _ in range(3)]
    factors.append(draws.uniform(-0.2 * s, 0.2 * s) * 2 * math.pi)
    x = colour_jitter(x, draws.chance(0.8), draws.order(4), factors)
    if x.shape[1] == 3:
        x = on_some(x, draws.chance(0.2), grey)
    return blurred(config, x, draws)


def blurred(config: Config, x: Tensor, draws: Draws) -> Tensor:
    """Blur some of the views: (N, C, S, S) → the same.

    The paper's sigma is 0.1 to 2.0 pixels for views of 224 px, with a kernel of a tenth of the view. Here sigma scales
    with the view, as 28 px views would otherwise be blurred eight times as much.
    """
    sigma = draws.uniform(0.1, 2.0) * config.size / 224
    most = 2.0 * config.size / 224
    return on_some(x, draws.chance(config.blur), lambda y, s: blur(y, s, most), sigma)
