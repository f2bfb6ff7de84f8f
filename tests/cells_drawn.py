"""Stained cells drawn with known nucleus, outline, place and size, for the tests of standardised input."""

import torch
from torch import Tensor

NUCLEUS, CYTOPLASM, RED = (0.95, 1.35, 0.45), (0.25, 0.45, 0.15), (0.15, 0.5, 0.4)
"""optical densities"""


def disc(size: int, x: float, y: float, radius: float) -> Tensor:
    """(size, size) bool."""
    grid = torch.arange(size) + 0.5
    return (grid[:, None] - y).square() + (grid - x).square() < radius**2


def stained(size=96, x=48.0, y=48.0, nucleus=12.0, cell=20.0, neighbours=True, lamp=(1.0, 1.0, 1.0), density=1.0):
    """A white cell: (3, size, size) float in 0..1, its nucleus and its outline, (size, size) bool each."""
    od = torch.zeros(3, size, size)
    inside, core = disc(size, x, y, cell), disc(size, x, y, nucleus)
    if neighbours:
        for at in ((10, 12), (80, 16), (14, 78), (84, 84)):
            od[:, disc(size, at[0] * size / 96, at[1] * size / 96, 9 * size / 96)] = torch.tensor(RED)[:, None]
    od[:, inside] = torch.tensor(CYTOPLASM)[:, None]
    od[:, core] = torch.tensor(NUCLEUS)[:, None]
    return torch.tensor(lamp)[:, None, None] * (-density * od).exp(), core, inside
