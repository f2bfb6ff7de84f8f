"""What the launcher and the environment may say, and what they may not: who runs where, threads, and never numerics."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_train import TINY, tiny
from torch import nn

from sslcells import launcher, ranks
from sslcells.cli import main
from sslcells.config import ConfigError
from sslcells.train import train

ROOT = Path(__file__).parent.parent
OTHERS = ("RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "SLURM_", "OMPI_", "PMI_", "MV2_", "TORCHELASTIC_", "OMP_", "KMP_")


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """Nothing of a launcher's, whatever started the tests; and their threads again afterwards."""
    for name in list(os.environ):
        if name.startswith((*OTHERS, *launcher._PREFIXES)):
            monkeypatch.delenv(name)
    before = torch.get_num_threads()
    yield monkeypatch
    torch.set_num_threads(before)


def set_all(monkeypatch, variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


def one_step(tmp_path, *changes):
    """Gradients and weights of a layer after one step through what a run is given."""
    started = launcher.accelerator(tiny(tmp_path, *changes))
    torch.manual_seed(0)
    layer = nn.Linear(64, 8)
    network, optimizer = started.prepare(layer, torch.optim.SGD(layer.parameters(), lr=0.1))
    started.backward(network(torch.randn(16, 64)).square().mean())
    norm = started.clip_grad_norm_(network.parameters(), 1e9)
    optimizer.step()
    return type(network), norm, layer.weight.grad, layer.weight.detach()


DYNAMO = "ACCELERATE_DYNAMO_"
LEAKS = [
    {"ACCELERATE_MIXED_PRECISION": "bf16"},
    {"ACCELERATE_MIXED_PRECISION": "fp16"},
    {"ACCELERATE_MIXED_PRECISION": "fp8", "ACCELERATE_FP8_BACKEND": "TE", "ACCELERATE_FP8_FORMAT": "E4M3"},
    {"ACCELERATE_FP8_BACKEND": "no such thing"},
    {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"},
    {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "auto"},
    {f"{DYNAMO}BACKEND": "INDUCTOR"},
    {f"{DYNAMO}BACKEND": "EAGER", f"{DYNAMO}MODE": "max-autotune", f"{DYNAMO}USE_FULLGRAPH": "True"},
    {f"{DYNAMO}BACKEND": "NO", f"{DYNAMO}USE_DYNAMIC": "perhaps", f"{DYNAMO}USE_REGIONAL_COMPILATION": "perhaps"},
    {"ACCELERATE_DOWNCAST_BF16": "true"},
    {"ACCELERATE_GRADIENT_CLIPPING": "0.01"},
    {"FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": "true", "MEGATRON_LM_TP_DEGREE": "2"},
    {"PARALLELISM_CONFIG_TP_SIZE": "2", "ACCELERATE_DEBUG_MODE": "1", "ACCELERATE_BYPASS_DEVICE_MAP": "true"},
    {"ACCELERATE_TORCH_DEVICE": "cpu", "ACCELERATE_USE_CPU": "", "ACCELERATE_USE_FSDP": "false"},
    {"TORCHELASTIC_RUN_ID": "x", "OMP_NUM_THREADS": "1"},
]


@pytest.mark.parametrize("variables", LEAKS, ids=lambda v: ",".join(f"{k[11:]}={x}" for k, x in v.items()))
def test_the_launcher_decides_nothing_of_what_is_computed(variables, tmp_path, monkeypatch):
    expected = one_step(tmp_path)
    set_all(monkeypatch, variables)
    found = one_step(tmp_path)
    assert found[0] is expected[0]
    for a, b in zip(found[1:], expected[1:], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=0)


def test_what_is_overruled_is_said_once(tmp_path, monkeypatch, capsys):
    set_all(monkeypatch, {f"{DYNAMO}BACKEND": "INDUCTOR", "ACCELERATE_MIXED_PRECISION": "bf16"})
    launcher.accelerator(tiny(tmp_path))
    launcher.accelerator(tiny(tmp_path))
    said = capsys.readouterr().err.splitlines()
    assert sorted(line.split(" of the launcher")[0] for line in said) == [
        "sslcells: ACCELERATE_DYNAMO_BACKEND=INDUCTOR",
        "sslcells: ACCELERATE_MIXED_PRECISION=bf16",
    ]
    assert all("train.compile decides" in line or "train.precision decides" in line for line in said)


SPLITS = [
    {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"},
    {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"},
    {"ACCELERATE_USE_MEGATRON_LM": "true"},
    {"ACCELERATE_USE_PARALLELISM_CONFIG": "true", "PARALLELISM_CONFIG_TP_SIZE": "2"},
    {"ACCELERATE_USE_SAGEMAKER": "true", "ACCELERATE_SAGEMAKER_DISTRIBUTED_TYPE": "DATA_PARALLEL"},
    {"ACCELERATE_TORCH_DEVICE": "meta"},
    {"ACCELERATE_USE_CPU": "perhaps"},
    {"ACCELERATE_CPU_AFFINITY": "perhaps"},
]


@pytest.mark.parametrize("variables", SPLITS, ids=lambda v: next(iter(v)))
@pytest.mark.parametrize("check", [["--check"], []])
def test_what_cannot_be_honoured_is_refused_by_name(variables, check, tmp_path, monkeypatch, capsys):
    set_all(monkeypatch, variables)
    assert main("train", [*check, *TINY, f"out={tmp_path}"]) == 2
    assert next(iter(variables)) in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


WRONG = [
    ({"WORLD_SIZE": "2"}, "not RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT: left over"),
    ({"RANK": ""}, "RANK='' in the environment is not a number"),
    ({"WORLD_SIZE": ""}, "WORLD_SIZE='' in the environment is not a number"),
    ({"LOCAL_RANK": "one"}, "LOCAL_RANK='one'"),
    ({"LOCAL_RANK": "0"}, "LOCAL_RANK=0, but not RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT"),
    ({"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_PORT": "1"}, "but not MASTER_ADDR"),
    ({"WORLD_SIZE": "2", "RANK": "2"}, "RANK=2 is none of the ranks 0 to 1 of WORLD_SIZE=2"),
    ({"WORLD_SIZE": "2", "RANK": "-1"}, "RANK=-1 is none"),
    ({"RANK": "1"}, "RANK=1 is none of the ranks 0 to 0 of 1 (WORLD_SIZE is not set)"),
    ({"WORLD_SIZE": "0"}, "WORLD_SIZE=0 is below 1"),
    ({"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "4", "LOCAL_WORLD_SIZE": "2"}, "LOCAL_RANK=4 is none of the ranks"),
    ({"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}, "LOCAL_WORLD_SIZE=4 is more than"),
    ({"MASTER_PORT": "http"}, "MASTER_PORT='http'"),
    ({"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "0"}, "srun started 2 copies"),
    ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0"}, "mpirun started 2 copies"),
    ({"PMI_SIZE": "2", "PMI_RANK": "0"}, "2 copies of this program (PMI_SIZE=2)"),
    ({"PMI_SIZE": "many"}, "PMI_SIZE='many'"),
    ({"MV2_COMM_WORLD_SIZE": "2", "MV2_COMM_WORLD_RANK": "0"}, "2 copies"),
]


@pytest.mark.parametrize(("variables", "message"), WRONG, ids=lambda v: v if isinstance(v, str) else "")
def test_a_launch_that_cannot_be_meant_is_named(variables, message, tmp_path, monkeypatch, capsys):
    set_all(monkeypatch, variables)
    assert main("train", [*TINY, f"out={tmp_path}"]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert any(word in said for word in ("unset ", "accelerate launch"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "variables",
    [
        {"SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"},
        {"SLURM_NTASKS": "8", "SLURM_PROCID": "0"},  # a batch script outside of srun
        {"WORLD_SIZE": "1", "RANK": "0", "SLURM_STEP_NUM_TASKS": "2"},  # copies that are meant
        {"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0", "PMI_SIZE": "1"},
    ],
)
def test_one_process_may_be_started_by_anything(variables, monkeypatch):
    set_all(monkeypatch, variables)
    assert launcher.start(True, 1.0).num_processes == 1


def test_left_over_variables_of_another_rank_are_told_too(monkeypatch, capsys):
    set_all(monkeypatch, {"WORLD_SIZE": "2", "RANK": "1"})
    assert main("train", [*TINY]) == 2
    assert "the environment sets RANK=1, WORLD_SIZE=2, but not LOCAL_RANK" in capsys.readouterr().err


def test_of_copies_one_tells(monkeypatch, capsys):
    set_all(monkeypatch, {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1"})
    assert main("train", [*TINY]) == 2
    assert capsys.readouterr().err == ""


def test_ranks_that_do_not_come_are_told(monkeypatch):
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    set_all(monkeypatch, {"WORLD_SIZE": "2", "RANK": "1", **address})
    with pytest.raises(ranks.Lost, match=r"rank 1 of 2 waited .* MASTER_ADDR=127\.0\.0\.1 MASTER_PORT=1 .*unset RANK"):
        launcher.start(True, 0.01)


MARK = {"ACCELERATE_MIXED_PRECISION": "no"}
ONE = {"OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize(
    ("variables", "asked", "workers", "expected"),
    [
        ({}, "auto", 0, 8),
        ({}, "auto", 1, 7),
        ({}, "auto", 6, 6),
        ({}, 3, 6, 3),
        (ONE, "auto", 1, 1),  # a user's
        (MARK | ONE, "auto", 1, 7),  # the launcher's
        ({"TORCHELASTIC_RUN_ID": "none"} | ONE, "auto", 1, 7),
        (MARK | ONE, 1, 1, 1),
        (MARK | {"OMP_NUM_THREADS": "4"}, "auto", 1, 4),
        (MARK | {"OMP_NUM_THREADS": "64"}, "auto", 1, 8),
        (MARK | ONE | {"LOCAL_WORLD_SIZE": "4", "WORLD_SIZE": "4"}, "auto", 1, 2),
        (MARK | ONE | {"LOCAL_WORLD_SIZE": "16", "WORLD_SIZE": "16"}, "auto", 4, 1),
        ({"OMP_NUM_THREADS": "many"}, "auto", 0, 8),
    ],
)
def test_threads(variables, asked, workers, expected, monkeypatch):
    set_all(monkeypatch, variables)
    monkeypatch.setattr(launcher, "cores", lambda: 8)
    assert launcher.threads_for(asked, workers) == expected


def test_two_cores_both_compute(monkeypatch):
    set_all(monkeypatch, MARK | ONE)
    monkeypatch.setattr(launcher, "cores", lambda: 2)
    assert launcher.threads_for("auto", 1) == 2


@pytest.mark.parametrize(
    ("own", "file", "text", "expected"),
    [
        ("0::/job\n", "job/cpu.max", "250000 100000\n", 2.5),
        ("0::/job/step\n", "job/cpu.max", "150000 100000\n", 1.5),
        ("0::/job\n", "job/cpu.max", "max 100000\n", float("inf")),
        ("4:memory:/x\n3:cpu,cpuacct:/job\n", "cpu/job/cpu.cfs_quota_us", "400000\n", 4.0),
        ("3:cpu:/job\n", "cpu/job/cpu.cfs_quota_us", "-1\n", float("inf")),
        ("3:cpuset:/job\n", "cpu/job/cpu.cfs_quota_us", "400000\n", float("inf")),
    ],
)
def test_cores_that_a_cgroup_pays_for(own, file, text, expected, tmp_path):
    (tmp_path / "own").write_text(own)
    (tmp_path / file).parent.mkdir(parents=True)
    (tmp_path / file).write_text(text)
    (tmp_path / file).with_name("cpu.cfs_period_us").write_text("100000\n")
    assert launcher._quota(tmp_path, tmp_path / "own") == expected


@pytest.mark.slow
@pytest.mark.parametrize(
    ("key", "values"), [("threads", (1, 2)), ("workers", (0, 2)), ("channels_last", ("false", "true"))]
)
def test_results_do_not_depend_on_what_a_machine_is_asked_for(key, values, tmp_path):
    few = ["train.total_steps=2", "optim.name=sgd", "optim.lr=0.01", "evaluate.pictures=false"]
    one, two = (train(tiny(tmp_path, *few, f"name={value}", f"train.{key}={value}")) for value in values)
    a, b = (load_file(folder / "encoder.safetensors") for folder in (one, two))
    for key, value in a.items():
        torch.testing.assert_close(b[key], value, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("flags", "precision"),
    [
        ("processor : 0\nflags\t\t: fpu avx512f avx512_bf16\n", "bf16"),
        ("flags\t\t: fpu amx_bf16 amx_tile\n", "bf16"),
        ("Features\t: fp asimd i8mm bf16\n", "bf16"),
        ("flags\t\t: fpu avx2 avx512f\n", "no"),
        ("", "no"),
    ],
)
def test_bf16_where_the_processor_has_it(flags, precision, tmp_path, monkeypatch):
    (tmp_path / "cpuinfo").write_text(flags)
    known = launcher._processor(tmp_path / "cpuinfo")
    assert launcher._processor(tmp_path / "none") == set()
    monkeypatch.setattr(launcher, "_processor", lambda: known)
    assert launcher.precision_for(torch.device("cpu")) == precision


@pytest.fixture
def as_before():
    yield
    launcher.make_deterministic(False)


@pytest.mark.usefixtures("as_before")
def test_deterministic(tmp_path, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":0:0")
    with pytest.raises(ConfigError, match=r"CUBLAS_WORKSPACE_CONFIG=:0:0 .* train\.deterministic=true: unset it"):
        launcher.accelerator(tiny(tmp_path, "train.deterministic=true"))
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    for asked, strict, warns in (("true", True, False), ("warn", True, True), ("false", False, False)):
        launcher.accelerator(tiny(tmp_path, f"train.deterministic={asked}"))
        assert torch.are_deterministic_algorithms_enabled() == torch.backends.cudnn.deterministic == strict
        assert torch.is_deterministic_algorithms_warn_only_enabled() == warns
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")  # undone at the end


@pytest.mark.usefixtures("as_before")
def test_an_operation_that_depends_on_chance_is_named(tmp_path, monkeypatch, capsys):
    def by_chance(*args):
        torch.use_deterministic_algorithms(True)
        raise RuntimeError("some_backward_cuda does not have a deterministic implementation, but you set …")

    monkeypatch.setattr("sslcells.train._introduce", by_chance)
    assert main("train", [*TINY, "train.deterministic=true", f"out={tmp_path}"]) == 1
    said = capsys.readouterr().err
    assert "some_backward_cuda" in said
    assert "train.deterministic=true forbids it; use warn" in said


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.usefixtures("as_before")
def test_equal_runs_are_equal_to_the_last_bit_on_cuda(tmp_path):
    few = ["train.deterministic=true", "train.precision=bf16", "train.total_steps=6", "model.backbone=test_resnet"]
    one, two = (train(tiny(tmp_path, *few, f"name={name}")) for name in ("one", "two"))
    a, b = (load_file(folder / "encoder.safetensors") for folder in (one, two))
    assert all(torch.equal(a[key], b[key]) for key in a)


LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--config_file"]


def launched(tmp_path, configuration, *changes, **variables):
    """`accelerate launch` with a user's own configuration."""
    (tmp_path / "user.yaml").write_text(f"compute_environment: LOCAL_MACHINE\nuse_cpu: true\n{configuration}")
    command = [
        *LAUNCH,
        str(tmp_path / "user.yaml"),
        "-m",
        "sslcells.train",
        *TINY,
        "train.total_steps=2",
        f"out={tmp_path}",
    ]
    return subprocess.run(
        [*command, *changes], env=os.environ | variables, cwd=ROOT, capture_output=True, text=True, check=False
    )


@pytest.mark.slow
def test_a_users_configuration_changes_no_result(tmp_path):
    plain = launched(tmp_path, "distributed_type: 'NO'\nnum_processes: 1\n", "name=plain")
    mine = (
        "distributed_type: 'NO'\nnum_processes: 1\nmixed_precision: bf16\n"
        "dynamo_config: {dynamo_backend: EAGER, dynamo_mode: default}\n"
    )
    own = launched(tmp_path, mine, "name=own", ACCELERATE_GRADIENT_ACCUMULATION_STEPS="4")
    assert plain.returncode == own.returncode == 0, own.stderr
    assert "ACCELERATE_DYNAMO_BACKEND=EAGER of the launcher is not used: train.compile decides" in own.stderr
    assert f"threads {launcher.threads_for('auto', 0)} " in plain.stdout
    a, b = (load_file(tmp_path / name / "encoder.safetensors") for name in ("plain", "own"))
    assert all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.slow
def test_a_users_fsdp_is_refused(tmp_path):
    mine = "distributed_type: FSDP\nnum_processes: 2\nmain_process_port: 0\nfsdp_config: {fsdp_version: 1}\n"
    done = launched(tmp_path, mine, "train.micro_batch=4")
    assert done.returncode != 0
    assert done.stderr.count("ACCELERATE_USE_FSDP=true: the launcher asks for FSDP") == 1
