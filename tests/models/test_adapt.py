"""Gentle adaptation: which parts of an encoder learn, at which rate, and what is handed out."""

import copy
import json

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import nn
from trained import SMALL

from sslcells import methods, models, optim
from sslcells.config import ConfigError, Model, Optim, load
from sslcells.delivery import hub
from sslcells.delivery.encoder import load_encoder
from sslcells.methods.byol import Config as Byol
from sslcells.methods.simclr import Config as Simclr
from sslcells.models import adapt, depth, lora
from sslcells.plan import consequences
from sslcells.run import checkpoint
from sslcells.train import train

VIT = {"backbone": "test_vit", "args": {"img_size": 32}}
LORA = {"pretrained": True, "lora_rank": 4}


def adapted(encoder=None, **changes):
    """An encoder and what is fixed of it; adapters are not at their start, where they do nothing."""
    torch.manual_seed(0)
    config = Model(**{**VIT, **({} if encoder is None else {"backbone": encoder, "args": {}}), **changes})
    made = models.build(config, 3)
    fixed = adapt.adapt(made, config).fixed
    for name, p in made.named_parameters():
        if name.endswith("weight.0.b"):
            nn.init.normal_(p, std=0.02)
    return made, fixed


def learner(config, encoder=None, **changes):
    made, fixed = adapted(encoder, **changes)
    return methods.Learner(made, methods.build(config, models.width(made, 3, 32), None), fixed)


def test_layers_are_the_stem_and_then_the_blocks():
    names = {b: [depth.name_of(x) for x in depth.layers(adapted(b)[0])] for b in ("test_resnet", "small_cnn")}
    assert names["test_resnet"] == ["conv1", "layer1.0", "layer2.0", "layer3.0", "layer4.0"]
    assert len(names["small_cnn"]) == 3
    vit = adapted()[0]
    first, *blocks = depth.layers(vit)
    assert {"cls_token", "pos_embed", "patch_embed.proj.weight"} == {*first} - {"patch_embed.proj.bias"}
    assert [depth.name_of(x) for x in blocks] == [f"blocks.{i}" for i in range(6)]
    assert "norm.weight" in blocks[-1]
    assert sum(len(x) for x in [first, *blocks]) == len(list(vit.parameters()))
    with pytest.raises(ConfigError, match="timm does not say how the layers of Sequential follow each other"):
        depth.layers(nn.Sequential())


@pytest.mark.parametrize("name", ["adamw", "lars"])
@pytest.mark.parametrize("changes", [{}, {"freeze": 3}, LORA])
def test_each_layer_has_the_rate_of_its_depth_and_weight_decay_as_without(name, changes):
    network = learner(Simclr(), **changes)
    config = Optim(name=name, layer_decay=0.5, encoder_scale=0.1, weight_decay=0.1)
    optimizer = optim.build(config, network, depth.parameters(network.backbone, apart=True))
    optim.set_learning_rate(optimizer, 8.0)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    learning = {name: p for name, p in network.named_parameters() if p.requires_grad}
    assert rates.keys() == {id(p) for p in learning.values()}
    for key, p in learning.items():
        block = int(key.split(".")[2]) if key.startswith("backbone.blocks") else 5 if "backbone.norm" in key else -1
        expected = 8.0 * (0.1 * 0.5 ** (5 - block) if key.startswith("backbone") else 1)
        assert rates[id(p)] == pytest.approx(expected), key
    plain = optim.build(config.model_copy(update={"layer_decay": 1.0, "encoder_scale": 1.0}), network)
    decays = [{id(p): g["weight_decay"] for g in o.param_groups for p in g["params"]} for o in (optimizer, plain)]
    assert decays[0] == decays[1]


def test_without_layer_decay_groups_are_as_they_were():
    """The order of a checkpoint's optimizer states: the head's parameters, then the encoder's."""
    network = learner(Simclr(), "test_resnet")
    layers = depth.parameters(network.backbone, apart=False)
    groups = optim.build(Optim(encoder_scale=0.5), network, layers).param_groups
    assert [(g["lr_scale"], g["weight_decay"]) for g in groups] == [(1, 0), (0.5, 0), (1, 0.01), (0.5, 0.01)]
    ours = {id(p) for p in network.backbone.parameters()}
    assert all((id(p) in ours) == (g["lr_scale"] == 0.5) for g in groups for p in g["params"])


def stepped(network, x):
    """A step of SGD on all that learns; the gradients before it, by name."""
    optimizer = torch.optim.SGD([p for p in network.parameters() if p.requires_grad], 0.1)
    network(x, progress=0.0).rows.square().sum().backward()
    gradients = {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}
    optimizer.step()
    network.follow(0.0)
    return gradients


@pytest.mark.parametrize(("backbone", "freeze"), [(None, 3), ("test_resnet", 0.4), ("small_cnn", 1)])
def test_frozen_layers_stay_to_the_last_bit_in_student_and_teacher(backbone, freeze):
    network = learner(Byol(norm="none"), backbone, freeze=freeze)
    names = [n for layer in depth.layers(network.backbone) for n in layer]
    kept = {n for n in names if not network.backbone.get_parameter(n).requires_grad}
    frozen = depth.modules_within(network.backbone, kept)
    assert 0 < len(kept) < len(names)
    before = copy.deepcopy(network.state_dict())
    with models.eval_mode(network.backbone):
        assert not network.backbone.training
    assert network.backbone.training
    gradients = stepped(network, torch.randn(4, 3, 32, 32))
    assert {n.removeprefix("backbone.") for n in gradients if n.startswith("backbone")} == {*names} - kept
    inside = tuple(f"{part}.{module}." for part in ("backbone", "teacher.backbone") for module in frozen)
    moved = {key for key, x in network.state_dict().items() if not torch.equal(before[key], x)}
    assert not {key for key in moved if key.startswith(inside) or key.partition("backbone.")[2] in kept}
    assert {name for name, gradient in gradients.items() if gradient.any()} <= moved
    assert any(key.startswith("teacher.backbone.") for key in moved)
    if backbone is not None:
        assert any("running_mean" in key for key in moved)
        assert any("running_mean" in key for key in before if key.startswith(inside))


def test_gradients_are_those_of_the_whole_network():
    x = torch.randn(4, 3, 32, 32)
    whole = stepped(learner(Simclr(norm="none")), x)
    part = stepped(learner(Simclr(norm="none"), freeze=0.5), x)
    assert 0 < len(part) < len(whole)
    assert all(torch.equal(whole[name], gradient) for name, gradient in part.items())


def test_adapters_start_as_nothing_and_are_merged_to_the_last_bit():
    config = Model(**VIT, **LORA, lora_alpha=8, lora_layers=("*.attn.*",))
    encoder = models.build(config, 3).eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        before = encoder(x)
        said = adapt.adapt(encoder, config).said[0]
        assert torch.equal(encoder(x), before)
        learning = {n: p for n, p in encoder.named_parameters() if p.requires_grad}
        assert all(".attn." in n and n.endswith((".a", ".b")) for n in learning)
        assert "12 linear layers learn, blocks.0.attn.qkv to blocks.5.attn.proj, with rank 4 and scale 2: " in said
        assert f"{sum(p.numel() for p in learning.values()):,} numbers" in said
        for p in learning.values():
            p.normal_()
        plain, old = models.build(config, 3).eval(), dict(encoder.state_dict())
        plain.load_state_dict(lora.merged(encoder))
        assert not torch.equal(encoder(x), before)
        assert torch.equal(plain(x), encoder(x))
    qkv = "blocks.2.attn.qkv"
    a, b, weight = (old[f"{qkv}.parametrizations.weight.{n}"] for n in ("0.a", "0.b", "original"))
    torch.testing.assert_close(plain.get_parameter(f"{qkv}.weight"), weight + 2 * b @ a)
    copied = copy.deepcopy(encoder)
    lora.merge(copied)
    assert copied.state_dict().keys() == plain.state_dict().keys()
    assert torch.equal(copied(x), plain(x))


def test_adapters_reach_attention_that_reads_its_weight_itself():
    """BEiT's computes with the weight of the layer, not with the layer."""
    small = {"img_size": 32, "embed_dim": 32, "depth": 2, "num_heads": 2}
    encoder, _ = adapted("beit_base_patch16_224", args=small, **LORA)
    encoder(torch.randn(2, 3, 32, 32)).square().sum().backward()
    gradients = {name: p.grad for name, p in encoder.named_parameters() if p.requires_grad}
    assert len(gradients) == 2 * 2 * 4
    assert all(gradient is not None and gradient.any() for gradient in gradients.values())


def linear_weights():
    return {f"{n}.weight" for n, m in models.build(Model(**VIT), 3).named_modules() if isinstance(m, nn.Linear)}


def test_the_teacher_is_the_average_of_merged_weights():
    network = learner(Byol(norm="none", momentum=0.9), **LORA)
    assert network.teacher.backbone.state_dict().keys() == models.build(Model(**VIT), 3).state_dict().keys()
    start = lora.merged(network.backbone)
    assert all(torch.equal(x, start[n]) for n, x in network.teacher.backbone.named_parameters())
    stepped(network, torch.randn(4, 3, 32, 32))
    now, weights = lora.merged(network.backbone), linear_weights()
    for name, x in network.teacher.backbone.named_parameters():
        torch.testing.assert_close(x, 0.9 * start[name] + 0.1 * now[name])
        assert torch.equal(x, start[name]) == (name not in weights)


def test_batchnorm_beside_adapters_is_fixed():
    assert adapt.adapt(nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)), Model(**LORA)).fixed == ("1",)


def configured(folder, *changes):
    start = models.build(Model(**VIT), 3)
    torch.save(start.state_dict(), folder / "start.pt")
    vit = ["model.backbone=test_vit", "model.args={img_size: 32}", f"model.weights={folder}/start.pt"]
    own = ["model.mean=[0.5]", "model.std=[0.25]", "train.global_batch=8", "train.total_steps=4", "train.workers=0"]
    rest = ["checkpoint.every_steps=2", "evaluate.pictures=false", f"out={folder}", "evaluate.every_epochs=99"]
    return load(None, [*SMALL[:5], *vit, *own, *rest, "optim.lr=1e-2", *changes])


class Killed(BaseException):
    pass


def die(station, x, seen=[]):  # noqa: B006
    seen.append(station)
    if seen.count("loss") == 3:
        raise Killed


def test_adapters_resume_exactly_and_timm_alone_loads_what_is_handed_out(tmp_path, capsys):
    gentle = ["model.lora_rank=2", "optim.layer_decay=0.8", "model.freeze=1"]
    dino = ["method.name=dino", "method.local_views=0", "method.prototypes=16"]
    run = configured(tmp_path, "name=whole", *gentle, *dino)
    whole = train(run)
    said = capsys.readouterr().out
    assert "model.freeze: the first 1 of 7 layers stay fixed, in eval mode (cls_token)" in said
    assert "LoRA: adapters of 24 linear layers learn" in said
    assert "optim.layer_decay=0.8: learning rate × 0.26 in the first of 7 layers (cls_token), × 1 in the last" in said
    assert said.split("LoRA: ")[1].splitlines()[0] in consequences(run, 1)
    killed = run.model_copy(update={"name": "killed"})
    with pytest.raises(Killed):
        train(killed, die)
    again = train(killed)
    end, exported = (load_file(f / "encoder.safetensors") for f in (whole, again))
    assert all(torch.equal(end[key], x) for key, x in exported.items())
    kept, same = (load_file(checkpoint.newest(f / "checkpoints") / "model.safetensors") for f in (whole, again))
    assert all(torch.equal(kept[key], x) for key, x in same.items())
    assert all(torch.equal(kept[f"teacher.backbone.{key}"], x) for key, x in exported.items())  # DINO's teacher
    start = torch.load(tmp_path / "start.pt")
    moved = {key for key, x in start.items() if not torch.equal(x, end[key])}
    assert moved == linear_weights()

    encoder = load_encoder(whole)
    assert hub.write(encoder.backbone, json.loads((whole / "encoder.json").read_text()), whole) is None
    made, x = timm.create_model(f"local-dir:{whole}", pretrained=True).eval(), torch.randn(2, 3, 32, 32)
    assert torch.equal(made(x), encoder.backbone(x))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            ["model.freeze=9"],
            r"freeze=9 is 9 of the 7 layers of the backbone, cls_token to blocks\.5; take 1 to 6",
        ),
        (["model.freeze=0.01"], r"model.freeze=0.01 is 0 of the 7 layers"),
        (["model.freeze=1.5"], r"model.freeze=1.5: expected true, false, a number of layers from 1, or a fraction"),
        (["model.freeze=true"], r"nothing would be left of the training, as method.name=simclr hands out the encoder"),
        (["model.freeze=true", "model.lora_rank=2"], r"freeze=true fixes the encoder, and lora_rank=2 trains it"),
        (["model.lora_rank=2", "model.weights=none"], r"lora_rank=2 adapts weights that are there: set weights"),
        (["model.lora_alpha=2"], r"lora_alpha and lora_layers are for adapters: set lora_rank"),
        (["model.lora_rank=65"], r"lora_rank=65 is more than the rank of blocks\.0\.attn\.qkv, 64: take a smaller one"),
        (["model.lora_rank=2", "model.lora_layers=[mlp]"], r"'mlp' is no linear layer that may learn: blocks\.0\.attn"),
        (["optim.args={layer_decay: 0.7}"], r"optim.args: layer_decay=0.7 cannot be: set optim.layer_decay"),
        (["optim.layer_decay=1.1"], r"optim.layer_decay=1.1"),
    ],
)
def test_mistakes_are_named(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        consequences(configured(tmp_path, *changes), 1)


@pytest.mark.parametrize("fixed", ["model.lora_rank=2", "model.freeze=3"])
def test_what_the_weights_lack_must_learn(tmp_path, fixed):
    run = configured(tmp_path, fixed, "model.allow_missing=[blocks.1.norm1.*]")
    start = torch.load(tmp_path / "start.pt")
    torch.save({key: x for key, x in start.items() if "blocks.1.norm1." not in key}, tmp_path / "start.pt")
    with pytest.raises(ConfigError, match=r"the weights lack blocks\.1\.norm1\.weight and 1 more, and model\.freeze"):
        consequences(run, 1)
    whole = run.model.model_copy(update={"lora_rank": None, "freeze": 2})
    assert "2 new" in consequences(run.model_copy(update={"model": whole}), 1)


def test_a_backbone_without_linear_layers_takes_no_adapters():
    with pytest.raises(ConfigError, match="ResNet has no linear layer that may learn; LoRA is for vision transformers"):
        adapted("test_resnet", **LORA)


@pytest.mark.parametrize("freeze", ["true", "1"])
def test_true_and_1_are_not_the_same_freeze(tmp_path, freeze):
    """Python calls them equal; a run must not go on with the other one."""
    other = {"true": "1", "1": "true"}[freeze]
    run = configured(tmp_path, "method.name=supervised", f"model.freeze={freeze}", "train.total_steps=2")
    train(run)
    with pytest.raises(ConfigError, match=r"model\.freeze: "):
        train(configured(tmp_path, "method.name=supervised", f"model.freeze={other}", "train.total_steps=2"))
