"""Reads images in the batches that a sampler chooses."""

import traceback
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from sslcells.data import Batch, DataError, ImageSet, Pick, _forked
from sslcells.data._room import no_room, room, share, stacked
from sslcells.data._undecoded import Undecoded, finished, joined

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
    files: dict[int, bytes]
    """of those that a device decodes, by their position in the batch"""


class _Images(Dataset[_Read]):
    """An image set for torch's data loader. An error is returned, not raised: the main process raises or lists it."""

    def __init__(self, images: ImageSet, undecoded: bool = False) -> None:
        self._images, self._undecoded = images, undecoded

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
                pixels = room(len(indices), *images.shape)
                if isinstance(pixels, DataError):
                    return _Read(ids, [], [Unread(0, pixels)], {})
                images.fill(indices, pixels)
                return _Read(ids, pixels, [], {})
        read: list[Tensor] = []
        unread: list[Unread] = []
        files: dict[int, bytes] = {}
        for at, index in enumerate(indices):
            file = images.plain_jpeg(index) if self._undecoded else None
            if file is not None:
                files[at] = file
                continue
            try:
                read.append(images.pixels(index))
            except DataError as error:
                unread.append(Unread(at, error))
        return _Read(ids, read, unread, files)


def _collate(read: _Read) -> Batch | DataError:
    if read.unread:
        return read.unread[0].error
    pixels = read.pixels if isinstance(read.pixels, Tensor) else stacked(read.pixels)
    if isinstance(pixels, DataError):
        return pixels
    batch = Batch(pixels, *read.ids)
    return share(batch) or batch


def _collate_undecoded(read: _Read) -> Undecoded | DataError:
    if read.unread:
        return read.unread[0].error
    assert isinstance(read.pixels, list)
    return joined(read.files, read.pixels, read.ids)


def read(
    images: ImageSet,
    batches: Sampler[list[Pick]],
    workers: int,
    pin_memory: bool,
    together: int = 1,
    device: torch.device | None = None,
) -> Generator[Batch, None, None]:
    """The batches of images that a sampler chooses, in its order, read ahead by `workers` processes.

    Use it inside `with_workers`. The caller uses `together` batches at a time; the images read ahead have as many bytes
    as these, or `AHEAD` if that is more. With `device`, images that have a `device_decoder` are decoded there, and the
    pixels are on it.

    Raises:
        DataError: if an image cannot be read; the message names it.
    """
    decoder = images.device_decoder if device is not None else None
    collate = _collate if decoder is None else _collate_undecoded
    for batch in _loaded(images, batches, workers, pin_memory, collate, together):
        if isinstance(batch, DataError):
            raise batch
        if decoder is None or device is None:
            yield Batch(*batch)
        else:
            yield finished(Undecoded(*batch), images, decoder, device)


def read_in_parts(
    images: ImageSet,
    batches: Sampler[list[Pick]],
    parts: int,
    workers: int,
    pin_memory: bool,
    device: torch.device | None = None,
) -> Generator[list[Batch], None, None]:
    """Like `read`, but each batch comes in `parts` equal parts, so a large batch is never copied into one piece."""
    batch: list[Batch] = []
    for part in read(images, Parts(batches, parts), workers, pin_memory, parts, device):
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
        together = stacked(pixels)
        if isinstance(together, DataError):
            return together
        pixels = together
    error = share([pixels] if isinstance(pixels, Tensor) else pixels)
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
    undecoded = collate is _collate_undecoded
    loader: DataLoader[_Read] = DataLoader(
        _Images(images, undecoded),
        batch_sampler=batches,
        collate_fn=collate,  # type: ignore[arg-type]
        pin_memory=pin_memory,
        prefetch_factor=ahead(_bytes(images, batches, undecoded), workers, together) if workers else None,
        **_forked.processes(workers),
    )
    try:
        batches_read = iter(loader)
    except OSError as error:  # the processes' locks are in shared memory too
        if not workers:
            raise
        raise no_room(0, error) from None
    yield from batches_read


AHEAD = 2**30
"""most bytes of images that a rank reads ahead, unless the batches used at a time are larger"""


def ahead(size: int, workers: int, together: int = 1) -> int:
    """Number of batches of `size` bytes that each worker reads ahead: 4 · `together`, or fewer if they are large."""
    allowed = max(AHEAD, size * together) // max(1, size)
    return max(1, min(4 * together, allowed // workers))


def _bytes(images: ImageSet, batches: Sampler[list[Pick]], undecoded: bool = False) -> int:
    """Bytes of a batch, estimated from the pixels of its first image, or from its file if that is larger."""
    first = next(iter(batches), [])
    if not first:
        return 0
    file = images.plain_jpeg(first[0].image) if undecoded else None
    try:
        return len(first) * max(images.pixels(first[0].image).nbytes, len(file or b""))
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
