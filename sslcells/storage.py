"""Files on shared storage: atomic writes, and retries while the storage is unavailable. Also the JSON that we write."""

import errno
import json
import logging
import math
import os
import re
import secrets
import stat
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from sslcells.errors import ConfigError

T = TypeVar("T")

PATIENCE = 60.0
"""seconds to retry before an error of the operating system is raised"""

_FINAL = {None, errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.EISDIR}
"""Errors that are not retried: those without a number (raised by a library), and those that waiting cannot fix."""

logger = logging.getLogger(__name__)


def patiently(call: Callable[[], T], what: str) -> T:
    """Return `call()`, retrying for up to PATIENCE seconds while it raises an OSError that may be temporary.

    The time counts from the first error in this process since the last success. So for a hundred images on a lost
    disk, only the first one waits. `what` names the file in the warning.

    Raises:
        OSError: the last error, if retrying did not help.
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
                logger.warning("%s: %s; retrying for %.0f s", what, error.strerror, PATIENCE)
                _away_since = time.monotonic()
            if time.monotonic() + pause > _away_since + PATIENCE:
                raise
        else:
            _away_since = None
            return answer
        time.sleep(pause)
        pause = min(2 * pause, 5.0)


_away_since: float | None = None


def write_atomically(target: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write to a temporary file and rename it: the target is complete or absent, even after a power cut."""
    partial = partial_name(target)
    try:
        with partial.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(target)
    except BaseException:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise


def write_text(file: Path, text: str) -> None:
    """Write a text atomically; bytes of file names that are no UTF-8 stay what they were.

    Raises:
        ConfigError: if it cannot be written.
    """
    try:
        write_atomically(file, lambda opened: opened.write(text.encode("utf-8", "surrogateescape")))
    except OSError as error:
        raise ConfigError(f"{file} cannot be written: {error}") from None


def partial_name(target: Path) -> Path:
    """A unique hidden name in the target's folder."""
    return target.with_name(f".{target.name}.{secrets.token_hex(4)}.partial")


def json_text(value: Any, indent: int | None = None) -> str:
    """A value as standard JSON; NaN and infinities, which JSON lacks, become null."""
    text = json.dumps(_without_non_finite(value), indent=indent, ensure_ascii=False, allow_nan=False)
    return re.sub("[\ud800-\udfff]", lambda m: f"\\u{ord(m[0]):04x}", text)  # from file names that are not UTF-8


def _without_non_finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _without_non_finite(one) for key, one in value.items()}
    return [_without_non_finite(one) for one in value] if isinstance(value, (list, tuple)) else value


def is_file(path: Path) -> bool:
    """True if the path is a regular file.

    Raises:
        PermissionError: if a folder on the way may not be read; pathlib would return False.
    """
    return stat.S_ISREG(_mode(path))


def is_folder(path: Path) -> bool:
    """Like `is_file`, for a folder."""
    return stat.S_ISDIR(_mode(path))


def _mode(path: Path) -> int:
    """The mode of a file or folder; 0 if there is none."""
    try:
        return os.stat(path).st_mode
    except PermissionError:
        raise
    except (OSError, ValueError):  # ValueError: a name that no file can have
        return 0


def denied(error: PermissionError) -> str:
    """Message for a file or folder without permission to read or write."""
    return f"{error.filename}: permission denied; ask its owner for access, or use chmod"
