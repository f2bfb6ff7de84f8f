"""This machine: versions, devices, threads, memory, disk and network name, and what to do about each."""

import contextlib
import importlib.metadata
import os
import platform
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch
from packaging.requirements import Requirement

from sslcells import __version__, cgroups, launcher, ranks
from sslcells.checks import Check
from sslcells.data._cache import free_memory

GIB, MIB = 2**30, 2**20
LEAST_DISK, LEAST_MEMORY, LEAST_SHARED = 10 * GIB, 4 * GIB, 256 * MIB
"""Bytes below which a machine should be looked at."""
SLOW_DISK = 20.0
"""MiB a second; below, a checkpoint holds up training."""
WRITTEN = 32
"""MiB that are written to measure the disk."""


def machine(out: Path) -> Iterator[Check]:
    """Every check of one machine; `out` is the folder for runs, or will be."""
    yield from versions()
    yield from device()
    yield from threads()
    yield memory()
    yield shared_memory()
    yield disk(out)
    yield network_name()
    yield backends()


def versions(package: str = "sslcells") -> Iterator[Check]:
    """Versions that matter, and requirements of the package that the environment does not meet."""
    found = {name: _version(name) for name in ("torch", "torchvision", "timm", "accelerate", "kornia")}
    of = ", ".join(f"{name} {version or 'missing'}" for name, version in found.items())
    yield Check("versions", True, f"sslcells {__version__}, Python {platform.python_version()}, {of}")
    try:
        required = [Requirement(line) for line in importlib.metadata.requires(package) or ()]
    except importlib.metadata.PackageNotFoundError:
        yield Check("requirements", None, f"{package} is not installed", "install it: pip install -e .")
        return
    needed = [one for one in required if one.marker is None or one.marker.evaluate({"extra": ""})]
    lacking = [one for one in needed if _lacks(one)]
    found_not = [f"{one.name} {_version(one.name) or 'missing'}, needed {one.specifier or 'any'}" for one in lacking]
    command = "pip install --upgrade " + " ".join(f"'{one.name}{one.specifier}'" for one in lacking)
    yield Check("requirements", not lacking, "; ".join(found_not) or f"all {len(needed)} are met", command)


def _lacks(one: Requirement) -> bool:
    version = _version(one.name)
    return version is None or not one.specifier.contains(version, prereleases=True)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def device() -> Iterator[Check]:
    """The GPUs that torch sees, beside those that the driver has."""
    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            of = torch.cuda.get_device_properties(number)
            precision = "bf16" if launcher.precision_for(torch.device("cuda", number)) == "bf16" else "no bf16"
            found = f"{of.name}, {of.total_memory / GIB:.0f} GiB, compute {of.major}.{of.minor}, {precision}"
            yield Check(f"GPU {number}", True, f"{found}, CUDA {torch.version.cuda}")
        return
    listed = _gpus_of_the_driver()
    if not listed:
        precision = launcher.precision_for(torch.device("cpu"))
        fast = "bf16 in hardware" if precision == "bf16" else "no bf16 in hardware"
        yield Check("device", True, f"CPU ({fast}); no NVIDIA driver lists a GPU")
    elif torch.version.cuda is None:
        remedy = "install a build of torch for CUDA, as the selector on PyTorch's pages says"
        yield Check("device", False, f"{len(listed)} GPU(s), but torch {torch.__version__} is built for CPUs", remedy)
    else:
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
        remedy = f"the driver must support CUDA {torch.version.cuda}: see nvidia-smi; and /dev/nvidia* must be there"
        remedy = remedy if hidden is None else f"CUDA_VISIBLE_DEVICES={hidden!r} is set: unset it"
        yield Check(
            "device", False, f"{len(listed)} GPU(s), which torch for CUDA {torch.version.cuda} cannot use", remedy
        )


def _gpus_of_the_driver() -> list[str]:
    if shutil.which("nvidia-smi") is None:
        return []
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=20, check=False)
        return [line for line in done.stdout.splitlines() if line.startswith("GPU")]
    return []


def threads() -> Iterator[Check]:
    """Cores, compute threads, and whether others use the cores too."""
    cores, said = launcher.cores(), os.environ.get("OMP_NUM_THREADS", "")
    computing = launcher.threads_for("auto", 1)
    wasted = said == "1" and computing < cores
    found = f"{cores} of {os.cpu_count()} cores, {computing} compute threads with train.workers=1"
    yield Check(
        "threads",
        None if wasted else True,
        f"{found}{f', OMP_NUM_THREADS={said}' if said else ''}",
        "OMP_NUM_THREADS=1 leaves cores unused: unset it, or set train.threads",
    )
    busy = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    remedy = "other processes use the cores: expect less speed, and do not trust the speeds below"
    yield Check("load", None if busy > cores + 1 else True, f"{busy:.1f} processes want {cores} cores", remedy)


def memory() -> Check:
    """Free memory, limited by the control group."""
    of = psutil.virtual_memory()
    limits = [limit for folder in cgroups.folders("memory") if (limit := _limit(folder))]
    free = min([free_memory(), *limits])
    limited = f", limited to {min(limits) / GIB:.1f} GiB" if limits and min(limits) < of.total else ""
    remedy = "a smaller train.micro_batch and fewer train.workers; on SLURM a larger --mem"
    found = f"{free / GIB:.1f} of {of.total / GIB:.1f} GiB free{limited}"
    return Check("memory", None if free < LEAST_MEMORY else True, found, remedy)


def _limit(folder: Path) -> int | None:
    """Bytes that one control group may use, of version 1 or 2; None without a limit."""
    for name in ("memory.max", "memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):
            return int((folder / name).read_text(encoding="utf-8"))
    return None


def shared_memory(folder: Path = Path("/dev/shm")) -> Check:
    """Room in /dev/shm, through which readers hand images to training."""
    try:
        room = shutil.disk_usage(folder)
    except OSError as error:
        return Check("shared memory", None, f"{folder}: {error.strerror}", "use train.workers=0")
    found = f"{folder}: {room.free / MIB:,.0f} of {room.total / MIB:,.0f} MiB free"
    remedy = "docker run --shm-size=8g or --ipc=host; else fewer train.workers, or train.workers=0"
    return Check("shared memory", None if room.free < LEAST_SHARED else True, found, remedy)


def disk(out: Path) -> Check:
    """Room and speed where runs are written, and its clock, by which runs on other machines are told to be alive."""
    folder = next(folder for folder in (out.resolve(), *out.resolve().parents) if folder.is_dir())
    remedy = f"write runs elsewhere: out=FOLDER; here it is {folder}"
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".sslcells-doctor-") as file:
            began = time.perf_counter()
            file.write(os.urandom(MIB) * WRITTEN)
            file.flush()
            os.fsync(file.fileno())
            speed = WRITTEN / (time.perf_counter() - began)
            ahead = os.stat(file.name).st_mtime - time.time()
        room = shutil.disk_usage(folder).free
    except OSError as error:
        return Check("disk", False, f"{folder}: {error.strerror}", remedy)
    found = f"{folder}: {room / GIB:,.0f} GiB free, {speed:,.0f} MiB/s"
    if abs(ahead) > 5:
        found += f", its clock is {abs(ahead):.0f} s {'ahead' if ahead > 0 else 'behind'}"
        remedy = "let the file server and this machine take their time from one source (NTP)"
    fine = room >= LEAST_DISK and speed >= SLOW_DISK and abs(ahead) <= 5
    return Check("disk", True if fine else None, found, remedy)


def network_name(host: str | None = None) -> Check:
    """Whether this machine's own name leads to an address of it, as gloo needs."""
    host = socket.gethostname() if host is None else host
    remedy = f"add a line '127.0.1.1 {host}' to /etc/hosts, or set GLOO_SOCKET_IFNAME to the network's interface"
    try:
        addresses = sorted({str(found[4][0]) for found in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)})
    except OSError as error:
        return Check("network name", None, f"{host} has no address: {error.strerror}", remedy)
    own = {address.address for of in psutil.net_if_addrs().values() for address in of}
    ours = [address for address in addresses if address in own or address.startswith("127.")]
    of = "" if ours else ", which no interface of this machine has"
    return Check("network name", True if ours else None, f"{host}: {', '.join(addresses)}{of}", remedy)


def backends() -> Check:
    """What ranks can talk through."""
    found = ranks.backends()
    needed = "NCCL" if torch.cuda.is_available() else "gloo"
    remedy = f"this build of torch lacks {needed}: install the one for your system"
    return Check("backends", any(name.startswith(needed) for name in found), ", ".join(found) or "none", remedy)
