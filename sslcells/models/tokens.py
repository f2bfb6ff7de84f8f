"""A Vision Transformer of timm as tokens: patches that a method hides are replaced or left out.

timm's own modules compute every step, so that nothing hidden gives timm's own features. Its families are
`vision_transformer` (with DeiT, DINOv2, register tokens) and `eva` (with rotary positions, DINOv3).
"""

from functools import partial
from typing import Any, NamedTuple

import torch
from timm.layers import PatchDropout, PatchDropoutWithIndices  # type: ignore[attr-defined]
from timm.models import checkpoint
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from sslcells.config import ConfigError


class Layout(NamedTuple):
    """How a Vision Transformer cuts an image into L patches."""

    patch: tuple[int, int]
    """height and width of a patch in pixels"""
    grid: tuple[int, int]
    """rows and columns of patches"""
    width: int
    """F of a token"""
    prefix: int
    """P, the tokens before the patches: class and registers"""
    pool: str
    """how tokens become a feature: `avg`, `token`, `map` for attention that is learned, …"""

    @property
    def patches(self) -> int:
        """L."""
        return self.grid[0] * self.grid[1]


def layout(encoder: nn.Module, size: int) -> Layout | None:
    """The layout for images of `size` pixels; None for a backbone without tokens.

    Raises:
        ConfigError: if the backbone drops patches by itself, whose places are then not known, or pads the image.
    """
    if not isinstance(encoder, VisionTransformer | Eva):
        return None
    drops = PatchDropout, PatchDropoutWithIndices
    if any(isinstance(module, drops) and module.prob > 0 for module in encoder.modules()):
        raise ConfigError("model.args: patch_drop_rate cannot be above 0: the method itself hides patches")
    embed: Any = encoder.patch_embed
    (rows, columns), (height, width) = embed.dynamic_feat_size((size, size)), embed.feat_ratio(as_scalar=False)
    if (rows * height, columns * width) != (size, size):
        raise ConfigError(f"augment.size={size} is no multiple of the backbone's patches, {height}×{width} px")
    return Layout((height, width), (rows, columns), encoder.embed_dim, encoder.num_prefix_tokens, encoder.global_pool)


def encode(
    encoder: nn.Module,
    x: Tensor,
    *,
    mask: Tensor | None = None,
    mask_token: Tensor | None = None,
    visible: Tensor | None = None,
) -> Tensor:
    """(N, C, H, W) → (N, P + L, F) after the last norm: the prefix tokens, then the patches row by row.

    Args:
        encoder: a backbone that has a `layout`.
        x: images as the encoder takes them.
        mask: (N, L) bool: patches whose embedding becomes `mask_token` (F,) before positions are added.
        mask_token: (F,).
        visible: (N, T) int64 patches that alone go through the blocks, in this order; the result is (N, P + T, F).
    """
    assert isinstance(encoder, VisionTransformer | Eva)
    patches: Tensor = encoder.patch_embed(x)  # (N, L, F), or (N, h, w, F) with dynamic_img_size
    if mask is not None:
        assert mask_token is not None
        patches = torch.where(mask.view(*patches.shape[:-1], 1), mask_token.to(patches.dtype), patches)
    rotary: Any = None
    if isinstance(encoder, Eva):
        tokens, rotary = encoder._pos_embed(patches)
    else:
        tokens = encoder._pos_embed(patches)
    if visible is not None:
        tokens = _kept(tokens, encoder.num_prefix_tokens, visible)
        rotary = None if rotary is None else _rotary_of(rotary, visible)
    tokens = encoder.norm_pre(tokens)
    mixed = rotary is not None and encoder.rope_mixed  # then each block has its own
    for depth, block in enumerate(encoder.blocks):
        more = {"rope": rotary[depth] if mixed else rotary} if isinstance(encoder, Eva) else {}
        run = partial(checkpoint, block) if encoder.grad_checkpointing else block
        tokens = run(tokens, **more)
    out: Tensor = encoder.norm(tokens)
    return out


def features(encoder: nn.Module, tokens: Tensor) -> Tensor:
    """(N, P + T, F) of `encode` → (N, F), pooled as the encoder pools them."""
    out: Tensor = encoder.forward_head(tokens)  # type: ignore[operator]
    return out


def blocks(encoder: nn.Module) -> list[nn.Module]:
    """The Transformer's blocks, first to last."""
    return list(encoder.blocks)  # type: ignore[arg-type]


def _kept(tokens: Tensor, prefix: int, visible: Tensor) -> Tensor:
    """The prefix tokens and the visible patches: (N, P + L, F), (N, T) → (N, P + T, F)."""
    at = visible[..., None].expand(-1, -1, tokens.shape[2])
    return torch.cat([tokens[:, :prefix], tokens[:, prefix:].gather(1, at)], 1)


def _rotary_of(rotary: Tensor, visible: Tensor) -> Tensor:
    """The visible patches' rotary embedding: (L, R) → (N, 1, T, R); (depth, heads, L, R) → (depth, N, heads, T, R)."""
    if rotary.ndim == 2:
        return rotary[visible][:, None]
    return rotary[:, :, visible].transpose(1, 2)
