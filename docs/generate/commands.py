"""Every command with its options, as `sslcells COMMAND --help` prints them."""

import contextlib
import io
import os

from sslcells import cli
from sslcells.arguments import arguments


def commands() -> str:
    """A section a command."""
    return "\n\n".join(f"## {name}\n\n```text\n{printed(name)}\n```" for name in cli._COMMANDS)


def printed(name: str) -> str:
    """What `sslcells NAME --help` prints, 100 characters wide."""
    out, width = io.StringIO(), os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "100"
    try:
        with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
            arguments(name, ["--help"])
    finally:
        os.environ.pop("COLUMNS")
        if width is not None:
            os.environ["COLUMNS"] = width
    return out.getvalue().strip()
