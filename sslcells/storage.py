"""Files on storage that several machines share: whole or not there, and waited for where it is away for a while.

And JSON, as every file of ours is written.
"""

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


def write_atomically(target: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file under another name and rename it: it is there whole or not at all, also after a power cut."""
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


def partial_name(target: Path) -> Path:
    """A hidden name beside the target's, of nobody else."""
    return target.with_name(f".{target.name}.{secrets.token_hex(4)}.partial")


def json_text(value: Any, indent: int | None = None) -> str:
    """A value as JSON that every reader takes: NaN and the infinities, for which JSON has no word, become null."""
    text = json.dumps(_without_non_finite(value), indent=indent, ensure_ascii=False, allow_nan=False)
    return re.sub("[\ud800-\udfff]", lambda m: f"\\u{ord(m[0]):04x}", text)  # of file names that are no UTF-8


def _without_non_finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _without_non_finite(one) for key, one in value.items()}
    return [_without_non_finite(one) for one in value] if isinstance(value, (list, tuple)) else value


def is_file(path: Path) -> bool:
    """Whether there is such a file.

    Raises:
        PermissionError: where that cannot be seen, in place of saying that there is none.
    """
    return stat.S_ISREG(_mode(path))


def is_folder(path: Path) -> bool:
    """As `is_file`, of a folder."""
    return stat.S_ISDIR(_mode(path))


def _mode(path: Path) -> int:
    """0 where there is nothing."""
    try:
        return os.stat(path).st_mode
    except PermissionError:
        raise
    except (OSError, ValueError):  # also a name that no file can have
        return 0


def denied(error: PermissionError) -> str:
    """What there is to say of a file or folder that may not be read or written."""
    return f"{error.filename}: permission denied; ask its owner, or chmod it"
