"""N ranks = one process: parameter gradients through DDP against the double loops on the whole batch, in float64."""

from types import SimpleNamespace

import pytest
import torch
from gloo import on_ranks
from reference import batch_hard, contrastive, nt_xent, pairwise
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from sslcells import ranks
from sslcells.losses import BatchHardTripletLoss, HardNegativeLoss, NTXentLoss, SupConLoss, _contrast, _rows, triplet
from sslcells.losses import contrastive as module
from sslcells.losses import torch_engine as engine

IMAGES, D = 6, 5
LABELS = torch.tensor([0, 1, 0, 2, 1, 3, 0, 1, 2, 2, 4, 0, 1, -1, 0, 5, 2, 1, 0, 3, 1, 2, 0, -1])
SOURCES = torch.arange(24) // 2 % 7
LABS = torch.arange(24) * 7 % 5 // 2


def network():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, D)).double()


def images(world):
    return torch.randn(2, world * IMAGES, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(world))


def ours(name, net, x, rows):
    """The loss of one rank's images x (2, B, 4); `rows` picks their labels and sources."""
    z0, z1 = net(x.flatten(0, 1)).chunk(2)
    return {
        "nt_xent": lambda: NTXentLoss(0.2)(z0, z1),
        "nt_xent_sources": lambda: NTXentLoss(0.2)(z0, z1, SOURCES[rows]),
        "nt_xent_labs": lambda: NTXentLoss(0.2)(z0, z1, lab=LABS[rows]),
        "supcon_labs": lambda: SupConLoss(0.1)(z0, LABELS[rows], SOURCES[rows], LABS[rows]),
        "batch_hard_labs": lambda: BatchHardTripletLoss(0.4)(z0, LABELS[rows], lab=LABS[rows]),
        "hard_negatives": lambda: HardNegativeLoss(0.3, prior=0.05, beta=0.5)(z0, z1),
        "supcon": lambda: SupConLoss(0.15)(z0, LABELS[rows]),
        "supcon_sources": lambda: SupConLoss(0.02)(z0, LABELS[rows], SOURCES[rows]),
        "batch_hard": lambda: BatchHardTripletLoss(0.4)(z0, LABELS[rows]),
        "semi_hard": lambda: BatchHardTripletLoss(0.4, semi_hard=True, rank=2)(z0, LABELS[rows]),
        "batch_hard_soft": lambda: BatchHardTripletLoss(distance="cosine", soft=True)(z0, LABELS[rows], SOURCES[rows]),
    }[name]()


def oracle(name, net, x):
    z0, z1 = net(x.flatten(0, 1)).chunk(2)
    labels, sources, labs = (ids[: len(z0)].tolist() for ids in (LABELS, SOURCES, LABS))
    return {
        "nt_xent": lambda: nt_xent(z0, z1, 0.2),
        "nt_xent_sources": lambda: nt_xent(z0, z1, 0.2, sources),
        "nt_xent_labs": lambda: nt_xent(z0, z1, 0.2, lab=labs),
        "supcon_labs": lambda: contrastive(z0, labels, 0.1, sources, labs),
        "batch_hard_labs": lambda: batch_hard(z0, labels, 0.4, "euclidean", lab=labs),
        "hard_negatives": lambda: pairwise(z0, z1, 0.3, "hard", 0.05, 0.5),
        "supcon": lambda: contrastive(z0, labels, 0.15),
        "supcon_sources": lambda: contrastive(z0, labels, 0.02, sources),
        "batch_hard": lambda: batch_hard(z0, labels, 0.4, "euclidean"),
        "semi_hard": lambda: batch_hard(z0, labels, 0.4, "euclidean", semi_hard=True, rank=2),
        "batch_hard_soft": lambda: batch_hard(z0, labels, 0, "cosine", True, sources),
    }[name]()


LOSSES = [
    "nt_xent",
    "nt_xent_sources",
    "nt_xent_labs",
    "supcon_labs",
    "batch_hard_labs",
    "hard_negatives",
    "supcon",
    "supcon_sources",
    "batch_hard",
    "batch_hard_soft",
    "semi_hard",
]


def without_world(monkeypatch):
    """The loss forgets that DDP divides by the world."""
    for m in (_contrast, module, triplet):
        monkeypatch.setattr(m, "ranks", SimpleNamespace(**{**vars(ranks), "world": lambda: 1}))


def swapped(monkeypatch):
    """Ranks are gathered in the wrong order."""
    gather = ranks.gather
    monkeypatch.setattr(ranks, "gather", lambda x: gather(x).unflatten(0, (-1, len(x))).flip(0).flatten(0, 1))


def local_only(monkeypatch):
    """Every rank sees its own rows as everyone's."""
    monkeypatch.setattr(ranks, "gather", lambda x: x.detach())
    monkeypatch.setattr(ranks, "rank", lambda: 0)


def no_columns(monkeypatch):
    """The gradient of a row as everyone else's reference is forgotten."""
    plain = engine.weighted_rows

    def rows_only(refs, offset, count, inv_t, weight, exclude):
        own = torch.zeros_like(weight)
        own[offset : offset + count] = weight[offset : offset + count]
        return plain(refs, offset, count, inv_t, own, exclude)

    monkeypatch.setattr(engine, "weighted_rows", rows_only)


def step(name, plant=None):
    """On a rank: the mean loss over ranks, and the parameter gradients."""
    patch = pytest.MonkeyPatch()
    patch.setattr(engine, "tile_size", lambda refs: 4)
    if plant is not None:
        plant(patch)
    try:
        net = DistributedDataParallel(network())
        world, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
        rows = slice(rank * IMAGES, (rank + 1) * IMAGES)
        loss = ours(name, net, images(world)[:, rows], rows)
        loss.backward()
    finally:
        patch.undo()
    values = ranks.gather(loss[None])
    return values.mean().item(), [p.grad for p in net.parameters()]


def error(name, world, plant=None):
    """Largest relative deviation of any rank's parameter gradients, and of the mean loss, from one process."""
    net = network()
    loss = oracle(name, net, images(world))
    want = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(net.parameters()))])
    worst = 0.0
    for value, grads in on_ranks(world, step, name, plant):
        got = torch.cat([g.flatten() for g in grads])
        worst = max(worst, ((got - want).norm() / want.norm()).item(), abs(value / loss.item() - 1))
    return worst


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("name", LOSSES)
def test_ranks_equal_one_process(name, world):
    assert error(name, world) < 1e-12


@pytest.mark.parametrize("plant", [without_world, swapped, local_only])
@pytest.mark.parametrize("name", ["nt_xent", "supcon", "batch_hard"])
def test_planted_mistakes_are_found(name, plant):
    assert error(name, 3, plant) > 1e-3


@pytest.mark.parametrize("name", ["nt_xent", "supcon"])
def test_a_missing_column_term_is_found(name):
    assert error(name, 2, no_columns) > 1e-3


def mined():
    """On a rank: the triplets that it mines for its rows."""
    world, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    z = nn.functional.normalize(torch.randn(24, D, generator=torch.Generator().manual_seed(1)), dim=1)
    z[5] = z[17] = z[9]
    count = 24 // world
    return engine.hardest(z, rank * count, count, _rows.codes(LABELS), None)


def test_the_same_triplets_for_any_number_of_ranks():
    want = torch.stack(on_ranks(1, mined)[0])
    for world in (2, 3, 4):
        assert torch.equal(torch.cat([torch.stack(m) for m in on_ranks(world, mined)], 1), want)


def ragged():
    rank = torch.distributed.get_rank()
    try:
        NTXentLoss()(torch.randn(3 + rank, 4), torch.randn(3 + rank, 4))
    except ValueError as error:
        return str(error)
    return "no error"


def test_different_numbers_of_rows_are_named_on_every_rank():
    for message in on_ranks(3, ragged):
        assert "[6, 8, 10]" in message


def unlabelled_rank():
    rank = torch.distributed.get_rank()
    z = torch.randn(4, 3, generator=torch.Generator().manual_seed(rank), requires_grad=True)
    labels = torch.tensor([-1, -1, -1, -1] if rank == 0 else [0, 0, 1, 1])
    values = []
    for loss in (SupConLoss(), BatchHardTripletLoss()):
        out = loss(z, labels)
        out.backward()
        values.append(out.item())
    return values, z.grad


def test_a_rank_without_valid_anchors_takes_part():
    (values, grad), (others, _) = on_ranks(2, unlabelled_rank)
    assert values == [0, 0]
    assert all(v > 0 for v in others)
    assert grad.isfinite().all()
    assert grad.any(), "rows without positives are still negatives of other ranks' anchors"


def once(name):
    return step(name)[1]


def test_the_same_bits_from_run_to_run():
    for name in ("nt_xent", "batch_hard"):
        first, second = (on_ranks(2, once, name)[0] for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
