"""Vision Transformers as tokens: timm's own features where nothing is hidden, and what hiding patches must do."""

import pytest
import torch

from sslcells import models
from sslcells.config import ConfigError, Model
from sslcells.models import tokens

SMALL = {"depth": 2, "embed_dim": 48, "num_heads": 2}
VITS = [
    ("test_vit", {"img_size": 32, "patch_size": 8}),
    ("test_vit3", {"img_size": 32, "patch_size": 8}),  # mapped by attention
    ("test_vit4", {"img_size": 32, "patch_size": 8}),
    ("vit_tiny_patch16_224", {**SMALL, "img_size": 28, "patch_size": 4, "dynamic_img_size": True}),
    ("vit_tiny_patch16_224", {**SMALL, "img_size": 32, "global_pool": "avg"}),
    ("vit_tiny_patch16_224", {**SMALL, "img_size": 32, "patch_size": 8, "global_pool": "avg", "class_token": False}),
    ("vit_small_patch14_reg4_dinov2", {**SMALL, "img_size": 28, "patch_size": 7, "dynamic_img_size": True}),
    ("vit_base_patch16_clip_224", {**SMALL, "img_size": 32, "patch_size": 8}),
    ("deit_tiny_distilled_patch16_224", {**SMALL, "img_size": 32, "patch_size": 8}),
    ("vit_tiny_r_s16_p8_224", {**SMALL, "img_size": 64}),
    ("vit_small_patch16_dinov3", {**SMALL, "img_size": 32, "patch_size": 8}),
    ("vit_small_patch16_rope_mixed_224", {**SMALL, "img_size": 32, "patch_size": 8}),
    ("eva02_tiny_patch14_224", {**SMALL, "img_size": 28, "patch_size": 7}),
]
IDS = [f"{name}-{i}" for i, (name, _) in enumerate(VITS)]
every_vit = pytest.mark.parametrize(("name", "args"), VITS, ids=IDS)


def made(name, args):
    torch.manual_seed(0)
    encoder = models.build(Model(backbone=name, args=args), 3)
    with torch.no_grad():
        for parameter in encoder.parameters():  # no zero or one that would hide a step that is left out
            parameter.add_(0.02 * torch.randn_like(parameter))
    size = args["img_size"]
    return encoder.eval(), torch.randn(3, 3, size, size), tokens.layout(encoder, size)


@every_vit
@torch.no_grad()
def test_with_nothing_hidden_the_features_are_timms(name, args):
    encoder, x, layout = made(name, args)
    all_patches = torch.arange(layout.patches).expand(len(x), -1)
    nothing = torch.zeros(len(x), layout.patches, dtype=torch.bool)
    ways = [{}, {"visible": all_patches}, {"mask": nothing, "mask_token": torch.full((layout.width,), torch.nan)}]
    for way in ways:
        out = tokens.encode(encoder, x, **way)
        assert out.shape == (len(x), layout.prefix + layout.patches, layout.width)
        torch.testing.assert_close(out, encoder.forward_features(x), rtol=0, atol=1e-6)
        torch.testing.assert_close(tokens.features(encoder, out), encoder(x), rtol=0, atol=1e-6)


def patch_changed(x, layout, index):
    """The images with another patch `index`."""
    (height, width), columns = layout.patch, layout.grid[1]
    top, left = index // columns * height, index % columns * width
    changed = x.clone()
    changed[..., top : top + height, left : left + width] += 3
    return changed


@every_vit
@torch.no_grad()
def test_what_is_hidden_is_not_seen_and_what_is_not_is(name, args):
    encoder, x, layout = made(name, args)
    if "_r_" in name:
        pytest.skip("its convolutions see beyond a patch")
    for hidden in (0, layout.patches - 2):
        mask = torch.arange(layout.patches).expand(len(x), -1) == hidden
        visible = (~mask).nonzero()[:, 1].view(len(x), -1)
        for way in ({"mask": mask, "mask_token": torch.ones(layout.width)}, {"visible": visible}):
            out = tokens.encode(encoder, x, **way)
            torch.testing.assert_close(tokens.encode(encoder, patch_changed(x, layout, hidden), **way), out)
            other = tokens.encode(encoder, patch_changed(x, layout, hidden + 1), **way)
            assert not torch.allclose(other, out, atol=1e-3)


@every_vit
@torch.no_grad()
def test_visible_patches_keep_their_places(name, args):
    """Their order changes the order of the tokens and nothing else."""
    encoder, x, layout = made(name, args)
    visible = torch.stack([torch.randperm(layout.patches)[: layout.patches // 2] for _ in x])
    order = torch.randperm(visible.shape[1])
    out = tokens.encode(encoder, x, visible=visible)
    again = tokens.encode(encoder, x, visible=visible[:, order])
    assert out.shape[1] == layout.prefix + visible.shape[1]
    torch.testing.assert_close(again[:, layout.prefix :], out[:, layout.prefix :][:, order], rtol=1e-4, atol=1e-5)
    elsewhere = tokens.encode(encoder, x, visible=(visible + 1) % layout.patches)
    assert not torch.allclose(elsewhere, out, atol=1e-3)


def test_layout():
    _, _, layout = made("vit_small_patch14_reg4_dinov2", {**SMALL, "img_size": 28, "patch_size": 7})
    assert layout == tokens.Layout(patch=(7, 7), grid=(4, 4), width=48, prefix=5, pool="token")
    assert layout.patches == 16
    assert tokens.layout(models.build(Model(), 3), 48) is None


def test_what_does_not_fit_is_named():
    for name in ("test_vit", "vit_small_patch16_dinov3"):
        small = SMALL if name != "test_vit" else {}
        encoder = models.build(Model(backbone=name, args={**small, "img_size": 32, "patch_drop_rate": 0.5}), 3)
        with pytest.raises(ConfigError, match="patch_drop_rate cannot be above 0"):
            tokens.layout(encoder, 32)
    args = {**SMALL, "img_size": 30, "dynamic_img_size": True, "dynamic_img_pad": True}
    with pytest.raises(ConfigError, match=r"augment.size=30 is no multiple of the backbone's patches, 16×16 px"):
        tokens.layout(models.build(Model(backbone="vit_tiny_patch16_224", args=args), 3), 30)
