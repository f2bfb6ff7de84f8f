"""The examples in docstrings run, and give what they show."""

import doctest
import importlib

import pytest
from trained import make_cells, make_run

from sslcells import losses

MODULES = [
    f"sslcells.losses.{name}"
    for name in (
        *("contrastive", "distillation", "gather", "lejepa", "moco", "pairs", "redundancy", "sinkhorn_knopp"),
        "triplet",
    )
]


def check(name):
    found = doctest.testmod(importlib.import_module(name))
    assert found.attempted
    assert not found.failed


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_of(name):
    check(name)


def test_the_examples_of_the_encoder(tmp_path, monkeypatch):
    """The examples may use a run's folder, runs/quickstart, and two images in cells/."""
    make_run(tmp_path / "runs" / "quickstart")
    make_cells(tmp_path / "cells", 2)
    monkeypatch.chdir(tmp_path)
    check("sslcells.delivery.encoder")
    check("sslcells.delivery.vectors")


@pytest.mark.parametrize("name", [name for name in losses.__all__ if name.endswith("Loss")])
def test_every_public_loss_has_an_example(name):
    assert doctest.DocTestParser().get_examples(getattr(losses, name).__doc__)
