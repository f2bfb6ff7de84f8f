"""Launched for real: two ranks through Accelerate, one process group, the same training as one process."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_train import TINY, untimed

from sslcells.run.metrics import read_metrics

ROOT = Path(__file__).parent.parent
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(ROOT / "launch" / "cpu2.yaml")]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}
NO_BATCHNORM = ["model.backbone=test_vit", "model.args={img_size: 32}", "method.norm=layer"]


def start(*command, **options):
    return subprocess.Popen(
        command, env=ENVIRONMENT, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options
    )


def finish(process, seconds=240):
    out, _ = process.communicate(timeout=seconds)
    assert process.returncode == 0, out
    return out


@pytest.mark.slow
def test_two_ranks_train_like_one(tmp_path):
    arguments = [*TINY, *NO_BATCHNORM, f"out={tmp_path}", "train.total_steps=6", "log.every_steps=1"]
    two = start(*LAUNCH, "-m", "sslcells.train", *arguments, "name=two")
    assert "world size 2" in finish(two)
    assert "world size 1" in finish(start(sys.executable, "-m", "sslcells.train", *arguments, "name=one"))
    one, two = untimed(tmp_path / "one"), untimed(tmp_path / "two")
    assert [r["step"] for r in one] == [r["step"] for r in two]
    for a, b in zip(one, two, strict=True):
        shared = a.keys() & b.keys() & {"loss", "knn/top1", "gradient_norm", "health/effective_rank"}
        assert {k: b[k] for k in shared} == pytest.approx({k: a[k] for k in shared}, rel=2e-3)
    assert not (tmp_path / "two" / "checkpoints" / ".step_00000006.partial").exists()


@pytest.mark.slow
def test_the_doctor_finds_two_ranks_well():
    out = finish(start(*LAUNCH, "-m", "sslcells.doctor"))
    assert "2 on" in out
    assert "gradient of SupCon" in out
    assert "FAIL" not in out


@pytest.mark.slow
def test_killed_in_the_second_epoch_it_ends_at_the_same_step(tmp_path):
    arguments = [
        "-m",
        "sslcells.train",
        *TINY,
        "train.total_epochs=2",
        "data.train=480",
        "log.every_steps=1",
        f"out={tmp_path}",
    ]
    metrics = tmp_path / "killed" / "metrics.jsonl"
    killed = start(sys.executable, *arguments, "name=killed", start_new_session=True)
    while not metrics.exists() or read_metrics(metrics.parent)[-1]["step"] < 41:
        assert killed.poll() is None
        time.sleep(0.02)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.communicate()
    assert read_metrics(metrics.parent)[-1]["step"] < 60
    assert "resuming after step" in finish(start(sys.executable, *arguments, "name=killed"))
    finish(start(sys.executable, *arguments, "name=whole"))
    assert untimed(metrics.parent) == untimed(tmp_path / "whole")
    assert untimed(metrics.parent)[-1]["step"] == 60
