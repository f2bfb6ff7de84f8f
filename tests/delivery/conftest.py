import pytest
from trained import make_cells, make_run


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path / "runs" / "tiny")


@pytest.fixture
def cells(tmp_path):
    return make_cells(tmp_path / "cells", 24, classes=("blast", "lymphocyte"))
