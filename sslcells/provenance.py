"""What made a result: the version of sslcells, its commit, and the command."""

import shlex
import subprocess
import sys
import time
from pathlib import Path

from sslcells import __version__

_PACKAGE = Path(__file__).resolve().parent


def made() -> dict[str, str | None]:
    """Date, version, commit and command of this process; the commit is None where sslcells is no checkout of git."""
    date = time.strftime("%Y-%m-%d %H:%M:%S")
    return {"date": date, "sslcells": __version__, "commit": commit(), "command": command(sys.argv)}


def command(argv: list[str]) -> str:
    """A process's arguments as one would type them: `sslcells train …`, or `python -m sslcells.train …`."""
    program = Path(argv[0])
    if program.suffix == ".py" and program.resolve().is_relative_to(_PACKAGE):
        parts = program.resolve().relative_to(_PACKAGE.parent).with_suffix("").parts
        module = ".".join(part for part in parts if part != "__main__")
        return shlex.join(["python", "-m", module, *argv[1:]])
    return shlex.join([program.name, *argv[1:]])


def commit(folder: Path = _PACKAGE.parent) -> str | None:
    """The commit that is checked out in a folder, with `+` if its files were changed since; None without git."""
    if not (folder / ".git").exists():
        return None
    try:
        number = _git(folder, "rev-parse", "--short=12", "HEAD")
        return number + "+" * bool(_git(folder, "status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.SubprocessError):
        return None


def _git(folder: Path, *words: str) -> str:
    command = ["git", "-C", str(folder), *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
