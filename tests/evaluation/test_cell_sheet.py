"""The sheet of cells: outlines where the cells are, a red frame where none was found."""

import numpy as np
import pytest
import torch
from cells_drawn import stained
from PIL import Image

from sslcells.config import Standardise
from sslcells.evaluation.cell_sheet import CELL, MISSED, NUCLEUS, cell_sheet
from sslcells.standardise import Standard


def count(file, colour):
    with Image.open(file) as sheet:
        return int((np.asarray(sheet) == colour).all(2).sum())


@pytest.mark.parametrize(("planes", "side"), [(3, 96), (3, 40), (2, 50), (5, 130)])
def test_outlines_are_drawn_and_what_was_not_found_is_framed(planes, side, tmp_path):
    stain = "giemsa" if planes == 3 else "dark"
    image = stained(size=side, x=side / 2, y=side / 2, nucleus=side / 8, cell=side / 5)[0]
    cells = (image.repeat(2, 1, 1)[:planes][None] * 255).byte()
    standard = Standard(Standardise(stain=stain, centre=True).model_dump() | {"reference": None})
    good = cell_sheet(cells, standard, tmp_path / "plots" / "good.png")
    assert count(good, NUCLEUS) > 50
    assert count(good, CELL) > 50
    assert count(good, MISSED) == 0
    both = cell_sheet(torch.cat([cells, torch.full_like(cells, 200)]), standard, tmp_path / "both.png")
    assert count(both, NUCLEUS) == count(good, NUCLEUS)
    assert count(both, MISSED) == 128**2 - 120**2
