"""`sslcells doctor`: whether this machine or cluster works, and what to do about what does not.

Started alone it looks at the machine, starts two ranks, compares the gradients of every loss with float64, and trains a
little. Started by `accelerate launch -m sslcells.doctor` it does so on all ranks, and instead of starting two it
measures theirs: under a minute on a quiet machine.
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from sslcells import __version__, commandline, launcher, ranks
from sslcells.checks import Check, gradients, of_ranks
from sslcells.checks.machine import machine
from sslcells.checks.speed import speed
from sslcells.checks.two_ranks import two_ranks
from sslcells.config import load


def doctor(out: Path) -> bool:
    """Run every check on every rank, print the table on rank 0, and return True on all ranks if none failed."""
    began = time.perf_counter()
    accelerator = launcher.accelerator(load(None, ["out=."]))
    device = accelerator.device
    checks = ranks.from_main(lambda: list(machine(out)))
    checks += [*of_ranks.devices(device), *of_ranks.gather(device)]
    checks += [*gradients.randomness(), *gradients.gradients(accelerator.prepare, device)]
    if device.type == "cuda":
        checks += list(gradients.kernels(device))
    if ranks.world() == 1:
        checks += [two_ranks(), *speed()]
    if ranks.rank() == 0:
        _print(checks, time.perf_counter() - began)
    return all(check.passed is not False for check in checks)


_MARKS = {True: ("pass", "green"), None: ("look", "bold yellow"), False: ("FAIL", "bold red")}


def _print(checks: Sequence[Check], seconds: float) -> None:
    table = Table(title=f"sslcells {__version__} doctor, {seconds:.1f} s", title_justify="left")
    for heading in ("check", "result", "found", "what to do"):
        table.add_column(heading, overflow="fold")
    for check in checks:
        table.add_row(check.name, Text(*_MARKS[check.passed]), Text(check.found), Text(_remedy(check)))
    Console().print(table)


def _remedy(check: Check) -> str:
    return "" if check.passed else check.remedy


def command(args: argparse.Namespace) -> None:
    """`sslcells doctor`."""
    if not doctor(Path(args.out)):
        raise SystemExit(1)


if __name__ == "__main__":
    raise SystemExit(commandline.run("doctor", command))
