"""Batches whose JPEG files travel as they are, to the process that owns the device which decodes them."""

import logging
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sslcells.data import Batch, DataError, ImageSet
from sslcells.data._decode.on_device import DeviceDecoder
from sslcells.data._room import room, share, stacked

_log = logging.getLogger(__name__)


class Undecoded(NamedTuple):
    """Images of one rank and step, some of them still files."""

    data: Tensor
    """(n,) uint8: the files, end to end"""
    lengths: Tensor
    """(B,) int64: bytes of the file of each image; 0 for images with pixels"""
    batch: Batch
    """its pixels are (R, C, H, W) of the other images alone, in order"""


def joined(files: Mapping[int, bytes], pixels: Sequence[Tensor], ids: Sequence[Tensor]) -> Undecoded | DataError:
    """A batch of files, by their position in it, and of the pixels of the others; an error if there is no room."""
    lengths = torch.zeros(len(files) + len(pixels), dtype=torch.int64)
    for at, file in files.items():
        lengths[at] = len(file)
    data = room(int(lengths.sum())) if files else torch.empty(0, dtype=torch.uint8)
    if isinstance(data, DataError):
        return data
    if files:
        np.concatenate([np.frombuffer(file, np.uint8) for file in files.values()], out=data.numpy())
    rest = stacked(pixels) if pixels else torch.empty(0, dtype=torch.uint8)
    if isinstance(rest, DataError):
        return rest
    batch = Batch(rest, *ids)
    return share([data, lengths, *batch]) or Undecoded(data, lengths, batch)


def finished(read: Undecoded, images: ImageSet, decoder: DeviceDecoder, device: torch.device) -> Batch:
    """The batch with all its pixels on the device.

    A file that the device does not decode is read again as if there were no device.

    Raises:
        DataError: if that fails too, or sizes differ where none is given; the message names the image.
    """
    files = (read.lengths > 0).nonzero()[:, 0]
    decoded = decoder(torch.split(read.data, read.lengths[files].tolist()), device)
    rows = {}
    for at, found in zip(files.tolist(), decoded, strict=True):
        rows[at] = found if isinstance(found, Tensor) else _again(images, int(read.batch.image[at]), found, device)
    others = (read.lengths == 0).nonzero()[:, 0].tolist()
    rows |= dict(zip(others, read.batch.pixels.to(device, non_blocking=True), strict=True))
    _check_sizes(rows, read, images)
    pixels = torch.stack([rows[at] for at in range(len(rows))])
    return read.batch._replace(pixels=pixels)


def _again(images: ImageSet, index: int, why: Exception, device: torch.device) -> Tensor:
    """Image `index` by the decoder of a reading process, which says what is wrong with it."""
    pixels = images.pixels(index).to(device)
    reason = (str(why).strip() or type(why).__name__).splitlines()[0]
    _log.warning("%s: not decoded on %s (%s), but by the CPU", images.name(index), device, reason)
    return pixels


def _check_sizes(rows: Mapping[int, Tensor], read: Undecoded, images: ImageSet) -> None:
    for at, row in rows.items():
        if row.shape != rows[0].shape:
            name, other = (images.name(int(read.batch.image[i])) for i in (at, 0))
            size, expected = ("×".join(map(str, x.shape[1:])) for x in (row, rows[0]))
            raise DataError(f"{name} is {size}, {other} {expected}; set data.size=")
