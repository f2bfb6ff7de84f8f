"""Signals that ask a run to stop: remembered when they come, answered between two steps."""

import signal
import threading
from types import FrameType
from typing import Any

from sslcells.errors import UserError

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class Interrupt:
    """From `with` to its end, remembers the first of SIGTERM, SIGUSR1 and SIGINT; further ones do no harm.

    A second Ctrl-C alone raises KeyboardInterrupt. In a thread other than the main one nothing is caught, as Python
    delivers no signals there.
    """

    def __init__(self) -> None:
        self.asked = 0
        """the signal's number, 0 while none came"""
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "Interrupt":
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._remember) for number in SIGNALS}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.asked == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = self.asked or number


class Stopped(UserError):
    """A run was asked to stop, and did, with everything written that it needs to go on."""

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.number = number
        # 0 for SIGUSR1, which a scheduler sends so that the run makes room and comes again
        self.status = 0 if number == signal.SIGUSR1 else 128 + number
