"""Backbones from timm, the small stem, and the encoder's file."""

import json

import pytest
import timm
import torch
from safetensors.torch import load_file

from sslcells import models
from sslcells.config import ConfigError, Model
from sslcells.models import files, tokens, weights
from sslcells.models.heads import projection


@pytest.mark.parametrize("channels", [1, 3, 6])
@pytest.mark.parametrize("backbone", ["test_resnet", "test_vit", "small_cnn"])
def test_any_backbone_and_number_of_channels(backbone, channels):
    args = {"img_size": 48} if backbone == "test_vit" else {}
    encoder = models.build(Model(backbone=backbone, args=args), channels)
    width = models.width(encoder, channels, 48)
    assert encoder.training
    assert encoder(torch.zeros(2, channels, 48, 48)).shape == (2, width)


def test_small_stem_keeps_the_resolution():
    encoder = models.build(Model(backbone="resnet18", stem="small"), 3).eval()
    shapes = []
    encoder.layer1.register_forward_hook(lambda m, i, o: shapes.append(o.shape))
    encoder(torch.zeros(1, 3, 28, 28))
    assert shapes[0][-2:] == (28, 28)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"backbone": "resnet81"}, "did you mean resnet"),
        ({"backbone": "resnet18", "args": {"widthh": 3}}, "widthh"),
        ({"backbone": "test_vit", "stem": "small"}, "stem=small"),
        ({"args": {"features_only": True}}, "features_only=True cannot be: an encoder gives one vector an image"),
        ({"args": {"num_classes": 10}}, "num_classes=10 cannot be: the head is the method's"),
        ({"args": {"global_pool": ""}}, "global_pool='' cannot be: an encoder gives one vector"),
        ({"args": {"in_chans": 3}}, "in_chans=3 cannot be: the images say"),
        ({"args": {"checkpoint_path": "x"}}, "checkpoint_path='x' cannot be: model.weights=FILE"),
        ({"mean": (0.1, 0.2)}, "model.mean has 2 values; the images have 3 channels"),
    ],
)
def test_mistakes_are_named(model, message):
    with pytest.raises(ConfigError, match=message):
        models.build(Model(**model), 3)


def test_unreachable_weights_are_a_clear_error(monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("no route to the hub\nand more")

    encoder = models.build(Model(backbone="resnet18"), 3)
    monkeypatch.setattr(timm, "create_model", refuse)
    with pytest.raises(ConfigError, match=r"model.weights=resnet18: .* cannot be had: no route to the hub$"):
        weights.load(encoder, Model(backbone="resnet18", pretrained=True), 3)


@pytest.mark.parametrize("backbone", ["test_resnet", "test_vit"])
def test_an_encoder_that_gives_no_vectors_is_told(backbone):
    """Whatever else timm's arguments may do to what comes out."""
    with pytest.raises(ConfigError, match=r"features of shape list, not \(N, F\): see model.args"):
        models.width(models.create("test_resnet", 3, {"features_only": True}), 3, 48)
    with pytest.raises(ConfigError, match=r"features of shape \(1, .*\), not \(N, F\): see model.args"):
        models.width(
            models.create(backbone, 3, {"global_pool": ""}), 3, timm.get_pretrained_cfg(backbone).input_size[1]
        )


@pytest.mark.parametrize(
    ("size", "key", "args", "remedy"),
    [
        (96, "augment.size", {"drop_rate": 0.1}, "model.args={depth: 1, drop_rate: 0.1, img_size: 96} would do"),
        (
            100,
            "augment.size",
            {},
            "augment.size=96 and model.args={depth: 1, img_size: 96} would do (its patches are 16 px)",
        ),
        (48, "method.local_size", {}, "model.args={depth: 1, dynamic_img_size: true} would do"),
    ],
)
def test_what_would_make_a_size_fit_is_said(size, key, args, remedy):
    config = Model(backbone="vit_tiny_patch16_224", args={"depth": 1, **args})
    with pytest.raises(ConfigError) as error:
        models.width(models.build(config, 3), 3, size, key, config)
    assert f"{key}={size}: the backbone takes no images of" in str(error.value)
    assert f"; {remedy}" in str(error.value)


def test_a_size_that_the_backbone_does_not_take():
    with pytest.raises(ConfigError, match=r"augment\.size=48"):
        models.width(models.build(Model(backbone="vit_tiny_patch16_224"), 3), 3, 48)


@pytest.mark.parametrize("stem", ["timm", "small"])
def test_export_and_load(stem, tmp_path):
    config = Model(backbone="test_resnet" if stem == "timm" else "resnet18", stem=stem, mean=(0.4,), std=(0.2,))
    encoder = models.build(config, 3).eval()
    files.export(encoder, config, channels=3, size=40, folder=tmp_path)
    again, spec = files.load(tmp_path)
    x = torch.randn(2, 3, 40, 40)
    assert torch.equal(again(x), encoder(x))
    assert spec["mean"] == [0.4] * 3
    assert spec["size"] == 40


def test_timm_alone_loads_the_encoder(tmp_path):
    config = Model(args={"drop_path_rate": 0.1})
    encoder = models.build(config, 1).eval()
    files.export(encoder, config, channels=1, size=40, folder=tmp_path)
    spec = json.loads((tmp_path / "encoder.json").read_text())
    again = timm.create_model(**spec["timm"], checkpoint_path=str(tmp_path / "encoder.safetensors")).eval()
    x = torch.randn(2, 1, 40, 40)
    assert torch.equal(again(x), encoder(x))
    assert load_file(tmp_path / "encoder.safetensors").keys() == encoder.state_dict().keys()


def test_a_folder_without_encoder(tmp_path):
    with pytest.raises(ConfigError, match=r"holds no encoder\.json"):
        files.load(tmp_path)


@pytest.mark.parametrize("norm", ["batch", "layer", "none"])
def test_projection_has_so_many_linear_maps(norm):
    head = projection(8, 16, 4, 3, norm)
    assert sum(isinstance(m, torch.nn.Linear) for m in head) == 3
    assert head(torch.randn(5, 8)).shape == (5, 4)


@pytest.mark.parametrize(
    ("backbone", "stem", "layer"),
    [("resnet18", "timm", "groupnorm"), ("resnet18", "small", "groupnorm"), ("test_resnet", "timm", "groupnorm1")],
)
def test_group_norm_in_place_of_batch_norm(tmp_path, backbone, stem, layer):
    config = Model(backbone=backbone, stem=stem, norm="group")
    encoder = models.build(config, 3)
    kinds = [type(module) for module in encoder.modules()]
    assert not any(issubclass(kind, torch.nn.BatchNorm2d) for kind in kinds)
    assert any(issubclass(kind, torch.nn.GroupNorm) for kind in kinds)
    x = torch.randn(4, 3, 48, 48)
    alone = torch.cat([encoder(one[None]) for one in x])  # in training mode too, no image sees another one
    torch.testing.assert_close(encoder(x), alone, rtol=1e-4, atol=1e-5)
    files.export(encoder, config, 3, 48, tmp_path)
    loaded, spec = files.load(tmp_path)
    assert spec["timm"]["norm_layer"] == layer
    assert torch.equal(loaded(x), encoder.eval()(x))
    if stem == "timm":
        theirs = timm.create_model(**spec["timm"], checkpoint_path=str(tmp_path / files.WEIGHTS)).eval()
        assert torch.equal(theirs(x), loaded(x))
    again = models.build(config.model_copy(update={"encoder": str(tmp_path)}), 3)
    files.start_from(again, config.model_copy(update={"encoder": str(tmp_path)}), 3)
    with pytest.raises(ConfigError, match="norm_layer"):
        files.start_from(again, Model(backbone=backbone, stem=stem, encoder=str(tmp_path)), 3)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"backbone": "test_vit"}, "cannot build backbone='test_vit' with GroupNorm in place of BatchNorm"),
        ({"backbone": "small_cnn"}, "cannot build backbone='small_cnn' with GroupNorm"),
        (
            {"args": {"norm_layer": "layernorm2d"}},
            "norm=group and norm_layer='layernorm2d' in model.args: set only one",
        ),
    ],
)
def test_backbones_without_group_norm(model, message):
    with pytest.raises(ConfigError, match=message):
        models.build(Model(norm="group", **model), 3)


def test_group_norm_does_not_take_the_weights_of_batch_norm():
    with pytest.raises(ValueError, match="backbone=resnet50_gn"):
        Model(norm="group", pretrained=True)


def gradients(encoder, forward, x):
    """Of every parameter, and the bytes that the forward pass keeps for them."""
    kept = []

    def keep(tensor):
        kept.append(tensor.untyped_storage().nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = forward(encoder, x)
    out.square().sum().backward()
    return [parameter.grad for parameter in encoder.parameters()], sum(kept)


VIT = {"img_size": 32, "patch_size": 4, "depth": 4, "embed_dim": 48, "num_heads": 2}


@pytest.mark.parametrize(
    ("model", "forward"),
    [
        ({"backbone": "vit_tiny_patch16_224", "args": VIT}, lambda encoder, x: encoder(x)),
        ({"backbone": "vit_tiny_patch16_224", "args": VIT}, tokens.encode),
        ({"backbone": "eva02_tiny_patch14_224", "args": VIT}, tokens.encode),
        ({"backbone": "resnet18", "norm": "group"}, lambda encoder, x: encoder(x)),
    ],
)
def test_blocks_that_run_again_give_the_same_gradient_and_keep_less(model, forward):
    x, config, found = torch.randn(4, 3, 32, 32), Model(**model), []
    for again in (False, True):
        torch.manual_seed(0)
        encoder = models.build(config, 3).train()
        if again:
            models.checkpoint_activations(encoder, config)
        torch.manual_seed(1)
        found.append(gradients(encoder, forward, x))
    (plain, kept), (run_again, kept_then) = found
    for a, b in zip(plain, run_again, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)
    assert kept_then < kept / 2


def test_where_blocks_cannot_run_again():
    config = Model(backbone="resnet18")
    with pytest.raises(ConfigError, match=r"backbone='resnet18' has BatchNorm, whose statistics would count each"):
        models.checkpoint_activations(models.build(config, 3), config)
    with pytest.raises(ConfigError, match=r"backbone='tiny': timm cannot run its blocks again; train.micro_batch"):
        models.checkpoint_activations(torch.nn.Linear(2, 2), Model(backbone="tiny"))
