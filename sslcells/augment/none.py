"""No augmentation: every view is the image, resized."""

from typing import Literal

from torch import Tensor

from sslcells.augment import resized
from sslcells.augment._draws import Draws
from sslcells.config import Recipe


class Config(Recipe):
    """Only the size can be set."""

    recipe: Literal["none"] = "none"


def views(config: Config, x: Tensor, draws: Draws) -> Tensor:
    """(N, C, H, W) in 0..1 → (N, C, S, S)."""
    return resized(x, config.size)
