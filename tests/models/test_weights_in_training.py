"""A run that starts from published weights: what it says, how it resumes, and what it hands out."""

import json
import shutil

import pytest
import timm
import torch
from layouts import VIT, vit
from safetensors.torch import load_file
from trained import SMALL, make_run

import sslcells
from sslcells import models
from sslcells.config import ConfigError, Model, dump, load
from sslcells.delivery import hub
from sslcells.delivery.export import export
from sslcells.models import weights
from sslcells.plan import consequences
from sslcells.train import train

SAME = {"backbone", "args"}
MEAN = [0.485, 0.456, 0.406]
ARGS = ", ".join(f"{key}: {value}" for key, value in VIT.items())


def configured(folder, *changes):
    steps = ["train.total_steps=3", "checkpoint.every_steps=1", "checkpoint.keep=9", "train.global_batch=8"]
    quiet = ["train.workers=0", "evaluate.pictures=false", "evaluate.every_epochs=9", "method.name=supervised"]
    model = ["model.backbone=vit_tiny_patch16_224", f"model.args={{{ARGS}}}", f"model.weights={folder}/mae.pth"]
    return load(None, [*SMALL, *steps, *quiet, *model, f"out={folder}", "name=run", *changes])


def published(folder):
    """A file in MAE's layout, whose images are prepared as published."""
    decoder = {"mask_token": torch.zeros(1, 1, 8), "decoder_pos_embed": torch.zeros(1, 17, 8)}
    torch.save({"model": vit("MAE") | decoder}, folder / "mae.pth")


def test_a_run_says_what_it_starts_from_and_never_reads_it_again(tmp_path, capsys):
    published(tmp_path)
    run = configured(tmp_path)
    folder = train(run)
    said = capsys.readouterr().out
    assert "30 tensors of the encoder: 30 loaded, 0 resized, 0 inflated, 0 new; left out: " in said
    prepared = "images: mean 0.485, 0.456, 0.406, std 0.229, 0.224, 0.225, interpolation bicubic, crop 0.875"
    assert f"{prepared}; from as MAE's are published" not in said
    assert f"{prepared}; as MAE's are published" in said
    written = load(str(folder / "config.yaml"))
    assert list(written.model.mean) == MEAN
    spec = json.loads((folder / "encoder.json").read_text())
    assert (spec["mean"], spec["interpolation"], spec["crop"]) == (MEAN, "bicubic", 0.875)
    end = load_file(folder / "encoder.safetensors")
    assert not torch.equal(end["blocks.0.mlp.fc1.weight"], vit("MAE")["blocks.0.mlp.fc1.weight"])

    (tmp_path / "mae.pth").unlink()
    for step in (2, 3):
        shutil.rmtree(folder / "checkpoints" / f"step_{step:08}")
    assert train(run) == folder
    again = load_file(folder / "encoder.safetensors")
    assert all(torch.equal(again[key], x) for key, x in end.items())
    assert "weights:" not in capsys.readouterr().out

    shutil.rmtree(folder)
    with pytest.raises(ConfigError, match=r"model.weights=.*mae.pth: no such file"):
        train(run)


def test_a_checkpoint_with_adapters_starts_another_run(tmp_path):
    """Their strength stands in the run's configuration alone, so a copy of the file says too little."""
    published(tmp_path)
    folder = train(configured(tmp_path, "model.lora_rank=2", "model.lora_alpha=6"))
    end = load_file(folder / "encoder.safetensors")
    assert not torch.equal(end["blocks.0.mlp.fc1.weight"], vit("MAE")["blocks.0.mlp.fc1.weight"])
    file = folder / "checkpoints" / "step_00000003" / "model.safetensors"
    again = configured(tmp_path, f"model.weights={file}").model
    start = models.build(again, 3)
    weights.load(start, again, 3)
    assert end.keys() == start.state_dict().keys()
    assert all(torch.equal(start.state_dict()[key], x) for key, x in end.items())

    shutil.copy(file, tmp_path / "copy.safetensors")
    with pytest.raises(ConfigError, match=r"it holds LoRA adapters .* take the run's encoder.safetensors"):
        weights.load(start, configured(tmp_path, f"model.weights={tmp_path}/copy.safetensors").model, 3)


def test_check_prints_the_account(tmp_path):
    published(tmp_path)
    report = consequences(configured(tmp_path, "data.train=30"), 1)
    assert "(MAE's names, the network model): 30 tensors of the encoder: 30 loaded" in report
    assert "images: mean 0.485" in report
    broken = torch.load(tmp_path / "mae.pth")
    del broken["model"]["norm.bias"]
    torch.save(broken, tmp_path / "mae.pth")
    with pytest.raises(ConfigError, match=r"1 of the encoder's 30 tensors are missing: norm\.bias"):
        consequences(configured(tmp_path), 1)


def test_a_run_without_weights_is_written_as_before():
    run = load(None, [])
    assert "mean: null" in dump(run)
    assert sslcells.models.normalisation(run.model, 3) == ((0.5,) * 3, (0.25,) * 3)


@pytest.mark.parametrize(
    "changes",
    [
        ["model.backbone=test_resnet", "model.args={}"],
        ["model.backbone=test_vit", "model.args={img_size: 32, global_pool: avg}", "model.crop=0.8"],
    ],
)
@pytest.mark.parametrize("channels", [pytest.param(3, marks=pytest.mark.slow), 5])
def test_timms_local_dir_loads_an_export(changes, channels, tmp_path):
    folder = make_run(tmp_path / "run", *changes, channels=channels)
    encoder = sslcells.load_encoder(folder)
    assert hub.write(encoder.backbone, json.loads((folder / "encoder.json").read_text()), folder) is None
    made = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    x = encoder.prepare(torch.rand(2, channels, 40, 40))
    with torch.no_grad():
        torch.testing.assert_close(made(x), encoder.backbone(x), rtol=1e-5, atol=1e-5)
    cfg = timm.data.resolve_model_data_config(made)
    assert tuple(cfg["input_size"]) == (channels, 32, 32)
    assert tuple(cfg["mean"]) == (0.5,) * channels
    assert cfg["crop_pct"] == (0.8 if "model.crop=0.8" in changes else 1.0)
    config = Model(weights=f"local-dir:{folder}", **load(str(folder / "config.yaml")).model.model_dump(include=SAME))
    again = models.build(config, channels).eval()
    assert "0 resized, 0 inflated, 0 new" in weights.load(again, config, channels)[0]
    with torch.no_grad():
        assert torch.equal(again(x), made(x))
    assert weights.resolved(config, channels)[0].mean == (0.5,) * channels


@pytest.mark.slow
@pytest.mark.parametrize("changes", [["model.backbone=test_resnet", "model.args={}"], []])
def test_an_export_has_what_the_hub_has_where_timm_knows_the_network(changes, tmp_path):
    folder = make_run(tmp_path / "run", *changes)
    said = list[str]()
    out = export(str(folder), str(tmp_path / "out"), onnx=False, say=said.append)
    names = {file.name for file in out.iterdir()}
    assert ({"config.json", "model.safetensors"} <= names) == bool(changes)
    assert any(line.startswith("timm local-dir on noise" if changes else "left out: config.json") for line in said)
