"""benchmarks/gpu.sh in front of programs that stand in for the GPU's: order, limits, what is left, exit status."""

import importlib
import os
import re
import shlex
import subprocess
import sys

import pytest
from test_benchmarks import BENCHMARKS

from sslcells.config import load

PARTS = ["tests", "kernels", "steps", "augment", "determinism", "micro_batch", "decode", "train", "doctor"]
STAND_IN = """#!/usr/bin/env bash
echo "$(basename "$0") $(printf '%q ' "$@")" >>"$CALLS"
for bad in $FAILS; do [[ " $* " != *" $bad "* ]] || exit 3; done
[[ $* != *name=one* && $* != *name=two* ]] || {
  for word; do [[ $word != out=* && $word != name=* ]] || printf -v "${word%%=*}" %s "${word#*=}"; done
  mkdir -p "$out/$name" && echo weights >"$out/$name/encoder.safetensors"
}
"""
TIMEOUT = """#!/usr/bin/env bash
echo "limit $3" >>"$CALLS"
for bad in $HANGS; do [[ " $* " != *" $bad "* ]] || exit 124; done
"${@:4}"
"""


@pytest.fixture
def gpu(tmp_path):
    """Runs the script; gives its status, what it printed, and the calls it made."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("python", "accelerate", "nvidia-smi", "timeout"):
        (programs / name).write_text(TIMEOUT if name == "timeout" else STAND_IN)
        (programs / name).chmod(0o755)
    calls = tmp_path / "calls"

    def run(**changes):
        calls.write_text("")
        path = f"{programs}:{os.environ['PATH']}"
        variables = {"PATH": path, "CALLS": str(calls), "FAILS": "", "HANGS": "", **changes}
        script = ["bash", str(BENCHMARKS / "gpu.sh"), str(tmp_path / "out")]
        done = subprocess.run(script, capture_output=True, text=True, env=variables)
        return done.returncode, done.stdout + done.stderr, calls.read_text().splitlines()

    return run


def parts(tmp_path):
    return [line.split(",")[0] for line in (tmp_path / "out" / "parts.txt").read_text().splitlines()]


def test_all_parts_in_order_under_nine_minutes_and_once(gpu, tmp_path):
    status, _, calls = gpu()
    assert status == 0
    assert parts(tmp_path) == [f"{name}: done" for name in PARTS]
    limits = [int(call.split()[1]) for call in calls if call.startswith("limit")]
    assert len(limits) == len(PARTS)
    assert sum(limits) <= 530
    assert len(list((tmp_path / "out").rglob("*"))) <= 8
    status, said, calls = gpu()
    assert status == 0
    assert said.count(" is done") == len(PARTS)
    assert not any(call.startswith(("limit", "python", "accelerate")) for call in calls)


def test_a_part_that_fails_or_hangs_stops_no_other_and_is_run_again(gpu, tmp_path):
    status, said, _ = gpu(FAILS="benchmarks/augment.py name=two", HANGS="benchmarks/losses.py")
    assert status == 1
    assert "left for another call: kernels augment determinism" in said
    went = {"kernels": "stopped after 110 s", "augment": "failed with status 3", "determinism": "failed with status 3"}
    assert parts(tmp_path) == [f"{name}: {went.get(name, 'done')}" for name in PARTS]
    status, _, calls = gpu(PARTS="doctor augment kernels")
    assert status == 0
    assert [call.split()[1] for call in calls if call.startswith("python")] == [
        "benchmarks/losses.py",
        "benchmarks/augment.py",
    ]
    assert gpu()[0] == 0


def test_what_does_not_fit_the_limit_is_left(gpu, tmp_path):
    status, said, calls = gpu(LIMIT="9")
    assert status == 1
    assert f"left for another call: {' '.join(PARTS)}" in said
    assert not any(call.startswith("limit") for call in calls)
    (limit,) = [call for call in gpu(LIMIT="60", PARTS="kernels")[2] if call.startswith("limit")]
    assert 40 < int(limit.split()[1]) <= 60


def test_what_is_not_there_is_said_at_once(gpu, tmp_path):
    status, said, _ = gpu(PARTS="kernel")
    assert status == 2
    assert "no part kernel" in said
    status, _, calls = gpu(FAILS="--format=csv")
    assert status == 3
    assert len(calls) == 1


def test_every_command_is_understood(gpu, monkeypatch):
    """The benchmarks' command lines and the runs' configurations; the tests that are named exist."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    seen = set()
    for call in gpu()[2]:
        program, *words = shlex.split(call)
        if script := next((re.fullmatch(r"benchmarks/(\w+)\.py", word) for word in words), None):
            monkeypatch.setattr(sys, "argv", words)
            importlib.import_module(script[1]).arguments()
            seen.add(script[1])
        elif "sslcells.train" in words:
            load(None, words[words.index("sslcells.train") + 1 :])
            seen.add(program)
        elif "pytest" in words:
            files = [word for word in words if word.startswith("tests/")]
            assert "tests/losses/test_triton_engine.py" in files
            assert all((BENCHMARKS.parent / file).exists() for file in files)
    assert seen == {"losses", "end_to_end", "augment", "large_batch", "throughput", "python", "accelerate"}
