"""Siamese heads: who is paired with whom, and that the concatenating judge is not symmetric."""

import pytest
import torch
from test_contract import Images

from sslcells import methods
from sslcells.config import PLUGINS
from sslcells.data import Batch
from sslcells.methods.siamese import partners

LABEL = torch.tensor([2, 0, 0, 1, 2, 2, 0, 3, 0, 2])


def build(judge):
    torch.manual_seed(0)
    return methods.build(PLUGINS["method"].config("siamese")(judge=judge, dimension=8), 10, Images())


def test_the_concatenating_judge_depends_on_who_asks():
    a, b = torch.randn(2, 5, 8)
    concat = build("concat")
    assert (concat.judge(a, b) - concat.judge(b, a)).abs().min() > 1e-4
    for judge in ("difference", "cosine"):
        method = build(judge)
        assert torch.equal(method.judge(a, b), method.judge(b, a))


def test_partners_are_drawn_evenly():
    met = torch.zeros(2, 10, 10)
    for seed in range(600):
        chosen, exists = partners(LABEL, None, torch.Generator().manual_seed(seed))
        assert exists.tolist() == [[label in (0, 2) for label in LABEL.tolist()], [True] * 10]
        for kind in range(2):
            met[kind, torch.arange(10)[exists[kind]], chosen[kind][exists[kind]]] += 1
    same = (LABEL[:, None] == LABEL) & ~torch.eye(10, dtype=torch.bool)
    for seen, allowed in zip(met, (same, LABEL[:, None] != LABEL), strict=True):
        share = seen / seen.sum(1, keepdim=True).clamp_min(1)
        torch.testing.assert_close(share, allowed / allowed.sum(1, keepdim=True).clamp_min(1), rtol=0, atol=0.08)


def test_a_negative_of_the_same_source_does_not_count():
    _, exists = partners(LABEL, torch.zeros(10, dtype=torch.int64), torch.Generator().manual_seed(0))
    assert not exists[1].any()
    assert exists[0].sum() == 8


@pytest.mark.parametrize("judge", ["concat", "difference", "cosine"])
def test_the_loss_by_hand(judge):
    """Two images of two views: each row's positive is its other view, its negative a row of the other image."""
    method = build(judge)
    z = torch.randn(4, 8)
    image = torch.tensor([4, 9])
    batch = Batch(torch.zeros(2, 1, 1, 1), image * 0, image, image, image * 0, image * 0)
    loss, figures = method.loss(methods.Outputs(z), batch, 0.0)
    positive = [method.judge(z[i : i + 1], z[(i + 2) % 4][None]).item() for i in range(4)]
    options = [[method.judge(z[i : i + 1], z[j][None]).item() for j in ((i + 1) % 4, (i + 3) % 4)] for i in range(4)]
    if judge == "cosine":
        of = lambda said, same: (said - same) ** 2  # noqa: E731
    else:
        of = lambda said, same: torch.tensor(-said if same else said).exp().log1p().item()  # noqa: E731
    fixed = sum(of(p, 1) for p in positive)
    bounds = [(fixed + sum(pick(of(o, 0) for o in pair) for pair in options)) / 8 for pick in (min, max)]
    assert bounds[0] - 1e-5 <= loss.item() <= bounds[1] + 1e-5
    assert 0 <= figures["pair_accuracy"] <= 1
