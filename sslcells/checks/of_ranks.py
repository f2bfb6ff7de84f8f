"""Whether the ranks that were launched are connected, each with a device, and how fast they gather."""

import socket
import time
from collections.abc import Iterator

import torch

from sslcells import launcher, ranks
from sslcells.checks import Check


def devices(device: torch.device) -> Iterator[Check]:
    """As many ranks as were launched, each with a device of its own, all of one kind."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    everyone = ranks.all_ranks((socket.gethostname(), name, str(device)))
    launched, started = launcher.launched_world(), ranks.world()
    hosts = sorted({host for host, _, _ in everyone})
    yield Check(
        "ranks",
        launched == started,
        f"{started} on {', '.join(hosts)}",
        f"{launched} were configured: see the launcher's file; MULTI_CPU needs mpirun, launch/cpu2.yaml does not",
    )
    kinds = sorted({name for _, name, _ in everyone})
    shared = device.type == "cuda" and len({(h, d) for h, _, d in everyone}) < len(everyone)
    yield Check(
        "devices",
        len(kinds) == 1 and not shared,
        ", ".join(kinds),
        "give each rank a device of its own, all of one kind",
    )


def gather(device: torch.device) -> Iterator[Check]:
    """Rows arrive in rank order; how fast."""
    world = ranks.world()
    order, seconds, received = gathered(device)
    right = order == [r for r in range(world) for _ in range(2)]
    yield Check("gather, order", right, "rows come in rank order" if right else str(order), "report it: this is a bug")
    speed = f"{received / 2**30 / seconds:.2f} GiB/s a rank, {1000 * seconds:.2f} ms for {ROWS}"
    yield Check("gather, bandwidth", True, speed if world > 1 else "one rank: nothing to send", "")


def gathered(device: torch.device) -> tuple[list[int], float, int]:
    """The ranks of gathered rows, two of each, as they came; seconds to gather ROWS, and bytes one rank receives."""
    order = ranks.gather(torch.full((2,), ranks.rank(), device=device)).tolist()
    rows = torch.zeros(8192, 128, device=device)
    ranks.gather(rows)
    _finish(device)
    began = time.perf_counter()
    for _ in range(5):
        ranks.gather(rows)
    _finish(device)
    return order, (time.perf_counter() - began) / 5, rows.nbytes * (ranks.world() - 1)


ROWS = "8,192 rows of 128 a rank"


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    ranks.barrier()
