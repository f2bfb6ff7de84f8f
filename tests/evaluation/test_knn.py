import math

import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

from sslcells.evaluation import knn, screen
from sslcells.evaluation.knn import knn_accuracy, knn_predictions, knn_scores, neighbours


def rows(n, f=16, seed=0):
    return torch.randn(n, f, generator=torch.Generator().manual_seed(seed))


def labels_of(n, classes=5, seed=0):
    return torch.randint(classes, (n,), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("temperature", [None, 0.07])
@pytest.mark.parametrize("k", [1, 7, 400])
def test_scores_are_those_of_scikit_learn(k, temperature):
    query, bank, labels = rows(83), rows(400, seed=1) * torch.arange(1, 401)[:, None], labels_of(400)
    weights = (
        "uniform" if temperature is None else lambda distance: torch.tensor((1 - distance) / temperature).exp().numpy()
    )
    peer = KNeighborsClassifier(k, metric="cosine", algorithm="brute", weights=weights)
    expected = torch.from_numpy(peer.fit(bank.double(), labels).predict_proba(query.double()))
    scores = knn_scores(query, bank, labels, 5, k, temperature)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores.double() / scores.sum(1, keepdim=True), expected, rtol=1e-4, atol=1e-5)


def naive_leave_one_out(z, labels, source, classes, k, temperature):
    z = torch.nn.functional.normalize(z.double(), dim=1)
    scores = torch.zeros(len(z), classes, dtype=torch.float64)
    for i in range(len(z)):
        others = [j for j in range(len(z)) if source[j] != source[i] and labels[j] >= 0]
        others.sort(key=lambda j, i=i: -float(z[i] @ z[j]))
        for j in others[:k]:
            scores[i, labels[j]] += math.exp(float(z[i] @ z[j]) / temperature)
    return scores


@pytest.mark.parametrize("k", [5, 60])
def test_leave_one_out_with_sources_is_the_double_loop(k):
    z, labels, source = rows(60), labels_of(60), torch.arange(60) // 3
    labels[::7] = -1
    expected = naive_leave_one_out(z, labels, source, 5, k, 0.2)
    scores = knn_scores(z, z, labels, 5, k, 0.2, source, source).double()
    torch.testing.assert_close(
        scores / scores.sum(1, keepdim=True), expected / expected.sum(1, keepdim=True), rtol=1e-4, atol=1e-6
    )


def test_own_source_is_no_neighbour():
    z, source = rows(40).repeat_interleave(2, 0), torch.arange(40).repeat_interleave(2)
    labels = source % 4
    flattered = knn_accuracy(knn_scores(z, z, labels, 4, 1, None), labels)
    assert flattered["top1"] == 1
    _, index = neighbours(z, z, 3, source, source)
    assert (source[index] != source[:, None]).all()
    assert knn_accuracy(knn_scores(z, z, labels, 4, 1, None, source, source), labels)["top1"] < 0.6


def test_one_kind_of_sources_is_refused():
    with pytest.raises(ValueError, match="both or neither"):
        neighbours(rows(3), rows(3), 1, query_source=torch.arange(3))


@pytest.mark.parametrize(("queries", "bank", "group"), [(7, 40, 1), (7, 40, 4), (101, 16, 2), (3, 101, 64), (5, 6, 2)])
@pytest.mark.parametrize("k", [1, 3, 30])
def test_tiles_and_groups_do_not_change_anything(monkeypatch, queries, bank, group, k):
    """Against a stable sort of whole rows: many ties, rows that are not finite, and own sources left out."""
    z = torch.randint(-1, 2, (101, 3), generator=torch.Generator().manual_seed(k)).float()
    z[::17] = torch.nan
    source = torch.arange(101) // 2 % 30
    whole = torch.nn.functional.normalize(z.double(), dim=1) @ torch.nn.functional.normalize(z.double(), dim=1).T
    whole = whole.mul(2**20).round().div(2**20).nan_to_num(nan=-math.inf)  # products of thirds tie as numbers do
    whole[source[:, None] == source] = -math.inf
    expected = whole.sort(dim=1, descending=True, stable=True)
    for name, size in (("QUERIES", queries), ("TILE", bank), ("GROUP", group)):
        monkeypatch.setattr(knn, name, size)
    cosine, index = neighbours(z, z, k, source, source)
    torch.testing.assert_close(cosine.double(), expected.values[:, :k], rtol=0, atol=2e-6)
    found = cosine.isfinite()
    order = whole.gather(1, index)
    assert (source[index] != source[:, None])[found].all()
    torch.testing.assert_close(order[found], expected.values[:, :k][found], rtol=0, atol=0)
    assert all(len(set(row[kept].tolist())) == kept.sum() for row, kept in zip(index, found, strict=True))


def test_equal_rows_come_in_their_order_across_tiles(monkeypatch):
    for name, size in (("QUERIES", 2), ("TILE", 32), ("GROUP", 2)):
        monkeypatch.setattr(knn, name, size)
    bank = torch.eye(4).repeat(25, 1)  # row i is axis i % 4
    cosine, index = neighbours(torch.eye(4)[:3], bank, 5)
    assert index.tolist() == [[a, a + 4, a + 8, a + 12, a + 16] for a in range(3)]
    assert (cosine == 1).all()


@pytest.fixture
def screened(monkeypatch):
    """A screen in bfloat16 whatever the processor; counts the tiles that it decided and those left to float32."""
    tiles = {True: 0, False: 0}

    def counted(*args):
        decided = kept(*args)
        tiles[decided] += 1
        return decided

    kept = knn._screen
    monkeypatch.setattr(knn, "_screen", counted)
    monkeypatch.setattr(knn, "_has_fast_bfloat16", lambda device: True)
    monkeypatch.setattr(knn, "TILE", 1024)
    return tiles


@pytest.mark.parametrize("sources", [False, True])
def test_a_screen_changes_no_neighbour(monkeypatch, screened, sources):
    query, bank = rows(70, 48), rows(20_000, 48, seed=1)
    query[5], bank[3000] = torch.nan, torch.inf
    bank[7000:7070] = query  # the own row is nearest, unless it is of the own source
    ids = (torch.arange(70), torch.arange(20_000) % 70 if sources else torch.arange(70, 20_070))
    found = neighbours(query, bank, 5, *ids)
    assert screened[True] > 10
    assert screened[False] >= 1
    monkeypatch.setattr(knn, "_has_fast_bfloat16", lambda device: False)
    expected = neighbours(query, bank, 5, *ids)
    torch.testing.assert_close(found[1], expected[1], rtol=0, atol=0)
    torch.testing.assert_close(found[0], expected[0], rtol=0, atol=1e-6)


def test_a_screen_keeps_equal_rows_in_their_order(screened):
    few = rows(8, 48)
    bank = torch.cat([rows(3000, 48, seed=1), few, rows(4000, 48, seed=2), few, few, rows(3000, 48, seed=3)])
    cosine, index = neighbours(few, bank, 3)
    assert screened[True] >= 5
    assert index.tolist() == [[3000 + i, 7008 + i, 7016 + i] for i in range(8)]
    assert (cosine == cosine[:, :1]).all()


def test_rows_that_are_all_alike_are_left_to_float32(screened):
    """As a collapsed encoder's: no bound parts them."""
    bank = 1 + 1e-4 * rows(4096, 48)
    cosine, _ = neighbours(bank[:10], bank, 2)
    assert screened[True] == 0
    assert (cosine > 1 - 1e-6).all()


def test_the_error_of_bfloat16_is_within_its_bound():
    for width in (3, 48, 700):
        a, b = screen.UnitRows(rows(300, width)), screen.UnitRows(rows(900, width, seed=1).abs())
        rough, error = a.rough_cosines(b)
        worst = (rough.double() - a.z.double() @ b.z.double().T).abs().max()
        assert worst < error < 0.012


def test_the_bank_is_not_copied(monkeypatch):
    """Nothing as large as the bank is made, and few rows of it are looked at more closely than by their group."""
    made, looked = [], []
    kept = knn.largest
    monkeypatch.setattr(knn, "largest", lambda x, k: looked.append(x.numel()) or kept(x, k))

    class Watched(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and not out._is_view():
                made.append(out.numel())
            return out

    monkeypatch.setattr(knn, "TILE", 2048)
    query, bank = rows(64), rows(40_000, seed=1)
    with Watched():
        neighbours(query, bank, 5, torch.arange(64), torch.arange(64, 40_064))
    assert max(made) <= 64 * 2048 < bank.numel()
    assert sum(looked) < 0.3 * len(query) * len(bank)


def test_equal_cosines_go_to_the_lowest_index():
    bank = torch.tensor([[0.0, 1.0], [1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 0.0]])
    _, index = neighbours(torch.tensor([[2.0, 0.0], [0.0, 3.0]]), bank, 3)
    assert index.tolist() == [[1, 2, 4], [0, 3, 1]]


def test_too_few_left_for_k():
    z, labels = torch.eye(4), torch.arange(4)
    scores = knn_scores(z, z, labels, 4, 20, None, labels, labels)
    assert torch.equal(scores, 1 - torch.eye(4))


def test_one_image_a_class_left_out_cannot_be_right():
    z, labels = rows(6), torch.arange(6)
    assert knn_accuracy(knn_scores(z, z, labels, 6, 5, 0.07, labels, labels), labels) == {"top1": 0, "balanced": 0}


def test_no_neighbour_left_is_all_zero_and_wrong():
    z, one = rows(5), torch.zeros(5, dtype=torch.int64)
    scores = knn_scores(z, z, one, 3, 2, 0.07, one, one)
    assert torch.equal(scores, torch.zeros(5, 3))
    assert knn_predictions(scores).tolist() == [-1] * 5
    assert knn_accuracy(scores, one) == {"top1": 0, "balanced": 0}


def test_unlabelled_bank_gives_zero_and_unknown_labels_no_figure():
    unknown = torch.full((7,), -1)
    scores = knn_scores(rows(4), rows(7), unknown, 3, 2, 0.07)
    assert torch.equal(scores, torch.zeros(4, 3))
    assert knn_accuracy(scores, unknown[:4]) == {}


def test_class_missing_from_the_bank_is_wrong_and_counts_in_balanced():
    bank = torch.eye(3)[[0, 0, 1]]
    scores = knn_scores(torch.eye(3)[[0, 0, 0, 1, 2]], bank, torch.tensor([0, 0, 1]), 3, 1, None)
    labels = torch.tensor([0, 0, 0, 1, 2])
    assert scores.shape == (5, 3)
    assert knn_accuracy(scores, labels) == pytest.approx({"top1": 4 / 5, "balanced": 2 / 3})


def test_balanced_is_over_the_classes_present_and_known():
    scores = torch.tensor([[1.0, 0, 0], [1, 0, 0], [1, 0, 0], [0, 0, 1]])
    figures = knn_accuracy(scores, torch.tensor([0, 0, 1, -1]))
    assert figures == pytest.approx({"top1": 2 / 3, "balanced": 1 / 2})


def test_collapsed_rows_are_no_better_than_chance():
    z, labels, source = torch.ones(40, 8), torch.arange(40) % 4, torch.arange(40)
    figures = knn_accuracy(knn_scores(z, z, labels, 4, 20, 0.07, source, source), labels)
    assert figures["balanced"] <= 0.5


@pytest.mark.parametrize("temperature", [1e-3, 1e-2])
def test_small_temperatures_neither_overflow_nor_vanish(temperature):
    labels = labels_of(50)
    scores = knn_scores(-rows(9), rows(50), labels, 5, 5, temperature)
    assert scores.isfinite().all()
    assert (scores.amax(1) > 0).all()
    nearest = knn_scores(-rows(9), rows(50), labels, 5, 1, None)
    if temperature == 1e-3:
        assert torch.equal(knn_predictions(scores), knn_predictions(nearest))


def test_rows_with_nan_are_nobodys_neighbour():
    z = rows(10)
    z[3] = math.nan
    cosine, index = neighbours(z, z, 9)
    assert (cosine[3] == -math.inf).all()
    assert not (index[torch.arange(10) != 3] == 3).any()
