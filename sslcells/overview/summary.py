"""What a run's folder says of its run: state, step, time left, best figure; and what is broken in it."""

import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeVar, get_args

from sslcells import names
from sslcells.overview.figures import Figures, figures
from sslcells.overview.settings import Settings, settings
from sslcells.overview.words import duration, printable
from sslcells.run import lock
from sslcells.run.metrics import METRICS
from sslcells.storage import is_file

T = TypeVar("T")
State = Literal["running", "silent", "broken", "failed", "stopped", "finished"]
STATES: tuple[State, ...] = get_args(State)
"""Those that need attention first."""

DEAF = 6 * lock.BEAT
"""Seconds without a beat after which a run on another host counts as silent."""
QUIET, TIMES = 600.0, 10
"""A run whose process lives counts as silent after QUIET seconds without a new line, or TIMES its usual pause."""


@dataclass(frozen=True)
class Summary:
    """One run at a glance."""

    folder: Path
    state: State
    note: str = ""
    """why, and what to do"""
    seen: float | None = None
    """seconds since the folder's last sign of life"""
    steps: int | None = None
    """optimizer steps of the whole training, if known"""
    left: float | None = None
    """seconds that the rest of a running training takes at its present speed, without evaluations"""
    method: str = ""
    figures: Figures = field(default_factory=Figures)


def summary(folder: Path) -> Summary:
    """Read the folder of a run; what cannot be read is named in its note. Nothing is written."""
    faults: list[str] = []
    known = _read(folder, names.CONFIG, settings, faults) or Settings()
    done = (_read(folder, METRICS, figures, faults) if _age(folder / METRICS) is not None else None) or Figures()
    owner = _owner(folder, faults)
    steps, ages = known.steps(done), [_age(folder / name) for name in _OF_A_RUN]
    state, note = _state_of_owner(owner, ages[0], known.pause(done)) if owner else (None, "")
    if state is None:
        state, note = _state_without_owner(folder, owner, over=steps is None or done.step >= steps)
    left = known.left(done) if state == "running" else None
    if faults:
        state, note = "broken", printable("; ".join([*faults, *filter(None, [note])]))
    seen = min((age for age in (*ages, owner and owner.silent) if age is not None), default=None)
    return Summary(folder, state, note, seen, steps, left, printable(known.method), done)


_OF_A_RUN = (METRICS, names.SPEC, names.STOPPED, names.CONFIG)
"""Files whose age says when a run was last active."""


def _state_of_owner(owner: lock.Owner, written: float | None, pause: float) -> tuple[State | None, str]:
    """State of a run that a process holds, and why; None if that process is gone. `written`: age of its figures."""
    if owner.lives is False:
        return None, ""
    if owner.lives is None and owner.silent > DEAF:
        return "silent", f"no beat of {owner.name} for {duration(owner.silent)}: it hangs, or was killed"
    quiet = owner.age if written is None else min(written, owner.age)
    if written is not None and quiet > max(QUIET, TIMES * pause):
        return "silent", f"{owner.name} lives, but no new figures for {duration(quiet)}"
    return "running", owner.name


def _state_without_owner(folder: Path, owner: lock.Owner | None, over: bool) -> tuple[State, str]:
    """State of a run that no process holds, and why. `over`: all of its steps are done."""
    reason = _text(folder / names.STOPPED)
    if over and _age(folder / names.SPEC) is not None:
        return "finished", f"a later start: {reason}" if reason else ""
    if reason:
        return "failed", reason
    saved = _newest_checkpoint(folder)
    resumes = f"the same command resumes it after step {saved}" if saved else "the same command starts it again"
    return "stopped", f"{f'{owner.name} is gone' if owner else 'ended by a signal, or with its node'}; {resumes}"


def _read(folder: Path, name: str, read: Callable[[bytes], T], faults: list[str]) -> T | None:
    """The contents of a file as `read` understands them; None, and a fault, if it cannot."""
    try:
        if not is_file(folder / name):  # also a pipe, which would be waited for
            raise ValueError("there is no such file")
        return read((folder / name).read_bytes())
    except (OSError, ValueError) as error:
        faults.append(f"{name}: {_why(error)}")
        return None


def _owner(folder: Path, faults: list[str]) -> lock.Owner | None:
    try:
        return lock.owner(folder)
    except (OSError, ValueError) as error:
        faults.append(f"{lock.FILE}: {_why(error)}")
        return None


def _why(error: OSError | ValueError) -> str:
    return str(error.strerror or error) if isinstance(error, OSError) else str(error)


def _text(file: Path) -> str:
    """The text of a file in one line; empty if it cannot be read."""
    try:
        return printable(" ".join(file.read_text(encoding="utf-8", errors="replace").split()))
    except OSError:
        return ""


def _age(file: Path) -> float | None:
    """Seconds since a file was written; None if there is none."""
    try:
        return max(0.0, time.time() - file.stat().st_mtime)
    except OSError:
        return None


def _newest_checkpoint(folder: Path) -> int | None:
    """Step of the newest checkpoint by its name."""
    try:
        found = [int(name[5:]) for name in os.listdir(folder / "checkpoints") if re.fullmatch(r"step_\d+", name)]
    except OSError:
        return None
    return max(found, default=None)
