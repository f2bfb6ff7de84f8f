"""What the launcher started: this process's Accelerator, device, threads, rank and world size.

The launcher decides which processes run where, never what they compute. Its variables that would change the
computation are either overruled, with a line on stderr, or refused by name.
"""

import math
import os
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    GradientAccumulationPlugin,
    TorchDynamoPlugin,
    patch_environment,
)

from sslcells import cgroups, ranks, sharding
from sslcells.config import ConfigError, Run, check_tracker


def accelerator(run: Run) -> Accelerator:
    """Start the process group that the launcher described, if any, and assign this process its device.

    Numerics come only from the run's configuration. A process may call this for several runs, one after another.

    Raises:
        ConfigError: as `start`.
    """
    check_tracker(run.log)
    make_deterministic(run.train.deterministic)
    return start(
        run.train.device == "cpu",
        run.train.timeout_minutes,
        run.train.precision,
        run.train.threads,
        run.train.workers,
        run.train.parallel == "fsdp",
        log_with=None if run.log.tracker == "none" else run.log.tracker,
        project_dir=run.folder,
    )


def start(
    cpu: bool,
    minutes: float,
    precision: str = "no",
    threads: int | Literal["auto"] = "auto",
    workers: int = 0,
    sharded: bool = False,
    **options: Any,
) -> Accelerator:
    """Like `accelerator`, without a run. Ranks wait `minutes` for each other; `cpu`, or having no GPU, selects the CPU.

    Raises:
        ConfigError: if the launch is inconsistent or asks for something unsupported, or if Accelerate would silently
            run the launched ranks without connecting them.
        Lost: if the other ranks do not arrive.
    """
    computing = threads_for(threads, workers)
    device = _join(cpu, minutes, computing)
    if precision == "auto":
        precision = precision_for(device)
    _overrule(precision)
    AcceleratorState._reset_state()  # forgets the last run's precision; the process group stays
    with patch_environment(OMP_NUM_THREADS=computing):  # without it, Accelerate would choose a number
        started = (sharding.accelerator if sharded and ranks.world() > 1 else Accelerator)(
            cpu=device.type == "cpu",
            mixed_precision=precision,
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
            dynamo_plugin=TorchDynamoPlugin(backend="no"),
            kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
            **options,
        )
    torch.set_num_threads(computing)
    if precision == "fp16" and device.type == "cpu":
        raise ConfigError(
            "train.precision=fp16 needs a GPU, but this process runs on a CPU: use bf16, or no for float32"
        )
    return started


def make_deterministic(mode: bool | Literal["warn"]) -> None:
    """Use deterministic algorithms from now on; where none exists, raise an error, or with `warn` print a warning.

    Raises:
        ConfigError: if the environment sets a cuBLAS workspace that is not deterministic.
    """
    workspace = os.environ.get("CUBLAS_WORKSPACE_CONFIG", "")
    if mode and workspace not in ("", *_WORKSPACES):
        raise ConfigError(
            f"CUBLAS_WORKSPACE_CONFIG={workspace} in the environment is not deterministic, but train.deterministic="
            f"{str(mode).lower()}: unset it, or set it to one of {', '.join(_WORKSPACES)}"
        )
    if mode:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = workspace or _WORKSPACES[0]  # read at the first matrix product
    torch.use_deterministic_algorithms(bool(mode), warn_only=mode == "warn")
    torch.backends.cudnn.deterministic = bool(mode)


_WORKSPACES = (":4096:8", ":16:8")


def device_for(run: Run) -> torch.device:
    """Start the process group that the launcher described, if any, and return this process's device.

    Raises:
        ConfigError: as `start`.
        Lost: as `start`.
    """
    computing = threads_for(run.train.threads, run.train.workers)
    return _join(run.train.device == "cpu", run.train.timeout_minutes, computing)


def _join(cpu: bool, minutes: float, computing: int) -> torch.device:
    launch = launched()
    launch.check_complete()
    check_numerics()
    cpu = _take_device() or _flag("ACCELERATE_USE_CPU") or cpu or not torch.accelerator.is_available()
    timeout = timedelta(minutes=minutes)
    ranks.set_timeout(timeout)
    try:
        with patch_environment(OMP_NUM_THREADS=computing):
            state = PartialState(cpu, timeout=timeout)
    except Exception as error:
        if not ranks.unmet(error):
            raise
        raise ranks.Lost(
            f"rank {launch.rank} of {launch.world} waited {minutes:g} minutes at MASTER_ADDR="
            f"{os.environ['MASTER_ADDR']} MASTER_PORT={os.environ['MASTER_PORT']} but not all ranks arrived. "
            f"If these variables are left over from another job: {_UNSET}"
        ) from error
    if state.num_processes != launch.world:
        raise ConfigError(
            f"{launch.world} processes were launched, but Accelerate connects {state.num_processes}: "
            f"launch with one of launch/*.yaml"
        )
    kind = state.distributed_type
    if kind != DistributedType.NO and not kind.value.startswith("MULTI_"):
        raise ConfigError(f"Accelerate's distributed_type {kind.value} is not supported: {_TYPES}")
    device: torch.device = state.device
    if cpu and device.type != "cpu":
        raise ConfigError(
            f"this process already uses {device}, but train.device=cpu or ACCELERATE_USE_CPU now asks for the CPU: "
            f"use the same train.device for all runs of one command"
        )
    return device


# What `auto` means


def precision_for(device: torch.device) -> Literal["no", "bf16"]:
    """bf16 if the device supports it in hardware (fast, with the range of float32), else no mixed precision."""
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no"
    return "bf16" if device.type == "cpu" and _BFLOAT16 & _processor() else "no"


def channels_last_for(device: torch.device, precision: str) -> bool:
    """True if convolutions were measured to be faster with channels last, on this kind of device and precision."""
    return (device.type, precision) in _CHANNELS_LAST


_CHANNELS_LAST = {("cpu", "no"), ("cpu", "bf16"), ("cuda", "no"), ("cuda", "bf16"), ("cuda", "fp16")}
"""On a CPU, ResNet-18 at 64 px and timm's test_resnet at 48 px, images per second of CPU time, contiguous → channels
last: float32 42 → 49 and 341 → 507, bf16 74 → 83 and 527 → 856 (EPYC with AVX-512 bf16, torch 2.15, 2026-11-25)."""


_BFLOAT16 = {"avx512_bf16", "amx_bf16", "bf16"}
"""CPU flags of Linux for matrix products in bfloat16, on x86 and ARM."""


def _processor(file: Path = Path("/proc/cpuinfo")) -> set[str]:
    """The CPU flags that Linux lists; empty on other systems."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except OSError:
        return set()
    return set(next((line for line in lines if line.lower().startswith(("flags", "features"))), "").split())


# Which processes run where


class Launch(NamedTuple):
    """Rank of this process, and number of processes, as the launcher set them."""

    rank: int
    world: int
    local: bool
    """True if the launcher set LOCAL_RANK, so that a process group is expected"""

    def check_complete(self) -> None:
        """Raise a ConfigError if ranks were launched without the variables they need to connect."""
        needed = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
        missing = [name for name in needed if not os.environ.get(name)]
        if missing and (self.world > 1 or self.local):
            said = ", ".join(f"{name}={os.environ[name]}" for name in needed if os.environ.get(name))
            raise ConfigError(
                f"the environment sets {said}, but not {', '.join(missing)}: left over from another job? "
                f"For one process: {_UNSET}; for several: {_LAUNCH}"
            )


def launched() -> Launch:
    """Read rank and world size from the environment, before any process group exists.

    Raises:
        ConfigError: if the variables contradict each other, or several unconnected copies of this process were started.
    """
    world, rank = _number("WORLD_SIZE", 1), _number("RANK", 0)
    local, local_world, _ = (
        _number("LOCAL_RANK", -1),
        _number("LOCAL_WORLD_SIZE", max(world, 1)),
        _number("MASTER_PORT", 0),
    )
    wrong = []
    if world < 1:
        wrong.append(f"WORLD_SIZE={world} is below 1")
    elif not 0 <= rank < world:
        wrong.append(f"RANK={rank} is none of the ranks 0 to {world - 1} of {_said('WORLD_SIZE', world)}")
    if not -1 <= local < local_world:
        wrong.append(f"LOCAL_RANK={local} is none of the ranks of {_said('LOCAL_WORLD_SIZE', local_world)}")
    if not wrong and local_world > world:
        wrong.append(f"LOCAL_WORLD_SIZE={local_world} is more than {_said('WORLD_SIZE', world)}")
    if wrong:
        raise ConfigError(f"{'; '.join(wrong)}: left over from another job? {_UNSET}")
    if "WORLD_SIZE" not in os.environ:
        for size, _, program, remedy in _COPIES:
            if (copies := _number(size, 1)) > 1:
                raise ConfigError(
                    f"{program} started {copies} copies of this program ({size}={copies}) that are not connected to "
                    f"each other: {remedy}; for a single process, put WORLD_SIZE=1 before the command"
                )
    return Launch(rank, world, local >= 0)


def launched_rank() -> int:
    """This process's rank as the launcher set it; raises like `launched`."""
    return launched().rank


def launched_world() -> int:
    """Number of processes that the launcher started; raises like `launched`."""
    return launched().world


def first() -> bool:
    """True if this process prints for all ranks; gives an answer even if the launch is inconsistent."""
    try:
        launch = launched()
        launch.check_complete()
        return launch.rank == 0
    except ConfigError:
        numbers = [
            os.environ.get(number, "") for size, number, _, _ in _COPIES if os.environ.get(size) not in (None, "1")
        ]
        return "WORLD_SIZE" in os.environ or all(number in ("", "0") for number in numbers)


_LAUNCH = "accelerate launch --config_file launch/gpu8.yaml, or another file of launch/"
_UNSET = "unset RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT"
_COPIES = (
    (
        "SLURM_STEP_NUM_TASKS",
        "SLURM_PROCID",
        "srun",
        "let srun start one task per node, and accelerate launch the ranks there, as slurm/simclr.sh does",
    ),
    ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "mpirun", f"start without mpirun: {_LAUNCH}"),
    ("PMI_SIZE", "PMI_RANK", "an MPI launcher", f"start without it: {_LAUNCH}"),
    ("MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_RANK", "mpirun", f"start without mpirun: {_LAUNCH}"),
)
"""Other launchers: variable with the number of processes, variable with this one's, program, and what to do instead."""


def _number(name: str, otherwise: int) -> int:
    """The number in an environment variable, or `otherwise` if it is not set."""
    said = os.environ.get(name)
    if said is None:
        return otherwise
    try:
        return int(said)
    except ValueError:
        raise ConfigError(
            f"{name}={said!r} in the environment is not a number: left over from another job? unset {name}"
        ) from None


def _said(name: str, value: int) -> str:
    return f"{name}={value}" if name in os.environ else f"{value} ({name} is not set)"


# The launcher must not change what is computed


_TYPES = "distributed_type may be NO or MULTI_GPU; launch with a file of launch/, or run `accelerate config` again"
_SPLIT = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism_config",
}
_OVERRULED = {
    "ACCELERATE_MIXED_PRECISION": ("no", "train.precision"),
    "ACCELERATE_DOWNCAST_BF16": ("no", "train.precision"),
    "ACCELERATE_DYNAMO_BACKEND": ("no", "train.compile"),
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": ("1", "train.micro_batch"),
}
"""Variables that change what Accelerate computes, their neutral value, and the key that decides instead."""
_PREFIXES = ("ACCELERATE_", "FSDP_", "MEGATRON_LM_", "PARALLELISM_CONFIG_")
_KEPT = {"ACCELERATE_USE_CPU", "ACCELERATE_CPU_AFFINITY", "ACCELERATE_LOG_LEVEL", "ACCELERATE_MIXED_PRECISION"}
"""Kept: they say where to run. The last shows that Accelerate launched us, and an argument always overrules it."""
_YES, _NO = ("y", "yes", "t", "true", "on", "1"), ("n", "no", "f", "false", "off", "0", "")


def check_numerics() -> None:
    """Raise a ConfigError if the launcher asks for something that no run supports."""
    for name, what in _SPLIT.items():
        if _flag(name):
            raise ConfigError(
                f"{name}={os.environ[name]}: the launcher asks for {what}, which would split the network over the "
                f"ranks; here only train.parallel=fsdp does. {_TYPES}"
            )
    if _flag("ACCELERATE_USE_SAGEMAKER") and os.environ.get("ACCELERATE_SAGEMAKER_DISTRIBUTED_TYPE", "NO") != "NO":
        raise ConfigError(f"ACCELERATE_USE_SAGEMAKER: SageMaker's own ranks are not supported. {_TYPES}")
    if (device := os.environ.get("ACCELERATE_TORCH_DEVICE", "")) not in ("", "cpu", "cuda"):
        raise ConfigError(
            f"ACCELERATE_TORCH_DEVICE={device}: each rank uses its own device; choose GPUs with CUDA_VISIBLE_DEVICES, "
            f"or the CPU with train.device=cpu"
        )
    for name in ("ACCELERATE_USE_CPU", "ACCELERATE_CPU_AFFINITY"):
        _flag(name)


def _flag(name: str) -> bool:
    """True if an environment variable says yes; an empty variable counts as not set, and is removed."""
    said = os.environ.get(name, "").strip().lower()
    if said not in _YES + _NO:
        raise ConfigError(f"{name}={os.environ[name]} in the environment is neither true nor false")
    if not said:
        os.environ.pop(name, None)
    return said in _YES


def _take_device() -> bool:
    """True if the launcher asks for the CPU in ACCELERATE_TORCH_DEVICE, which is removed."""
    return os.environ.pop("ACCELERATE_TORCH_DEVICE", "") == "cpu"


def _overrule(precision: str) -> None:
    """Remove variables that would change the computation, and print those that differ from the run's settings."""
    for name, (nothing, key) in _OVERRULED.items():
        said = os.environ.get(name, nothing)
        agreed = name == "ACCELERATE_MIXED_PRECISION" and said == precision
        if said.strip().lower() not in ("", nothing, *_NO) and not agreed and first():
            print(f"sslcells: {name}={said} of the launcher is not used: {key} decides", file=sys.stderr, flush=True)
    if "ACCELERATE_MIXED_PRECISION" in os.environ:
        os.environ["ACCELERATE_MIXED_PRECISION"] = precision
    for name in [n for n in os.environ if n.startswith(_PREFIXES) and n not in _KEPT]:
        del os.environ[name]


# Cores and threads


def cores() -> int:
    """Cores that this process may use: its CPU affinity, limited by its cgroup's quota."""
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.ceil(min(bound, _quota())))


def share() -> int:
    """Cores per rank on this machine."""
    return max(1, cores() // max(1, _number("LOCAL_WORLD_SIZE", 1)))


def threads_for(threads: int | Literal["auto"], workers: int) -> int:
    """Compute threads of this rank: `threads`, or for `auto` the cores that `workers` leave free.

    OMP_NUM_THREADS counts if the user set it. A launcher sets it to 1 if the user did not, so under a launcher a 1 is
    ignored, and a larger number is limited to this rank's share of the cores.
    """
    if threads != "auto":
        return threads
    said = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    number = int(said) if said.isdecimal() else 0
    by_launcher = "ACCELERATE_MIXED_PRECISION" in os.environ or "TORCHELASTIC_RUN_ID" in os.environ
    if number > 0 and not by_launcher:
        return number
    if number > 1:
        return min(number, share())
    # Readers rarely fill a core while the network computes, so they get at most a quarter of the cores.
    return max(share() - workers, math.ceil(0.75 * share()), 1)


def _quota(root: Path = cgroups.ROOT, own: Path = cgroups.OWN) -> float:
    """Cores that the process's cgroups (version 1 or 2) allow; infinite without a limit."""
    return min(map(_allowed, cgroups.folders("cpu", root, own)), default=math.inf)


def _allowed(folder: Path) -> float:
    """Cores that one cgroup allows; infinite without a limit."""
    try:
        if (folder / "cpu.max").is_file():
            quota, period = (folder / "cpu.max").read_text(encoding="utf-8").split()
        else:
            quota = (folder / "cpu.cfs_quota_us").read_text(encoding="utf-8").strip()
            period = (folder / "cpu.cfs_period_us").read_text(encoding="utf-8").strip()
        return int(quota) / int(period) if quota != "max" and int(quota) > 0 else math.inf
    except (OSError, ValueError):
        return math.inf
