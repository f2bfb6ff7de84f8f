"""The examples in docstrings run, and give what they show."""

import doctest
import importlib

import pytest
from trained import make_cells, make_run

MODULES = ["sslcells.delivery.encoder"]


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_of(name, tmp_path, monkeypatch):
    """The examples may use a run's folder, runs/quickstart, and two images in cells/."""
    make_run(tmp_path / "runs" / "quickstart")
    make_cells(tmp_path / "cells", 2)
    monkeypatch.chdir(tmp_path)
    found = doctest.testmod(importlib.import_module(name))
    assert found.attempted
    assert not found.failed
