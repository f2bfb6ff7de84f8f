"""Augmentation on the device: uint8 images in, normalised float views out; one file per recipe.

A recipe is a module with a `Config` and `views(config, x, draws) -> Tensor`: of images x (B, C, H, W), uint8 or float
in 0..1, it makes the views (V·B, C, S, S) of the draws, view-major, float in 0..1. If its views take something of other
images, it is `views(config, x, draws, others)`, and x is float and has a row for each view.
"""

import importlib
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from sslcells.augment._draws import Draws as Draws
from sslcells.augment._others import Bank as Bank
from sslcells.augment._others import Others
from sslcells.augment._stain import StainJitter as StainJitter
from sslcells.config import ConfigError, Recipe
from sslcells.standardise import Standard

_AT_ONCE = 32
"""images whose views, if they take something of other images, are made at a time on a CPU: they stay in its caches"""


class Augment:
    """Applies a recipe: one call makes all views of a batch, with separate random numbers for every view and image."""

    def __init__(
        self,
        config: Recipe,
        mean: Sequence[float],
        std: Sequence[float],
        interpolation: str = "bilinear",
        crop: float = 1.0,
        standard: Standard | None = None,
        bank: Bank | None = None,
        lab_rows: Tensor | None = None,
    ) -> None:
        """`bank` is for recipes whose views take something of other images, and `standard` then says how cells look.

        `lab_rows` (labs + 1, P) stand for the images of each laboratory, by its number, where `standard` goes by it.
        """
        self.config, self.standard, self._bank, self._lab_rows = config, standard, bank, lab_rows
        self._views = importlib.import_module(f"sslcells.augment.{config.recipe}").views  # type: ignore[attr-defined]
        self.normalisation = tuple(mean), tuple(std)
        self._whole = interpolation, crop
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
        lab: Tensor | None = None,
    ) -> Tensor:
        """(B, C, H, W) uint8 and image ids (B,) → (V·B, C, S, S) float32, view-major, normalised.

        A view depends only on (seed, step, image id, view number), and on the image's `occurrence` (B,) if the global
        batch repeats it, and its laboratory `lab` (B,); never on the rank, the rank's batch, or earlier calls. View
        numbers start at `first`.
        """
        if self._bank is None:
            draws = Draws(seed, step, image, views, first, occurrence)
            x = pixels if self.standard is None else self.standard(pixels.float() / 255, self.rows(lab, len(pixels)))
            return self._normalised(self._views(self.config, x, draws))
        lab = torch.zeros_like(image) if lab is None else lab
        made = []
        at_once = _AT_ONCE if pixels.device.type == "cpu" else len(image)
        for start in range(0, len(image), at_once):
            i = slice(start, start + at_once)
            draws = Draws(seed, step, image[i], views, first, None if occurrence is None else occurrence[i])
            made.append(self._of_others(pixels[i], lab[i], draws, self._bank).chunk(views))
        return torch.cat([torch.cat(of_one_view) for of_one_view in zip(*made, strict=True)])

    def _of_others(self, pixels: Tensor, lab: Tensor, draws: Draws, bank: Bank) -> Tensor:
        """Views that take something of other images: (B, C, H, W) uint8 and laboratories (B,) → (V·B, C, S, S)."""
        assert self.standard is not None
        bank.to(pixels.device)
        x, cell, _ = self.standard.found(pixels.float() / 255, self.rows(lab, len(pixels)), cell=True)
        assert cell is not None
        views = len(draws) // len(pixels)
        others = Others(cell.repeat(views, 1, 1, 1), lab.cpu().repeat(views), bank)
        return self._normalised(self._views(self.config, x.repeat(views, 1, 1, 1), draws, others))

    def local(self, size: int, scale: tuple[float, float]) -> "Augment":
        """The same recipe for crops of `size` px whose share of the image's area lies in the range `scale`.

        Raises:
            ConfigError: if the recipe does not crop.
        """
        if "max_scale" not in type(self.config).model_fields:
            raise ConfigError(f"augment.recipe={self.config.recipe}: it has no crops, which local views need")  # type: ignore[attr-defined]
        changes = {"size": size, "min_scale": scale[0], "max_scale": scale[1]}
        made = *self.normalisation, *self._whole, self.standard, self._bank, self._lab_rows
        return Augment(self.config.model_copy(update=changes), *made)

    def at(
        self,
        size: int,
        mean: Sequence[float],
        std: Sequence[float],
        standard: Standard | None = None,
        lab_rows: Tensor | None = None,
    ) -> "Augment":
        """The same views of `size` px and normalised otherwise, for another network.

        With `standard`, they are of images that it prepares, with its own `lab_rows`.
        """
        config = self.config.model_copy(update={"size": size})
        how = (self.standard, self._lab_rows) if standard is None else (standard, lab_rows)
        return Augment(config, mean, std, *self._whole, how[0], self._bank, how[1])

    @torch.no_grad()
    def plain(self, pixels: Tensor, lab: Tensor | None = None) -> Tensor:
        """(B, C, H, W) uint8 → (B, C, S, S) float32: standardised, resized and normalised, without augmentation.

        `lab` (B,) int64 on the CPU: laboratories; unknown where None or 0.
        """
        return self.plain_found(pixels, lab)[0]

    @torch.no_grad()
    def plain_found(self, pixels: Tensor, lab: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """As `plain`, and (B,) bool, in which images the standardisation looked for a cell and found none."""
        x, failed = pixels.float() / 255, torch.zeros(len(pixels), dtype=torch.bool, device=pixels.device)
        if self.standard is not None:
            x, _, failed = self.standard.found(x, self.rows(lab, len(x)))
        return self._normalised(resized(x, self.config.size, *self._whole)), failed

    def rows(self, lab: Tensor | None, count: int) -> Tensor | None:
        """(B, P) what stands for images of these laboratories (B,), NaN where nothing does; None if nothing ever."""
        if self._lab_rows is None:
            return None
        return self._lab_rows[torch.zeros(count, dtype=torch.int64) if lab is None else lab.cpu()]

    def _normalised(self, x: Tensor) -> Tensor:
        self._mean, self._std = self._mean.to(x.device), self._std.to(x.device)
        return (x - self._mean) / self._std


def resized(x: Tensor, size: int, interpolation: str = "bilinear", crop: float = 1.0) -> Tensor:
    """(N, C, H, W) in 0..1 → (N, C, size, size), with antialiasing when it shrinks.

    `crop` is the central part of height and width that is kept: what remains has `size` pixels.
    """
    whole = max(size, round(size / crop))
    if x.shape[-2:] != (whole, whole):
        x = F.interpolate(x, (whole, whole), mode=interpolation, antialias=True, align_corners=False)
        x = x.clamp(0, 1) if interpolation == "bicubic" else x
    first = (whole - size) // 2
    return x if whole == size else x[..., first : first + size, first : first + size]
