"""A run with values that are not finite ends with an error and keeps its good checkpoints: with every method."""

import functools
import json
import math
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_train import tiny
from torch import nn
from trained import make_cells, make_run

from sslcells import methods
from sslcells.cli import main
from sslcells.config import PLUGINS, ConfigError, Model, load
from sslcells.data import DataError
from sslcells.delivery.embedding import embed_folder
from sslcells.delivery.encoder import load_encoder
from sslcells.delivery.shards import Embeddings
from sslcells.delivery.vectors import embed
from sslcells.errors import TrainingError
from sslcells.evaluation.encode import NotFinite, check_finite
from sslcells.models import files
from sslcells.plan import Plan
from sslcells.run import checkpoint
from sslcells.run.meter import SKIPPED, Meter
from sslcells.train import train

PLAIN = ["evaluate.pictures=false", "evaluate.every_epochs=100"]
"""Quicker."""
METHODS = [[f"method.name={name}"] for name in PLUGINS["method"].names()]
TRIPLETS = [["method.name=triplet", *more] for more in (["method.soft=true"], ["method.negative=semi-hard"])]
TRIPLETS += [["method.name=triplet", f"method.negative={kind}"] for kind in ("all", "hardest")]
QUICK = ("triplet", "pairs", "simclr")


def after_step(monkeypatch, step, act):
    """Act on the learner after a step, counted from 1."""
    follow, count = methods.Learner.follow, iter(range(1, 1000))

    def acting(self, progress):
        follow(self, progress)
        if next(count) == step:
            act(self)

    monkeypatch.setattr(methods.Learner, "follow", acting)


@torch.no_grad()
def poison_weight(learner):
    """One number, so that rows become NaN from the next step on."""
    next(learner.backbone.parameters())[0] = math.nan


@torch.no_grad()
def poison_statistics(learner):
    """Values that only evaluation and export use, not training."""
    next(b for name, b in learner.encoder.named_buffers() if name.endswith("running_var"))[0] = math.inf


def floating(weights):
    """The name of the first weight that could be NaN."""
    return next(name for name, value in weights.items() if value.is_floating_point())


def assert_left_as_it_was(folder, *steps):
    """The good checkpoints are there, none after them, no encoder, and no figure that is not finite."""
    assert [p.name for p in sorted((folder / "checkpoints").iterdir())] == [f"step_{s:08d}" for s in steps]
    for path in (folder / "checkpoints").iterdir():
        assert all(x.isfinite().all() for x in load_file(path / "model.safetensors").values())
    assert not (folder / files.WEIGHTS).exists()
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    assert all(None not in json.loads(line).values() for line in lines)
    assert (folder / "stopped.txt").read_text().startswith("rank 0: TrainingError: ")


CASES = [
    pytest.param(words, id=" ".join(w.split("=")[1] for w in words), marks=() if quick else pytest.mark.slow)
    for words, quick in [(m, m[0].split("=")[1] in QUICK) for m in METHODS] + [(m, False) for m in TRIPLETS]
]


@pytest.mark.parametrize("method", CASES)
def test_nan_rows_end_every_method(tmp_path, monkeypatch, method):
    after_step(monkeypatch, 5, poison_weight)
    small = [
        "evaluate.pictures=false",
        "checkpoint.every_steps=2",
        "checkpoint.keep=1",
        "train.total_steps=8",
        "log.every_steps=8",
    ]
    small += ["evaluate.every_epochs=100", "data.train=32", "data.test=0"]
    options = [o for o in ("method.hidden=16", "method.dimension=8", "method.prototypes=32") if known(method, o)]
    with pytest.raises(TrainingError, match=r"(loss became|norm of the gradient|weights are no longer).*step_00000004"):
        train(load(None, [*TINY_DATA, *small, *method, *options, *needed(method, tmp_path), f"out={tmp_path}"]))
    assert_left_as_it_was(tmp_path / "quickstart", 4)


def needed(method, folder):
    """What a method cannot do without: a Vision Transformer, or a teacher."""
    if method[0].endswith(("=ibot", "=mae")):
        return ["model.backbone=test_vit", "model.args={img_size: 32, patch_size: 8}"]
    if method[0].endswith("=distill"):
        return [f"method.teacher={{weights: '{make_run(folder / 'teacher', 'augment.size=32')}'}}"]
    return []


TINY_DATA = [word for word in __import__("test_train").TINY if not word.startswith(("method.", "train.total_epochs"))]


def known(method, option):
    fields = PLUGINS["method"].config(method[0].split("=")[1]).model_fields
    return option.split("=")[0].split(".")[1] in fields


PLANTED = [
    pytest.param(words, id=words[-1], marks=() if words[-1].endswith("all") else pytest.mark.slow)
    for words in [*TRIPLETS, ["method.name=pairs"]]
]


@pytest.mark.parametrize("method", PLANTED)
def test_a_learning_rate_out_of_this_world_ends_with_status_1(tmp_path, capsys, method):
    """From the command line, with the quickstart recipe."""
    given = ["optim.name=sgd", "optim.lr=1e30", *method, f"out={tmp_path}", "evaluate.pictures=false"]
    assert main(argv=["train", "--config", "configs/debug.yaml", *given]) == 1
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert re.search(r"(loss became|norm of the gradient became|weights are no longer finite|no finite feat)", said[0])
    assert "there is no checkpoint yet" in said[0]
    assert "A lower optim.lr" in said[0]
    assert not (tmp_path / "debug" / files.WEIGHTS).exists()
    assert not (tmp_path / "debug" / "checkpoints").exists()


def test_statistics_that_training_does_not_look_at(tmp_path, monkeypatch):
    after_step(monkeypatch, 5, poison_statistics)
    with pytest.raises(TrainingError, match=r"weights are no longer finite after step 8 on rank 0: .*running_var"):
        train(tiny(tmp_path, *PLAIN))
    assert_left_as_it_was(tmp_path / "quickstart", 4)


def test_state_of_the_optimizer(tmp_path, monkeypatch):
    """With an infinite second moment a weight never changes again, but stays finite."""
    states = []
    plain = torch.optim.AdamW.__init__

    def kept(self, *args, **kwargs):
        plain(self, *args, **kwargs)
        states.append(self)

    monkeypatch.setattr(torch.optim.AdamW, "__init__", kept)
    after_step(monkeypatch, 5, lambda learner: next(iter(states[0].state.values()))["exp_avg_sq"].fill_(math.inf))
    with pytest.raises(TrainingError, match=r"weights are no longer finite .*optimizer\.state\.0\.exp_avg_sq"):
        train(tiny(tmp_path, *PLAIN))
    assert_left_as_it_was(tmp_path / "quickstart", 4)


def test_a_run_goes_on_from_before_a_checkpoint_that_is_not_finite(tmp_path):
    """As an earlier version may have left one."""
    run = tiny(tmp_path, "checkpoint.every_steps=5", *PLAIN)
    folder = train(run)
    newest = checkpoint.newest(folder / "checkpoints")
    weights = load_file(newest / "model.safetensors")
    weights[floating(weights)][0] = math.nan
    save_file(weights, newest / "model.safetensors")
    summary = json.loads((newest / "state.json").read_text())
    summary["sha256"]["model.safetensors"] = checkpoint._digest(newest / "model.safetensors")
    (newest / "state.json").write_text(json.dumps(summary))
    assert checkpoint.newest(folder / "checkpoints").name == "step_00000010"
    train(run)
    assert checkpoint.newest(folder / "checkpoints").name == "step_00000015"


def test_no_checkpoint_is_written_of_what_is_not_finite():
    net = nn.Linear(3, 2)
    checkpoint.files(1, net, {"a": [{"b": torch.ones(2)}]})
    with pytest.raises(checkpoint.CheckpointError, match=r"step 1 is not written: a\.0\.b is not finite"):
        checkpoint.files(1, net, {"a": [{"b": torch.tensor([1.0, math.inf])}]})
    nn.init.constant_(net.weight, math.nan)
    with pytest.raises(checkpoint.CheckpointError, match="weight is not finite"):
        checkpoint.files(1, net, {})


# ---- the loss scaler of fp16


def meter(tmp_path, scaled):
    run = tiny(tmp_path)
    return Meter(run, Plan(run, 80, 1), torch.device("cpu"), scaled=scaled)


def seen(meter, norms):
    for norm in norms:
        meter.add(torch.tensor(1.0), torch.tensor(norm), {})
    return meter.check(len(norms))


def test_a_loss_scaler_may_leave_out_steps_but_not_all(tmp_path):
    with pytest.raises(TrainingError, match=r"norm of the gradient became inf at step 2 on rank 0; the loss"):
        seen(meter(tmp_path, scaled=False), [1.0, math.inf])
    often = [math.inf] * SKIPPED + [1.0] + [math.nan] * SKIPPED
    assert len(seen(meter(tmp_path, scaled=True), often)) == len(often)
    first = meter(tmp_path, scaled=True)
    seen(first, [math.inf] * 30)
    again = meter(tmp_path, scaled=True)  # goes on counting after a restart
    again.load_state_dict(first.state_dict())
    with pytest.raises(TrainingError, match=rf"became inf at step .*, as at the {SKIPPED} before it, on rank 0"):
        seen(again, [math.inf] * 30)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="fp16 has a loss scaler on a GPU alone, and there is none")
def test_fp16_with_steps_left_out_trains(tmp_path, monkeypatch):
    """The scale starts so high that the first gradients overflow, as is normal."""
    plain = torch.amp.GradScaler.__init__
    monkeypatch.setattr(torch.amp.GradScaler, "__init__", functools.partialmethod(plain, init_scale=2.0**140))
    small = [
        "evaluate.pictures=false",
        "data.test=0",
        "train.precision=fp16",
        "log.every_steps=1",
        "train.total_steps=14",
    ]
    folder = train(tiny(tmp_path, *small))
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    norms = [row["gradient_norm"] for row in rows if "loss" in row]
    assert norms[0] is None
    assert norms[-1] is not None


# ---- whoever reads an encoder


@pytest.fixture
def broken(tmp_path):
    """A run's folder as an earlier version left it: with an encoder of NaN."""
    run = make_run(tmp_path / "run")
    weights = load_file(run / files.WEIGHTS)
    weights[floating(weights)][0] = math.nan
    save_file(weights, run / files.WEIGHTS)
    return run


def test_an_encoder_that_is_not_finite_is_refused(broken, tmp_path, capsys):
    cells = make_cells(tmp_path / "cells", 2)
    holds = "encoder.safetensors holds weights that are not finite (NaN or infinite): "
    with pytest.raises(ConfigError, match=re.escape(holds)):
        load_encoder(broken)
    with pytest.raises(ConfigError, match=re.escape(holds)):
        embed(torch.zeros(1, 3, 32, 32), broken)
    with pytest.raises(ConfigError, match=re.escape(holds)):
        train(tiny(tmp_path, f"model.encoder={broken}"))
    for command in (["embed", str(broken), str(cells), "--cpu"], ["evaluate", str(broken)], ["export", str(broken)]):
        assert main(argv=command) == 2
        assert holds in capsys.readouterr().err
    assert not (broken / "embeddings").exists()
    assert not (broken / "evaluation.json").exists()


def test_an_encoder_that_is_not_finite_is_not_exported(tmp_path):
    net = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    net[1].running_mean[0] = -math.inf
    with pytest.raises(ConfigError, match=r"is not exported to .*not finite.*: 1\.running_mean$"):
        files.export(net, Model(), 3, 32, tmp_path)
    assert not list(tmp_path.iterdir())


def test_features_that_are_not_finite_are_refused(tmp_path):
    """Finite weights whose features overflow."""
    run, cells = make_run(tmp_path / "run"), make_cells(tmp_path / "cells", 2)
    weights = {
        k: torch.full_like(v, 3e38) if v.is_floating_point() else v for k, v in load_file(run / files.WEIGHTS).items()
    }
    save_file(weights, run / files.WEIGHTS)
    with pytest.raises(DataError, match="gives no finite features for 2 of 2 images"):
        embed(cells, run)
    with pytest.raises(DataError, match="gives no finite features for 2 of 2 images"):
        embed_folder(str(run), str(cells), cpu=True, workers=0)
    with pytest.raises(NotFinite, match="no finite features for 1 of 2 images of test"):
        check_finite(torch.tensor([[1.0], [math.nan]]), "images of test")


def test_vectors_that_are_not_finite_are_refused(tmp_path):
    """As an earlier version may have left them."""
    run, cells = make_run(tmp_path / "run"), make_cells(tmp_path / "cells", 2)
    embeddings = Embeddings.open(embed_folder(str(run), str(cells), cpu=True, workers=0))
    shard = embeddings.read(0)
    vector = shard.vector.copy()
    vector[1] = math.nan
    embeddings.write(0, shard._replace(vector=vector))
    with pytest.raises(DataError, match="holds vectors that are not finite"):
        embeddings.read(0)
