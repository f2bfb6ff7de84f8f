"""A lock on a run's folder: one job at a time uses it, also on a file system that several machines share.

The file `lock.json` names the owner: host, process, and a beat, a number that the owner increases every BEAT seconds. A
process that finds the file checks if the owner is alive: on the same host by its process, on another host by its beat.
The system's file locks do not work on all shared file systems, and the clocks of two hosts may differ.

While a process checks and takes the folder, it holds a system lock. Where that does not work, `lock.json` alone is
safe: it is created with its content in one operation, which fails if the file exists.
"""

import contextlib
import errno
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import psutil
from filelock import FileLock, Timeout

from sslcells.errors import ConfigError
from sslcells.storage import json_text, partial_name, write_atomically

FILE = "lock.json"
TAKING = ".taking"
"""System lock of the process that checks for an owner and takes the folder."""
BEAT = 10.0
"""seconds between two beats"""


class Lock:
    """This process owns the folder until `release`; used by one rank."""

    def __init__(self, folder: Path, otherwise: str = "choose another name=") -> None:
        """Take the folder; the lock of a dead process is replaced. `otherwise` is advice for the error.

        Raises:
            ConfigError: if another process owns it; the beat of an owner on another host is watched for 3 · BEAT.
            OSError: if the folder cannot be written.
        """
        self._path = folder / FILE
        process = psutil.Process()
        self._owner = {
            "host": socket.gethostname(),
            "process": process.pid,
            "started": process.create_time(),
            "job": os.environ.get("SLURM_JOB_ID", ""),
            "start": os.environ.get("SLURM_RESTART_COUNT", "0"),
            "token": secrets.token_hex(8),
        }
        self.lost = ""
        """the process that took the folder from this one; empty if none did"""
        try:
            with one_at_a_time(folder / TAKING, 5 * BEAT):
                self._take(folder, otherwise)
        except Timeout:
            raise ConfigError(f"{folder} is being locked by another process; wait for it, or {otherwise}") from None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="lock", daemon=True)
        self._thread.start()

    def release(self) -> None:
        """Release the folder."""
        self._ended.set()
        self._thread.join()
        if not self.lost:
            with contextlib.suppress(OSError):  # the disk is unavailable
                self._path.unlink()

    def _take(self, folder: Path, otherwise: str) -> None:
        """Create the file with this process as owner; only one process of a host does this at a time."""
        while not self._create():
            other = self._read()
            if other is not None and self._is_alive(other):
                raise ConfigError(f"{folder} is in use by {_name(other)}; wait for its end, or {otherwise}")
            self._remove(other)

    def _remove(self, dead: dict[str, Any] | None) -> None:
        """Remove the file of a dead owner, unless another host has just replaced it with its own."""
        aside = partial_name(self._path)
        with contextlib.suppress(FileNotFoundError):
            self._path.rename(aside)
            if (moved := self._read(aside)) is not None and moved["token"] != (dead or {}).get("token"):
                with contextlib.suppress(OSError):
                    os.link(aside, self._path)
            aside.unlink()

    def _create(self) -> bool:
        """Create the file; False if it exists."""
        made = partial_name(self._path)
        made.write_text(json_text(self._owner | {"beat": 0}), encoding="utf-8")
        try:
            os.link(made, self._path)
        except FileExistsError:
            return False
        except OSError:  # a file system without hard links
            try:
                with self._path.open("x", encoding="utf-8") as file:
                    file.write(made.read_text(encoding="utf-8"))
            except FileExistsError:
                return False
        finally:
            made.unlink(missing_ok=True)
        return True

    def _is_alive(self, other: dict[str, Any]) -> bool:
        if other["host"] == self._owner["host"]:
            return _process_lives(other)
        if other["job"] and other["job"] == self._owner["job"] and other["start"] != self._owner["start"]:
            return False  # an earlier start of this job: SLURM ended it before this one
        until = time.monotonic() + 3 * BEAT
        while time.monotonic() < until:
            time.sleep(min(1.0, BEAT / 4))
            if (now := self._read()) is None:
                return False
            if (now["token"], now["beat"]) != (other["token"], other["beat"]):
                return True
        return False

    def _beat(self) -> None:
        beat = 0
        while not self._ended.wait(BEAT):
            beat += 1
            try:
                now = self._read()
                if now is not None and now["token"] != self._owner["token"]:
                    self.lost = _name(now)
                    return
                self._write(beat)
            except OSError:
                continue  # the disk is unavailable; training's own writes report it

    def _read(self, path: Path | None = None) -> dict[str, Any] | None:
        """The owner in the file; None if there is no file, or it was cut off."""
        try:
            owner: dict[str, Any] = json.loads((path or self._path).read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return None
        return owner

    def _write(self, beat: int) -> None:
        text = json_text(self._owner | {"beat": beat})
        write_atomically(self._path, lambda file: file.write(text.encode()))


class Owner(NamedTuple):
    """The owner of a folder, as `lock.json` names it."""

    name: str
    lives: bool | None
    """whether its process lives; None on another host, where only its beat tells"""
    silent: float
    """seconds since its last beat, by the clock of the disk and of this host"""
    age: float
    """seconds since its process started, by the clock of its host and of this one"""


def owner(folder: Path) -> Owner | None:
    """The owner of a folder, without waiting and without touching anything; None if no process has it.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if it is not the file of an owner.
    """
    path = folder / FILE
    try:
        text, beaten = path.read_bytes(), path.stat().st_mtime
    except FileNotFoundError:
        return None
    try:
        other: dict[str, Any] = json.loads(text)
        name, here = _name(other), other["host"] == socket.gethostname()
        lives = _process_lives(other) if here else None
        now = time.time()
        return Owner(name, lives, max(0.0, now - beaten), max(0.0, now - other["started"]))
    except (KeyError, TypeError, ValueError):
        raise ValueError("it names no owner") from None


def _process_lives(owner: dict[str, Any]) -> bool:
    """True if the owner's process is one of this host."""
    try:
        return bool(psutil.Process(owner["process"]).create_time() == owner["started"])
    except psutil.NoSuchProcess:
        return False


@contextlib.contextmanager
def one_at_a_time(file: Path, seconds: float) -> Iterator[None]:
    """Wait until no other process is in this block, then enter it. On a file system without locks, enter at once.

    Raises:
        Timeout: if another process stays in it for more than `seconds`.
    """
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(FileLock(file, timeout=seconds, mode=_mode()))
        except NotImplementedError:
            pass
        except OSError as error:
            if isinstance(error, Timeout) or error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
        yield


def _mode() -> int:
    """The permissions that the umask leaves to a new file."""
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask


def _name(owner: dict[str, Any]) -> str:
    job = f"job {owner['job']}, " if owner["job"] else ""
    return f"{job}process {owner['process']} on {owner['host']}"
