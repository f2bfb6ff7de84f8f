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


class Rows:
    """Rows of `size` bytes in files: row i of file f starts at byte `starts[f]` + i · `size`."""

    def __init__(self, files: Sequence[str], starts: Sequence[int], size: int) -> None:
        self.files, self._starts, self._size = list(files), list(starts), size
        self._opened: dict[int, int] = {}

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
                os.posix_fadvise(self._open(run.file), run.at, sum(map(len, run.pieces)), os.POSIX_FADV_WILLNEED)
        for run in runs:
            try:
                _read(self._open(run.file), run, self.files[run.file])
            except OSError as error:
                self.close()
                raise OSError(error.errno, error.strerror, self.files[run.file]) from None

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

    def _open(self, number: int) -> int:
        """The descriptor of a file; the one opened first is closed when there are too many."""
        if number not in self._opened:
            if len(self._opened) >= _OPEN:
                os.close(self._opened.pop(next(iter(self._opened))))
            self._opened[number] = os.open(self.files[number], os.O_RDONLY | os.O_CLOEXEC)
        return self._opened[number]

    def close(self) -> None:
        """Close the files; reading opens them again."""
        while self._opened:
            os.close(self._opened.popitem()[1])

    def __del__(self) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_opened": {}}


def _read(descriptor: int, run: _Run, name: str) -> None:
    pieces, at = list(run.pieces), run.at
    while pieces:
        got = os.preadv(descriptor, pieces, at)
        if got == 0:
            raise EOFError(f"{name} ends at byte {at:,}, within an image")
        at += got
        while pieces and got >= len(pieces[0]):
            got -= len(pieces.pop(0))
        if pieces and got:
            pieces[0] = pieces[0][got:]
