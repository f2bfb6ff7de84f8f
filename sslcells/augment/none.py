"""No augmentation: every view is the image, resized."""

from typing import Literal

from torch import Tensor

from sslcells.augment import resized
from sslcells.augment._draws import Draws
from sslcells.augment._operations import in_unit_range
from sslcells.config import Recipe


class Config(Recipe):
    """Only the size can be set."""

    recipe: Literal["none"] = "none"


def views(config: Config, x: Tensor, draws: Draws) -> Tensor:
    """(B, C, H, W) uint8, or float in 0..1 → (V·B, C, S, S)."""
    return resized(in_unit_range(x), config.size).repeat(len(draws) // len(x), 1, 1, 1)
