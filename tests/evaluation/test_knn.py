import math

import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

from sslcells.evaluation import knn
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


def test_tiles_do_not_change_anything(monkeypatch):
    z, source = rows(101), torch.arange(101) // 2
    whole = neighbours(z, z, 9, source, source)
    monkeypatch.setattr(knn, "_TILE", 101 * 7)
    seen = []
    largest = knn.largest
    monkeypatch.setattr(knn, "largest", lambda x, k: seen.append(len(x)) or largest(x, k))
    tiled = neighbours(z, z, 9, source, source)
    assert max(seen) == 7
    assert sum(seen) == 101
    torch.testing.assert_close(tiled, whole)


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
