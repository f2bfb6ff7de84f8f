"""SimCLR's augmentation for natural images, arXiv 2002.05709, appendix A: crop, flip, colour, grey, blur."""

import math
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from sslcells.augment._crops import Crops
from sslcells.augment._draws import Draws
from sslcells.augment._operations import blur, colour_jitter, grey, odd, on_some, warp


class Config(Crops):
    """Defaults as in the paper."""

    recipe: Literal["simclr"] = "simclr"
    min_scale: float = Field(0.08, gt=0, le=1)
    """Smallest crop, as a part of the image's area."""
    strength: float = Field(1.0, ge=0, le=1.25)
    """Of the colour distortion, s in the paper; it uses 0.5 on CIFAR-10."""
    blur: float = Field(0.5, ge=0, le=1)
    """Probability of the blur; the paper leaves it out on CIFAR-10."""
    flip: float = Field(0.5, ge=0, le=1)
    """Probability of the mirror image."""


def views(config: Config, x: Tensor, draws: Draws) -> Tensor:
    """(N, C, H, W) in 0..1 → (N, C, S, S)."""
    height, width = x.shape[-2:]
    area = height * width * draws.uniform(config.min_scale, config.max_scale)
    ratio = draws.uniform(math.log(3 / 4), math.log(4 / 3)).exp()
    side = torch.stack([(area * ratio).sqrt() / width, (area / ratio).sqrt() / height], 1).clamp_max(1)
    centre = (1 - side) * torch.stack([draws.uniform(-1, 1), draws.uniform(-1, 1)], 1)
    mirrored = torch.stack([draws.chance(config.flip), torch.zeros(len(draws), dtype=torch.bool)], 1)
    x = warp(x, config.size, centre, side, torch.zeros(len(draws)), mirrored)
    s = config.strength
    factors = [draws.uniform(1 - 0.8 * s, 1 + 0.8 * s).clamp_min(0) for _ in range(3)]
    factors.append(draws.uniform(-0.2 * s, 0.2 * s) * 2 * math.pi)
    x = colour_jitter(x, draws.chance(0.8), draws.order(4), factors)
    if x.shape[1] == 3:
        x = on_some(x, draws.chance(0.2), grey)
    sigma = draws.uniform(0.1, 2.0)
    return on_some(x, draws.chance(config.blur), lambda y, s: blur(y, s, odd(config.size / 10)), sigma)
