"""Augmentation for channels that are not colours (fluorescence, multi-spectral): each is changed or dropped alone."""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from sslcells.augment._crops import CellCrops, blurred, cropped
from sslcells.augment._draws import Draws


class Config(CellCrops):
    """Strengths of the recipe."""

    recipe: Literal["channels"] = "channels"
    gain: float = Field(0.4, ge=0, lt=1)
    """The intensities of each channel change by up to this fraction."""
    offset: float = Field(0.1, ge=0, le=1)
    """The background of each channel rises or falls by up to this fraction of the full range."""
    gamma: float = Field(0.3, ge=0, le=2)
    """The intensities of each channel are raised to a power between exp(−gamma) and exp(gamma)."""
    drop: float = Field(0.1, ge=0, lt=1)
    """Probability of setting a channel to black; at least one is always kept."""


def views(config: Config, x: Tensor, draws: Draws) -> Tensor:
    """(B, C, H, W) uint8, or float in 0..1 → (V·B, C, S, S)."""
    x = cropped(config, x, draws)
    each = range(x.shape[1])
    gain = torch.stack([draws.uniform(1 - config.gain, 1 + config.gain) for _ in each], 1)
    offset = torch.stack([draws.uniform(-config.offset, config.offset) for _ in each], 1)
    gamma = torch.stack([draws.uniform(-config.gamma, config.gamma) for _ in each], 1).exp()
    luck = torch.stack([draws.uniform() for _ in each], 1)
    keep = (luck >= config.drop) | (luck == luck.amax(1, keepdim=True))
    x = channel_jitter(x, gain * keep, offset * keep, gamma)
    return blurred(config, x, draws)


def channel_jitter(x: Tensor, gain: Tensor, offset: Tensor, gamma: Tensor) -> Tensor:
    """Each channel's own gain · x^gamma + offset: (N, C, H, W) in 0..1 and (N, C) CPU tensors → the same, in 0..1."""
    gain, offset, gamma = (t[:, :, None, None].to(x.device, non_blocking=True) for t in (gain, offset, gamma))
    return torch.addcmul(offset, gain, x.clamp(0, 1).pow(gamma)).clamp(0, 1)
