"""Augmentation for channels that are no colours (fluorescence, multi-spectral): each varies, or lacks, on its own."""

import math
from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from sslcells.augment._draws import Draws
from sslcells.augment._operations import blur, odd, on_some, warp
from sslcells.config import Recipe


class Config(Recipe):
    """Strengths of the recipe."""

    recipe: Literal["channels"] = "channels"
    min_scale: float = Field(0.4, gt=0, le=1)
    """Smallest crop, as a part of the image's area; the middle of the image stays in the crop's middle half."""
    max_scale: float = Field(1.0, gt=0, le=1)
    """Largest crop."""
    rotate: bool = True
    """Turn by any angle."""
    gain: float = Field(0.4, ge=0, lt=1)
    """Each channel's intensities are multiplied by up to this part more or less."""
    offset: float = Field(0.1, ge=0, le=1)
    """Each channel's background rises or falls by up to this part of the whole range."""
    gamma: float = Field(0.3, ge=0, le=2)
    """Each channel's intensities are taken to a power between exp(−gamma) and exp(gamma)."""
    drop: float = Field(0.1, ge=0, lt=1)
    """Probability that a channel is black; one always stays."""
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
    each = range(x.shape[1])
    gain = torch.stack([draws.uniform(1 - config.gain, 1 + config.gain) for _ in each], 1)
    offset = torch.stack([draws.uniform(-config.offset, config.offset) for _ in each], 1)
    gamma = torch.stack([draws.uniform(-config.gamma, config.gamma) for _ in each], 1).exp()
    luck = torch.stack([draws.uniform() for _ in each], 1)
    keep = (luck >= config.drop) | (luck == luck.amax(1, keepdim=True))
    x = channel_jitter(x, gain * keep, offset * keep, gamma)
    sigma = draws.uniform(0.3, max(0.6, 0.02 * config.size))
    return on_some(x, draws.chance(config.blur), lambda y, s: blur(y, s, odd(0.08 * config.size)), sigma)


def channel_jitter(x: Tensor, gain: Tensor, offset: Tensor, gamma: Tensor) -> Tensor:
    """Each channel's own gain · x^gamma + offset: (N, C, H, W) in 0..1 and (N, C) CPU tensors → the same, in 0..1."""
    gain, offset, gamma = (t[:, :, None, None].to(x.device, non_blocking=True) for t in (gain, offset, gamma))
    return torch.addcmul(offset, gain, x.clamp(0, 1).pow(gamma)).clamp(0, 1)
