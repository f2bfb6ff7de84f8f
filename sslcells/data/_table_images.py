"""The images of a table's rows: whole files, or the boxes that are cut from them."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from sslcells.data import DataError, ImageSet
from sslcells.data._boxes import Outside, cut, inside
from sslcells.data._decode import Decoder, Header
from sslcells.data._decode.pixel_size import field
from sslcells.data.folder import FolderImages


class Cuts(NamedTuple):
    """The boxes of rows, and how they are cut."""

    edges: NDArray[np.int64]
    """(N, 4) left, upper, right and lower edge in px of the file"""
    outside: Outside
    """what is done where a box reaches beyond its image"""

    def of(self, rows: NDArray[np.int64]) -> "Cuts":
        """Those of some rows."""
        return self._replace(edges=self.edges[rows])


class TableImages(ImageSet):
    """Rows of a table; a row with a box is cut from its image."""

    def __init__(
        self,
        files: FolderImages,
        rows: NDArray[np.int64],
        boxes: Cuts | None,
        cells: Sequence[str] | None,
        decoder: Decoder,
        scales: NDArray[np.float64] | None,
        wrong: Mapping[int, str] | None = None,
    ) -> None:
        """`rows`: (N,) the file of each row; `wrong`: why some of them cannot be read, by place."""
        self._files, self._rows, self._boxes, self._cells, self._scales = files, rows, boxes, cells, scales
        self._wrong = wrong or {}
        # A cut is 8 bit already, and each of its channels is resized by itself.
        self._cut = replace(decoder, channels=1, stack=None, intensity="percentile", range=None, um_per_pixel=None)
        self._decoder = decoder
        self._last: tuple[int, Tensor] | None = None
        self.channels = files.channels
        self.whole_files = boxes is None

    def plain_jpeg(self, index: int) -> bytes | None:
        """The file of image `index`, if the row has no box and a device can decode it."""
        if not self.whole_files or index in self._wrong:
            return None
        return self._files.plain_jpeg(int(self._rows[index]))

    def pixels(self, index: int) -> Tensor:
        """Image `index`: (C, H, W) uint8, of the box if the row has one.

        Raises:
            DataError: if the file can no longer be read, or its box lies outside of it; the message names it.
        """
        if index in self._wrong:
            raise DataError(f"{self.name(index)}: {self._wrong[index]}")
        file = int(self._rows[index])
        if self._boxes is None:
            return self._files.pixels(file)
        if self._last is None or self._last[0] != file:  # the cells of a field often follow each other
            self._last = file, self._files.pixels(file)
        whole, box = self._last[1], self._boxes.edges[index].tolist()
        try:
            if self._decoder.um_per_pixel is not None:
                inside(box, whole.shape[1], whole.shape[2], self._boxes.outside)
                return self._field(whole, box, file)
            part = cut(whole, box, self._boxes.outside)
        except ValueError as error:
            raise DataError(f"{self.name(index)}: {error}") from None
        return torch.cat([self._cut.pixels(Image.fromarray(x.numpy())) for x in part])

    def _field(self, whole: Tensor, box: Sequence[int], file: int) -> Tensor:
        """(C, H, W) of the field of the wanted scale around the centre of a box.

        Raises:
            ValueError: if the scale of the file is not known.
        """
        (left, upper, right, lower), size, wanted = box, self._cut.size, self._decoder.um_per_pixel
        assert size is not None
        assert wanted is not None
        um = np.nan if self._scales is None else float(self._scales[file])
        if np.isnan(um):  # only the file says it
            header = self._files.header(file)
            um = (header.um_per_pixel if header is not None else 0) or self._decoder.um_per_pixel_default or 0
        if not um:
            raise ValueError(f"its µm per pixel is not known, and data.um_per_pixel is {wanted:g}")
        centre = ((upper + lower) / 2, (left + right) / 2)
        each = [field(Image.fromarray(x.numpy()), size, wanted / um, centre) for x in whole]
        return torch.from_numpy(np.stack(each))

    def values(self, index: int) -> NDArray[Any]:
        """The raw values of image `index`, of its box if the row has one.

        Raises:
            DataError: as `pixels`.
        """
        values = self._files.values(int(self._rows[index]))
        if self._boxes is None:
            return values
        rows = 0 if self._decoder.stack is None else 1
        height, width = values.shape[rows : rows + 2]
        try:
            left, upper, right, lower = inside(self._boxes.edges[index].tolist(), height, width, "clip")
        except ValueError as error:
            raise DataError(f"{self.name(index)}: {error}") from None
        return values[(slice(None),) * rows + (slice(upper, lower), slice(left, right))]

    def header(self, index: int) -> Header | None:
        """The file header of image `index`; None if it cannot be read."""
        return self._files.header(int(self._rows[index]))

    def name(self, index: int) -> str:
        """The path as in the folder, with `#` and the cell's id or box if the table has them."""
        path = self._files.name(int(self._rows[index]))
        if self._cells is not None:
            return f"{path}#{self._cells[index]}"
        return path if self._boxes is None else f"{path}#{','.join(map(str, self._boxes.edges[index]))}"

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_last": None}
