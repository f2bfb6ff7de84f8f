"""What the doctor says of a machine, and of each thing that is wrong with one."""

import importlib.metadata
import os
import shutil
from collections import namedtuple

import pytest
import torch

from sslcells.checks import machine

Usage = namedtuple("Usage", "total used free")


def installed(monkeypatch, requires, **versions):
    def version(name):
        if versions.get(name) is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: requires)


def test_this_machine(tmp_path):
    checks = list(machine.machine(tmp_path / "runs" / "not yet"))
    assert [check for check in checks if check.passed is False] == []
    names = [check.name for check in checks]
    assert {"versions", "requirements", "threads", "load", "memory", "disk", "network name", "backends"} <= set(names)
    assert all(check.found for check in checks)
    assert list(tmp_path.iterdir()) == []  # nothing is left


def test_requirements_that_are_not_met(monkeypatch):
    requires = ["torch>=2.11", "timm>=1.0.20", 'zarr>=3.0; extra == "zarr"', "kornia"]
    installed(monkeypatch, requires, torch="2.3.1+cu121", timm="1.0.21")
    versions, wrong = machine.versions()
    assert "kornia missing" in versions.found
    assert wrong.passed is False
    assert wrong.found == "torch 2.3.1+cu121, needed >=2.11; kornia missing, needed any"
    assert wrong.remedy == "pip install --upgrade 'torch>=2.11' 'kornia'"
    installed(monkeypatch, requires, torch="2.11.0", timm="1.0.20", kornia="0.8.1")
    assert [check.passed for check in machine.versions()] == [True, True]


@pytest.mark.parametrize(
    ("built", "hidden", "words"),
    [
        (None, None, "install a build of torch for CUDA"),
        ("12.8", None, "the driver must support CUDA 12.8"),
        ("12.8", "", "CUDA_VISIBLE_DEVICES='' is set: unset it"),
    ],
)
def test_a_gpu_that_torch_does_not_reach(monkeypatch, built, hidden, words):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(machine, "_gpus_of_the_driver", lambda: ["GPU 0: NVIDIA H100"])
    monkeypatch.setattr(torch.version, "cuda", built)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if hidden is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    (check,) = machine.device()
    assert check.passed is False
    assert words in check.remedy


def test_threads_that_are_wasted_and_cores_that_others_use(monkeypatch):
    monkeypatch.setattr(machine.launcher, "cores", lambda: 8)
    monkeypatch.setattr(machine.launcher, "share", lambda: 8)
    for name in ("ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(os, "getloadavg", lambda: (20.0, 1.0, 1.0))
    computing, load = machine.threads()
    assert (computing.passed, load.passed) == (None, None)
    assert "unset it" in computing.remedy
    assert load.found == "20.0 processes want 8 cores"
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(os, "getloadavg", lambda: (2.0, 1.0, 1.0))
    assert [check.passed for check in machine.threads()] == [True, True]


def test_little_room(monkeypatch, tmp_path):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage(64 * 2**20, 0, 64 * 2**20))
    assert machine.shared_memory(tmp_path).passed is None
    assert "64 of 64 MiB free" in machine.shared_memory(tmp_path).found
    assert machine.disk(tmp_path).passed is None
    monkeypatch.undo()
    assert machine.shared_memory(tmp_path / "nothing").passed is None
    monkeypatch.setattr(machine.cgroups, "folders", lambda controller, *places: [tmp_path])
    (tmp_path / "memory.max").write_text("1073741824\n")
    assert machine.memory().passed is None
    assert "limited to 1.0 GiB" in machine.memory().found


def test_a_disk_that_cannot_be_written_or_has_another_clock(monkeypatch, tmp_path):
    def refused(**options):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(machine.tempfile, "NamedTemporaryFile", refused)
    check = machine.disk(tmp_path)
    assert check.passed is False
    assert "Read-only file system" in check.found
    monkeypatch.undo()
    now = machine.time.time()
    monkeypatch.setattr(machine.time, "time", lambda: now - 60)
    check = machine.disk(tmp_path)
    assert check.passed is None
    assert "60 s ahead" in check.found


def test_a_name_that_leads_nowhere():
    check = machine.network_name("no-such-host.invalid")
    assert check.passed is None
    assert "/etc/hosts" in check.remedy
    assert machine.network_name("localhost").passed is True
    assert machine.network_name("192.0.2.7").passed is None  # an address of the documentation, not of this machine
