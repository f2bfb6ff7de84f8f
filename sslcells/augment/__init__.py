"""Augmentation on the device: uint8 images in, normalised float views out; one file per recipe.

A recipe is a module with a `Config` and `views(config, x, draws) -> Tensor`, x being (N, C, H, W) float in 0..1.
"""

import importlib
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from sslcells.augment._draws import Draws as Draws
from sslcells.augment._stain import StainJitter as StainJitter
from sslcells.config import ConfigError, Recipe


class Augment:
    """A recipe at work: one call makes all views of a batch, every view of every image with its own random numbers."""

    def __init__(self, config: Recipe, mean: Sequence[float], std: Sequence[float]) -> None:
        self.config = config
        self._views = importlib.import_module(f"sslcells.augment.{config.recipe}").views  # type: ignore[attr-defined]
        self.normalisation = tuple(mean), tuple(std)
        self._mean = torch.tensor(mean)[:, None, None]
        self._std = torch.tensor(std)[:, None, None]

    @torch.no_grad()
    def __call__(
        self,
        pixels: Tensor,
        image: Tensor,
        *,
        seed: int,
        step: int,
        views: int,
        first: int = 0,
        occurrence: Tensor | None = None,
    ) -> Tensor:
        """(B, C, H, W) uint8 and image ids (B,) → (V·B, C, S, S) float32, view-major, normalised.

        The views of an image depend on (seed, step, its id, the view's number) alone, and on its `occurrence` (B,) in
        the global batch where that shows it more than once: not on the rank, the rank's batch, or what came before.
        Numbers begin at `first`.
        """
        draws = Draws(seed, step, image, views, first, occurrence)
        x = (pixels.float() / 255).repeat(views, 1, 1, 1)
        return self._normalised(self._views(self.config, x, draws))

    def local(self, size: int, scale: tuple[float, float]) -> "Augment":
        """The same recipe for crops of another size, which are a part of the image's area between the two of `scale`.

        Raises:
            ConfigError: where the recipe does not crop.
        """
        if "max_scale" not in type(self.config).model_fields:
            raise ConfigError(f"augment.recipe={self.config.recipe}: it has no crops, which local views need")  # type: ignore[attr-defined]
        changes = {"size": size, "min_scale": scale[0], "max_scale": scale[1]}
        return Augment(self.config.model_copy(update=changes), *self.normalisation)

    @torch.no_grad()
    def plain(self, pixels: Tensor) -> Tensor:
        """(B, C, H, W) uint8 → (B, C, S, S) float32: resized and normalised, nothing random."""
        return self._normalised(resized(pixels.float() / 255, self.config.size))

    def _normalised(self, x: Tensor) -> Tensor:
        self._mean, self._std = self._mean.to(x.device), self._std.to(x.device)
        return (x - self._mean) / self._std


def resized(x: Tensor, size: int) -> Tensor:
    """(N, C, H, W) → (N, C, size, size), smoothed where it shrinks."""
    if x.shape[-2:] == (size, size):
        return x
    return F.interpolate(x, (size, size), mode="bilinear", antialias=True, align_corners=False)
