"""A run on several gloo ranks: the loss of a resume is the true one, and every rank shows the same network."""

import os
import shutil
import signal

import pytest
import torch
from gloo import launched, on_ranks
from safetensors.torch import load_file
from test_train import NO_BATCHNORM, in_step, tiny, untimed

from sslcells.evaluation.during_training import Evaluation
from sslcells.models import files
from sslcells.run.interrupt import Stopped
from sslcells.train import train

SMALL = [
    "evaluate.pictures=false",
    "train.total_epochs=2",
    "log.every_steps=6",
    "checkpoint.every_steps=4",
    "train.device=cpu",
]


def started(run, stop_after):
    """A start, to its end or until a signal in the middle of a step."""
    with launched():
        if stop_after:
            with pytest.raises(Stopped):
                train(run, in_step(stop_after, lambda: os.kill(os.getpid(), signal.SIGUSR1)))
        else:
            train(run)


def trained(folder, stop_after):
    """Without BatchNorm, so that ranks do not matter."""
    started(tiny(folder, *SMALL, *NO_BATCHNORM, "train.total_steps=8"), stop_after)


def lines(folder):
    return [{k: v for k, v in row.items() if k in ("step", "loss")} for row in untimed(folder) if "loss" in row]


@pytest.mark.slow
def test_a_resume_between_two_lines_shows_the_loss_of_every_rank(tmp_path):
    """Also on another number of ranks: the line of step 6 is of four steps before the stop and of two after it."""
    on_ranks(2, trained, tmp_path / "whole", 0)
    on_ranks(2, trained, tmp_path / "two", 4)
    on_ranks(2, trained, tmp_path / "two", 0)
    whole = lines(tmp_path / "whole" / "quickstart")
    assert lines(tmp_path / "two" / "quickstart") == whole
    on_ranks(2, trained, tmp_path / "one", 4)
    train(tiny(tmp_path / "one", *SMALL, *NO_BATCHNORM, "train.total_steps=8"))
    (first, *_), (expected, *_) = lines(tmp_path / "one" / "quickstart"), whole
    assert first["step"] == expected["step"] == 6
    assert first["loss"] == pytest.approx(
        expected["loss"], rel=0.02
    )  # BatchNorm sees other batches in two of six steps


def encoded(folder):
    """Of each rank: BatchNorm's statistics at every evaluation, and the figures."""
    seen = []
    plain = Evaluation.figures

    def figures(self, learner):
        before = {name: b.clone() for name, b in learner.named_buffers() if "running" in name}
        seen.append(before)
        return plain(self, learner)

    Evaluation.figures = figures
    try:
        with launched():
            train(tiny(folder, *SMALL))
    finally:
        Evaluation.figures = plain
    return seen


def test_every_rank_evaluates_the_network_that_is_exported(tmp_path):
    """BatchNorm's statistics are each rank's own on a CPU: without care each rank encodes with its own."""
    first, second = on_ranks(2, encoded, tmp_path)
    assert len(first) == len(second) >= 2
    torch.testing.assert_close(second, first, rtol=0, atol=0)
    encoder, _ = files.load(tmp_path / "quickstart")
    last = {name.removeprefix("backbone."): b for name, b in first[-1].items() if name.startswith("backbone.")}
    assert last
    assert all(torch.equal(value, dict(encoder.named_buffers())[name]) for name, value in last.items())


def of_a_teacher(folder, *changes):
    return tiny(folder, *SMALL, *NO_BATCHNORM, "method.name=byol", "train.total_steps=8", "optim.clip_norm=1", *changes)


def with_shards(folder, stop_after, parallel):
    started(of_a_teacher(folder, f"train.parallel={parallel}"), stop_after)


@pytest.mark.slow
def test_a_training_with_shards_is_that_of_ddp_and_resumes_exactly(tmp_path):
    """Also without shards, in one process, to float32's rounding."""
    on_ranks(2, with_shards, tmp_path / "ddp", 0, "ddp")
    on_ranks(2, with_shards, tmp_path / "whole", 0, "fsdp")
    on_ranks(2, with_shards, tmp_path / "two", 4, "fsdp")
    shutil.copytree(tmp_path / "two", tmp_path / "one")
    on_ranks(2, with_shards, tmp_path / "two", 0, "fsdp")
    train(of_a_teacher(tmp_path / "one"))
    ddp, whole, two, one = (tmp_path / name / "quickstart" for name in ("ddp", "whole", "two", "one"))
    assert (two / files.WEIGHTS).read_bytes() == (whole / files.WEIGHTS).read_bytes()
    assert untimed(two) == untimed(whole)
    assert (whole / files.SPEC).read_bytes() == (ddp / files.SPEC).read_bytes()
    assert sorted(p.name for p in whole.rglob("*")) == sorted(p.name for p in ddp.rglob("*"))
    expected = load_file(ddp / files.WEIGHTS)
    for found in (load_file(folder / files.WEIGHTS) for folder in (whole, one)):
        assert list(found) == list(expected)
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    for row, of_ddp in zip(untimed(whole), untimed(ddp), strict=True):
        assert row == pytest.approx(of_ddp, rel=1e-2, abs=1e-3)
