"""A run's folder belongs to one job at a time, also on a file system that several machines share.

The file `lock.json` says who: host, process, and a beat that its owner counts up. Who finds one looks whether the
process lives, on the same host, or whether the beat goes on: file locks of the system do not reach across all shared
file systems, and clocks differ. One process at a time looks and takes, by a lock of the system; and the file of a new
owner appears whole and only where there is none, which holds where that lock does not reach.
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
from typing import Any

import psutil
from filelock import FileLock, Timeout

from sslcells.config import ConfigError
from sslcells.storage import json_text, partial_name, write_atomically

FILE = "lock.json"
TAKING = ".taking"
"""Locked while one process looks whose the folder is, and takes it."""
BEAT = 10.0
"""seconds"""


class Lock:
    """The folder is this process's until `release`; for one rank to hold."""

    def __init__(self, folder: Path, otherwise: str = "choose another name=") -> None:
        """Take the folder, from a process that is no more if need be; `otherwise` is advice where it is in use.

        Raises:
            ConfigError: where another process has it; one on another host is watched for three beats.
            OSError: where the folder cannot be written.
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
        """who took the folder away from this process, if somebody did"""
        try:
            with one_at_a_time(folder / TAKING, 5 * BEAT):
                self._take(folder, otherwise)
        except Timeout:
            raise ConfigError(f"{folder} is being taken by another process; wait for its end, or {otherwise}") from None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="lock", daemon=True)
        self._thread.start()

    def release(self) -> None:
        """Let the folder go."""
        self._ended.set()
        self._thread.join()
        if not self.lost:
            with contextlib.suppress(OSError):  # the folder is away, and with it this run
                self._path.unlink()

    def _take(self, folder: Path, otherwise: str) -> None:
        """Be the owner that the file names; one process of this host at a time."""
        while not self._create():
            other = self._read()
            if other is not None and self._lives(other):
                raise ConfigError(f"{folder} is in use by {_name(other)}; wait for its end, or {otherwise}")
            self._clear(other)

    def _clear(self, dead: dict[str, Any] | None) -> None:
        """Remove the file of an owner that is no more; where another host has just taken the folder, leave it that."""
        aside = partial_name(self._path)
        with contextlib.suppress(FileNotFoundError):
            self._path.rename(aside)
            if (moved := self._read(aside)) is not None and moved["token"] != (dead or {}).get("token"):
                with contextlib.suppress(OSError):
                    os.link(aside, self._path)
            aside.unlink()

    def _create(self) -> bool:
        """Write the file where there is none; whether there was none."""
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

    def _lives(self, other: dict[str, Any]) -> bool:
        if other["host"] == self._owner["host"]:
            try:
                return bool(psutil.Process(other["process"]).create_time() == other["started"])
            except psutil.NoSuchProcess:
                return False
        if other["job"] and other["job"] == self._owner["job"] and other["start"] != self._owner["start"]:
            return False  # an earlier start of this job: SLURM ended it before it began this one
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
                continue  # the folder is away; what must be written there will say so

    def _read(self, path: Path | None = None) -> dict[str, Any] | None:
        """What the file says; None where there is none, or it was cut off."""
        try:
            owner: dict[str, Any] = json.loads((path or self._path).read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return None
        return owner

    def _write(self, beat: int) -> None:
        text = json_text(self._owner | {"beat": beat})
        write_atomically(self._path, lambda file: file.write(text.encode()))


@contextlib.contextmanager
def one_at_a_time(file: Path, seconds: float) -> Iterator[None]:
    """Wait for others that do the same, where the file system has locks; without, `_create` alone keeps them apart.

    Raises:
        Timeout: where another one does it for longer than it may take.
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
    """What the umask leaves to a file."""
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask


def _name(owner: dict[str, Any]) -> str:
    job = f"job {owner['job']}, " if owner["job"] else ""
    return f"{job}process {owner['process']} on {owner['host']}"
