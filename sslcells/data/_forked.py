"""The processes of a data loader, which surely begin.

A fork copies the locks of a process as they are. If another thread holds one at that moment, the new process may wait
for it for ever: in Python before 3.11.8, gloo's threads do so with the list of threads, when they drop the tensors of
the last collective (https://github.com/python/cpython/issues/112275). So each process says that it has begun, and one
that does not is made anew.
"""

import signal
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.context import ForkContext, ForkProcess
from typing import Any

import torch

from sslcells.data import DataError

PATIENCE = 2.0
"""seconds for a new process to begin; twice as many at each further try, as the machine may be slow"""
TRIES = 6
"""how often it is made"""


def processes(workers: int) -> dict[str, Any]:
    """The arguments of torch's DataLoader for so many processes, 0 for none; every loader has them from here.

    Without Linux' fork it makes them in its own way.
    """
    ours = _Context() if workers and sys.platform == "linux" else None
    return {"num_workers": workers, "worker_init_fn": _prepare, "multiprocessing_context": ours}


def _prepare(worker: int) -> None:
    """Prepare a process: it leaves signals to its parent, and uses one core."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    signal.set_wakeup_fd(-1)  # inherited: the worker's signals would wake the parent
    torch.set_num_threads(1)


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
