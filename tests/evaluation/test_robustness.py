"""The robustness index against its formula, and the predictability of laboratories against its null."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from sslcells.evaluation.robustness import (
    FEW,
    Rows,
    best_k,
    index_score,
    matched,
    near,
    predictability,
    robustness_index,
)
from sslcells.evaluation.scores import Units


def random_rows(seed, count=60, classes=3, labs=3, sources=20, width=5):
    g = torch.Generator().manual_seed(seed)
    z = torch.randn(count, width, generator=g, dtype=torch.float64)
    source = torch.randint(sources, (count,), generator=g)
    return Rows(
        z,
        torch.randint(-1, classes, (count,), generator=g),
        source,
        torch.randint(labs + 1, (sources,), generator=g)[source],
    )


def by_formula(rows, k):
    """The definition, row by row, with every similarity in float64."""
    so = os = 0
    z = F.normalize(rows.z, dim=1)
    known = [i for i in range(len(z)) if rows.labels[i] >= 0 and rows.labs[i] > 0]
    for i in known:
        others = [j for j in known if rows.sources[j] != rows.sources[i]]
        others.sort(key=lambda j: -float(z[i] @ z[j]))
        for j in others[:k]:
            same_class, same_lab = rows.labels[i] == rows.labels[j], rows.labs[i] == rows.labs[j]
            so += bool(same_class and not same_lab)
            os += bool(same_lab and not same_class)
    return so / (so + os) if so + os else math.nan


@pytest.mark.parametrize("k", [1, 5, 30, 1000])
@pytest.mark.parametrize("seed", range(4))
def test_the_index_is_its_formula(seed, k):
    rows = random_rows(seed)
    found = robustness_index(rows.z * 3, rows.labels, rows.labs, rows.sources, k)
    assert found == pytest.approx(by_formula(rows, k), abs=1e-12)


def test_the_ends_of_the_index():
    labels, labs = torch.tensor([0, 0, 1, 1] * 5), torch.tensor([1, 2, 1, 2] * 5)
    source = torch.arange(20)
    by_class, by_lab = F.one_hot(labels).float(), F.one_hot(labs).float()
    assert robustness_index(by_class, labels, labs, source, 9) == 1
    assert robustness_index(by_lab, labels, labs, source, 9) == 0
    assert math.isnan(robustness_index(by_class, labels, torch.ones_like(labs), source, 4))
    assert math.isnan(robustness_index(by_class, -1 - labels, labs, source, 4))


def test_wrong_ids_are_refused():
    rows = random_rows(0)
    with pytest.raises(ValueError, match=r"labs must be \(60,\), one a row; it is \(59,\)"):
        robustness_index(rows.z, rows.labels, rows.labs[1:], rows.sources, 3)
    with pytest.raises(ValueError, match="k=0"):
        robustness_index(rows.z, rows.labels, rows.labs, rows.sources, 0)


def test_the_interval_holds_the_index_and_resamples_sources():
    rows = Rows(*(x.repeat_interleave(8, 0) for x in planted(0.7, count=30)))  # 8 equal images of each source
    found = near(rows, 80)
    score = index_score(rows, found, 80, Units(rows.sources, 0, 400))
    assert score.value == robustness_index(*rows[:2], rows.labs, rows.sources, 80)
    assert score.low < score.value < score.high
    alone = index_score(rows, found, 80, Units(torch.arange(len(rows.z)), 0, 400))
    assert score.high - score.low > 2 * (alone.high - alone.low)


def test_a_matched_sample_has_as_many_of_each_class():
    labels = torch.tensor([0] * 50 + [1] * 12 + [2] * 30 + [0] * 14 + [1] * 40 + [2] * (FEW - 1) + [-1] * 5)
    labs = torch.tensor([1] * 92 + [2] * (54 + FEW - 1) + [1] * 5)
    rows = Rows(torch.zeros(len(labels), 1), labels, torch.arange(len(labels)), labs)
    index, classes = matched(rows, 1, 2, seed=0)
    assert classes == [0, 1]
    drawn = rows.at(index)
    for c, many in ((0, 14), (1, 12)):
        assert [int(((drawn.labels == c) & (drawn.labs == lab)).sum()) for lab in (1, 2)] == [many, many]
    assert len(index.unique()) == len(index) == 52
    assert matched(rows, 1, 2, seed=1)[0].tolist() != index.tolist()
    assert matched(rows, 1, 3, seed=0)[1] == []


def test_k_is_that_of_the_best_vote_and_none_without_an_index():
    g = torch.Generator().manual_seed(0)
    labels, labs = torch.arange(2).repeat(40), torch.arange(2).repeat_interleave(40) + 1
    z = F.one_hot(labels).float() + 0.8 * torch.randn(80, 2, generator=g)
    rows = Rows(z, labels, torch.arange(80), labs)
    assert best_k(rows, near(rows, 51)) > 1  # noisy rows: one neighbour is the worst
    assert best_k(rows._replace(labs=torch.ones(80, dtype=torch.int64), labels=0 * labels), near(rows, 51)) is None


def planted(tint, seed=0, count=120):
    g = torch.Generator().manual_seed(seed)
    labels, labs = torch.arange(3).repeat(count // 3), (torch.arange(count) // 3) % 2 + 1
    z = torch.cat([F.one_hot(labels).float(), tint * F.one_hot(labs).float()], 1)
    return Rows(z + 0.15 * torch.randn(z.shape, generator=g), labels, torch.arange(count), labs)


def test_predictability_of_a_planted_laboratory():
    rows = planted(3.0)
    found = predictability(rows, near(rows, 5), 5, seed=0)
    assert found.value > 0.95
    assert found.high < 0.7
    assert found.p < 0.01
    rows = planted(0.0)
    found = predictability(rows, near(rows, 5), 5, seed=0)
    assert found.low <= found.value <= found.high
    assert found.p > 0.01


def test_the_null_shuffles_whole_sources():
    """Ten images of each source are alike, so neighbours tell nothing of a laboratory but by its few sources."""
    g = torch.Generator().manual_seed(0)
    centres = torch.randn(12, 4, generator=g)
    sources = torch.arange(12).repeat_interleave(10)
    rows = Rows(centres[sources] + 0.01 * torch.randn(120, 4, generator=g), 0 * sources, sources, sources % 2 + 1)
    whole = predictability(rows, near(rows, 5), 5, seed=0)
    single = predictability(rows._replace(sources=torch.arange(120)), near(rows, 5), 5, seed=0)
    assert whole.high - whole.low > 2 * (single.high - single.low)
    few = rows.at(sources < 6)
    assert math.isnan(predictability(few, near(few, 5), 5, seed=0).low)  # three sources a laboratory


def coverage(sets, draws, seed):
    """Share of sets without a difference between laboratories whose value lies in the null's interval."""
    inside = 0
    for i in range(sets):
        g = torch.Generator().manual_seed(seed + i)
        labels = torch.arange(2).repeat(75)
        lab = torch.cat([torch.randperm(75, generator=g) < 37 for _ in range(2)]).view(2, 75).T.flatten()
        z = F.one_hot(labels).float() + 0.5 * torch.randn(150, 2, generator=g)
        rows = Rows(z, labels, torch.arange(150), lab.long() + 1)
        found = predictability(rows, near(rows, 5), 5, seed=seed + i, draws=draws)
        inside += found.low <= found.value <= found.high
    return inside / sets


def test_the_null_covers_most_sets():
    assert 0.85 <= coverage(60, 100, 7) <= 1


@pytest.mark.slow
def test_the_null_covers_95_of_100_sets():
    assert coverage(1000, 200, 1000) == pytest.approx(0.95, abs=0.02)


def test_nothing_depends_on_numpys_or_torchs_global_state():
    rows = planted(0.3)
    torch.manual_seed(1)
    first = predictability(rows, near(rows, 5), 5, seed=0)
    np.random.default_rng(3)
    torch.manual_seed(2)
    assert predictability(rows, near(rows, 5), 5, seed=0) == first
    assert predictability(rows, near(rows, 5), 5, seed=1) != first
