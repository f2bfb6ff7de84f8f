"""A small convolutional network for MNIST-like images, known to timm as `small_cnn`."""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

from timm.models import register_model
from torch import Tensor, nn


class SmallCNN(nn.Module):
    """Three 3×3 convolutions with BatchNorm, two max-pools and a mean over the plane: (N, C, H, W) → (N, 4·width)."""

    def __init__(self, in_chans: int = 3, num_classes: int = 0, width: int = 32) -> None:
        super().__init__()
        widths = [in_chans, width, 2 * width, 4 * width]
        layers: list[nn.Module] = []
        for before, after in pairwise(widths):
            layers += [nn.Conv2d(before, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU(inplace=True)]
            layers += [nn.MaxPool2d(2)]
        self.features = nn.Sequential(*layers[:-1])
        self.num_features = widths[-1]
        self.head = nn.Linear(widths[-1], num_classes) if num_classes else nn.Identity()

    def group_matcher(self, coarse: bool = False) -> Callable[[str], int | float]:
        """Timm's: which layer a name is of, each a convolution and its BatchNorm."""
        return lambda name: int(name.split(".")[1]) // 4 if name.startswith("features.") else math.inf

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) → (N, 4·width), or (N, num_classes)."""
        out: Tensor = self.head(self.features(x).mean((2, 3)))
        return out


@register_model
def small_cnn(pretrained: bool = False, **kwargs: Any) -> SmallCNN:
    """Timm's entry point; there are no published weights."""
    for key in ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"):
        kwargs.pop(key, None)
    return SmallCNN(**kwargs)
