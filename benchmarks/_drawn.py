"""Drawn cells as image files, for benchmarks that need many."""

import os
from concurrent.futures import ProcessPoolExecutor
from itertools import repeat
from pathlib import Path

import numpy as np
import tifffile
from PIL import Image

from sslcells.data._smear import draw_smear

_BLOCK = 32
_LINKED = 64


def jpegs(folder: Path, count: int, size: int) -> None:
    """So many different JPEG files of size×size px: one drawing for each block, brightened by and by."""
    folder.mkdir(parents=True)
    blocks = range(0, count, _BLOCK)
    with ProcessPoolExecutor() as pool:
        list(pool.map(_block, repeat(folder), blocks, (min(_BLOCK, count - i) for i in blocks), repeat(size)))


def _block(folder: Path, first: int, count: int, size: int) -> None:
    drawn = Image.fromarray(draw_smear(0, first, first % 5, size))
    for i in range(count):
        brighter = drawn.point([min(255, v + i) for v in range(256)] * 3)
        brighter.save(folder / f"{first + i:07d}.jpg", quality=88)


def linked(folder: Path, count: int, size: int, channels: int = 3) -> None:
    """So many names of a few files of size×size px: JPEG of three channels, else TIFF with the channels first."""
    originals = folder.parent / f".{folder.name}"
    originals.mkdir()
    folder.mkdir()
    for i in range(min(count, _LINKED)):
        drawn = draw_smear(0, i, i % 5, size)
        if channels == 3:
            Image.fromarray(drawn).save(originals / f"{i}.jpg", quality=88)
        else:
            planes = np.stack([np.roll(drawn[..., c % 3], c, 0) for c in range(channels)])
            tifffile.imwrite(originals / f"{i}.tif", planes, photometric="minisblack", metadata={"axes": "CYX"})
    names = sorted(originals.iterdir())
    for i in range(count):
        original = names[i % len(names)]
        os.link(original, folder / f"{i:07d}{original.suffix}")
