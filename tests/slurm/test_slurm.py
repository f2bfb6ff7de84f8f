"""The templates of slurm/ on a real SLURM of two nodes: what they refuse, what they train, and how they resume."""

import json
import math
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from cluster import Cluster, missing, wait_for
from trained import make_run

from sslcells.run.metrics import read_metrics

pytestmark = [pytest.mark.slurm, pytest.mark.skipif(bool(missing()), reason=missing())]

PATIENCE = 600
"""Seconds: a start takes 20 of them on two cores that have nothing else to do."""

CHECKOUT = Path(__file__).resolve().parents[2]

TINY = """\
out: {folder}
data: {{kind: synthetic, size: 32, train: 64, val: 20, test: 0}}
augment: {{size: 32}}
model: {{backbone: small_cnn, args: {{width: 8}}}}
method: {{hidden: 16, dimension: 8}}
train: {{global_batch: 16, workers: 1}}
checkpoint: {{every_steps: 100000}}
log: {{every_steps: 1}}
evaluate: {{every_epochs: 1000, k: 5}}
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
    """Arguments of a run of seconds, whose folder is in tmp_path, and whose only checkpoints are the ones asked for."""
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(TINY.format(folder=tmp_path))
    return ["--config", str(recipe)]


def on_login_node(cluster, *command, cwd=CHECKOUT, **env):
    return subprocess.run(command, cwd=cwd, env=cluster.env | env, capture_output=True, text=True)


def submit(cluster, folder, *command, **env):
    """The number and the log of a job that is submitted from the checkout."""
    done = on_login_node(cluster, *command, **({"SBATCH_OUTPUT": f"{folder}/%j.log", "NODES": "2"} | env))
    assert done.returncode == 0, done.stderr
    number = int(done.stdout.split()[-1])
    return number, folder / f"{number}.log"


def losses(folder):
    """Every row's step and loss, in the order of the file."""
    return [(row["step"], row["loss"]) for row in read_metrics(folder) if "loss" in row]


def reach(step, folder, log):
    """Return when a run has finished so many steps."""
    metrics = folder / "metrics.jsonl"

    def there():
        return metrics.is_file() and any(f'"step": {n},' in metrics.read_text() for n in range(step, step + 200))

    wait_for(there, PATIENCE, f"step {step}; see {log}")


def assert_whole(folder, steps):
    """No step is missing from metrics.jsonl, and none is there twice."""
    rows = losses(folder)
    assert [step for step, _ in rows] == list(range(1, steps + 1))
    assert all(math.isfinite(loss) for _, loss in rows)


def assert_falling(folder):
    curve = [loss for _, loss in losses(folder)]
    assert sum(curve[-20:]) < sum(curve[:20])


def processes(*words):
    """Those whose command line and environment hold all the words."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            text = (path / "cmdline").read_bytes() + (path / "environ").read_bytes()
        except OSError:  # it has just ended
            continue
        if all(word.encode() in text.split(b"\0") for word in words):
            found.append(int(path.name))
    return found


def test_two_nodes(cluster, tmp_path, tiny):
    arguments = [*tiny, "name=triplet", "train.total_steps=40"]
    number, log = submit(cluster, tmp_path, "sbatch", "--nodes=2", "slurm/triplet.sh", *arguments)
    job = cluster.wait(number, "COMPLETED", PATIENCE, log)
    text = log.read_text()
    assert job["ExitCode"] == "0:0"
    assert f"job {number}: nodes n1 n2; ranks 2; SLURM_RESTART_COUNT=0" in text
    assert "no GPU in this job: on CPUs with gloo, 1 rank(s) a node" in text
    assert "world size 2  device cpu" in text
    assert cluster.steps(number) == 2  # a look at the nodes, and the training
    assert_whole(tmp_path / "triplet", 40)
    assert (tmp_path / "triplet" / "encoder.safetensors").is_file()


def test_fine_tuning_and_evaluation(cluster, tmp_path):
    encoder = make_run(tmp_path / "encoder")
    recipe = tmp_path / "classifier.yaml"
    recipe.write_text(TINY.format(folder=tmp_path).replace("{hidden: 16, dimension: 8}", "{name: supervised}"))
    arguments = ["--config", str(recipe), f"model.encoder={encoder}", "name=tuned", "train.total_steps=20"]
    number, log = submit(cluster, tmp_path, "bash", "slurm/finetune.sh", *arguments)
    cluster.wait(number, "COMPLETED", PATIENCE, log)
    assert (tmp_path / "tuned" / "predictions_val.npz").is_file()
    quick = ["evaluate.bootstrap=100", "train.workers=0"]
    number, log = submit(cluster, tmp_path, "sbatch", "--nodes=2", "slurm/evaluate.sh", str(tmp_path / "tuned"), *quick)
    cluster.wait(number, "COMPLETED", PATIENCE, log)
    assert json.loads((tmp_path / "tuned" / "evaluation.json").read_text())["made"]["ranks"] == 2


def test_only_a_finished_run_is_evaluated(cluster, tmp_path):
    done = on_login_node(cluster, "bash", "slurm/evaluate.sh", str(tmp_path))
    assert done.returncode == 2
    assert f"{tmp_path} is not the folder of a finished run" in done.stderr


def test_the_signal_of_the_time_limit(cluster, tmp_path, tiny):
    run = tmp_path / "signalled"
    arguments = [*tiny, "name=signalled", "train.total_steps=600"]
    number, log = submit(cluster, tmp_path, "bash", "slurm/simclr.sh", *arguments)
    reach(30, run, log)
    cluster.call("scancel", "--batch", "--signal=USR1", str(number))
    cluster.call("scancel", "--batch", "--signal=USR1", str(number), check=False)  # a second one does no harm
    cluster.again(number, log)
    last = losses(run)[-1][0]
    job = cluster.wait(number, "COMPLETED", PATIENCE, log)
    text = log.read_text()
    assert (job["ExitCode"], job["Restarts"]) == ("0:0", "1")
    assert text.count(f"job {number}: SIGUSR1, requeued") == 1
    assert f"job {number}: nodes n1 n2; ranks 2; SLURM_RESTART_COUNT=1" in text
    assert text.count("world size 2") == 2
    assert re.findall(r"stopped by SIGUSR1 after step (\d+)", text) == [str(last)]
    assert re.findall(r"resuming after step (\d+)", text) == [str(last)]  # nothing is lost
    assert 30 <= last < 600
    assert_whole(run, 600)
    assert_falling(run)
    shown = [int(step) for step in re.findall(r"step +(\d+)/600 .* loss ", text)]
    assert shown == list(range(1, 601))
    assert (run / "encoder.safetensors").is_file()


def test_a_time_limit_and_scancel(cluster, tmp_path, tiny):
    run = tmp_path / "limited"
    limits = ["--nodes=2", "--time=60", "--signal=B:USR1@60"]
    number, log = submit(
        cluster, tmp_path, "sbatch", *limits, "slurm/simclr.sh", *tiny, "name=limited", "train.total_steps=100000"
    )
    reach(30, run, log)
    _, minutes, _ = cluster.job(number)["RunTime"].split(":")  # a limit of one or two minutes from now
    cluster.call("scontrol", "update", f"jobid={number}", f"TimeLimit={int(minutes) + 2}")
    wait_for(lambda: cluster.job(number)["JobState"] != "RUNNING", 180, f"the signal; see {log}")
    cluster.again(number, log)
    (stopped,) = re.findall(r"stopped by SIGUSR1 after step (\d+)", log.read_text())
    cluster.call("scontrol", "update", f"jobid={number}", "TimeLimit=60")
    reach(int(stopped) + 20, run, log)
    assert re.findall(r"resuming after step (\d+)", log.read_text()) == [stopped]

    cluster.call("scancel", str(number))
    job = cluster.wait(number, "CANCELLED", PATIENCE, log)
    assert job["Restarts"] == "1"
    assert_whole(run, last := losses(run)[-1][0])
    assert [path.name for path in sorted((run / "checkpoints").glob("*"))][-1] == f"step_{last:08d}"
    assert log.read_text().count(", requeued") == 1
    assert not (run / "stopped.txt").exists()


def test_preemption(cluster, tmp_path, tiny):
    run = tmp_path / "preempted"
    number, log = submit(cluster, tmp_path, "bash", "slurm/simclr.sh", *tiny, "name=preempted", "train.total_steps=300")
    reach(30, run, log)
    urgent, other = submit(cluster, tmp_path, "sbatch", "--partition=urgent", "--nodes=2", "--wrap=sleep 1")
    cluster.wait(urgent, "COMPLETED", PATIENCE, other)
    cluster.again(number, log)
    last = losses(run)[-1][0]
    job = cluster.wait(number, "COMPLETED", PATIENCE, log)
    assert job["Restarts"] == "1"
    assert re.findall(r"resuming after step (\d+)", log.read_text()) == [str(last)]
    assert_whole(run, 300)


def test_a_killed_rank(cluster, tmp_path, tiny):
    run = tmp_path / "killed"
    arguments = [*tiny, "name=killed", "train.total_steps=300", "checkpoint.every_steps=20"]
    number, log = submit(cluster, tmp_path, "bash", "slurm/simclr.sh", *arguments)
    reach(50, run, log)
    rank = min(processes("name=killed", "RANK=1"))  # its data loader was started later
    os.kill(rank, signal.SIGKILL)
    cluster.again(number, log)
    job = cluster.wait(number, "COMPLETED", PATIENCE, log)
    text = log.read_text()
    assert job["Restarts"] == "1"
    assert text.count(f"job {number}: the training was cut off, with status") == 1
    (step,) = re.findall(r"resuming after step (\d+)", text)
    assert int(step) >= 40
    assert int(step) % 20 == 0
    assert_whole(run, 300)
    assert_falling(run)


def test_a_lost_node(cluster, tmp_path, tiny):
    run = tmp_path / "lost"
    arguments = [*tiny, "name=lost", "train.total_steps=300", "checkpoint.every_steps=20"]
    number, log = submit(cluster, tmp_path, "bash", "slurm/simclr.sh", *arguments)
    reach(50, run, log)
    cluster.call("scontrol", "update", "nodename=n2", "state=down", "reason=test")
    cluster.again(number, log)  # n2's daemon has reported it as up again
    job = cluster.wait(number, "COMPLETED", PATIENCE, log)
    assert job["Restarts"] == "1"
    assert_whole(run, 300)


def test_what_would_come_again(cluster, tmp_path, tiny):
    arguments = [*tiny, "name=nan", "train.total_steps=100", "optim.lr=1e30"]
    number, log = submit(cluster, tmp_path, "bash", "slurm/simclr.sh", *arguments)
    job = cluster.wait(number, "FAILED", PATIENCE, log)
    reason = (tmp_path / "nan" / "stopped.txt").read_text().strip()
    assert "the loss became nan at step" in reason
    assert job["Restarts"] == "0"
    assert f"job {number}: not requeued, as this would happen again: {reason}" in log.read_text()


def test_starts_that_come_no_further(cluster, tmp_path, tiny):
    fake = tmp_path / "bin" / "accelerate"
    fake.parent.mkdir()
    fake.write_text("#!/bin/sh\nexit 9\n")
    fake.chmod(0o755)
    path = f"PATH={fake.parent}:{cluster.env['PATH']}"
    number, log = submit(cluster, tmp_path, "env", path, "sbatch", "--nodes=2", "slurm/simclr.sh", *tiny, "name=stuck")
    cluster.again(number, log)
    cluster.again(number, log, restarts=2)
    job = cluster.wait(number, "FAILED", PATIENCE, log)
    text = log.read_text()
    assert job["Restarts"] == "2"
    assert text.count("the training was cut off, with status 9, requeued") == 2
    assert "not requeued: start 3 of this job wrote no new checkpoint" in text


def test_a_sweep(cluster, tmp_path, tiny):
    (tmp_path / "three.txt").write_text(
        "# a comment\nmethod.temperature=0.1 train.total_steps=5\n\n"
        "name=warm 'model.args={width: 4}'\n  name=warmer method.temperature=0.5\n"
    )
    command = ["bash", "slurm/sweep.sh", str(tmp_path / "three.txt"), *tiny, "train.total_steps=300"]
    logs = f"{tmp_path}/%A_%a.log"
    number, _ = submit(cluster, tmp_path, *command, SBATCH_OUTPUT=logs, NODES="1", SWEEP_AT_ONCE="2")
    log = tmp_path / f"{number}_2.log"
    assert cluster.job(f"{number}_2")["ArrayTaskThrottle"] == "2"
    reach(30, tmp_path / "warmer", log)
    cluster.wait(f"{number}_0", "COMPLETED", 1, log)  # with two at once, a task ends before the last begins
    (its_own,) = re.findall(r"^JobId=(\d+)", cluster.call("scontrol", "show", "job", f"{number}_2"))
    assert its_own == str(number)  # and by this number SLURM would requeue all three
    cluster.call("scancel", "--batch", "--signal=USR1", f"{number}_2")
    cluster.again(f"{number}_2", log)
    jobs = [cluster.wait(f"{number}_{task}", "COMPLETED", PATIENCE, log) for task in range(3)]
    assert [job["Restarts"] for job in jobs] == ["0", "0", "1"]
    text = log.read_text()
    assert f"job {number}_2: nodes n" in text
    assert "world size 1  device cpu" in text
    assert text.count("resuming after step") == 1
    assert_whole(tmp_path / "three-0", 5)
    assert_whole(tmp_path / "warm", 300)
    assert_whole(tmp_path / "warmer", 300)
    temperatures = [re.findall(r"temperature: ([\d.]+)", path.read_text())[0] for path in configurations(tmp_path)]
    assert temperatures == ["0.1", "0.2", "0.5"]
    assert "width: 4" in configurations(tmp_path)[1].read_text()


def configurations(folder):
    return [folder / name / "config.yaml" for name in ("three-0", "warm", "warmer")]


def test_a_search_that_two_tasks_share(cluster, tmp_path, tiny):
    fixed = [*tiny, "name=search", "train.total_steps=60"]
    wanted = [*fixed, "--trials", "4", "--search", "method.temperature=0.1..0.5"]
    logs = f"{tmp_path}/%A_%a.log"
    command = ["bash", "slurm/tune.sh", *wanted]
    number, _ = submit(cluster, tmp_path, *command, SBATCH_OUTPUT=logs, NODES="1", TUNE_AT_ONCE="2")
    tasks = {f"{number}_{task}": tmp_path / f"{number}_{task}.log" for task in range(2)}
    reach(10, tmp_path / "search" / "trial_0000", tmp_path / f"{number}_0.log")
    first = next(task for task, log in tasks.items() if log.exists() and "trial 0 of 4" in log.read_text())
    cluster.call("scancel", "--batch", "--signal=USR1", first)
    cluster.again(first, tasks[first])
    for task, log in tasks.items():
        cluster.wait(task, "COMPLETED", PATIENCE, log)
    for trial in range(4):
        assert_whole(tmp_path / "search" / f"trial_{trial:04}", 60)
    text = "".join(log.read_text() for log in tasks.values())
    assert text.count("resuming after step") == 1
    assert (tmp_path / "search" / "trials.csv").read_text().count("finished") == 4
    wrong = on_login_node(cluster, "bash", "slurm/tune.sh", *fixed, "--search", "method.temprature=0.1..0.5")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert "did you mean method.temperature?" in wrong.stderr


def test_a_wrong_sweep(cluster, tmp_path, tiny):
    sweep = tmp_path / "wrong.txt"
    sweep.write_text("name=same\nmethod.temprature=0.1\nname=same method.temperature=0.2\n")
    done = on_login_node(cluster, "bash", "slurm/sweep.sh", str(sweep), *tiny)
    assert (done.returncode, done.stdout) == (2, "")
    assert "did you mean method.temperature?" in done.stderr
    assert f"that was run 1 of {sweep}: method.temprature=0.1" in done.stderr
    assert f"two runs of {sweep} are called same: 0 and 2" in done.stderr
    assert cluster.call("squeue", "--noheader") == ""


def test_a_sweep_without_its_line(cluster, tmp_path, tiny):
    sweep = tmp_path / "one.txt"
    sweep.write_text("name=only\n")
    number, log = submit(cluster, tmp_path, "sbatch", "slurm/sweep.sh", str(sweep), *tiny)
    job = cluster.wait(number, "FAILED", PATIENCE, log)
    assert job["ExitCode"] == "2:0"
    assert "sbatch --array=0-0" in log.read_text()


RANK = """\
import signal, time
for number in (signal.SIGUSR1, signal.SIGTERM):
    signal.signal(number, lambda number, frame: print(signal.Signals(number).name, flush=True))
print("ready", flush=True)
while True:
    time.sleep(1)
"""


def test_signals_reach_the_ranks_from_the_task_alone(cluster, tmp_path):
    """With proctrack/cgroup SLURM signals no process below a step's task; this cluster has proctrack/linuxproc."""
    (tmp_path / "rank.py").write_text(RANK)
    (tmp_path / "accelerate").write_text(f"#!/bin/sh\npython {tmp_path}/rank.py &\nwait\n")
    (tmp_path / "accelerate").chmod(0o755)
    mark = f"MARK={tmp_path}"
    env = cluster.env | dict([mark.split("=")]) | {"PATH": f"{tmp_path}:{cluster.env['PATH']}", "SLURM_NODEID": "0"}
    command = ["bash", "-c", 'source slurm/common.sh && "$@"', "bash", "launch"]
    with subprocess.Popen(command, cwd=CHECKOUT, env=env, stdout=subprocess.PIPE, text=True) as task:
        try:
            assert task.stdout.readline() == "ready\n"
            for number in (signal.SIGUSR1, signal.SIGTERM):
                task.send_signal(number)
                assert task.stdout.readline() == f"{number.name}\n"
            assert task.poll() is None
        finally:
            for process in processes(mark):
                os.kill(process, signal.SIGKILL)


def test_a_wrong_argument_in_a_job(cluster, tmp_path, tiny):
    number, log = submit(cluster, tmp_path, "sbatch", "--nodes=2", "slurm/simclr.sh", *tiny, "train.global_batch=15")
    job = cluster.wait(number, "FAILED", PATIENCE, log)
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
    job = cluster.wait(number, "FAILED", PATIENCE, log)
    assert job["Restarts"] == "0"
    assert "GPUs on n2: 1, on the batch node: 2" in log.read_text()
    assert cluster.steps(number) == 1


def test_a_wrong_argument_before_a_job(cluster):
    done = on_login_node(cluster, "bash", "slurm/simclr.sh", "train.globel_batch=8")
    assert (done.returncode, done.stdout) == (2, "")
    assert "did you mean train.global_batch?" in done.stderr
    assert cluster.call("squeue", "--noheader") == ""


def test_not_the_checkout(cluster, tmp_path):
    done = on_login_node(cluster, "bash", str(CHECKOUT / "slurm" / "simclr.sh"), cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert f"no slurm/common.sh in {tmp_path}: change to the checkout" in done.stderr
