"""The templates of slurm/ on a real SLURM of two nodes: what they refuse, what they train, and how they go on."""

import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
from cluster import Cluster, missing, wait_for

from sslcells.tracking import read_metrics

pytestmark = [pytest.mark.slurm, pytest.mark.skipif(bool(missing()), reason=missing())]

CHECKOUT = Path(__file__).resolve().parents[2]

TINY = """\
out: {folder}
data: {{kind: synthetic, size: 32, train: 64, val: 0, test: 20}}
augment: {{size: 32}}
model: {{backbone: small_cnn, args: {{width: 8}}}}
method: {{hidden: 16, dimension: 8}}
train: {{global_batch: 16, workers: 0}}
checkpoint: {{every: 20}}
log: {{every: 1}}
evaluate: {{every: 1000, k: 5}}
"""


@pytest.fixture(scope="module")
def cluster():
    with Cluster() as cluster:
        cluster.env |= {
            "PATH": f"{Path(sys.executable).parent}:{cluster.env['PATH']}",
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": "lo",
        }
        yield cluster


@pytest.fixture
def tiny(tmp_path):
    """Arguments of a run of seconds, whose folder is in tmp_path."""
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(TINY.format(folder=tmp_path))
    return ["--config", str(recipe)]


def submit(cluster, folder, *command):
    """The number and the log of a job that is submitted from the checkout."""
    done = subprocess.run(
        command,
        cwd=CHECKOUT,
        env=cluster.env | {"SBATCH_OUTPUT": f"{folder}/%j.log", "NODES": "2"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    number = int(done.stdout.split()[-1])
    return number, folder / f"{number}.log"


def losses(folder):
    return {row["step"]: row["loss"] for row in read_metrics(folder) if "loss" in row}


def test_two_nodes(cluster, tmp_path, tiny):
    arguments = [*tiny, "name=triplet", "train.steps=40"]
    number, log = submit(cluster, tmp_path, "sbatch", "--nodes=2", "slurm/triplet.sh", *arguments)
    job = cluster.wait(number, "COMPLETED", 240, log)
    text = log.read_text()
    assert job["ExitCode"] == "0:0"
    assert f"job {number}: nodes n1 n2; ranks 2; SLURM_RESTART_COUNT=0" in text
    assert "no GPU in this job: training on CPUs with gloo, 1 rank(s) a node" in text
    assert "world size 2  device cpu" in text
    assert cluster.steps(number) == 1
    assert list(losses(tmp_path / "triplet")) == list(range(1, 41))
    assert all(map(math.isfinite, losses(tmp_path / "triplet").values()))
    assert (tmp_path / "triplet" / "encoder.safetensors").is_file()


def test_a_job_goes_on_after_the_signal_of_the_time_limit(cluster, tmp_path, tiny):
    arguments = [*tiny, "name=simclr", "train.steps=300"]
    number, log = submit(cluster, tmp_path, "bash", "slurm/simclr.sh", *arguments)
    checkpoints = tmp_path / "simclr" / "checkpoints"
    wait_for(lambda: list(checkpoints.glob("step_*")), 240, f"a checkpoint; see {log}")
    cluster.call("scancel", "--batch", "--signal=USR1", str(number))
    cluster.call("scancel", "--batch", "--signal=USR1", str(number), check=False)  # a second one does no harm
    cluster.wait(number, "PENDING", 60, log)
    cluster.call("scontrol", "update", f"jobid={number}", "StartTime=now")  # SLURM's own pause is two minutes
    job = cluster.wait(number, "COMPLETED", 240, log)
    text = log.read_text()
    assert (job["ExitCode"], job["Restarts"]) == ("0:0", "1")
    assert text.count(f"job {number}: SIGUSR1, back into the queue") == 1
    assert f"job {number}: nodes n1 n2; ranks 2; SLURM_RESTART_COUNT=1" in text
    assert text.count("world size 2") == 2
    (step,) = re.findall(r"goes on after step (\d+)", text)
    assert 0 < int(step) < 300
    curve = losses(tmp_path / "simclr")
    assert list(curve) == list(range(1, 301))
    assert all(map(math.isfinite, curve.values()))
    assert sum(list(curve.values())[-20:]) < sum(list(curve.values())[:20])


def test_a_wrong_argument_in_a_job(cluster, tmp_path, tiny):
    number, log = submit(cluster, tmp_path, "sbatch", "--nodes=2", "slurm/simclr.sh", *tiny, "train.global_batch=15")
    job = cluster.wait(number, "FAILED", 120, log)
    assert job["ExitCode"] == "2:0"
    assert "train.global_batch=15 does not divide over 2 ranks" in log.read_text()
    assert cluster.steps(number) == 0


def test_nodes_of_different_kinds(cluster, tmp_path, tiny):
    fake = tmp_path / "bin" / "nvidia-smi"
    fake.parent.mkdir()
    fake.write_text('#!/bin/sh\necho GPU 0\n[ "$SLURMD_NODENAME" = n2 ] || echo GPU 1\n')
    fake.chmod(0o755)
    path = f"PATH={fake.parent}:{cluster.env['PATH']}"
    number, log = submit(cluster, tmp_path, "env", path, "sbatch", "--nodes=2", "slurm/simclr.sh", *tiny, "name=mixed")
    cluster.wait(number, "FAILED", 120, log)
    assert "GPUs on n2: 1, on the batch node: 2" in log.read_text()
    assert "world size" not in log.read_text()


def test_a_wrong_argument_before_a_job(cluster):
    done = subprocess.run(
        ["bash", "slurm/simclr.sh", "train.globel_batch=8"],
        cwd=CHECKOUT,
        env=cluster.env,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert "did you mean train.global_batch?" in done.stderr
    assert cluster.call("squeue", "--noheader") == ""


def test_not_the_checkout(cluster, tmp_path):
    done = subprocess.run(
        ["bash", CHECKOUT / "slurm" / "simclr.sh"], cwd=tmp_path, env=cluster.env, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert f"{tmp_path} is not the checkout of sslcells" in done.stderr
