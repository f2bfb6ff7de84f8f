"""None, or one, of what is usually many: a value where there is one, else NaN or a ValueError with the numbers."""

import math

import numpy as np
import pytest
import torch

from sslcells.evaluation import clustering, fewshot, knn, probe, scores
from sslcells.evaluation.health import alignment, effective_rank, health, row_std, uniformity
from sslcells.evaluation.retrieval import retrieval


def rows(n):
    return torch.randn(n, 3, generator=torch.Generator().manual_seed(n))


def ids(n, value=0):
    return torch.full((n,), value)


@pytest.mark.parametrize("asked", [0, 1, 2])
@pytest.mark.parametrize("held", [0, 1, 2])
def test_neighbours(asked, held):
    for k in (1, 5):
        cosine, index = knn.neighbours(rows(asked), rows(held), k)
        assert cosine.shape == index.shape == (asked, min(k, held))
        for label in (0, -1):
            votes = knn.knn_scores(rows(asked), rows(held), ids(held, label), 2, k, None)
            assert votes.tolist() == [[min(k, held) if label == 0 else 0, 0]] * asked
            expected = 0 if label == 0 and held else -1
            assert knn.knn_predictions(votes).tolist() == [expected] * asked


def test_the_largest_none():
    for k in (0, 2):
        value, index = knn.largest(torch.tensor([[1.0, 3.0], [4.0, 2.0]]), k)
        assert value.shape == index.shape == (2, k)


@pytest.mark.parametrize("count", [0, 1])
def test_one_or_no_row_has_figures(count):
    z, labels = rows(count), ids(count)
    assert all(v.isnan().all() and len(v) == count for v in retrieval(z, labels, labels).values())
    assert math.isnan(uniformity(z))
    assert math.isnan(health(z)["uniformity"])
    assert [math.isnan(f) for f in (effective_rank(z), row_std(z), alignment(z, z))] == [count == 0] * 3
    assert len(clustering.clusters(z, 3, 0)) == count
    assert probe.linear_probe(probe.Labelled(z, labels, labels), None, None, 2, 0) is None
    metric = scores.of_class(0, labels, torch.zeros(count, 2), labels)
    assert all(np.isnan(v).all() for v in metric(np.zeros((3, count))).values())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: knn.neighbours(rows(2), rows(2), 0), "k=0"),
        (lambda: knn.neighbours(rows(2), rows(3), 1, ids(1), ids(3)), r"query_source must be \(2,\).*\(1,\)"),
        (lambda: knn.largest(rows(2), 4), r"k=4 is not in 0\.\.3"),
        (lambda: knn.knn_scores(rows(2), rows(2), ids(2), 0, 1, None), "classes=0"),
        (lambda: knn.knn_predictions(torch.zeros(2, 0)), r"\(2, 0\)"),
        (lambda: knn.knn_accuracy(torch.zeros(2, 3), ids(1)), r"labels must be \(2,\).*\(1,\)"),
        (lambda: retrieval(rows(2), ids(1), ids(2)), r"labels must be \(2,\).*\(1,\)"),
        (lambda: alignment(rows(2), rows(3)), r"\(2, 3\) and \(3, 3\)"),
        (lambda: clustering.clusters(rows(2), 0, 0), "count=0"),
        (lambda: fewshot.few_shot(rows(2), ids(2), ids(2), rows(2), ids(2), ids(2), 0, 0), "shots=0"),
        (lambda: fewshot.few_shot(rows(2), ids(2), ids(2), rows(0), ids(0), ids(0), 1, 0), "none of the 0 images"),
    ],
)
def test_what_cannot_be_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
