"""Rows that are not finite, of any norm, frozen or missing; and what the losses import."""

import math
import subprocess
import sys

import pytest
import torch
from gloo import on_ranks

from sslcells import ranks
from sslcells.losses import (
    BarlowTwinsLoss,
    BatchAllTripletLoss,
    BatchHardTripletLoss,
    DCLLoss,
    HardNegativeLoss,
    MoCoLoss,
    NTXentLoss,
    PairLoss,
    SupConLoss,
    VICRegLoss,
    gather_with_grad,
    sound,
    unit,
)

LABELS = torch.tensor([0, 0, 1, 1, 2, 2, 3, -1])
SOURCES = torch.tensor([0, 0, 0, 1, 1, 2, 3, 3])


def with_ids(loss, source=None):
    return lambda z: loss(z, LABELS[: len(z)], None if source is None else source[: len(z)])


def of_views(loss):
    return lambda z: loss(*z.chunk(2))


LOSSES = {
    "nt_xent": of_views(NTXentLoss()),
    "nt_xent_sources": lambda z: NTXentLoss()(*z.chunk(2), torch.zeros(len(z) // 2, dtype=torch.int64)),
    "nt_xent_learned": of_views(NTXentLoss(learnable=True)),
    "decoupled": of_views(DCLLoss()),
    "hard_negatives": of_views(HardNegativeLoss(prior=0.1, beta=0.5)),
    "supcon": with_ids(SupConLoss()),
    "supcon_sources": with_ids(SupConLoss(), SOURCES),
    **{f"hard_{d}": with_ids(BatchHardTripletLoss(distance=d)) for d in ("euclidean", "sqeuclidean", "cosine")},
    "hard_soft": with_ids(BatchHardTripletLoss(soft=True), SOURCES),
    "semi_hard": with_ids(BatchHardTripletLoss(semi_hard=True)),
    "rank": with_ids(BatchHardTripletLoss(rank=3)),
    **{f"all_{d}": with_ids(BatchAllTripletLoss(distance=d)) for d in ("euclidean", "sqeuclidean", "cosine")},
    "pairs": with_ids(PairLoss()),
    "hinges": with_ids(PairLoss(squared=False, distance="cosine"), SOURCES),
    "vicreg": of_views(VICRegLoss()),
    "barlow": of_views(BarlowTwinsLoss()),
    "moco": of_views(MoCoLoss()),
    "moco_queue": lambda z: MoCoLoss()(*z.chunk(2), torch.eye(5)),
    "moco_repeated": lambda z: MoCoLoss()(*z.chunk(2), image=torch.zeros(len(z) // 2, dtype=torch.int64)),
}


def rows(seed=0):
    return torch.randn(8, 5, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", LOSSES)
def test_rows_that_are_not_finite_are_seen(name, bad):
    everything = slice(None)
    for row in (0, 3, 7, everything):  # one of a pair, of another, and one without a class
        for column in (everything, 2):
            z = rows()
            z[row, column] = bad
            z.requires_grad_()
            value = LOSSES[name](z)
            value.backward()
            assert not value.isfinite(), (row, column)
            assert not z.grad.isfinite().all(), (row, column)


@pytest.mark.parametrize("name", LOSSES)
def test_the_factor_changes_no_bit(name, monkeypatch):
    z = rows().requires_grad_()
    value = LOSSES[name](z)
    grad = torch.autograd.grad(value, z)[0]
    for module in ("contrastive", "triplet", "pairs", "moco"):
        monkeypatch.setattr(f"sslcells.losses.{module}.sound", lambda refs: 1)
    plain = LOSSES[name](z)
    assert torch.equal(value, plain)
    assert torch.equal(grad, torch.autograd.grad(plain, z)[0])


def of_rank_1():
    values = []
    for name in LOSSES:
        z = rows(seed=ranks.rank())
        if ranks.rank() == 1:
            z[7] = math.nan  # of moco it is a key: queries stay on their rank
        values.append(LOSSES[name](z).detach())
    return torch.stack(values).isfinite()


def test_every_rank_sees_the_row_of_one():
    zero, one = on_ranks(2, of_rank_1)
    assert not one.any()
    assert not zero.any()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e4])
def test_a_learned_temperature_that_is_no_number_is_seen(value):
    loss = NTXentLoss(learnable=True)
    torch.nn.init.constant_(loss.log_inv_t, value)
    assert loss(*rows().chunk(2)).isfinite() == math.isfinite(value)


def test_sound_is_1_or_nan():
    assert sound(torch.tensor([3e38, 3e38])).item() == sound(torch.empty(0, 3)).item() == 1
    assert all(sound(torch.tensor([0.0, x, 1.0])).isnan() for x in (math.nan, math.inf, -math.inf))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_of_any_norm_have_length_1(dtype):
    z, grad = rows().to(dtype), rows(seed=1).to(dtype)
    plain = z / z.norm(dim=1, keepdim=True)
    assert torch.equal(unit(z), plain)
    powers = (-100, -60, 0, 60, 120) if dtype == torch.float32 else (-1000, -500, 500, 1000)
    for power in powers:
        scaled = (z * 2.0**power).requires_grad_()
        got = unit(scaled)
        assert torch.equal(got, plain)
        got.backward(grad * 2.0 ** max(power, 0))
        assert scaled.grad.isfinite().all()
        assert scaled.grad.any()
    for norm in (1e-30, 1e30):
        torch.testing.assert_close(unit(z * norm), plain)
        for name, loss in LOSSES.items():
            if name not in ("vicreg", "barlow"):  # which are not of unit rows
                torch.testing.assert_close(loss(z.float() * norm), loss(z.float()), rtol=1e-4, atol=1e-5, msg=name)


def test_zero_rows_stay_zero_with_a_finite_gradient():
    z = torch.tensor([[0.0, 0.0], [1e-42, -1e-42], [3.0, 4.0]]).requires_grad_()
    unit(z).sum().backward()
    assert unit(z)[0].tolist() == [0, 0]
    assert z.grad.isfinite().all()


@pytest.mark.parametrize("loss", [NTXentLoss(learnable=True), DCLLoss(learnable=True), SupConLoss(learnable=True)])
def test_a_loss_learns_its_temperature_from_frozen_rows(loss):
    call = with_ids(loss) if isinstance(loss, SupConLoss) else of_views(loss)
    frozen, free = rows(), rows().requires_grad_()
    call(frozen).backward()
    alone, loss.log_inv_t.grad = loss.log_inv_t.grad, None
    call(free).backward()
    assert alone
    assert torch.equal(alone, loss.log_inv_t.grad)


BLOCKED = ["accelerate", "pydantic", "omegaconf", "timm", "kornia", "wandb", "sklearn", "torchvision", "PIL", "psutil"]
ALONE = f"""
import sys
for name in {BLOCKED}:
    sys.modules[name] = None  # importing it fails
import torch
import sslcells.losses as losses
z = torch.randn(8, 4, requires_grad=True)
ids = torch.arange(8) // 2
values = [losses.NTXentLoss(learnable=True)(z[:4], z[4:]), losses.SupConLoss()(z, ids), losses.MoCoLoss()(z, z + 1)]
values += [losses.BatchHardTripletLoss()(z, ids), losses.PairLoss()(z, ids), losses.VICRegLoss()(z[:4], z[4:])]
sum(values).backward()
assert z.grad.isfinite().all() and z.grad.any()
ours = sorted(name for name in sys.modules if name.startswith("sslcells"))
print(*(name for name in ours if not name.startswith("sslcells.losses")))
"""


def test_the_losses_need_torch_and_little_of_the_rest():
    done = subprocess.run([sys.executable, "-W", "error::ImportWarning", "-c", ALONE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["sslcells", "sslcells.errors", "sslcells.ranks"]


@pytest.mark.parametrize("name", LOSSES)
def test_no_rows_and_rows_of_no_numbers_are_named(name):
    for shape in ((0, 5), (6, 0)):
        with pytest.raises(ValueError, match=r"\(\d, \d\)|0 image"):
            LOSSES[name](torch.empty(shape, requires_grad=True))


def without_rows():
    errors = []
    for loss in (LOSSES["supcon"], LOSSES["pairs"], LOSSES["moco"], gather_with_grad):
        try:
            loss(torch.empty(0, 5))
        except ValueError as error:
            errors.append(str(error))
    return errors


def test_no_rows_on_any_rank_are_named_on_every_rank():
    for errors in on_ranks(2, without_rows):
        assert len(errors) == 4
        assert all("no rows" in error and "(0, 5)" in error for error in errors)


@pytest.mark.parametrize("name", [name for name in LOSSES if name not in ("vicreg", "barlow", "moco_queue")])
def test_one_image_has_nothing_to_learn(name):
    """No negative, or no positive: the loss is 0 with a zero gradient, but for what pulls a positive nearer."""
    z = rows()[:2].requires_grad_()
    value = LOSSES[name](z)
    value.backward()
    assert z.grad.isfinite().all()
    if name not in ("pairs", "hinges"):
        assert value.item() == pytest.approx(0, abs=1e-6)
        assert z.grad.abs().max() < 1e-6


@pytest.mark.parametrize("name", ["vicreg", "barlow"])
def test_one_image_has_no_statistics(name):
    with pytest.raises(ValueError, match="1 image"):
        LOSSES[name](rows()[:2])


def test_anchors_without_a_negative_are_left_out_of_the_decoupled_loss():
    z, source = rows(), torch.tensor([0, 0, 1, 1])
    assert DCLLoss()(*z.chunk(2), torch.zeros(4, dtype=torch.int64)).item() == 0
    few = DCLLoss()(z[:3], z[3:6], torch.tensor([0, 0, 0]))
    assert few.item() == 0
    assert DCLLoss()(*z.chunk(2), source).isfinite()


def test_mistakes_are_named():
    for call, message in (
        (lambda: gather_with_grad(rows(), 3), r"views=3; they are \(8, 5\)"),
        (lambda: gather_with_grad(rows(), 0), "views=0"),
        (lambda: unit(torch.ones(4)), r"\(4,\)"),
        (lambda: PairLoss(distance="manhattan"), "manhattan"),
        (lambda: BatchAllTripletLoss(distance="manhattan"), "manhattan"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
