"""Nearest neighbours found by all ranks together: rank 0, which has the rows, asks, and the others help it."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import NamedTuple

import torch
from threadpoolctl import threadpool_limits
from torch import Tensor

from sslcells import ranks
from sslcells.evaluation.knn import QUERIES, TILE, largest, neighbours

CHUNK = 8 * TILE
"""Rows that a rank searches at a time: 256 MiB if they have 512 numbers."""


class _Asked(NamedTuple):
    """What rank 0 asks the others."""

    query: Tensor
    """(M, F)"""
    source: Tensor | None
    """(M,)"""
    centre: Tensor | None
    """(F,)"""
    k: int
    rows: int
    """N, the rows that are searched"""
    width: int
    dtype: torch.dtype


class Search:
    """The search of `neighbours`, on the device, in chunks of rows that the ranks take in turn.

    The result is the same to the last bit on any number of ranks, and of threads. Besides the rows that rank 0 has, the
    memory is that of a chunk and of the answer, on every rank.
    """

    def __init__(self, device: torch.device, threads: int) -> None:
        self._device, self._threads, self._ended = device, threads, False
        self._pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))

    def __call__(
        self,
        query: Tensor,
        bank: Tensor,
        k: int,
        query_source: Tensor | None = None,
        bank_source: Tensor | None = None,
        centre: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """As `neighbours`; called by rank 0 alone, on rows that are on the CPU."""
        asked = _Asked(query, query_source, centre, k, len(bank), bank.shape[1], bank.dtype)
        _told(asked)
        return self._answer(asked, bank, bank_source)

    def help(self) -> None:
        """Help rank 0 until it ends the search; called by all other ranks."""
        while (asked := _told(None)) is not None:
            self._answer(asked, None, None)

    def end(self) -> None:
        """Let the other ranks go on."""
        self._pool.shutdown()
        if not self._ended:
            self._ended = True
            _told(None)

    def _answer(self, asked: _Asked, bank: Tensor | None, bank_source: Tensor | None) -> tuple[Tensor, Tensor]:
        """This rank's part of the work; the neighbours among all rows on rank 0."""
        best, index = torch.zeros(len(asked.query), 0), torch.zeros(len(asked.query), 0, dtype=torch.int64)
        failure: Exception | None = None
        for first in range(0, asked.rows, CHUNK * ranks.world()):
            chunk, source = _dealt(asked, first, bank, bank_source)
            if not len(chunk) or failure is not None:
                continue
            try:
                cosine, near = self._nearest(asked, chunk, source)
                near += first + CHUNK * ranks.rank()
                best, index = _nearest_of(torch.cat([best, cosine], 1), torch.cat([index, near], 1), asked.k)
            except Exception as error:  # handed to every rank, and raised there
                failure = error
        try:
            ranks.raise_first(failure)
        except Exception:
            self._ended = True  # on every rank
            raise
        each = ranks.all_ranks((best, index))
        if ranks.rank() > 0:
            return best, index
        best, index = (torch.cat(parts, 1) for parts in zip(*each, strict=True))
        order = index.argsort(dim=1, stable=True)  # of equal cosines the lowest index comes first
        return _nearest_of(best.gather(1, order), index.gather(1, order), asked.k)

    def _nearest(self, asked: _Asked, chunk: Tensor, source: Tensor | None) -> tuple[Tensor, Tensor]:
        """The nearest rows of a chunk."""
        if self._device.type != "cpu":
            own, source, centre = (
                None if x is None else x.to(self._device) for x in (asked.source, source, asked.centre)
            )
            moved = asked.query.to(self._device), chunk.to(self._device)
            cosine, index = neighbours(*moved, asked.k, own, source, centre)
            return cosine.cpu(), index.cpu()

        blocks = -(-len(asked.query) // QUERIES)
        share = max(1, -(-blocks // self._threads)) * QUERIES  # of one thread, which prepares each tile once for it

        def block(start: int) -> tuple[Tensor, Tensor]:
            part = slice(start, start + share)
            own = None if asked.source is None else asked.source[part]
            return neighbours(asked.query[part], chunk, asked.k, own, source, asked.centre)

        found = list(self._pool.map(block, range(0, max(1, len(asked.query)), share)))
        cosine, index = (torch.cat(parts) for parts in zip(*found, strict=True))
        return cosine, index


def _told(asked: _Asked | None) -> _Asked | None:
    """What rank 0 asks, on every rank; None where it has ended."""
    return ranks.from_main(lambda: asked)


def _dealt(asked: _Asked, first: int, bank: Tensor | None, source: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """This rank's chunk of the rows from `first` on, which only rank 0 has; empty if none is left for it."""
    mine = max(0, min(CHUNK, asked.rows - first - CHUNK * ranks.rank()))
    most = min(CHUNK, asked.rows - first)
    starts = range(first, first + CHUNK * ranks.world(), CHUNK)

    def of(whole: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        parts = None if whole is None else [_padded(whole[start : start + most], most) for start in starts]
        return ranks.dealt(parts, shape, dtype)[:mine]

    chunk = of(bank, (most, asked.width), asked.dtype)
    return chunk, None if asked.source is None else of(source, (most,), torch.int64)


def _padded(rows: Tensor, count: int) -> Tensor:
    """The rows and as many zeros as are missing to `count`."""
    if len(rows) == count:
        return rows
    return torch.cat([rows, rows.new_zeros(count - len(rows), *rows.shape[1:])])


def _nearest_of(cosine: Tensor, index: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of the cosines (M, ·), or all, with their indices; of equal ones the first."""
    best, order = largest(cosine, min(k, cosine.shape[1]))
    return best, index.gather(1, order)


@contextmanager
def searching(device: torch.device) -> Iterator[Search | None]:
    """Rank 0 gets a Search for the block; every other rank helps it until the block ends there, and then gets None.

    Torch uses one thread meanwhile, as rounding depends on the number of threads; the search uses the others.
    """
    threads = torch.get_num_threads()
    with one_thread():
        search = Search(device, threads)
        if ranks.rank() > 0:
            search.help()
            yield None
            return
        try:
            yield search
        finally:
            search.end()


@contextmanager
def one_thread() -> Iterator[None]:
    """Use one thread inside the block, as rounding depends on the number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with threadpool_limits(1):
            yield
    finally:
        torch.set_num_threads(before)
