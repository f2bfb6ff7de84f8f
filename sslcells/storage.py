"""Shared storage that is away for a while: a file server restarts, a mount comes back."""

import errno
import logging
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

PATIENCE = 60.0
"""seconds until an error of the operating system is believed"""

_FINAL = {None, errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.EISDIR}
"""No number (a library's own error), or nothing that waiting mends."""

logger = logging.getLogger(__name__)


def patiently(call: Callable[[], T], what: str) -> T:
    """What `call` returns; called again, for up to PATIENCE seconds, where it raises an OSError that may pass.

    Raises:
        OSError: the last one, where it does not pass.
    """
    until, pause = time.monotonic() + PATIENCE, 0.1
    while True:
        try:
            return call()
        except OSError as error:
            if error.errno in _FINAL or time.monotonic() + pause > until:
                raise
            if pause == 0.1:
                logger.warning("%s: %s; trying again for %.0f s", what, error.strerror, PATIENCE)
        time.sleep(pause)
        pause = min(2 * pause, 5.0)
