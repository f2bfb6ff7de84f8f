"""Two ranks on this machine, started here, that gather: whether what joins ranks works at all.

They are processes of this file, each with one device, or on CPUs if there are not two GPUs.
"""

import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from sslcells import launcher, ranks
from sslcells.checks import Check, of_ranks
from sslcells.storage import json_text

SECONDS = 90.0
"""Time that both may take, imports included."""


def two_ranks(seconds: float = SECONDS, extra: Mapping[str, str] | None = None) -> Check:
    """Start two ranks, with `extra` in their environment, and read what they gathered."""
    cuda = torch.cuda.is_available() and torch.cuda.device_count() > 1
    backend = "NCCL" if cuda else "gloo"
    name = f"two ranks, {backend}"
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(tempfile.TemporaryFile("w+", encoding="utf-8")) for _ in range(4)]
        port = _free_port()
        processes = [_start(rank, cuda, port, extra or {}, files[2 * rank : 2 * rank + 2]) for rank in range(2)]
        until = time.monotonic() + seconds
        try:
            statuses = [process.wait(max(0.1, until - time.monotonic())) for process in processes]
        except subprocess.TimeoutExpired:
            if not all(_read(files[2 * rank]) for rank in range(2)):
                return Check(name, None, f"still importing torch after {seconds:.0f} s", _BUSY)
            return Check(name, False, f"they did not meet within {seconds:.0f} s", _remedy(cuda))
        finally:
            for process in processes:
                process.kill()
                process.wait()
        said, errors = ([_read(file) for file in files[k::2]] for k in range(2))
    if any(statuses):
        last = next(error.splitlines()[-1] for error in [*errors, "no reason given"] if error)
        return Check(name, False, f"ended with status {next(filter(None, statuses))}: {last}", _remedy(cuda))
    found = json.loads(said[0].splitlines()[-1])
    right = found["order"] == [0, 0, 1, 1]
    told = f"gathered in order, {1000 * found['seconds']:.2f} ms for {of_ranks.ROWS}"
    return Check(name, right, told if right else f"order {found['order']}", "report it: this is a bug")


def _start(
    rank: int, cuda: bool, port: int, extra: Mapping[str, str], files: Sequence[Any]
) -> "subprocess.Popen[bytes]":
    joined = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "OMP_NUM_THREADS": 1}
    here = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, **({} if cuda else {"ACCELERATE_USE_CPU": "true"})}
    environment = os.environ | {key: str(value) for key, value in (joined | here).items()} | dict(extra)
    return subprocess.Popen([sys.executable, "-m", __name__], env=environment, stdout=files[0], stderr=files[1])


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _read(file: Any) -> str:
    file.seek(0)
    return str(file.read())


_BUSY = "see the load above, and whether the environment is on a slow disk; then run it again"


def _remedy(cuda: bool) -> str:
    if cuda:
        return (
            "set NCCL_DEBUG=INFO to see why; NCCL_P2P_DISABLE=1 or NCCL_SHM_DISABLE=1 if cards or containers are apart"
        )
    return "see the network name above; GLOO_SOCKET_IFNAME=lo on one machine, or the network's interface on several"


def _main() -> None:
    """What each of the two ranks does."""
    print("imported", flush=True)
    device = launcher.start(cpu=False, minutes=1).device
    order, seconds, _ = of_ranks.gathered(device)
    if ranks.rank() == 0:
        print(json_text({"order": order, "seconds": seconds}), flush=True)
    ranks.close()


if __name__ == "__main__":
    _main()
