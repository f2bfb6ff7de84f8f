"""The loop from end to end: what it leaves behind, that it resumes exactly, and how it stops."""

import json
import os
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from sslcells import launcher, losses
from sslcells import train as train_module
from sslcells.config import ConfigError, load
from sslcells.data import Batch
from sslcells.errors import TrainingError
from sslcells.losses import torch_engine
from sslcells.models import files
from sslcells.run import checkpoint
from sslcells.run.folder import changed, resolve_auto
from sslcells.run.interrupt import Stopped
from sslcells.run.lock import TAKING, Lock
from sslcells.run.metrics import read_metrics
from sslcells.train import train

TINY = [
    "data.size=32",
    "data.train=80",
    "data.val=20",
    "data.test=0",
    "augment.size=32",
    "model.backbone=small_cnn",
    "model.args={width: 8}",
    "method.hidden=16",
    "method.dimension=8",
    "train.global_batch=16",
    "train.total_epochs=3",
    "train.workers=0",
    "log.every_steps=2",
    "checkpoint.every_steps=4",
    "evaluate.every_epochs=2",
    "evaluate.k=5",
]


def tiny(folder, *changes):
    return load(None, [*TINY, f"out={folder}", *changes])


def untimed(folder):
    rows = read_metrics(folder)
    return [{k: v for k, v in r.items() if k not in {"images_per_second", "data_wait", "memory_gib"}} for r in rows]


def test_the_loss_computes_figures_where_a_line_reads_them(tmp_path, monkeypatch):
    asked, plain = [], torch_engine.row_sums

    def spied(*args, figures):
        asked.append(figures)
        return plain(*args, figures=figures)

    monkeypatch.setattr(torch_engine, "row_sums", spied)
    quick = ["train.total_steps=5", "data.val=0", "evaluate.pictures=false"]
    lines = [row for row in read_metrics(train(tiny(tmp_path, *quick))) if "loss" in row]
    assert asked == [False, True, False, True, True]
    assert [row["step"] for row in lines] == [2, 4, 5]
    assert all(0 <= row["top1"] <= 1 for row in lines)


class Killed(BaseException):
    """Not an Exception: nothing in the package may catch it."""


def in_step(step, act):
    """For `watch`: acts once, in the middle of a step of this start, counted from 1."""
    count = 0

    def watch(station, x):
        nonlocal count
        count += station == "loss"
        if count == step and station == "loss":
            act()

    return watch


def killed_after(step):
    def die():
        raise Killed

    return in_step(step + 1, die)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return train(tiny(tmp_path_factory.mktemp("whole")))


def test_what_a_run_leaves(finished):
    rows = read_metrics(finished)
    assert [r["step"] for r in rows if "loss" in r] == [2, 4, 6, 8, 10, 12, 14, 15]
    assert [r["step"] for r in rows if {"batch/same_label", "batch/same_source"} <= r.keys()][-1] == 15
    assert [r["step"] for r in rows if "knn/top1" in r] == [0, 10, 15]
    assert {"health/effective_rank", "health/alignment", "health/uniformity", "health/row_std"} <= rows[0].keys()
    assert [p.name for p in sorted((finished / "checkpoints").iterdir())] == ["step_00000012", "step_00000015"]
    for name in ("views", "curves", "embedding", "neighbours"):
        with Image.open(finished / "plots" / f"{name}.png") as picture:
            assert picture.size[0] > 300
    encoder, spec = files.load(finished)
    assert spec["size"] == 32
    assert encoder(torch.zeros(1, 3, 32, 32)).shape == (1, 32)
    assert load(str(finished / "config.yaml")) == resolve_auto(tiny(finished.parent), torch.device("cpu"))


@pytest.mark.parametrize("step", [pytest.param(3, marks=pytest.mark.slow), 6, pytest.param(13, marks=pytest.mark.slow)])
def test_a_killed_run_goes_on_exactly(finished, tmp_path, step):
    with pytest.raises(Killed):
        train(tiny(tmp_path), killed_after(step))
    folder = train(tiny(tmp_path))
    assert untimed(folder) == untimed(finished)
    whole, again = (load_file(f / "encoder.safetensors") for f in (finished, folder))
    assert all(torch.equal(whole[k], again[k]) for k in whole)


def signalled_in(step, number):
    """Sends the signal in the middle of a step; it must be answered after it."""
    return in_step(step, lambda: os.kill(os.getpid(), number))


@pytest.mark.parametrize(
    ("changes", "steps"),
    [
        ([], (3, 9)),
        pytest.param(["train.micro_batch=4", "train.workers=1"], (6,), marks=pytest.mark.slow),
        pytest.param(["optim.warmup_epochs=2", "method.name=triplet"], (7,), marks=pytest.mark.slow),
        pytest.param(["sampler.kind=balanced", "train.total_epochs=2"], (7,), marks=pytest.mark.slow),
        pytest.param(["sampler.kind=classes", "sampler.per_class=4"], (8,), marks=pytest.mark.slow),
    ],
)
def test_a_stopped_run_goes_on_exactly(tmp_path, changes, steps):
    """At any step, also between two checkpoints, in the middle of an epoch and of a warm-up; nothing is done twice."""
    whole = train(tiny(tmp_path / "whole", *changes))
    done = 0
    for step, number in zip(steps, (signal.SIGUSR1, signal.SIGTERM), strict=False):
        with pytest.raises(Stopped, match=rf"stopped by SIG\w+ after step {step}; the same command") as stopped:
            train(tiny(tmp_path, *changes), signalled_in(step - done, number))
        assert stopped.value.number == number
        assert checkpoint.newest(tmp_path / "quickstart" / "checkpoints").name == f"step_{step:08d}"
        done = step
    folder = train(tiny(tmp_path, *changes))
    assert untimed(folder) == untimed(whole)
    alone, again = (load_file(f / "encoder.safetensors") for f in (whole, folder))
    assert all(torch.equal(alone[k], again[k]) for k in alone)
    assert not (folder / "lock.json").exists()
    assert not (folder / "stopped.txt").exists()


def test_a_signal_is_answered_while_no_image_comes(tmp_path, monkeypatch):
    """As on storage that hangs: the checkpoint is of the steps that were done."""
    plain = train_module.read_in_parts

    def hangs(*args, **kwargs):
        for step, batch in enumerate(plain(*args, **kwargs)):
            if step == 3:
                threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
                time.sleep(60)
            yield batch

    monkeypatch.setattr(train_module, "read_in_parts", hangs)
    with pytest.raises(Stopped, match="stopped by SIGTERM after step 3; the same command resumes it"):
        train(tiny(tmp_path, "evaluate.pictures=false"))
    assert checkpoint.newest(tmp_path / "quickstart" / "checkpoints").name == "step_00000003"


def test_what_would_come_again_is_written_down(tmp_path):
    (tmp_path / "quickstart").mkdir()
    (tmp_path / "quickstart" / "lock.json").write_text("")

    def breaks(station, x):
        if station == "loss":
            raise RuntimeError("no such operation")

    with pytest.raises(RuntimeError):
        train(tiny(tmp_path), breaks)
    assert (tmp_path / "quickstart" / "stopped.txt").read_text() == "rank 0: RuntimeError: no such operation\n"
    with pytest.raises(Stopped):
        train(tiny(tmp_path), signalled_in(1, signal.SIGUSR1))
    assert not (tmp_path / "quickstart" / "stopped.txt").exists()


def test_a_folder_in_use_is_left_alone(tmp_path):
    (tmp_path / "quickstart").mkdir()
    other = Lock(tmp_path / "quickstart")
    with pytest.raises(ConfigError, match="is in use by process"):
        train(tiny(tmp_path))
    other.release()
    assert {p.name for p in (tmp_path / "quickstart").iterdir()} == {"plots", TAKING}


def test_a_finished_run_is_left_as_it_is(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "quickstart")
    before = untimed(tmp_path / "quickstart")
    assert untimed(train(tiny(tmp_path))) == before


def test_another_configuration_does_not_go_on(finished):
    with pytest.raises(ConfigError, match=r"optim\.lr: 0\.002 → 0\.5"):
        train(tiny(finished.parent, "optim.lr=0.5"))
    with pytest.raises(ConfigError, match="resume=never"):
        train(tiny(finished.parent, "resume=never"))


def test_what_does_not_change_the_training_may_change(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "quickstart")
    folder = train(tiny(tmp_path, "log.every_steps=1", "checkpoint.keep=5"))
    assert untimed(folder) == untimed(finished)  # it was finished, and is not trained again


def test_what_auto_stood_for_stays_with_the_run(tmp_path, monkeypatch, capsys):
    """Begun where bf16 is fast, gone on with where it is not: in bf16, as the folder says."""
    monkeypatch.setattr(launcher, "precision_for", lambda device: "bf16")
    few = ["train.precision=auto", "evaluate.pictures=false", "train.total_steps=2", "checkpoint.every_steps=1"]
    with pytest.raises(Stopped):
        train(tiny(tmp_path, *few), signalled_in(1, signal.SIGUSR1))
    begun = load(str(tmp_path / "quickstart" / "config.yaml")).train
    assert (begun.precision, begun.channels_last) == ("bf16", launcher.channels_last_for(torch.device("cpu"), "bf16"))
    monkeypatch.setattr(launcher, "precision_for", lambda device: "no")
    assert not changed(tiny(tmp_path, *few))
    train(tiny(tmp_path, *few))
    assert capsys.readouterr().out.count("precision bf16") == 2
    with pytest.raises(ConfigError, match=r"train\.precision: 'bf16' → 'no'"):
        train(tiny(tmp_path, *few, "train.precision=no"))


@pytest.mark.slow
def test_mixed_precision(tmp_path):
    rows = read_metrics(train(tiny(tmp_path, "train.precision=bf16", "train.total_steps=4")))
    assert all(r["loss"] < 5 for r in rows if "loss" in r)


@pytest.mark.skipif(torch.accelerator.is_available(), reason="what a CPU cannot do")
def test_a_precision_that_the_device_lacks_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"train\.precision=fp16 needs a GPU"):
        train(tiny(tmp_path, "train.precision=fp16"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["triplet", "simclr"])
@pytest.mark.parametrize("recipe", ["simclr", "none"])
def test_other_methods_and_recipes(tmp_path, name, recipe):
    rows = read_metrics(train(tiny(tmp_path, f"method.name={name}", f"augment.recipe={recipe}", "train.total_steps=2")))
    assert "loss" in rows[1]
    assert ("active" in rows[1]) == (name == "triplet")


def test_a_loss_that_is_not_a_number_stops(tmp_path, monkeypatch):
    calls = iter(range(100))
    plain = losses.NTXentLoss.forward

    def poisoned(self, *args):
        return plain(self, *args) * (float("nan") if next(calls) == 6 else 1)

    monkeypatch.setattr(losses.NTXentLoss, "forward", poisoned)
    with pytest.raises(TrainingError, match=r"nan at step 7 on rank 0 \(before it: \d.*step_00000004"):
        train(tiny(tmp_path))
    assert [p.name for p in (tmp_path / "quickstart" / "checkpoints").iterdir()] == ["step_00000004"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("train.global_batch=100", r"train\.global_batch=100 is more than the 80 images"),
        ("model.backbone=resnet81", "did you mean resnet"),
        ("optim.name=adamv", "did you mean adam"),
        ("data.train=3", "more than the 3 images"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, change, message):
    with pytest.raises(ConfigError, match=message):
        train(tiny(tmp_path, change))


def test_an_unwritable_folder_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        train(tiny(tmp_path / "file"))


def test_metrics_are_json_lines(finished):
    lines = (Path(finished) / "metrics.jsonl").read_text().splitlines()
    assert all(json.loads(line)["step"] >= 0 for line in lines)


NO_BATCHNORM = ["model.backbone=test_vit", "model.args={img_size: 32}", "method.norm=layer", "train.total_steps=10"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "micro"), [(["method.name=simclr"], 4), (["method.name=triplet", "method.soft=true"], 8)]
)
def test_micro_batches_learn_the_same(tmp_path, method, micro):
    """Without BatchNorm the weights after ten steps are the plain step's, to float32 rounding."""
    plain = train(tiny(tmp_path, *NO_BATCHNORM, *method, "name=plain", "optim.name=sgd"))
    cached = train(tiny(tmp_path, *NO_BATCHNORM, *method, "name=micro", "optim.name=sgd", f"train.micro_batch={micro}"))
    whole, parts = (load_file(f / "encoder.safetensors") for f in (plain, cached))
    for key, value in whole.items():
        torch.testing.assert_close(parts[key], value, rtol=1e-4, atol=1e-6)
    assert any(not torch.equal(whole[k], parts[k]) for k in whole), "the two were not computed apart"


def test_the_device_is_sent_one_micro_batch_at_a_time(tmp_path, monkeypatch):
    """The loss needs ids alone: no step asks the device for the pixels of the whole batch."""
    sent = []
    plain = Batch.to
    monkeypatch.setattr(Batch, "to", lambda batch, device: (sent.append(len(batch.pixels)), plain(batch, device))[1])
    seen = []
    watch = lambda station, x: seen.append(len(x)) if station == "pixels" else None  # noqa: E731
    train(tiny(tmp_path, *NO_BATCHNORM[:3], "train.micro_batch=4", "train.total_steps=1"), watch)
    assert seen == [4] * 4
    assert max(sent) == 0


def test_a_micro_batch_that_does_not_divide_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"train\.micro_batch=5 does not divide the 16 images of a rank"):
        train(tiny(tmp_path, "train.micro_batch=5"))
