"""Distillation as a run: what the teacher sees, what a checkpoint holds, and that it never changes."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from trained import SMALL, make_run

from sslcells import inputs
from sslcells.config import ConfigError, load
from sslcells.data import listing
from sslcells.plan import consequences, open_run
from sslcells.train import train


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """An encoder of other images: larger, and normalised otherwise."""
    changes = ["augment.size=40", "model.args={width: 12}", "model.mean=[0.7]", "model.std=[0.1]"]
    return make_run(tmp_path_factory.mktemp("distill") / "teacher", *changes, seed=5)


def configured(folder, teacher, *changes):
    steps = ["train.total_steps=3", "checkpoint.every_steps=1", "checkpoint.keep=9", "train.global_batch=8"]
    quiet = ["train.workers=0", "evaluate.pictures=false", "evaluate.every_epochs=9", "log.every_steps=1"]
    method = ["method.name=distill", f"method.teacher.weights={teacher}", "method.views=2"]
    return load(None, [*SMALL, *steps, *quiet, *method, f"out={folder}", "name=run", *changes])


def test_a_name_alone_stands_for_the_teacher(tmp_path, teacher):
    run = load(None, ["method.name=distill", f"method.teacher={teacher}"])
    assert run.method.teacher.weights == str(teacher)
    with pytest.raises(ConfigError, match=r"method\.teacher: Field required"):
        load(None, ["method.name=distill"])
    with pytest.raises(
        ConfigError, match=r"method\.teacher\.wieghts.*no such key.*did you mean method.teacher.weights"
    ):
        load(None, ["method.name=distill", f"method.teacher.weights={teacher}", "method.teacher.wieghts=x"])


def test_the_teacher_sees_the_students_views(teacher, tmp_path):
    run = configured(tmp_path, teacher)
    splits = open_run(run)
    images, augment = splits["train"], inputs.augment(run, splits, None)
    pixels = torch.stack([images.pixels(i) for i in range(4)])
    key = {"image": torch.arange(4), "seed": 0, "step": 3, "views": 2}
    seen, same = augment(pixels, **key), augment.at(32, *augment.normalisation)(pixels, **key)
    assert torch.equal(seen, same)
    larger = augment.at(64, (0.0,) * 3, (1.0,) * 3)(pixels, **key)
    shrunk = F.interpolate(larger, (32, 32), mode="area")
    apart = [(shrunk - x * 0.25 - 0.5).abs().mean() for x in (seen, seen.roll(1, 0))]
    assert apart[0] < 0.03 < apart[1]


def test_no_checkpoint_holds_it_and_a_resumed_run_is_the_same(teacher, tmp_path, capsys):
    run = configured(tmp_path, teacher)
    folder = train(run)
    said = capsys.readouterr().out
    assert "features of images of 40×40 px, mean 0.7, 0.7, 0.7, std 0.1" in said
    assert "loss" in json.loads((folder / "metrics.jsonl").read_text().splitlines()[1])
    held = load_file(folder / "checkpoints" / "step_00000003" / "model.safetensors")
    assert held["method._extra_state"].shape == (32,)
    assert not any("teacher" in name for name in held)
    end = load_file(folder / "encoder.safetensors")
    for step in (2, 3):
        shutil.rmtree(folder / "checkpoints" / f"step_{step:08}")
    train(run)
    assert "resuming after step 1" in capsys.readouterr().out
    again = load_file(folder / "encoder.safetensors")
    assert all(torch.equal(again[key], x) for key, x in end.items())


def test_a_resumed_run_refuses_another_teacher(teacher, tmp_path, capsys):
    own = Path(shutil.copytree(teacher, tmp_path / "teacher"))
    run = configured(tmp_path, own, "train.total_steps=1")
    listing.record(own, open_run(run)["val"])
    train(run)
    assert "warning: teacher was trained on 20 of the 20 images of val" in capsys.readouterr().out
    weights = load_file(own / "encoder.safetensors")
    key = next(k for k, x in weights.items() if x.is_floating_point())
    save_file(weights | {key: weights[key] * 1.001}, own / "encoder.safetensors")
    with pytest.raises(
        ConfigError, match=r"method\.teacher=teacher: its weights or how .* not those that this run began"
    ):
        train(run)


def test_the_teacher_stays_as_it_is_and_the_student_nears_it(teacher, tmp_path):
    run = configured(tmp_path, teacher, "train.total_steps=12", "train.global_batch=30", "checkpoint.every_steps=99")
    before = load_file(teacher / "encoder.safetensors")
    folder = train(run)
    loss = [
        row["loss"] for row in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()) if "loss" in row
    ]
    assert loss[-1] < 0.7 * loss[0]
    after = load_file(teacher / "encoder.safetensors")
    assert all(torch.equal(after[key], x) for key, x in before.items())


@pytest.mark.parametrize("kind", ["cosine", "mse", "similarity"])
def test_check_says_who_teaches(kind, teacher, tmp_path):
    report = consequences(configured(tmp_path, teacher, f"method.loss={kind}"), 1)
    assert "teacher: teacher: " in report
    assert "features of images of 40×40 px, mean 0.7, 0.7, 0.7, std 0.1, 0.1, 0.1" in report


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("nobody", r"method\.teacher=nobody: no such file, and timm has no weights of that name"),
        (
            "{{weights: {there}/x.pth}}",
            r"x\.pth: nothing says which of timm's networks it is: set method\.teacher\.backb",
        ),
    ],
)
def test_a_teacher_that_cannot_be_had(given, words, tmp_path):
    torch.save({"a": torch.zeros(1)}, tmp_path / "x.pth")
    small = [*SMALL, "train.global_batch=8", "method.name=distill", f"out={tmp_path}"]
    with pytest.raises(ConfigError, match=words):
        train(load(None, [*small, f"method.teacher={given.format(there=tmp_path)}"]))
