"""What the drawn smears promise: reproducible, the same scene at every size, classes in structure only."""

from __future__ import annotations

import subprocess
import sys
from functools import cache

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.neighbors import KNeighborsClassifier

from sslcells.data import _smear
from sslcells.data._smear import CLASSES, draw_smear

Images = NDArray[np.uint8]


@cache
def _sample(seed: int, count: int) -> tuple[Images, NDArray[np.int64]]:
    """`count` images of 48 px, the classes in turn."""
    labels = np.arange(count) % len(CLASSES)
    return np.stack([draw_smear(seed, i, int(label), 48) for i, label in enumerate(labels)]), labels


def _of_class(name: str) -> NDArray[np.float64]:
    """A class's images, each with its background (its bright, commonest shade) brought to 1."""
    images, labels = _sample(3, 600)
    chosen = images[labels == CLASSES.index(name)].astype(np.float64)
    relative: NDArray[np.float64] = chosen / np.percentile(chosen, 90, axis=(1, 2), keepdims=True)
    return relative


def _dark(images: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Pixels of chromatin or basophil granules: little red or green light left."""
    return (images[..., 0] < 0.62) & (images[..., 1] < 0.55)


# Run on the file alone, a fresh process need not wait for the package's imports.
_DRAW_BACKWARDS = """
import runpy, sys
draw_smear = runpy.run_path(sys.argv[1])["draw_smear"]
for index in reversed(range(10)):
    sys.stdout.buffer.write(draw_smear(7, index, index % 5, 40).tobytes())
"""


@pytest.mark.parametrize("size", [32, 47, 96, 160])
@pytest.mark.parametrize("label", range(len(CLASSES)))
def test_image_is_rgb_bytes_of_the_size_asked(label: int, size: int) -> None:
    image = draw_smear(0, 5, label, size)
    assert image.shape == (size, size, 3)
    assert image.dtype == np.uint8
    assert image.flags.c_contiguous
    assert image.std() > 5


def test_arguments_alone_decide_the_bytes() -> None:
    first = draw_smear(1, 2, 0, 48)
    assert np.array_equal(first, draw_smear(1, 2, 0, 48))
    for other in ((2, 2, 0), (1, 3, 0), (1, 2, 1), (2, 1, 0)):
        assert not np.array_equal(first, draw_smear(*other, 48))


def test_neither_order_nor_process_matters() -> None:
    forward = [draw_smear(7, index, index % 5, 40).tobytes() for index in range(10)]
    command = [sys.executable, "-c", _DRAW_BACKWARDS, _smear.__file__]
    child = subprocess.run(command, capture_output=True, check=True)
    assert child.stdout == b"".join(reversed(forward))


@pytest.mark.parametrize("label", range(len(CLASSES)))
def test_size_changes_the_sharpness_and_not_the_scene(label: int) -> None:
    correlations = []
    for index in range(12):
        small = draw_smear(4, index, label, 48).astype(np.float64)
        large = draw_smear(4, index, label, 96).astype(np.float64)
        halved = large.reshape(48, 2, 48, 2, 3).mean(axis=(1, 3))
        correlations.append(np.corrcoef(small.ravel(), halved.ravel())[0, 1])
    assert min(correlations) > 0.9


def test_raw_pixels_do_not_give_the_classes_away() -> None:
    images, labels = _sample(3, 600)
    unseen, unseen_labels = _sample(9, 200)
    neighbours = KNeighborsClassifier(5).fit(images.reshape(600, -1), labels)
    assert neighbours.score(unseen.reshape(200, -1), unseen_labels) < 0.6


def test_chromatin_is_solid_in_lymphocytes_and_laced_or_parted_elsewhere() -> None:
    def solidity(name: str) -> float:
        """Share of the dark area left once its outermost pixel is worn off."""
        dark = _dark(_of_class(name))
        core = dark.copy()
        for axis in (1, 2):
            core &= np.roll(dark, 1, axis) & np.roll(dark, -1, axis)
        return float(core.sum() / dark.sum())

    lymphocyte = solidity("lymphocyte")
    for other in ("neutrophil", "basophil", "monocyte"):
        assert lymphocyte > solidity(other) + 0.05, other


def test_eosinophil_granules_are_orange() -> None:
    def orange(name: str) -> float:
        """Share of the field which keeps its red light but loses half of the green."""
        images = _of_class(name)
        return float(((images[..., 0] > 0.7) & (images[..., 1] < 0.58)).mean())

    assert orange("eosinophil") > 1.5 * max(orange(name) for name in CLASSES if name != "eosinophil")


def test_cells_differ_in_size_as_real_ones_do() -> None:
    def area(name: str) -> float:
        """Share of the field where red light is dimmed, as it is not by red cells: the white cell."""
        return float((_of_class(name)[..., 0] < 0.75).mean())

    for smaller in ("neutrophil", "eosinophil", "basophil", "lymphocyte"):
        assert area("monocyte") > 1.15 * area(smaller), smaller
