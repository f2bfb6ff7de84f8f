"""Signals that ask a run to stop: remembered when they arrive, and acted on between two steps, or at once in a wait."""

import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

from sslcells.errors import UserError

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
BURST = 3.0
"""Seconds within which SIGTERMs count as one: a scheduler and a launcher both send it to a rank."""
GRACE = 10.0
"""Seconds that the process may take to clean up after a second SIGTERM."""


class Awaited(BaseException):
    """A signal arrived during `Interrupt.waiting`."""


class Ended(KeyboardInterrupt):
    """A second SIGTERM or Ctrl-C: the process ends now, without a checkpoint."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.status = 128 + number
        """the exit status"""


class Interrupt:
    """Remembers the first of SIGTERM, SIGUSR1 and SIGINT that arrives inside the `with` block.

    A second Ctrl-C, or a SIGTERM more than BURST seconds after the first, raises Ended. If the process hangs, it is
    ended GRACE seconds later. Further signals are ignored otherwise. Outside the main thread no signal is caught, as
    Python delivers none there.
    """

    def __init__(self) -> None:
        self.received = 0
        """number of the signal; 0 if none arrived yet"""
        self._before: dict[signal.Signals, Any] = {}
        self._waits = False
        self._first_term: float | None = None
        self._left = threading.Event()

    def __enter__(self) -> "Interrupt":
        if threading.current_thread() is threading.main_thread():
            # Python runs no handler while the main thread is inside a library, but it writes to this socket at once.
            self._reader, self._writer = socket.socketpair()
            self._writer.setblocking(False)
            self._wakeup = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
            self._before = {number: signal.signal(number, self._handle) for number in SIGNALS}
            threading.Thread(target=self._end_if_hanging, name="signals", daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._before:
            signal.set_wakeup_fd(self._wakeup)
            if kind is not Ended:  # after Ended the exit of the interpreter may hang too
                self._left.set()
            self._writer.close()

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Inside this block a signal raises Awaited, also one that arrived before: the wait might never end."""
        self._waits = True
        try:
            if self.received:
                raise Awaited
            yield
        finally:
            self._waits = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.received == signal.SIGINT:
            raise Ended(number)
        if number == signal.SIGTERM:
            if self._first_term is not None and time.monotonic() - self._first_term > BURST:
                raise Ended(number)
            self._first_term = self._first_term or time.monotonic()
        self.received = self.received or number
        if self._waits:
            self._waits = False
            raise Awaited

    def _end_if_hanging(self) -> None:
        """End the process after a second SIGTERM, if it does not end by itself."""
        first: float | None = None
        with self._reader:
            while numbers := self._reader.recv(64):
                if signal.SIGTERM not in numbers:
                    continue
                if first is not None and time.monotonic() - first > BURST:
                    break
                first = first or time.monotonic()
            else:
                return
        if not self._left.wait(GRACE):
            print("sslcells: ended by a second SIGTERM, without a checkpoint", file=sys.stderr, flush=True)
            os._exit(128 + signal.SIGTERM)


class Stopped(UserError):
    """A signal stopped the run, after it had written everything that it needs to resume."""

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.number = number
        # 0 for SIGUSR1: a scheduler sends it to free the nodes, and starts the run again later
        self.status = 0 if number == signal.SIGUSR1 else 128 + number
