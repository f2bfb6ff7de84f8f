"""Drawn fields with masks: two magnifications, three donors, two sites, 16 bit, OME-TIFF and OME-Zarr."""

import csv
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tifffile
import zarr

WIDTH = 56.0
"""µm of a field"""
SCALES = (0.5, 0.25)
"""µm per pixel at 20× and 40×"""
LABELS = ("smooth", "granular")


class Cell(NamedTuple):
    """A drawn cell, in µm from the upper left corner of its field."""

    y: float
    x: float
    radius: float


class Field(NamedTuple):
    """A drawn field."""

    path: str
    donor: str
    site: str
    label: str
    um: float
    cells: list[Cell]
    """those that lie wholly in it, in the order of their labels"""


def draw_fields(folder: Path, count: int = 200) -> list[Field]:
    """Write fields, their masks, and `fields.csv` with donor, site and label of each; OME-Zarr holds its own mask."""
    fields = []
    for i in range(count):
        random = np.random.default_rng([7, i])
        um, zarrs, label = SCALES[i % 2], i // 2 % 2 == 1, LABELS[i // 4 % 2]
        name = f"{'AB'[i // 8 % 2]}/f{i:03}"
        cells = _places(random)
        image, mask = _draw(random, cells, um, 900.0 + 150 * (i % 3), label == "granular")
        if zarrs:
            path = f"fields/{name}.zarr"
            _write_zarr(folder / path, image, um)
            _write_zarr(folder / path / "labels" / "cells", mask, um)
        else:
            path = f"fields/{name}.ome.tif"
            _write_tiff(folder / path, image, um)
            (folder / "masks" / name).parent.mkdir(parents=True, exist_ok=True)
            tifffile.imwrite(folder / "masks" / f"{name}_cp_masks.tif", mask)
        whole = [c for c in cells if min(c.y, c.x, WIDTH - c.y, WIDTH - c.x) > c.radius + 0.5]
        fields.append(Field(path, f"d{i % 3 + 1}", name[0], label, um, whole))
    with (folder / "fields.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["path", "donor", "site", "label"])
        rows.writerows(field[:4] for field in fields)
    return fields


def _places(random: np.random.Generator) -> list[Cell]:
    """Cells on a 3 × 3 grid, some of the places empty, one cell at the border."""
    out = [Cell(0.0, random.uniform(20, 36), 4.0)]
    for i in range(9):
        y, x = (14 + 14 * (i // 3), 14 + 14 * (i % 3))
        if random.random() < 0.6:
            out.append(Cell(y + random.uniform(-1.5, 1.5), x + random.uniform(-1.5, 1.5), random.uniform(3.0, 4.5)))
    return out


def _draw(
    random: np.random.Generator, cells: list[Cell], um: float, bright: float, granular: bool
) -> tuple[np.ndarray, np.ndarray]:
    """(H, W) uint16 image of 12 significant bits, and mask."""
    side = round(WIDTH / um)
    y, x = (np.mgrid[:side, :side] + 0.5) * um
    image, mask = np.full((side, side), 300.0), np.zeros((side, side), np.uint16)
    for number, cell in enumerate(cells, 1):
        far = np.hypot(y - cell.y, x - cell.x)
        inside = 1 / (1 + np.exp((far - cell.radius) / 0.25))
        texture = np.full_like(image, bright)
        for _ in range(10 if granular else 0):
            turn, at = random.uniform(0, 2 * np.pi), cell.radius * np.sqrt(random.uniform(0, 0.7))
            near = np.hypot(y - cell.y - at * np.sin(turn), x - cell.x - at * np.cos(turn))
            texture += 1200 * np.exp(-(near**2) / (2 * 0.5**2))
        image += inside * texture
        mask[far < cell.radius] = number
    image += random.normal(0, 15, image.shape)
    return image.clip(0, 4095).astype(np.uint16), mask


def _write_tiff(file: Path, image: np.ndarray, um: float) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    sizes = {"PhysicalSizeX": um, "PhysicalSizeY": um, "SignificantBits": 12}
    tifffile.imwrite(file, image, ome=True, metadata={"axes": "YX", **sizes})


def _write_zarr(folder: Path, image: np.ndarray, um: float) -> None:
    group = zarr.open_group(folder, mode="a", zarr_format=2)
    array = group.create_array("0", shape=image.shape, chunks=image.shape, dtype=image.dtype)
    array[:] = image
    axes = [{"name": axis, "type": "space", "unit": "micrometer"} for axis in "yx"]
    levels = [{"path": "0", "coordinateTransformations": [{"type": "scale", "scale": [um, um]}]}]
    group.attrs["multiscales"] = [{"version": "0.4", "axes": axes, "datasets": levels}]
