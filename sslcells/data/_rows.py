"""Reads rows of one size from files: those of a batch in few, large, ordered reads.

The files can be memory-mapped, but a file that became shorter, or storage that fails, would then kill the process with
SIGBUS; here it is an error with a name. All processes share what the system keeps of the files in memory.
"""

import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

_GAP = 2**16
"""bytes between two rows that are read too, rather than in two reads"""
_MOST = 512
"""pieces of one read; systems allow 1024"""
_OPEN = 64
"""files that a process keeps open"""


class _Run(NamedTuple):
    """A part of a file that is read at once, into pieces of memory."""

    file: int
    at: int
    pieces: list[memoryview]


class Files:
    """Files that are open for reading while a process needs them, at most `_OPEN` at a time."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = list(names)
        self._opened: dict[int, int] = {}

    def __getitem__(self, number: int) -> int:
        """The descriptor of a file; the one opened first is closed when there are too many."""
        if number not in self._opened:
            if len(self._opened) >= _OPEN:
                os.close(self._opened.pop(next(iter(self._opened))))
            self._opened[number] = os.open(self.names[number], os.O_RDONLY | os.O_CLOEXEC)
        return self._opened[number]

    def read(self, number: int, at: int, size: int) -> bytes:
        """A part of a file.

        Raises:
            OSError: with its name, if it cannot be read; the next call opens it again.
            EOFError: with its name, if it is too short.
        """
        data = bytearray(size)
        self.read_into(number, at, [memoryview(data)])
        return bytes(data)

    def read_into(self, number: int, at: int, pieces: Sequence[memoryview]) -> None:
        """Like `read`, into pieces of memory that follow each other in the file."""
        left = list(pieces)
        try:
            while left:
                got = os.preadv(self[number], left, at)
                if got == 0:
                    size = os.fstat(self[number]).st_size
                    raise EOFError(f"{self.names[number]} ends at byte {size:,}, within an image")
                at += got
                while left and got >= len(left[0]):
                    got -= len(left.pop(0))
                if left and got:
                    left[0] = left[0][got:]
        except OSError as error:
            self.close()
            raise OSError(error.errno, error.strerror, self.names[number]) from None

    def close(self) -> None:
        """Close the files; reading opens them again."""
        while self._opened:
            os.close(self._opened.popitem()[1])

    def __del__(self) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_opened": {}}


class Rows:
    """Rows of `size` bytes in files: row i of file f starts at byte `starts[f]` + i · `size`."""

    def __init__(self, files: Sequence[str], starts: Sequence[int], size: int) -> None:
        self.files, self._starts, self._size = Files(files), list(starts), size

    def read(self, file: Sequence[int], row: Sequence[int], out: Tensor, places: Sequence[int] | None = None) -> None:
        """Fill `out[i]`, or `out[places[i]]`, with row `row[i]` of file `file[i]`; `out` is (B, …) uint8, contiguous.

        Raises:
            OSError: if a file cannot be read; the next call opens the files again.
            EOFError: with its name, if a file is too short.
        """
        if not len(row):
            return
        flat = out.numpy().reshape(-1).data
        order: list[int] = np.lexsort((row, file)).tolist()
        to = range(len(row)) if places is None else places
        runs = self._runs([(file[i], self._starts[file[i]] + row[i] * self._size, to[i]) for i in order], flat)
        if len(runs) > 1 and hasattr(os, "posix_fadvise"):  # slow storage then works on all of them at once
            for run in runs:
                size = sum(map(len, run.pieces))
                os.posix_fadvise(self.files[run.file], run.at, size, os.POSIX_FADV_WILLNEED)
        for run in runs:
            self.files.read_into(run.file, run.at, run.pieces)

    def _runs(self, rows: Sequence[tuple[int, int, int]], flat: memoryview) -> list[_Run]:
        """Rows as (file, byte, place in `flat`), sorted, joined where one begins where another ends or soon after."""
        runs: list[_Run] = []
        end = -1
        for number, at, i in rows:
            piece = flat[i * self._size : (i + 1) * self._size]
            gap = at - end
            if runs and runs[-1].file == number and 0 <= gap <= _GAP and len(runs[-1].pieces) < _MOST:
                runs[-1].pieces.extend([memoryview(bytearray(gap)), piece] if gap else [piece])
            else:
                runs.append(_Run(number, at, [piece]))
            end = at + self._size
        return runs
