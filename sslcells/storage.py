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
    """What `call` returns; called again where it raises an OSError that may pass.

    Up to PATIENCE seconds, which count from the first error that no success has followed in this process: of a hundred
    images on a disk that is gone only the first is waited for.

    Raises:
        OSError: the last one, where it does not pass.
    """
    global _away_since
    pause = 0.1
    while True:
        try:
            answer = call()
        except OSError as error:
            if error.errno in _FINAL:
                raise
            if _away_since is None:
                logger.warning("%s: %s; trying again for %.0f s", what, error.strerror, PATIENCE)
                _away_since = time.monotonic()
            if time.monotonic() + pause > _away_since + PATIENCE:
                raise
        else:
            _away_since = None
            return answer
        time.sleep(pause)
        pause = min(2 * pause, 5.0)


_away_since: float | None = None
