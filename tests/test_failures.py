"""Every failure that benchmarks/failures.py injects: said, survived, and without a trace in the end."""

import importlib.util
import os
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


def script():
    sys.path.insert(0, str(BENCHMARKS))
    try:
        spec = importlib.util.spec_from_file_location("failures", BENCHMARKS / "failures.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(BENCHMARKS))
    return module


failures = script()
ENDS_WELL = {"the image folder is away for 5 s", "the run folder is away for 5 s", "SIGUSR1, and a second one"}


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    return failures.Setting(tmp_path_factory.mktemp("failures"))


@pytest.mark.parametrize("name", failures.CASES)
def test_a_failure_is_said_and_survived(setting, name):
    if name == "the disk is full" and os.geteuid() != 0:
        pytest.skip("a file system of its own needs root")
    ended, exact = failures.strike(setting, name)
    assert (ended.status == 0) == (name in ENDS_WELL)
    assert ended.seconds < 120
    assert exact


def test_kills_at_random_moments_and_inside_checkpoints(setting):
    """Three and more of them, and metrics.jsonl is that of the run that nothing happened to, line for line."""
    killed = failures.kills(setting, 4, seed=0)
    assert killed.random + killed.inside >= 3
    assert killed.inside
    assert killed.most_lost <= 2 * failures.EVERY
    assert killed.not_resumed == 0
    assert killed.equal
