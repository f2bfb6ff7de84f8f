"""Small images of many cells as one picture, which a page shows a part at a time."""

import base64
import io
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from PIL import Image as Pillow

from sslcells.evaluation.sheets import Image, shown_channels

MOST_BYTES = 1_000_000
"""Of a picture of thumbnails, as base64."""
_QUALITIES = (85, 70, 50, 30, 10)
"""JPEG's, best first: the first is used with which a picture is not too large."""


class Thumbnails(NamedTuple):
    """Thumbnails in rows of `columns`, each `side` pixels wide and high."""

    uri: str
    """data URI of a JPEG"""
    columns: int
    side: int


def thumbnails(images: Iterable[Image], side: int) -> Thumbnails:
    """One picture of images (H, W, C) uint8, each shrunk or enlarged to fit `side` pixels, with white around it.

    Shown are the first three channels, or the first of two. At most MOST_BYTES, of 250 images of 96 pixels and fewer.
    """
    small = [_fitted(image, side) for image in images]
    columns = max(1, round(len(small) ** 0.5))
    sheet = Pillow.new("RGB", (columns * side, -(-len(small) // columns) * side), "white")
    for i, image in enumerate(small):
        left, top = side * (i % columns), side * (i // columns)
        sheet.paste(image, (left + (side - image.width) // 2, top + (side - image.height) // 2))
    uri = ""
    for quality in _QUALITIES:
        file = io.BytesIO()
        sheet.save(file, "JPEG", quality=quality)
        uri = f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
        if len(uri) <= MOST_BYTES:
            break
    return Thumbnails(uri, columns, side)


def _fitted(image: Image, side: int) -> Pillow.Image:
    array = np.ascontiguousarray(image[..., : shown_channels(image.shape[2])])
    whole = Pillow.fromarray(array.squeeze(2) if array.shape[2] == 1 else array).convert("RGB")
    scale = side / max(whole.size)
    size = max(1, round(whole.width * scale)), max(1, round(whole.height * scale))
    # Small images are shown pixel by pixel; large ones must be averaged down.
    return whole.resize(size, Pillow.Resampling.NEAREST if scale > 1 else Pillow.Resampling.BOX)
