"""Fixtures that several folders of tests use."""

import os
import time
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # each process of the tests, and what it starts, has one core

import pytest
from accelerate.state import AcceleratorState, GradientState

from sslcells import storage


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Two processes for a whole suite; none for a part of one, or for SLURM's tests, which share one cluster."""
    whole = config.args_source is pytest.Config.ArgsSource.TESTPATHS and not config.option.keyword
    return 2 if whole and config.option.markexpr in ("slow", "slow and not slurm", "not slow and not slurm") else 0


def pytest_runtest_setup(item: pytest.Item) -> None:
    """SSLCELLS_TESTS_UNTIL, in seconds since 1970: no test starts after it. Those left out are skipped, not passed."""
    if time.time() > float(os.environ.get("SSLCELLS_TESTS_UNTIL", "inf")):
        pytest.skip(f"{item.nodeid} not started: SSLCELLS_TESTS_UNTIL is over")


@pytest.fixture(scope="session")
def realdata() -> Path:
    """The development images: SSLCELLS_TEST_DATA, or shared/data beside the checkout."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("SSLCELLS_TEST_DATA", beside))
    if not folder.is_dir():
        pytest.skip(f"no development images at {folder}; SSLCELLS_TEST_DATA names their folder")
    return folder


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """Each test may start accelerate anew, with numerics of its own."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture(autouse=True)
def storage_is_there(monkeypatch):
    """No test inherits the patience that another one spent."""
    monkeypatch.setattr(storage, "_away_since", None)
