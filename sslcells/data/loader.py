"""How images are read, in the batches that a sampler names."""

import shutil
import signal
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from sslcells.data import Batch, DataError, ImageSet, Pick

T = TypeVar("T")


Sample = tuple[Tensor, int, int, int, int]


class Unread(NamedTuple):
    """An image that cannot be read."""

    image: int
    error: DataError


class _Samples(Dataset[Sample | Unread]):
    """An image set as the data loader reads it: an unreadable image is handed over, to be told where it is seen."""

    def __init__(self, images: ImageSet) -> None:
        self._images = images

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, pick: Pick) -> Sample | Unread:
        index, occurrence = pick
        try:
            pixels = self._images.pixels(index)
        except DataError as error:
            return Unread(index, error)
        return pixels, int(self._images.labels[index]), index, int(self._images.sources[index]), occurrence


def _collate(samples: Sequence[Sample | Unread]) -> Batch | DataError:
    whole: list[Sample] = []
    for sample in samples:
        if isinstance(sample, Unread):
            return sample.error
        whole.append(sample)
    pixels, *ids = zip(*whole, strict=True)
    batch = Batch(torch.stack(pixels), *(torch.tensor(i, dtype=torch.int64) for i in ids))
    return _unshared(batch) or batch


def _unshared(tensors: Sequence[Tensor]) -> DataError | None:
    """Lay a worker's tensors into the memory that it shares with the main process, or say why that cannot be done.

    torch would do it later, in a thread of the queue's, where an error is printed and the batch lost: the main process
    waits for it for ever.
    """
    if get_worker_info() is None:
        return None
    try:
        for x in tensors:
            x.share_memory_()  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        return _no_room(sum(x.nbytes for x in tensors), error)
    return None


def _no_room(size: int, error: Exception) -> DataError:
    try:
        room = shutil.disk_usage("/dev/shm")
        shm = f"/dev/shm has {room.total / 2**20:.4g} MiB, {room.free / 2**20:.4g} of them free"
    except OSError:
        shm = "/dev/shm is not there"
    return DataError(
        f"a process that reads images found no room in shared memory for {size / 2**20:.3g} MiB: {shm} "
        f"({str(error).splitlines()[0]}). A larger one helps (docker run --shm-size=8g), fewer train.workers, or "
        f"train.workers=0 (sslcells embed: --workers 0)"
    )


def quiet(worker: int) -> None:
    """A worker leaves signals to its parent, and takes one core."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    signal.set_wakeup_fd(-1)  # what comes here is not for the parent
    torch.set_num_threads(1)


def read(
    images: ImageSet, batches: Sampler[list[Pick]], workers: int, pin_memory: bool, together: int = 1
) -> Generator[Batch, None, None]:
    """The batches of images that a sampler names, in its order, read ahead by `workers` processes.

    For `attended`, where processes read. So many batches are wanted `together`; what is read ahead has the bytes of
    those, or `AHEAD` where that is more.

    Raises:
        DataError: where an image cannot be read, naming it.
    """
    for batch in _loaded(images, batches, workers, pin_memory, _collate, together):
        if isinstance(batch, DataError):
            raise batch
        yield Batch(*batch)


def read_in_parts(
    images: ImageSet, batches: Sampler[list[Pick]], parts: int, workers: int, pin_memory: bool
) -> Generator[list[Batch], None, None]:
    """As `read`, but each batch in so many equal parts: a large one is never copied into one piece, nor read as one."""
    batch: list[Batch] = []
    for part in read(images, Parts(batches, parts), workers, pin_memory, together=parts):
        batch.append(part)
        if len(batch) == parts:
            yield batch
            batch = []


@contextmanager
def attended(batches: Generator[T, None, None]) -> Iterator[Generator[T, None, None]]:
    """From `with` to its end the batches of `read` are read; the processes that do it end with the block.

    One left behind would wait for work for ever, and the exit for it. One that dies is told in the middle of anything:
    torch raises where the signal of its death arrives.

    Raises:
        DataError: where a process that reads dies.
    """
    try:
        yield batches
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        shared = "; see /dev/shm, and train.workers=0" if "shm" in str(error) else ""
        died = DataError(f"a process that reads images died, for lack of memory perhaps: {error}{shared}")
        for note in getattr(error, "__notes__", ()):  # on which rank
            died.add_note(note)
        raise died from None
    finally:
        batches.close()


class Readable(NamedTuple):
    """What could be read of the images that were asked for together."""

    asked: int
    """how many were"""
    image: list[int]
    """the indices of those that could, in their order"""
    pixels: Tensor | list[Tensor]
    """theirs: (B, C, H, W) uint8, or (C, H, W) each where their sizes differ"""
    unreadable: list[tuple[int, str]]
    """the indices of the others, and why"""


def read_readable(
    images: ImageSet, batches: Sampler[list[Pick]], workers: int, pin_memory: bool
) -> Generator[Readable, None, None]:
    """As `read`, but what cannot be read is listed instead, and sizes may differ.

    Raises:
        DataError: where there is no room for what was read.
    """
    for batch in _loaded(images, batches, workers, pin_memory, _collate_readable):
        if isinstance(batch, DataError):
            raise batch
        yield Readable(*batch)


def _collate_readable(samples: Sequence[Sample | Unread]) -> Readable | DataError:
    pixels = [sample[0] for sample in samples if not isinstance(sample, Unread)]
    image = [sample[2] for sample in samples if not isinstance(sample, Unread)]
    unreadable = [(sample.image, str(sample.error)) for sample in samples if isinstance(sample, Unread)]
    one_size = len({x.shape for x in pixels}) == 1
    read = torch.stack(pixels) if one_size else pixels
    return _unshared([read] if isinstance(read, Tensor) else read) or Readable(len(samples), image, read, unreadable)


def _loaded(
    images: ImageSet,
    batches: Sampler[list[Pick]],
    workers: int,
    pin_memory: bool,
    collate: Callable[[Sequence[Sample | Unread]], Any],
    together: int = 1,
) -> Iterator[Any]:
    """What `collate` makes of each batch."""
    loader: DataLoader[Sample | Unread] = DataLoader(
        _Samples(images),
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=collate,
        worker_init_fn=quiet,
        pin_memory=pin_memory,
        prefetch_factor=ahead(_bytes(images, batches), workers, together) if workers else None,
    )
    try:
        each = iter(loader)
    except OSError as error:  # the processes' locks lie in shared memory too
        if not workers:
            raise
        raise _no_room(0, error) from None
    yield from each


AHEAD = 2**30
"""bytes of images that a rank reads ahead, at the most, unless one batch is more"""


def ahead(size: int, workers: int, together: int = 1) -> int:
    """Batches of `size` bytes that each worker reads ahead: four times what is wanted together, if bytes allow."""
    allowed = max(AHEAD, size * together) // max(1, size)
    return max(1, min(4 * together, allowed // workers))


def _bytes(images: ImageSet, batches: Sampler[list[Pick]]) -> int:
    """Bytes of the pixels of a batch, by its first image."""
    first = next(iter(batches), [])
    try:
        return len(first) * images.pixels(first[0].image).nbytes if first else 0
    except DataError:  # told where it is read
        return 0


class Parts(Sampler[list[Pick]]):
    """Batches, each cut into so many equal parts."""

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
