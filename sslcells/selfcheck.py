"""Does this machine or cluster compute correct gradients? `accelerate launch -m sslcells.selfcheck`, under a minute."""

import argparse
import socket
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

from sslcells import __version__, commandline, launcher, ranks
from sslcells.augment import Draws
from sslcells.config import load
from sslcells.losses import (
    BarlowTwinsLoss,
    BatchHardTripletLoss,
    DCLLoss,
    MoCoLoss,
    NTXentLoss,
    SupConLoss,
    VICRegLoss,
    engine,
    torch_engine,
)
from sslcells.train import stream

IMAGES, WIDTH = 32, 32
"""Images a rank brings to each loss, and width of their rows."""


class Check(NamedTuple):
    """One line of the table."""

    name: str
    passed: bool
    found: str
    remedy: str


def selfcheck() -> bool:
    """Run every check on every rank, print the table on rank 0, and return True on all ranks if all passed."""
    accelerator = launcher.accelerator(load(None, ["out=."]))
    device = accelerator.device
    began = time.perf_counter()
    checks = [*_devices(device), *_gather(device), *_randomness(), *_gradients(accelerator.prepare, device)]
    if device.type == "cuda":
        checks += list(_kernels(device))
    if accelerator.is_main_process:
        _print(checks, time.perf_counter() - began)
    return all(check.passed for check in checks)


def _devices(device: torch.device) -> Iterator[Check]:
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


def _gather(device: torch.device) -> Iterator[Check]:
    world, rank = ranks.world(), ranks.rank()
    order = ranks.gather(torch.full((2,), rank, device=device)).tolist()
    right = order == [r for r in range(world) for _ in range(2)]
    yield Check("gather, order", right, "rows come in rank order" if right else str(order), "report it: this is a bug")
    rows = torch.zeros(8192, 128, device=device)
    ranks.gather(rows)
    _finish(device)
    began = time.perf_counter()
    for _ in range(5):
        ranks.gather(rows)
    _finish(device)
    seconds = (time.perf_counter() - began) / 5
    received = rows.nbytes * (world - 1) / 2**30
    speed = f"{received / seconds:.2f} GiB/s a rank, {1000 * seconds:.2f} ms for 8,192 rows of 128 a rank"
    yield Check("gather, bandwidth", True, speed if world > 1 else "one rank: nothing to send", "")


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    ranks.barrier()


def _randomness() -> Iterator[Check]:
    seeds = ranks.all_ranks(stream(0, 0, ranks.rank()))
    differ = len(set(seeds)) == len(seeds)
    yield Check(
        "network's random numbers", differ, "differ between ranks" if differ else "the same", "report it: a bug"
    )
    drawn = ranks.all_ranks(Draws(0, 3, torch.arange(64), 2).uniform().tolist())
    same = all(d == drawn[0] for d in drawn)
    found = "the same for the same image on every rank" if same else "depend on the rank"
    yield Check(
        "augmentation's random numbers", same, found, "report it: this is a bug, or the ranks' torch versions differ"
    )


def _gradients(prepare: Callable[[nn.Module], nn.Module], device: torch.device) -> Iterator[Check]:
    """Parameter gradients through DDP against float64 on the whole batch, with nothing tiled and nothing gathered."""
    world, rank = ranks.world(), ranks.rank()
    x = torch.randn(2, world * IMAGES, 16, generator=torch.Generator().manual_seed(1))
    label = torch.arange(world * IMAGES) % 5
    own = slice(rank * IMAGES, (rank + 1) * IMAGES)
    here, ids = x[:, own].flatten(0, 1).to(device), label[own].repeat(2).to(device)
    losses: dict[str, Callable[[Tensor], Tensor]] = {
        "NT-Xent": lambda z: NTXentLoss(0.2)(*z.chunk(2)),
        "decoupled": lambda z: DCLLoss(0.2)(*z.chunk(2)),
        "SupCon": lambda z: SupConLoss(0.2)(z, ids),
        "batch-hard triplet": lambda z: BatchHardTripletLoss(0.5)(z, ids),
        "MoCo": lambda z: MoCoLoss(0.2)(*z.chunk(2)),
        "VICReg": lambda z: VICRegLoss()(*z.chunk(2)),
        "Barlow Twins": lambda z: BarlowTwinsLoss()(*z.chunk(2)),
    }
    for name, loss in losses.items():
        torch.manual_seed(0)
        plain = nn.Linear(16, WIDTH, bias=False)
        whole = plain.weight.detach().double().requires_grad_()
        (expected,) = torch.autograd.grad(_dense(name, x.flatten(0, 1).double() @ whole.T, label.repeat(2)), whole)
        network = prepare(plain)
        torch.autograd.backward(loss(network(here)))
        (weight,) = network.parameters()
        assert weight.grad is not None
        error = ((weight.grad.cpu().double() - expected).norm() / expected.norm()).item()
        worst = max(ranks.all_ranks(error))
        limit = 5e-3 if device.type == "cuda" else 1e-5
        yield Check(
            f"gradient of {name}",
            worst < limit,
            f"{world} rank(s) against one process: {worst:.1e} of its norm",
            f"above {limit:g}: the ranks do not compute one global batch; report it with this table",
        )


def _dense(name: str, z: Tensor, label: Tensor) -> Tensor:
    """The loss of the whole batch from the whole matrix, in float64."""
    if name in {"VICReg", "Barlow Twins"}:
        return _of_dimensions(name, *z.chunk(2))
    z = F.normalize(z, dim=1)
    if name == "MoCo":
        first, second = z.chunk(2)
        return F.cross_entropy(first @ second.detach().T / 0.2, torch.arange(len(first)))
    itself = torch.eye(len(z), dtype=torch.bool)
    image = torch.arange(len(z) // 2).repeat(2)
    same = (image[:, None] == image if name in {"NT-Xent", "decoupled"} else label[:, None] == label) & ~itself
    if name == "batch-hard triplet":
        distance = torch.cdist(z, z)
        far = distance.masked_fill(~same, -1).amax(1)
        near = distance.masked_fill(same | itself, 9).amin(1)
        return (far - near + 0.5).clamp_min(0).mean()
    logits = z @ z.T / 0.2
    counted = ~itself & ~same if name == "decoupled" else ~itself
    log_sum = logits.masked_fill(~counted, -torch.inf).logsumexp(1)
    return (log_sum - (logits * same).sum(1) / same.sum(1)).mean()


def _of_dimensions(name: str, z0: Tensor, z1: Tensor) -> Tensor:
    """The losses on the dimensions of the rows, as `_dense`."""
    if name == "Barlow Twins":
        a, b = ((z - z.mean(0)) / (z.var(0, correction=0) + 1e-5).sqrt() for z in (z0, z1))
        c = a.T @ b / len(a)
        return (1 - c.diagonal()).square().sum() + 0.005 * (c - c.diagonal().diag()).square().sum()
    loss = 25 * F.mse_loss(z0, z1)
    for z in (z0, z1):
        c = z.T.cov()
        loss = loss + 25 * (1 - (c.diagonal() + 1e-4).sqrt()).clamp_min(0).mean()
        loss = loss + (c - c.diagonal().diag()).square().sum() / len(c)
    return loss


def _kernels(device: torch.device) -> Iterator[Check]:
    """The fused kernels against the torch engine in float64."""
    refs = F.normalize(torch.randn(4096, 128, generator=torch.Generator().manual_seed(2)), dim=1).to(device)
    partner = torch.arange(4096, device=device).roll(2048)
    exclude = torch_engine.Exclude(partner)
    at = refs.double(), 1024, 2048, 10.0
    sums = torch_engine.row_sums(*at, exclude).total
    fused = engine.row_sums(refs, *at[1:], exclude, None, "bf16").total
    weight = torch.rand(4096, device=device)
    rows = torch_engine.weighted_rows(*at, weight.double(), exclude)
    fused_rows = engine.weighted_rows(refs, *at[1:], weight, exclude, "bf16")
    pairs = (("row sums", fused, sums), ("weighted rows", fused_rows, rows))
    for name, ours, exact in pairs:
        error = ((ours - exact).norm() / exact.norm()).item()
        remedy = "the kernel is wrong on this device: report it with the versions of torch and triton"
        yield Check(f"kernel, {name}", error < 5e-3, f"bf16 against float64: {error:.1e}", remedy)
    group = (torch.arange(4096, device=device) % 512).int()
    same = [
        torch.equal(a, b)
        for a, b in zip(
            engine.hardest(refs, 1024, 2048, group, None, "exact"),
            torch_engine.hardest(at[0], 1024, 2048, group, None),
            strict=True,
        )
    ]
    yield Check(
        "kernel, mining", all(same), "the same pairs" if all(same) else "other pairs", "report it with the versions"
    )


def _print(checks: list[Check], seconds: float) -> None:
    table = Table(title=f"sslcells {__version__} selfcheck, {seconds:.1f} s", title_justify="left")
    for heading in ("check", "result", "found", "what to do"):
        table.add_column(heading, overflow="fold")
    for c in checks:
        mark = "[green]pass[/]" if c.passed else "[bold red]FAIL[/]"
        table.add_row(c.name, mark, c.found, "" if c.passed else c.remedy)
    Console().print(table)


def command(args: argparse.Namespace) -> None:
    """`sslcells selfcheck`."""
    if not selfcheck():
        raise SystemExit(1)


if __name__ == "__main__":
    raise SystemExit(commandline.run("selfcheck", command))
