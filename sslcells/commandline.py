"""What every command shares: how it starts, and how errors end it, with one line on stderr and the exit status.

Nothing here imports torch, so --help, --version and a misspelt option answer at once.
"""

import argparse
import os
import sys
from collections.abc import Callable

from sslcells.arguments import arguments
from sslcells.errors import ConfigError, UserError
from sslcells.storage import denied


def run(name: str, command: Callable[[argparse.Namespace], None]) -> int:
    """Run one command with this process's arguments and return the exit status of `python -m sslcells.<name>`."""
    args = arguments(name)
    return guarded(lambda: command(args))


def guarded(command: Callable[[], None]) -> int:
    """Run a command and return its exit status; a user's error is printed once, without a traceback."""
    try:
        command()
    except UserError as error:
        status = report_error(error, error.status)
        if error.at_once:
            sys.stderr.flush()
            os._exit(status)  # a normal exit could wait for ever for a lost rank
        return status
    except PermissionError as error:
        return report_error(ConfigError(denied(error)), 2)
    except RuntimeError as error:
        if "does not have a deterministic implementation" not in str(error):
            raise
        return report_error(
            error, 1, "\ntrain.deterministic=true forbids it; use warn to continue with a warning, or false"
        )
    except KeyboardInterrupt as ended:
        status = getattr(ended, "status", 130)
        word = "interrupted" if status == 130 else "ended by a second SIGTERM, without a checkpoint"
        print(f"sslcells: {word}", file=sys.stderr)
        return int(status)
    except Exception as error:
        if not _out_of_memory(error):
            raise
        return report_error(error, 1, "; use a smaller train.micro_batch, or train.precision=bf16")
    finally:
        if "sslcells.ranks" in sys.modules:
            from sslcells import ranks

            ranks.close()
    return 0


def _out_of_memory(error: Exception) -> bool:
    """True if the device ran out of memory; without torch imported, no device was used."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(error, torch.OutOfMemoryError)


_LAUNCHED = {"RANK", "WORLD_SIZE", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "MV2_COMM_WORLD_RANK"}
"""If none of these variables is set, there is only one process."""


def report_error(error: Exception, status: int, advice: str = "") -> int:
    """Print an error of all ranks once, and an error of a single rank with its number; returns `status`."""
    notes, of, speaks = getattr(error, "__notes__", []), "", True
    if _LAUNCHED & os.environ.keys():
        from sslcells import launcher

        may_be_alone = error.one_ranks if isinstance(error, UserError) else _out_of_memory(error)
        alone = may_be_alone and not notes and launcher.launched_world() > 1
        of = f"rank {launcher.launched_rank()}: " if alone else "".join(f"{note}: " for note in notes[:1])
        speaks = launcher.first() or alone
    if speaks:
        print(f"sslcells: {of}{error}{advice}", file=sys.stderr)
    return status


def one_process(what: str) -> None:
    """Raise a ConfigError if several processes were launched."""
    from sslcells import launcher

    if launcher.launched_world() > 1:
        raise ConfigError(f"{what} runs in one process, but {launcher.launched_world()} were launched")
