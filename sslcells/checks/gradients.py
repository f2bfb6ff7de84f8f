"""Whether ranks compute the gradients and random numbers of one process, and the kernels what torch does."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sslcells import ranks
from sslcells.augment import Draws
from sslcells.checks import Check
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


def randomness() -> Iterator[Check]:
    """The network's random numbers differ between ranks; the augmentation's depend on the image alone."""
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


def gradients(prepare: Callable[[nn.Module], nn.Module], device: torch.device) -> Iterator[Check]:
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


def kernels(device: torch.device) -> Iterator[Check]:
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
