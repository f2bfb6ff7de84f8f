"""Memory that a process that reads images shares with the main one."""

import math
import shutil
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from sslcells.data import DataError


def room(*shape: int) -> Tensor | DataError:
    """A tensor of uint8 for the pixels of a batch, of a worker in memory that it shares; or that there is no room."""
    if get_worker_info() is None:
        return torch.empty(shape, dtype=torch.uint8)
    size = math.prod(shape)
    try:  # as torch's own collate function: share_memory_() would copy what is not written yet
        shared = torch.UntypedStorage._new_shared(size)  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        return no_room(size, error)
    return torch.empty(0, dtype=torch.uint8).set_(shared).view(shape)


def stacked(pixels: Sequence[Tensor]) -> Tensor | DataError:
    """(C, H, W) each → (B, C, H, W), of a worker in memory that it shares."""
    out = room(len(pixels), *pixels[0].shape)
    return torch.stack([*pixels], out=out) if isinstance(out, Tensor) else out


def share(tensors: Sequence[Tensor]) -> DataError | None:
    """Move a worker's tensors into memory that it shares with the main process; returns the error if there is no room.

    Otherwise torch would do it later, in a thread of its queue. There an error is only printed and the batch is lost,
    and the main process waits for it for ever.
    """
    if get_worker_info() is None:
        return None
    try:
        for x in tensors:
            x.share_memory_()  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        return no_room(sum(x.nbytes for x in tensors), error)
    return None


def no_room(size: int, error: Exception) -> DataError:
    """That shared memory has no room for so many bytes."""
    try:
        left = shutil.disk_usage("/dev/shm")
        shm = f"/dev/shm has {left.total / 2**20:.4g} MiB, {left.free / 2**20:.4g} of them free"
    except OSError:
        shm = "there is no /dev/shm"
    return DataError(
        f"a process that reads images found no room in shared memory for {size / 2**20:.3g} MiB: {shm} "
        f"({str(error).splitlines()[0]}). Make it larger (docker run --shm-size=8g), use fewer train.workers, or use "
        f"train.workers=0 (sslcells embed: --workers 0)"
    )
