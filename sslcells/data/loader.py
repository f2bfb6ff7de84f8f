"""Reads images in the batches that a sampler chooses."""

import math
import shutil
import signal
import traceback
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from sslcells.data import Batch, DataError, ImageSet, Pick

T = TypeVar("T")


class Unread(NamedTuple):
    """An image that cannot be read."""

    at: int
    """its position in the batch"""
    error: DataError


class _Read(NamedTuple):
    """The images of a batch, as they were read."""

    ids: tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
    """of all of them, in order: label, image, source, laboratory, occurrence, (B,) int64 each"""
    pixels: Tensor | list[Tensor]
    """of those that could be read"""
    unread: list[Unread]


class _Images(Dataset[_Read]):
    """An image set for torch's data loader. An error is returned, not raised: the main process raises or lists it."""

    def __init__(self, images: ImageSet) -> None:
        self._images = images

    def __len__(self) -> int:
        return len(self._images)

    def __getitems__(self, picks: Sequence[Pick]) -> _Read:
        """The images of one batch."""
        image, occurrence = (torch.tensor(ids, dtype=torch.int64) for ids in zip(*picks, strict=True))
        images = self._images
        ids = images.labels[image], image, images.sources[image], images.labs_of(image), occurrence
        indices: list[int] = image.tolist()
        if images.shape is not None:
            with suppress(DataError):  # then one by one, to find out which image it is
                pixels = _room(len(indices), *images.shape)
                if isinstance(pixels, DataError):
                    return _Read(ids, [], [Unread(0, pixels)])
                images.fill(indices, pixels)
                return _Read(ids, pixels, [])
        read: list[Tensor] = []
        unread: list[Unread] = []
        for at, index in enumerate(indices):
            try:
                read.append(images.pixels(index))
            except DataError as error:
                unread.append(Unread(at, error))
        return _Read(ids, read, unread)


def _collate(read: _Read) -> Batch | DataError:
    if read.unread:
        return read.unread[0].error
    pixels = read.pixels if isinstance(read.pixels, Tensor) else _stacked(read.pixels)
    if isinstance(pixels, DataError):
        return pixels
    batch = Batch(pixels, *read.ids)
    return _share_memory(batch) or batch


def _room(*shape: int) -> Tensor | DataError:
    """A tensor of uint8 for the pixels of a batch, of a worker in memory that it shares; or that there is no room."""
    if get_worker_info() is None:
        return torch.empty(shape, dtype=torch.uint8)
    size = math.prod(shape)
    try:  # as torch's own collate function: share_memory_() would copy what is not written yet
        shared = torch.UntypedStorage._new_shared(size)  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        return _no_room_error(size, error)
    return torch.empty(0, dtype=torch.uint8).set_(shared).view(shape)


def _stacked(pixels: Sequence[Tensor]) -> Tensor | DataError:
    """(C, H, W) each → (B, C, H, W), of a worker in memory that it shares."""
    room = _room(len(pixels), *pixels[0].shape)
    return torch.stack([*pixels], out=room) if isinstance(room, Tensor) else room


def _share_memory(tensors: Sequence[Tensor]) -> DataError | None:
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
        return _no_room_error(sum(x.nbytes for x in tensors), error)
    return None


def _no_room_error(size: int, error: Exception) -> DataError:
    try:
        room = shutil.disk_usage("/dev/shm")
        shm = f"/dev/shm has {room.total / 2**20:.4g} MiB, {room.free / 2**20:.4g} of them free"
    except OSError:
        shm = "there is no /dev/shm"
    return DataError(
        f"a process that reads images found no room in shared memory for {size / 2**20:.3g} MiB: {shm} "
        f"({str(error).splitlines()[0]}). Make it larger (docker run --shm-size=8g), use fewer train.workers, or use "
        f"train.workers=0 (sslcells embed: --workers 0)"
    )


def start_worker(worker: int) -> None:
    """Prepare a data loader process: it leaves signals to its parent, and uses one core."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    signal.set_wakeup_fd(-1)  # inherited: the worker's signals would wake the parent
    torch.set_num_threads(1)


def read(
    images: ImageSet, batches: Sampler[list[Pick]], workers: int, pin_memory: bool, together: int = 1
) -> Generator[Batch, None, None]:
    """The batches of images that a sampler chooses, in its order, read ahead by `workers` processes.

    Use it inside `with_workers`. The caller uses `together` batches at a time; the images read ahead have as many bytes
    as these, or `AHEAD` if that is more.

    Raises:
        DataError: if an image cannot be read; the message names it.
    """
    for batch in _loaded(images, batches, workers, pin_memory, _collate, together):
        if isinstance(batch, DataError):
            raise batch
        yield Batch(*batch)


def read_in_parts(
    images: ImageSet, batches: Sampler[list[Pick]], parts: int, workers: int, pin_memory: bool
) -> Generator[list[Batch], None, None]:
    """Like `read`, but each batch comes in `parts` equal parts, so a large batch is never copied into one piece."""
    batch: list[Batch] = []
    for part in read(images, Parts(batches, parts), workers, pin_memory, together=parts):
        batch.append(part)
        if len(batch) == parts:
            yield batch
            batch = []


@contextmanager
def with_workers(batches: Generator[T, None, None]) -> Iterator[Generator[T, None, None]]:
    """The batches of `read`, while the `with` block lasts; the processes that read them end with it.

    A process left behind would wait for work for ever, and keep the program from exiting. If one dies, torch raises an
    error in the main process at any place in the block.

    Raises:
        DataError: if a process that reads dies.
    """
    try:
        yield batches
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        shared = "; see /dev/shm, and train.workers=0" if "shm" in str(error) else ""
        died = DataError(f"a process that reads images died, perhaps for lack of memory: {error}{shared}")
        for note in getattr(error, "__notes__", ()):  # on which rank
            died.add_note(note)
        # Ends torch's iterator here: in a traceback it lives until some later garbage collection, which closes its
        # queues' files below the threads that still write to them.
        traceback.clear_frames(error.__traceback__)
        raise died from None
    finally:
        batches.close()


class Readable(NamedTuple):
    """A batch in which some images may be unreadable."""

    size: int
    """number of images, unreadable ones included"""
    image: list[int]
    """indices of the images that could be read, in order"""
    pixels: Tensor | list[Tensor]
    """of these images: (B, C, H, W) uint8, or a list of (C, H, W) if their sizes differ"""
    unreadable: list[tuple[int, str]]
    """index of each other image, and the reason"""


def read_readable(
    images: ImageSet, batches: Sampler[list[Pick]], workers: int, pin_memory: bool
) -> Generator[Readable, None, None]:
    """Like `read`, but unreadable images are listed in the batch, and sizes may differ.

    Raises:
        DataError: if shared memory has no room for the images.
    """
    for batch in _loaded(images, batches, workers, pin_memory, _collate_readable):
        if isinstance(batch, DataError):
            raise batch
        yield Readable(*batch)


def _collate_readable(read: _Read) -> Readable | DataError:
    lost = {one.at for one in read.unread}
    indices: list[int] = read.ids[1].tolist()
    pixels = read.pixels
    if not isinstance(pixels, Tensor) and len({x.shape for x in pixels}) == 1:
        stacked = _stacked(pixels)
        if isinstance(stacked, DataError):
            return stacked
        pixels = stacked
    error = _share_memory([pixels] if isinstance(pixels, Tensor) else pixels)
    unreadable = [(indices[one.at], str(one.error)) for one in read.unread]
    image = [index for at, index in enumerate(indices) if at not in lost]
    return error or Readable(len(indices), image, pixels, unreadable)


def _loaded(
    images: ImageSet,
    batches: Sampler[list[Pick]],
    workers: int,
    pin_memory: bool,
    collate: Callable[[_Read], Any],
    together: int = 1,
) -> Iterator[Any]:
    """The result of `collate` for each batch."""
    loader: DataLoader[_Read] = DataLoader(
        _Images(images),
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=collate,  # type: ignore[arg-type]
        worker_init_fn=start_worker,
        pin_memory=pin_memory,
        prefetch_factor=ahead(_bytes(images, batches), workers, together) if workers else None,
    )
    try:
        batches_read = iter(loader)
    except OSError as error:  # the processes' locks are in shared memory too
        if not workers:
            raise
        raise _no_room_error(0, error) from None
    yield from batches_read


AHEAD = 2**30
"""most bytes of images that a rank reads ahead, unless the batches used at a time are larger"""


def ahead(size: int, workers: int, together: int = 1) -> int:
    """Number of batches of `size` bytes that each worker reads ahead: 4 · `together`, or fewer if they are large."""
    allowed = max(AHEAD, size * together) // max(1, size)
    return max(1, min(4 * together, allowed // workers))


def _bytes(images: ImageSet, batches: Sampler[list[Pick]]) -> int:
    """Bytes of the pixels of a batch, estimated from its first image."""
    first = next(iter(batches), [])
    try:
        return len(first) * images.pixels(first[0].image).nbytes if first else 0
    except DataError:  # raised again when the batch is read
        return 0


class Parts(Sampler[list[Pick]]):
    """Batches, each cut into `parts` equal parts."""

    def __init__(self, batches: Sampler[list[Pick]], parts: int) -> None:
        self._batches, self._parts = batches, parts

    def __iter__(self) -> Iterator[list[Pick]]:
        for batch in self._batches:
            size = len(batch) // self._parts
            yield from (batch[i : i + size] for i in range(0, len(batch), size))

    def __len__(self) -> int:
        return len(self._batches) * self._parts  # type: ignore[arg-type]


class InOrder(Sampler[list[Pick]]):
    """The given indices, `size` at a time."""

    def __init__(self, indices: Sequence[int], size: int) -> None:
        self._indices, self._size = [Pick(i) for i in indices], size

    def __iter__(self) -> Iterator[list[Pick]]:
        return (self._indices[i : i + self._size] for i in range(0, len(self._indices), self._size))

    def __len__(self) -> int:
        return -(-len(self._indices) // self._size)
