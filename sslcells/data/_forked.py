"""Reading processes that surely begin.

A fork copies the locks of a process as they are. If another thread holds one at that moment, the new process may wait
for it for ever: in Python before 3.11.8, gloo's threads do so with the list of threads, when they drop the tensors of
the last collective (https://github.com/python/cpython/issues/112275). So each process says that it has begun, and one
that does not is made anew.
"""

import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext, ForkContext, ForkProcess
from typing import Any

from sslcells.data import DataError

PATIENCE = 2.0
"""seconds for a new process to begin; twice as many at each further try, as the machine may be slow"""
TRIES = 6
"""how often it is made"""


def context(workers: int) -> BaseContext | None:
    """How a data loader makes its processes; None, the loader's own way, without processes or without Linux' fork."""
    return _Context() if workers and sys.platform == "linux" else None


class _Process:
    """A process as torch's data loader uses it."""

    daemon = False

    def __init__(self, target: Callable[..., None], args: tuple[Any, ...]) -> None:
        self._work: tuple[Any, ...] | None = (target, args)
        self._forked: ForkProcess | None = None

    def start(self) -> None:
        """Start it.

        Raises:
            DataError: if it does not begin.
        """
        fork = ForkContext()
        for patience in (PATIENCE * 2**i for i in range(TRIES)):
            began, say = fork.Pipe(duplex=False)
            forked = fork.Process(target=_begin, args=(began, say, self._work), daemon=self.daemon)
            forked.start()
            say.close()
            with began:
                if began.poll(patience):  # or it is dead already, which the loader sees
                    self._forked, self._work = forked, None
                    return
            forked.kill()
            forked.join()
        raise DataError(
            f"a process that reads images did not begin in {TRIES} tries, the last of {patience:g} s; "
            "train.workers=0 reads without processes"
        )

    def __getattr__(self, name: str) -> Any:
        return getattr(self._forked, name)


class _Context(ForkContext):
    Process = _Process  # type: ignore[assignment]


def _begin(began: "Connection[bytes, bytes]", say: "Connection[bytes, bytes]", work: tuple[Any, ...]) -> None:
    began.close()
    say.send_bytes(b"begun")
    say.close()
    target, args = work
    del work
    target(*args)
