"""Signals that ask a run to stop: remembered when they come, answered between two steps, or at once where it waits."""

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
"""Seconds that an ordered end may take after a second SIGTERM."""


class Awaited(BaseException):
    """A signal came while there was nothing to do but wait; raised within `Interrupt.waiting`."""


class Ended(KeyboardInterrupt):
    """A second SIGTERM, or Ctrl-C: the process ends now, without a checkpoint."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.status = 128 + number
        """the exit status"""


class Interrupt:
    """From `with` to its end, remembers the first of SIGTERM, SIGUSR1 and SIGINT.

    A second Ctrl-C, or a SIGTERM more than BURST seconds after the first, raises Ended; the process is gone GRACE
    seconds later, whatever it hangs in. Other further signals do no harm. In a thread other than the main one nothing
    is caught, as Python delivers no signals there.
    """

    def __init__(self) -> None:
        self.asked = 0
        """the signal's number, 0 while none came"""
        self._before: dict[signal.Signals, Any] = {}
        self._waits = False
        self._term: float | None = None
        self._left = threading.Event()

    def __enter__(self) -> "Interrupt":
        if threading.current_thread() is threading.main_thread():
            # Python's handlers wait while the main thread is in a library; this pipe is written at once.
            self._heard, heard = socket.socketpair()
            heard.setblocking(False)
            self._written, self._wakeup = heard, signal.set_wakeup_fd(heard.fileno(), warn_on_full_buffer=False)
            self._before = {number: signal.signal(number, self._remember) for number in SIGNALS}
            threading.Thread(target=self._guard, name="signals", daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._before:
            signal.set_wakeup_fd(self._wakeup)
            if kind is not Ended:  # after that one, the interpreter's end may hang too
                self._left.set()
            self._written.close()

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Until its end a signal raises Awaited, also one that came before: what is waited for may never come."""
        self._waits = True
        try:
            if self.asked:
                raise Awaited
            yield
        finally:
            self._waits = False

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.asked == signal.SIGINT:
            raise Ended(number)
        if number == signal.SIGTERM:
            if self._term is not None and time.monotonic() - self._term > BURST:
                raise Ended(number)
            self._term = self._term or time.monotonic()
        self.asked = self.asked or number
        if self._waits:
            self._waits = False
            raise Awaited

    def _guard(self) -> None:
        """End the process after a second SIGTERM, if it does not end itself."""
        first: float | None = None
        with self._heard:
            while numbers := self._heard.recv(64):
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
    """A run was asked to stop, and did, with everything written that it needs to go on."""

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.number = number
        # 0 for SIGUSR1, which a scheduler sends so that the run makes room and comes again
        self.status = 0 if number == signal.SIGUSR1 else 128 + number
