"""Stain jitter: changes the amount of each dye in optical density; as a function, and as a Kornia augmentation."""

from typing import Any

import torch
from kornia.augmentation import IntensityAugmentationBase2D
from torch import Tensor
from torch.nn import functional as F

STAINS = {
    "haematoxylin-eosin": ((0.650, 0.704, 0.286), (0.072, 0.990, 0.105), (0.268, 0.570, 0.776)),
    "giemsa": ((0.834, 0.513, 0.196), (0.092, 0.954, 0.283), (0.635, 0.001, 0.771)),
}
"""Optical densities of the dyes in red, green and blue, as in Ruifrok and Johnston's colour deconvolution (2001)."""


def stain_jitter(x: Tensor, stain: str, amount: Tensor, base: Tensor) -> Tensor:
    """Change the amount of each dye: density of dye k becomes density · amount (N, 3) + base (N, 3).

    Images are converted to optical density (Beer–Lambert), separated into dyes, changed, and converted back. This
    imitates differences between staining batches and laboratories. (N, 3, H, W) in 0..1 → the same.
    """
    dyes = F.normalize(torch.tensor(STAINS[stain]), dim=1)
    apart = dyes.inverse()
    matrix = (apart[None] * amount[:, None, :]) @ dyes
    matrix, shift = (t.to(x.device, non_blocking=True) for t in (matrix.mT, base @ dyes))
    density = -x.clamp(1 / 255, 1).log().flatten(2)
    return torch.baddbmm(shift[:, :, None], matrix, density).neg().exp().view_as(x).clamp(0, 1)


class StainJitter(IntensityAugmentationBase2D):
    """`stain_jitter` as a Kornia augmentation, for an AugmentationSequential: (N, 3, H, W) in 0..1 → the same.

    For each image and dye, the density is multiplied by a number in 1 − strength … 1 + strength, and a number in
    −base … base is added. They come from torch's generator; the recipe `cells` uses `Draws`, which resume exactly.

    Raises:
        ValueError: for an unknown stain, or a strength or base that is not in 0..1.
    """

    def __init__(
        self,
        stain: str = "giemsa",
        strength: float = 0.3,
        base: float = 0.03,
        same_on_batch: bool = False,
        p: float = 1.0,
        keepdim: bool = False,
    ) -> None:
        super().__init__(p=p, same_on_batch=same_on_batch, keepdim=keepdim)
        if stain not in STAINS:
            raise ValueError(f"stain={stain!r} is not known; choose from: {', '.join(STAINS)}")
        for name, value in (("strength", strength), ("base", base)):
            if not 0 <= value <= 1:
                raise ValueError(f"{name}={value} should be in 0..1")
        self.flags = {"stain": stain}
        self._strength, self._base = strength, base

    def generate_parameters(self, batch_shape: tuple[int, ...]) -> dict[str, Tensor]:
        """`amount` and `base`, (N, 3) each."""
        images = batch_shape[0]
        drawn = (2 * torch.rand(2, 1 if self.same_on_batch else images, 3) - 1).expand(2, images, 3)
        return {"amount": 1 + self._strength * drawn[0], "base": self._base * drawn[1]}

    def apply_transform(
        self, input: Tensor, params: dict[str, Tensor], flags: dict[str, Any], transform: Tensor | None = None
    ) -> Tensor:
        """Apply the drawn parameters to images (N, 3, H, W)."""
        if input.shape[1] != 3:
            raise ValueError(f"a stain has three channels; these images have {input.shape[1]}")
        amount, base = (params[key].cpu().float() for key in ("amount", "base"))
        return stain_jitter(input.float(), flags["stain"], amount, base).to(input.dtype)
