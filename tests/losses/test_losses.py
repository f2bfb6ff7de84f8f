"""The losses in one process against the double loops of reference.py."""

import math

import pytest
import torch
from reference import batch_hard, contrastive, nt_xent, pairwise
from torch.utils._python_dispatch import TorchDispatchMode

from sslcells.losses import BatchHardTripletLoss, DCLLoss, HardNegativeLoss, NTXentLoss, SupConLoss
from sslcells.losses import torch_engine as engine

LABELS = [0, 1, 2, 0, 1, 2, 2, 2, 5, -1, -1, 0]
SOURCES = [0, 0, 1, 1, 2, 2, 3, 3, 3, 0, 4, 5]
LABS = [1, 2, 1, 1, 2, 2, 1, 2, 1, 2, 1, 3]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Tiles of 5 rows: every test crosses tile borders, with a ragged last one."""
    monkeypatch.setattr(engine, "tile_size", lambda refs: 5)


def rows(n, d=6, seed=0, dtype=torch.float64):
    z = torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=dtype) * 3
    return z.requires_grad_()


def agree(ours, reference, *leaves, tolerance=1e-11):
    torch.testing.assert_close(ours, reference.to(ours.dtype), rtol=tolerance, atol=tolerance)
    got = torch.autograd.grad(ours, leaves)
    want = torch.autograd.grad(reference, leaves)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("temperature", [1.0, 0.1, 0.03, 0.01])
@pytest.mark.parametrize("source", [None, [0, 0, 1, 2, 2, 2, 3]])
def test_nt_xent_is_the_papers(temperature, source):
    z0, z1 = rows(7, seed=1), rows(7, seed=2)
    ids = None if source is None else torch.tensor(source)
    agree(NTXentLoss(temperature)(z0, z1, ids), nt_xent(z0, z1, temperature, source), z0, z1)


@pytest.mark.parametrize("temperature", [0.5, 0.07, 0.02])
@pytest.mark.parametrize("source", [None, SOURCES])
def test_supcon_is_the_papers(temperature, source):
    z = rows(12)
    ids = None if source is None else torch.tensor(source)
    agree(SupConLoss(temperature)(z, torch.tensor(LABELS), ids), contrastive(z, LABELS, temperature, source), z)


@pytest.mark.parametrize("distance", ["euclidean", "sqeuclidean", "cosine"])
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("source", [None, SOURCES])
def test_batch_hard_is_the_papers(distance, soft, source):
    z = rows(12)
    loss = BatchHardTripletLoss(0.3, distance, soft)
    ids = None if source is None else torch.tensor(source)
    agree(loss(z, torch.tensor(LABELS), ids), batch_hard(z, LABELS, 0.3, distance, soft, source), z)


@pytest.mark.parametrize("temperature", [1.0, 0.1, 0.01])
@pytest.mark.parametrize("source", [None, [0, 0, 1, 2, 2, 2, 3]])
@pytest.mark.parametrize("lab", [[1, 1, 2, 2, 1, 3, 2], [0] * 7, [-1, -1, 2, 2, 2, 1, 1]])
def test_nt_xent_with_negatives_of_the_same_lab(temperature, source, lab):
    z0, z1 = rows(7, seed=1), rows(7, seed=2)
    ids = None if source is None else torch.tensor(source)
    want = nt_xent(z0, z1, temperature, source, lab)
    agree(NTXentLoss(temperature)(z0, z1, ids, torch.tensor(lab)), want, z0, z1)


@pytest.mark.parametrize("temperature", [0.5, 0.07, 0.02])
@pytest.mark.parametrize("source", [None, SOURCES])
def test_supcon_with_negatives_of_the_same_lab(temperature, source):
    z = rows(12)
    ids = None if source is None else torch.tensor(source)
    want = contrastive(z, LABELS, temperature, source, LABS)
    agree(SupConLoss(temperature)(z, torch.tensor(LABELS), ids, torch.tensor(LABS)), want, z)


@pytest.mark.parametrize("source", [None, SOURCES])
@pytest.mark.parametrize(("semi_hard", "rank"), [(False, 1), (True, 1), (False, 2)])
def test_batch_hard_with_negatives_of_the_same_lab(source, semi_hard, rank):
    z = rows(12)
    ids = None if source is None else torch.tensor(source)
    loss = BatchHardTripletLoss(0.3, semi_hard=semi_hard, rank=rank)
    want = batch_hard(z, LABELS, 0.3, "euclidean", source=source, semi_hard=semi_hard, rank=rank, lab=LABS)
    agree(loss(z, torch.tensor(LABELS), ids, torch.tensor(LABS)), want, z)


def test_one_lab_is_no_lab_to_the_last_bit():
    z0, z1, z, labels = rows(7, seed=1), rows(7, seed=2), rows(12), torch.tensor(LABELS)
    for loss, arguments in (
        (NTXentLoss(0.1), (z0, z1)),
        (DCLLoss(0.1), (z0, z1)),
        (SupConLoss(0.1), (z, labels)),
        (BatchHardTripletLoss(), (z, labels)),
    ):
        one = torch.full((len(arguments[0]),), 4)
        assert torch.equal(loss(*arguments), loss(*arguments, lab=one))


def test_labs_that_are_not_one_a_row_are_refused():
    z = rows(12)
    for loss in (SupConLoss(), BatchHardTripletLoss()):
        with pytest.raises(ValueError, match=r"lab must be \(12,\) integers; it is \(11,\)"):
            loss(z, torch.tensor(LABELS), lab=torch.tensor(LABS[1:]))


@pytest.mark.parametrize("temperature", [0.5, 0.1, 0.02])
def test_decoupled_is_the_papers(temperature):
    z0, z1 = rows(7, seed=1), rows(7, seed=2)
    agree(DCLLoss(temperature)(z0, z1), pairwise(z0, z1, temperature, "dcl"), z0, z1)


@pytest.mark.parametrize("temperature", [0.5, 0.1])
@pytest.mark.parametrize(("prior", "beta"), [(0.0, 0.0), (0.1, 0.0), (0.1, 1.0), (0.0, 0.5), (0.9, 0.0)])
def test_hard_negatives_are_the_papers(temperature, prior, beta):
    z0, z1 = rows(7, seed=1), rows(7, seed=2)
    loss = HardNegativeLoss(temperature, prior=prior, beta=beta)
    agree(loss(z0, z1), pairwise(z0, z1, temperature, "hard", prior, beta), z0, z1)


def test_hard_negatives_stay_finite_when_the_rows_coincide():
    z = torch.ones(8, 4, requires_grad=True)
    out = HardNegativeLoss(0.1, prior=0.3, beta=1.0)(z, z)
    out.backward()
    assert out.isfinite()
    assert z.grad.isfinite().all()


@pytest.mark.parametrize("scale", [0.05, 0.3])
def test_a_learned_temperature_has_its_gradient(scale):
    z0, z1 = rows(7, seed=1), rows(7, seed=2)
    labels = torch.tensor([0, 1, 0, 1, 2, 2, 2])
    for ours, theirs in (
        (lambda loss: loss(z0, z1), lambda t: nt_xent(z0, z1, t)),
        (lambda loss: loss(z0, labels), lambda t: contrastive(z0, labels.tolist(), t)),
    ):
        loss = (NTXentLoss if ours.__code__.co_freevars == ("z0", "z1") else SupConLoss)(scale, learnable=True).double()
        ours(loss).backward()
        t = torch.tensor(loss.temperature, dtype=torch.float64, requires_grad=True)
        (by_t,) = torch.autograd.grad(theirs(t), t)
        assert loss.log_inv_t.grad.item() == pytest.approx((-t * by_t).item(), rel=1e-6)


def test_top1_counts_anchors_whose_positive_is_nearest():
    z0, z1 = rows(20, 3, seed=1), rows(20, 3, seed=2)
    with torch.no_grad():
        z1[:12] = z0[:12] + 0.3 * z1[:12]
    loss = NTXentLoss()
    loss(z0, z1)
    z = torch.nn.functional.normalize(torch.cat([z0, z1]), dim=1)
    nearest = (z @ z.T - 2 * torch.eye(40)).argmax(1)
    assert loss.stats["top1"].item() == pytest.approx((nearest == (torch.arange(40) + 20) % 40).double().mean().item())


def test_top1_of_groups_counts_anchors_whose_nearest_row_is_a_positive():
    z, label = rows(60, 3, seed=1).detach(), torch.arange(60) % 4
    label[::7] = -1
    z += 2 * label[:, None].clamp_min(0) * torch.tensor([1.0, -1.0, 0.5])
    loss = SupConLoss()
    loss(z, label)
    unit = torch.nn.functional.normalize(z, dim=1)
    nearest = (unit @ unit.T - 2 * torch.eye(60)).argmax(1)
    right = (label[nearest] == label)[label >= 0].double().mean().item()
    assert 0.2 < right < 1
    assert loss.stats["top1"].item() == pytest.approx(right)


@pytest.mark.parametrize("source", [None, SOURCES])
@pytest.mark.parametrize(("semi_hard", "rank"), [(True, 1), (False, 2), (False, 5), (True, 3), (False, 99)])
def test_milder_negatives(source, semi_hard, rank):
    z = rows(12)
    loss = BatchHardTripletLoss(0.3, semi_hard=semi_hard, rank=rank)
    ids = None if source is None else torch.tensor(source)
    want = batch_hard(z, LABELS, 0.3, "euclidean", source=source, semi_hard=semi_hard, rank=rank)
    agree(loss(z, torch.tensor(LABELS), ids), want, z)


def test_nt_xent_is_supcon_with_the_image_as_id():
    z0, z1 = rows(9, seed=3), rows(9, seed=4)
    image = torch.arange(9).repeat(2)
    torch.testing.assert_close(NTXentLoss(0.2)(z0, z1), SupConLoss(0.2)(torch.cat([z0, z1]), image))


def test_gradcheck():
    z0, z1 = rows(4, 3, seed=5), rows(4, 3, seed=6)
    labels = torch.tensor([0, 1, 0, 1])
    assert torch.autograd.gradcheck(NTXentLoss(0.3), (z0, z1))
    assert torch.autograd.gradcheck(lambda z: SupConLoss(0.3)(z, labels), (z0,))
    assert torch.autograd.gradcheck(lambda z: BatchHardTripletLoss(0.5)(z, labels), (z0,))


@pytest.mark.parametrize("temperature", [0.5, 0.05])
def test_float32_is_near_float64(temperature):
    z0, z1 = (rows(40, 32, seed=s, dtype=torch.float32) for s in (7, 8))
    exact = nt_xent(z0.double(), z1.double(), temperature)
    agree(NTXentLoss(temperature)(z0, z1), exact, z0, z1, tolerance=2e-5)


def test_autocast_changes_nothing():
    z0, z1 = (rows(16, 32, seed=s, dtype=torch.float32) for s in (9, 10))
    labels = torch.arange(16) % 3
    losses = (
        lambda: NTXentLoss()(z0, z1),
        lambda: SupConLoss()(z0, labels),
        lambda: BatchHardTripletLoss()(z0, labels),
    )
    for loss in losses:
        plain = torch.autograd.grad(loss(), z0)[0]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(torch.autograd.grad(loss(), z0)[0], plain)


HARD_CASES = {
    "duplicates": (torch.ones(6, 4).cumsum(0)[[0, 0, 1, 1, 2, 2]], [0, 0, 1, 1, 2, 2]),
    "collapsed": (torch.ones(6, 4), [0, 0, 1, 1, 2, 2]),
    "zero rows": (torch.zeros(6, 4), [0, 0, 1, 1, 2, 2]),
    "one zero row": (torch.eye(6, 4), [0, 0, 1, 1, 2, 2]),
    "one class": (torch.randn(6, 4, generator=torch.Generator().manual_seed(0)), [3] * 6),
    "singletons": (torch.randn(6, 4, generator=torch.Generator().manual_seed(0)), [0, 1, 2, 3, 4, 5]),
    "unknown": (torch.randn(6, 4, generator=torch.Generator().manual_seed(0)), [-1] * 6),
}


@pytest.mark.parametrize("case", HARD_CASES)
@pytest.mark.parametrize("temperature", [0.1, 0.01])
def test_hard_cases_stay_finite(case, temperature):
    value, labels = HARD_CASES[case]
    ids = torch.tensor(labels)
    for loss in (
        lambda z: SupConLoss(temperature)(z, ids),
        lambda z: SupConLoss(temperature)(z, ids, torch.zeros(6, dtype=torch.int64)),
        lambda z: BatchHardTripletLoss()(z, ids),
        lambda z: BatchHardTripletLoss(soft=True, distance="cosine")(z, ids),
        lambda z: NTXentLoss(temperature)(z[:3], z[3:]),
        lambda z: NTXentLoss(temperature)(z[:3], z[3:], torch.zeros(3, dtype=torch.int64)),
    ):
        z = value.clone().requires_grad_()
        out = loss(z)
        out.backward()
        assert out.isfinite()
        assert z.grad.isfinite().all()


@pytest.mark.parametrize("case", ["singletons", "unknown"])
def test_no_valid_anchor_is_zero(case):
    value, labels = HARD_CASES[case]
    for loss in (SupConLoss(), BatchHardTripletLoss()):
        z = value.clone().requires_grad_()
        out = loss(z, torch.tensor(labels))
        out.backward()
        assert out.item() == 0
        assert not z.grad.any()


def test_known_values():
    z = torch.ones(8, 3)
    assert NTXentLoss(0.2)(z, z).item() == pytest.approx(math.log(15), abs=1e-5)
    assert BatchHardTripletLoss(0.37)(z, torch.arange(8) // 2).item() == pytest.approx(0.37)
    opposite = torch.tensor([[1.0, 0], [1, 0], [-1, 0], [-1, 0]])
    loss = BatchHardTripletLoss(0.2)
    assert loss(opposite, torch.tensor([0, 0, 1, 1])).item() == 0
    assert loss.stats["active"].item() == 0
    assert loss.stats["negative_distance"].item() == pytest.approx(2)


def test_stats_are_the_mean_cosines():
    z0, z1 = rows(6, seed=11), rows(6, seed=12)
    loss = NTXentLoss()
    loss(z0, z1)
    z = torch.nn.functional.normalize(torch.cat([z0, z1]), dim=1)
    cosine = (z @ z.T).fill_diagonal_(0)
    assert loss.stats["reference_cosine"].item() == pytest.approx((cosine.sum() / (12 * 11)).item())
    assert loss.stats["positive_cosine"].item() == pytest.approx(cosine.diagonal(6).mean().item())
    assert not loss.stats["positive_cosine"].requires_grad


def test_ties_go_to_the_lowest_index():
    z = torch.tensor([[1.0, 0], [0, 1], [0, 1], [-1, 0], [-1, 0], [0, 1], [0.6, 0.8], [0.6, 0.8]])
    code = torch.tensor([0, 0, 0, 0, 0, 1, 1, 2], dtype=torch.int32)
    far, near = engine.hardest(z, 0, 8, code, None)
    assert far.tolist() == [3, 0, 0, 0, 0, 6, 5, -1]
    assert near.tolist() == [6, 5, 5, 5, 5, 1, 7, 6]


class Largest(TorchDispatchMode):
    """The largest tensor that any operation returns."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else [out]:
            if isinstance(x, torch.Tensor):
                self.numel = max(self.numel, x.untyped_storage().nbytes() // x.element_size())
        return out


@pytest.mark.parametrize("name", ["nt_xent", "supcon", "batch_hard"])
def test_memory_is_linear(name, monkeypatch):
    """No tensor of a step is larger than a few times the rows or a tile; saved bytes double with N."""
    monkeypatch.setattr(engine, "tile_size", lambda refs: 128)
    saved = []
    for n in (1024, 2048):
        z = torch.randn(n, 16, requires_grad=True)
        labels = torch.arange(n) % (n // 4)
        loss = {
            "nt_xent": lambda z: NTXentLoss()(*z.chunk(2)),
            "supcon": lambda z, labels=labels: SupConLoss()(z, labels),
            "batch_hard": lambda z, labels=labels: BatchHardTripletLoss()(z, labels),
        }[name]
        kept = []
        hooks = torch.autograd.graph.saved_tensors_hooks(lambda x, kept=kept: kept.append(x.nbytes) or x, lambda x: x)
        with Largest() as largest, hooks:
            loss(z).backward()
        assert largest.numel <= max(128 * 128, 4 * n * 16)
        saved.append(sum(kept))
    assert saved[1] < 2.1 * saved[0]


def test_mistakes_are_named():
    z = torch.randn(4, 3)
    with pytest.raises(ValueError, match=r"\(4, 3\) and \(5, 3\)"):
        NTXentLoss()(z, torch.randn(5, 3))
    with pytest.raises(ValueError, match=r"positive must be \(4,\) integers"):
        SupConLoss()(z, torch.arange(5))
    with pytest.raises(ValueError, match=r"temperature=0\.0"):
        NTXentLoss(0.0)
    with pytest.raises(ValueError, match="manhattan"):
        BatchHardTripletLoss(distance="manhattan")
    with pytest.raises(ValueError, match="margin=-1"):
        BatchHardTripletLoss(margin=-1)
