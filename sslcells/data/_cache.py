"""Keeps decoded images in memory, which all processes of a machine that read them share.

The memory belongs to an anonymous file (memfd) of one process, which the others open. It needs no room in /dev/shm, and
is gone with the processes. Each image has a place of its own there, whoever decodes it first.
"""

import mmap
import os
import secrets
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from numpy.typing import NDArray
from torch import Tensor

from sslcells import cgroups, ranks
from sslcells.config import ConfigError
from sslcells.data import Header, ImageSet
from sslcells.data._rows import Rows

GIB = 2**30
_ORDER = ("train", "val", "test")


class Cached(ImageSet):
    """Images that are decoded once, as far as the memory has a place for them; the others are decoded each time."""

    def __init__(self, images: ImageSet, memory: "Memory", whose: str = "") -> None:
        self._images, self._memory = images, memory
        self.light, self.channels, self.classes = images.light, images.channels, images.classes
        self.shape, self.about = memory.shape, images.about
        size = f"{memory.count * memory.row / GIB:.3g} GiB"
        kept = f"{memory.count:,} of {len(images):,} are kept in memory once decoded, {size}"
        self.found = images.found and replace(images.found, cache=kept + (f"; {whose}" if whose else ""))
        self.labels, self.sources, self.targets = images.labels, images.sources, images.targets
        self.sourced, self.labs, self.lab_names = images.sourced, images.labs, images.lab_names

    def pixels(self, index: int) -> Tensor:
        """Image `index`: (C, H, W) uint8."""
        out = torch.empty(1, *self._memory.shape, dtype=torch.uint8)
        self.fill([index], out)
        return out[0]

    def fill(self, indices: Sequence[int], out: Tensor) -> None:
        """Copy images that are kept into `out`, (B, C, H, W) uint8; decode the others, and keep those with a place."""
        index = np.asarray(indices, np.int64)
        kept = self._memory.kept(index)
        self._memory.read(index[kept], np.flatnonzero(kept), out)
        for place in np.flatnonzero(~kept).tolist():
            pixels = self._images.pixels(int(index[place]))
            out[place].copy_(pixels)
            self._memory.keep(int(index[place]), pixels)

    def values(self, index: int) -> NDArray[Any]:
        """The raw values of image `index`, read again."""
        return self._images.values(index)

    def header(self, index: int) -> Header | None:
        """The file header of image `index`."""
        return self._images.header(index)

    def name(self, index: int) -> str:
        """The name of image `index`."""
        return self._images.name(index)


class Memory:
    """Places for the first `count` images of a split: a byte each that says whether it is filled, then the pixels."""

    def __init__(
        self, file: str, start: int, count: int, shape: tuple[int, int, int], owner: "_Anonymous | None"
    ) -> None:
        self.shape, self.count, self.row = shape, count, int(np.prod(shape))
        self._file, self._start, self._owner = file, start, owner
        self._pixels = start + _pages(count)
        self._opened: tuple[int, NDArray[np.uint8]] | None = None
        self._rows = Rows([file], [self._pixels], self.row)

    def kept(self, index: NDArray[np.int64]) -> NDArray[np.bool_]:
        """(B,) bool: which of these images are there."""
        _, filled = self.open()
        placed = index < self.count
        kept = np.zeros(len(index), bool)
        kept[placed] = filled[index[placed]] == 1
        return kept

    def read(self, index: NDArray[np.int64], place: NDArray[np.int64], out: Tensor) -> None:
        """Copy images into these places of `out`."""
        self._rows.read([0] * len(index), index.tolist(), out, place.tolist())

    def keep(self, index: int, pixels: Tensor) -> None:
        """Store an image, if it has a place. Another process may do the same, with the same pixels."""
        if index >= self.count:
            return
        file, _ = self.open()
        data = memoryview(np.ascontiguousarray(pixels.numpy()).reshape(-1).data)
        at = self._pixels + index * self.row
        while data:
            written = os.pwrite(file, data, at)
            at, data = at + written, data[written:]
        os.pwrite(file, b"\1", self._start + index)  # after the pixels, also as other processors see it

    @property
    def end(self) -> int:
        """The byte after the last place."""
        return self._pixels + _pages(self.count * self.row)

    def open(self) -> tuple[int, NDArray[np.uint8]]:
        """The file, and of each place whether it is filled."""
        if self._opened is None:
            file = os.open(self._file, os.O_RDWR | os.O_CLOEXEC)
            filled = np.empty(0, np.uint8)
            if self.count:
                mapped = mmap.mmap(file, self.count, mmap.MAP_SHARED, mmap.PROT_READ, offset=self._start)
                filled = np.frombuffer(mapped, np.uint8)
            self._opened = file, filled
        return self._opened

    def __del__(self) -> None:
        if self._opened is not None:
            os.close(self._opened[0])

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_opened": None, "_owner": None}


def cached(splits: Mapping[str, ImageSet], gib: float) -> dict[str, ImageSet]:
    """The splits with a cache of at most `gib` GiB on each machine: train first, then val and test.

    Every rank must call this. The processes of a machine share one cache; where one cannot open another's memory, each
    has its part of the budget.

    Raises:
        ConfigError: if the cache would take more memory than is free.
        DataError: if the first image of a split cannot be read.
    """
    shapes: dict[str, Any] = ranks.from_main(
        lambda: {name: tuple(images.pixels(0).shape) for name, images in splits.items()}
    )
    hosts = ranks.all_ranks(socket.gethostname())
    local = [rank for rank, host in enumerate(hosts) if host == hosts[ranks.rank()]]
    own = ranks.together(lambda: _Anonymous() if local[0] == ranks.rank() else None)
    file, name = ranks.all_ranks(("", "") if own is None else (own.path, own.name))[local[0]]
    shared = all(ranks.all_ranks(_is_there(file, name)))
    if not shared:
        own = ranks.together(lambda: own or _Anonymous())
        file = own.path
    budget = int(gib * GIB / (1 if shared else len(local)))
    memories: dict[str, Memory] = {}
    end = 0
    for name in [name for name in _ORDER if name in splits]:
        shape = shapes[name]
        count = max(0, min(len(splits[name]), (budget - end - 2 * mmap.PAGESIZE) // (int(np.prod(shape)) + 1)))
        memories[name] = Memory(file, end, count, shape, own)
        end = memories[name].end
    ranks.together(lambda: own.make(end, gib) if own is not None else None)
    for memory in memories.values():
        memory.open()
    whose = f"{len(local)} ranks share it" if shared and len(local) > 1 else ""
    whose = whose if shared else f"a part for each of {len(local)} ranks, as they cannot open each other's memory"
    return {name: Cached(images, memories[name], whose) for name, images in splits.items()}


class _Anonymous:
    """A file in memory, which any process of this user on this machine can open; gone with this object."""

    def __init__(self) -> None:
        self.name = f"sslcells-{secrets.token_hex(8)}"
        try:
            self._file = os.memfd_create(self.name)
        except (AttributeError, OSError) as error:
            self._file = -1
            raise ConfigError(f"data.cache=ram needs memfd_create, which is not there: {error}") from None
        self.path = f"/proc/{os.getpid()}/fd/{self._file}"

    def make(self, size: int, gib: float) -> None:
        """Give it this size; memory is taken when it is written to.

        Raises:
            ConfigError: if so much is not free.
        """
        free = free_memory()
        if size > free:
            raise ConfigError(
                f"data.cache_gib={gib:g}: the images would take {size / GIB:.3g} GiB, and {free / GIB:.3g} GiB of "
                f"memory are free; use a smaller budget"
            )
        os.ftruncate(self._file, size)

    def __del__(self) -> None:
        if self._file >= 0:
            os.close(self._file)


def _is_there(file: str, name: str) -> bool:
    """True if this process can open the file of this name in memory: the path may be another's on another machine."""
    try:
        return name in os.readlink(file) and os.access(file, os.R_OK | os.W_OK)
    except OSError:
        return False


def free_memory(root: Path = cgroups.ROOT, own: Path = cgroups.OWN) -> int:
    """Bytes that this process may still take: what the machine has free, and what its cgroups (version 2) allow."""
    available: int = psutil.virtual_memory().available
    return min([available, *map(_left, cgroups.folders("memory", root, own))])


def _left(folder: Path) -> int:
    """Bytes that one cgroup has left; what only keeps files in memory counts as free."""
    try:
        most = (folder / "memory.max").read_text(encoding="utf-8").strip()
        if most == "max":
            return sys.maxsize
        used = int((folder / "memory.current").read_text(encoding="utf-8"))
        lines = (folder / "memory.stat").read_text(encoding="utf-8").splitlines()
        files = sum(int(line.split()[1]) for line in lines if line.split()[0] in ("active_file", "inactive_file"))
        return max(0, int(most) - used + files)
    except (OSError, ValueError):
        return sys.maxsize


def _pages(size: int) -> int:
    """`size` rounded up to whole pages."""
    return -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
