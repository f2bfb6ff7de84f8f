"""The cost of a step apart from the network, for several numbers of ranks: computed, and measured with gloo ranks.

  python benchmarks/ranks.py --ranks 1 2 4 --out benchmarks/RESULTS.md

The computed rows hold for any interconnect. Every rank has the same number of images, with two views each.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from _measure import markdown, section, show
from torch import nn
from torch.nn.functional import normalize

from sslcells import models, ranks
from sslcells.config import Model
from sslcells.losses import NTXentLoss

WIDTH = 128


def paper(world: int, images: int, parameters: int, norms: list[int]) -> list[str]:
    """Of each rank and step: what it receives and computes; bytes in MiB, operations in units of 10⁹."""
    rows = 2 * images * world
    others = (world - 1) / world
    gather = others * rows * (4 * WIDTH + 4 * 2)
    gradients = 2 * others * parameters * 4
    batch_norm = world * sum(4 * (2 * c + 1) for c in norms) + 2 * others * sum(4 * 2 * c for c in norms)
    operations = 6 * (2 * images) * rows * WIDTH
    figures = [gather / 2**20, operations / 1e9, gradients / 2**20, batch_norm / 2**20]
    return [f"{world:,}", f"{images * world:,}", f"{rows - 2:,}", *(f"{figure:,.3g}" for figure in figures)]


def measured(images: int, repeats: int) -> tuple[float, float, float, float]:
    """On a rank: seconds of a step's vote, of a gather of rows, and of the loss with its backward; its error."""
    torch.manual_seed(ranks.rank())
    z = torch.randn(2 * images, WIDTH, requires_grad=True)
    loss = NTXentLoss(0.1)

    def step() -> None:
        z.grad = None
        loss(*z.chunk(2)).backward()

    calls = (lambda: ranks.largest(0), lambda: ranks.gather(z), step)
    taken = []
    for call in calls:
        call()
        ranks.barrier()
        # The same number of calls on every rank, or one would wait for the others for ever.
        taken.append(min(_timed(call) for _ in range(repeats)))
    step()
    assert z.grad is not None
    return (*taken, _error(z, z.grad))


def _timed(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def _error(z: torch.Tensor, grad: torch.Tensor) -> float:
    """Relative error of a rank's gradient against one process in float64 over the rows of all."""
    world, count = ranks.world(), len(z) // 2
    views = ranks.gather(z.detach().double()).view(world, 2, count, WIDTH).transpose(0, 1).flatten(1, 2)
    views = views.clone().requires_grad_()
    rows = normalize(views.flatten(0, 1), dim=1)
    logits = (rows @ rows.T / 0.1).fill_diagonal_(-torch.inf)
    nn.functional.cross_entropy(logits, torch.arange(len(rows)).roll(len(rows) // 2)).backward()
    assert views.grad is not None
    own = views.grad.view(2, world, count, WIDTH)[:, ranks.rank()].flatten(0, 1) * world
    return ((grad - own).norm() / own.norm()).item()


def on_rank(rank: int, world: int, store: str, images: int, repeats: int, out: str) -> None:
    """Join the group, measure, and write what was found."""
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // world))
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    found = torch.tensor(measured(images, repeats), dtype=torch.float64)
    slowest = ranks.gather(found[None]).amax(0)
    if rank == 0:
        torch.save(slowest, out)
    ranks.close()


def main() -> None:
    """Counts, measures, prints the tables and appends them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--images", type=int, default=512, help="of a rank")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--out", type=Path, metavar="FILE", help="also append the section to this file")
    args = parser.parse_args()
    encoder = models.build(Model(backbone="resnet18"), 3)
    parameters = sum(p.numel() for p in encoder.parameters())
    norms = [m.num_features for m in encoder.modules() if isinstance(m, nn.BatchNorm2d)]
    columns = ["ranks", "global batch", "negatives per anchor", "rows received, MiB", "loss, 10⁹ operations"]
    columns += ["gradients received (ResNet-18), MiB", "SyncBatchNorm received, MiB"]
    rows = [paper(world, args.images, parameters, norms) for world in (*args.ranks, 8, 64, 1024)]
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for world in args.ranks:
            out = f"{folder}/{world}.pt"
            arguments = world, f"{folder}/store-{world}", args.images, args.repeats, out
            mp.spawn(on_rank, arguments, nprocs=world)
            *taken, error = torch.load(out).tolist()
            rate = 6 * (2 * args.images) ** 2 * world * WIDTH / taken[2] / 1e9
            figures = [*(f"{1e3 * t:.3g}" for t in taken), f"{rate:.3g}", f"{error:.1e}"]
            found.append([str(world), f"{args.images * world:,}", *figures])
    heads = ["ranks", "global batch", "vote, ms", "gather, ms", "loss, ms", "10⁹ operations/s a rank", "gradient error"]
    notes = (
        f"{args.images} images a rank, two views, rows of {WIDTH}. On paper, of a rank and a step; SyncBatchNorm has "
        f"{2 * len(norms)} collectives a step, the loss two gathers and the vote one, on the CPUs. Measured: the best "
        f"of {args.repeats} calls of the slowest rank; the ranks share the cores."
    )
    text = section("Ranks", "cpu", notes, [markdown(columns, rows), markdown(heads, found)])
    show(text, args.out)


if __name__ == "__main__":
    main()
