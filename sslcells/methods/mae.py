"""MAE, arXiv 2111.06377: hide most patches of an image from a Vision Transformer, and reconstruct their pixels.

A small decoder of its own turns the encoder's tokens into pixels; it is not exported.
"""

from collections.abc import Sequence
from typing import Literal, Self, final

import torch
from pydantic import Field, model_validator
from timm.layers import build_sincos2d_pos_embed  # type: ignore[attr-defined]
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from sslcells import methods
from sslcells.augment import Draws
from sslcells.config import ConfigError, Section
from sslcells.data import Batch, ImageSet
from sslcells.losses import sound
from sslcells.models import tokens


class Config(Section):
    """What is hidden, what is predicted, and the decoder."""

    name: Literal["mae"] = "mae"
    mask_ratio: float = Field(0.75, gt=0, lt=1)
    """Fraction of the patches of a view that are hidden, drawn anew at every step."""
    views: int = Field(1, ge=1)
    """Views of an image, each of which is reconstructed by itself."""
    normalise: Literal["patch", "channel", "none"] = "patch"
    """What is predicted: pixels minus the mean of their patch, divided by its standard deviation (`patch`); the same
    for each channel of a patch by itself, where channels differ in brightness (`channel`); or the pixels themselves."""
    decoder_width: int = Field(128, ge=4)
    """Width of the decoder's tokens, a multiple of 4 and of decoder_heads (512 in the paper)."""
    decoder_depth: int = Field(2, ge=1)
    """Blocks of the decoder (8 in the paper)."""
    decoder_heads: int = Field(4, ge=1)
    """Attention heads of the decoder (16 in the paper)."""

    @model_validator(mode="after")
    def _divides(self) -> Self:
        for key, number in (("decoder_heads", self.decoder_heads), ("4, for its positions", 4)):
            if self.decoder_width % number:
                raise ValueError(f"decoder_width={self.decoder_width} does not divide by {key}={number}")
        return self


class Decoder(nn.Module):
    """A Transformer from the encoder's tokens to the pixels of patches, section 3; positions are fixed sines."""

    positions: Tensor

    def __init__(self, config: Config, layout: tokens.Layout, values: int) -> None:
        super().__init__()
        width = config.decoder_width
        self.prefix = layout.prefix
        # Encoders that pool the mean of the patches normalise after it, and not here.
        self.embed = nn.Sequential(nn.LayerNorm(layout.width), nn.Linear(layout.width, width))
        self.mask_token = nn.Parameter(torch.randn(width) * 0.02)
        self.blocks = nn.Sequential(
            *(Block(width, config.decoder_heads, qkv_bias=True) for _ in range(config.decoder_depth))
        )
        self.pixels = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, values))
        self.register_buffer("positions", build_sincos2d_pos_embed(list(layout.grid), width), persistent=False)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def forward(self, encoded: Tensor, visible: Tensor, hidden: Tensor) -> Tensor:
        """Tokens (A, P + T, F) of the visible patches (A, T) → predictions (A, M, values) of the hidden ones (A, M)."""
        x = self.embed(encoded)
        width = x.shape[2]
        patches = self.mask_token.to(x.dtype).expand(len(x), len(self.positions), width)
        patches = patches.scatter(1, visible[..., None].expand(-1, -1, width), x[:, self.prefix :])
        patches = patches + self.positions.to(x.dtype)
        x = self.blocks(torch.cat([x[:, : self.prefix], patches], 1))[:, self.prefix :]
        out: Tensor = self.pixels(_at(x, hidden))
        return out


@final
class Method(methods.Reconstructing):
    """A decoder; the rows are (A, 1), the mean squared error of each view's hidden patches."""

    negative_views = 0

    def __init__(self, config: Config, features: int, images: ImageSet, layout: tokens.Layout) -> None:
        super().__init__()
        if layout.pool == "map":
            raise ConfigError(
                "method.name=mae: the backbone pools by attention that is learned (global_pool=map), which the loss "
                "never reaches, and its features would be those of an untrained one; model.args={global_pool: avg} or "
                "token"
            )
        kept = round(layout.patches * (1 - config.mask_ratio))
        if not 0 < kept < layout.patches:
            raise ConfigError(
                f"method.mask_ratio={config.mask_ratio} of {layout.patches} patches: {kept} would be seen and "
                f"{layout.patches - kept} hidden; both must be at least 1. Smaller patches are more: model.args="
                f"{{patch_size: …}}"
            )
        self.views = config.views
        self._config, self._layout, self._kept = config, layout, kept
        self.head = Decoder(config, layout, images.channels * layout.patch[0] * layout.patch[1])

    def forward(self, features: Tensor, progress: float) -> Tensor:
        """(A, F) → (A, 1) zeros: the features, which are of whole images, have no error. See `encode`."""
        return features.new_zeros(len(features), 1)

    def teacher_copies(self) -> None:
        """There is no teacher."""

    def encode(
        self,
        backbone: nn.Module,
        teacher: methods.Teacher | None,
        crops: Sequence[Tensor],
        draws: Draws,
        progress: float,
    ) -> methods.Outputs:
        """The error of the reconstruction of each view, as rows (A, 1)."""
        (x,) = crops
        predicted, hidden, unused = self._predicted(backbone, x, draws)
        with torch.autocast(x.device.type, enabled=False):
            target, _, _ = self._target(x)  # (A, L, C, p, p)
            error = predicted.to(x.dtype) - _at(target.flatten(2), hidden)
            rows = error.square().mean((1, 2))[:, None]
        return methods.Outputs(rows + unused)

    def loss(self, outputs: methods.Outputs, batch: Batch, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean over views; as many patches are hidden in each, so it is that over all hidden patches."""
        return outputs.rows.mean() * sound(outputs.rows), {}

    @torch.no_grad()
    def reconstruct(self, backbone: nn.Module, x: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
        """Views (A, C, S, S) → what the encoder saw of them, hidden patches being 0, and with these as predicted.

        Predictions get the mean and standard deviation that their patch was normalised by.
        """
        predicted, hidden, _ = self._predicted(backbone, x, draws)
        target, mean, std = self._target(x)
        at = hidden[..., None].expand(-1, -1, target[0, 0].numel())
        whole = target.flatten(2).scatter(1, at, predicted.to(x.dtype)).view_as(target)
        seen = self._cut(x).flatten(2).scatter(1, at, 0.0).view_as(target)
        return self._joined(seen), self._joined(whole * std + mean)

    def _predicted(self, backbone: nn.Module, x: Tensor, draws: Draws) -> tuple[Tensor, Tensor, Tensor]:
        """Predictions (A, M, values), the hidden patches (A, M), and 0 () that has a gradient for all of the encoder.

        DDP waits for the gradient of what pools and normalises the features, which MAE does not use.
        """
        order = draws.order(self._layout.patches).to(x.device)
        visible, hidden = order[:, : self._kept], order[:, self._kept :]
        encoded = tokens.encode(backbone, x, visible=visible)
        return self.head(encoded, visible, hidden), hidden, 0 * tokens.features(backbone, encoded).sum()

    def _target(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What is predicted, (A, L, C, p, p), and the mean and standard deviation that it was normalised by."""
        patches = self._cut(x)
        if self._config.normalise == "none":
            return patches, patches.new_zeros(()), patches.new_ones(())
        over = (2, 3, 4) if self._config.normalise == "patch" else (3, 4)
        variance, mean = torch.var_mean(patches, over, correction=0, keepdim=True)
        std = (variance + 1e-6).sqrt()
        return (patches - mean) / std, mean, std

    def _cut(self, x: Tensor) -> Tensor:
        """(A, C, S, S) → patches (A, L, C, p, p), row by row."""
        (rows, columns), (height, width) = self._layout.grid, self._layout.patch
        return x.reshape(*x.shape[:2], rows, height, columns, width).permute(0, 2, 4, 1, 3, 5).flatten(1, 2)

    def _joined(self, patches: Tensor) -> Tensor:
        """The inverse of `_cut`."""
        x = patches.view(len(patches), *self._layout.grid, *patches.shape[2:])
        return x.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)  # from (A, C, rows, p, columns, p)


def _at(x: Tensor, index: Tensor) -> Tensor:
    """Tokens (A, L, W) with these indices (A, M) → (A, M, W)."""
    chosen: Tensor = x.gather(1, index[..., None].expand(-1, -1, x.shape[2]))
    return chosen
