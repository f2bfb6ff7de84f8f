"""What the figures make of rows that are not finite, very long or very short, and of too few of them."""

import math

import numpy as np
import pytest
import torch

from sslcells.evaluation.clustering import clustering, clusters
from sslcells.evaluation.fewshot import few_shot
from sslcells.evaluation.knn import knn_accuracy, knn_predictions, knn_scores, neighbours
from sslcells.evaluation.retrieval import retrieval
from sslcells.evaluation.scores import Units, of_ranking, unit_rows

LABELS, SOURCES = torch.arange(12) % 3, torch.arange(12)


def rows(seed=0):
    return torch.eye(3, 5)[LABELS] + 0.3 * torch.randn(12, 5, generator=torch.Generator().manual_seed(seed))


def broken(which, value):
    z = rows()
    z[which] = value
    return z


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("which", [slice(0, 12), slice(0, 1), slice(6, 12)])
def test_rows_that_are_not_finite_find_nothing_and_are_not_found(which, value):
    z, bad = broken(which, value), torch.zeros(12, dtype=torch.bool)
    bad[which] = True
    found = retrieval(z, LABELS, SOURCES)
    assert all(not figures[bad].any() for figures in found.values())
    rest = retrieval(z[~bad], LABELS[~bad], SOURCES[~bad])
    for name in rest:
        if name.startswith("recall"):
            assert found[name][~bad].tolist() == rest[name].tolist()
    assert (knn_predictions(knn_scores(z, z, LABELS, 3, 4, 0.1, SOURCES, SOURCES))[bad] == -1).all()
    right, _, _ = few_shot(z, SOURCES, LABELS, rows(1), LABELS, SOURCES + 12, 2, 0)
    assert not right[bad].any()
    assert bad.all() or right[~bad].any()


def test_a_prototype_that_is_not_finite_is_nearest_to_nothing():
    bank = rows(1)
    bank[LABELS == 1] = math.nan
    right, _, _ = few_shot(rows(), SOURCES, LABELS, bank, LABELS, SOURCES + 12, 2, 0)
    assert not right[LABELS == 1].any()
    assert right[LABELS != 1].mean() > 0.5


@pytest.mark.parametrize("scale", [2.0**-110, 2.0**110])
def test_rows_may_have_any_norm(scale):
    z = rows()
    for small, plain in zip(neighbours(z * scale, z, 4), neighbours(z, z, 4), strict=True):
        torch.testing.assert_close(small, plain)
    for name, figures in retrieval(z * scale, LABELS, SOURCES).items():
        assert torch.equal(figures, retrieval(z, LABELS, SOURCES)[name])
    torch.testing.assert_close(unit_rows(z * scale), unit_rows(z))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_rows_may_be_of_any_precision(dtype):
    z = rows().to(dtype)
    for name, figures in retrieval(z, LABELS, SOURCES).items():
        assert torch.equal(figures, retrieval(z.float(), LABELS, SOURCES)[name])
    cosine, index = neighbours(z, z, 4)
    assert cosine.dtype == torch.float32
    assert torch.equal(index, neighbours(z.float(), z.float(), 4)[1])


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda z: neighbours(z, z, 0), "k=0"),
        (lambda z: neighbours(z, z[:, :3], 1), r"\(12, 5\) and \(12, 3\)"),
        (lambda z: knn_scores(z, z, LABELS, 3, -1, None), "k=-1"),
        (lambda z: knn_scores(z, z, LABELS[:5], 3, 1, None), r"\(12,\).*\(5,\)"),
        (lambda z: knn_scores(z, z, LABELS, 3, 1, 0.0), r"temperature=0\.0"),
        (lambda z: knn_accuracy(torch.rand(12, 2), LABELS), "label 2 .* 2 classes"),
        (lambda z: few_shot(z, SOURCES, LABELS, z, LABELS, SOURCES, 0, 0), "shots=0"),
        (lambda z: few_shot(z, SOURCES, LABELS, z, LABELS - 9, SOURCES, 1, 0), "none of the 12"),
        (lambda z: clusters(z, 0, 0), "count=0"),
        (lambda z: clusters(broken(slice(0, 2), math.nan), 3, 0), "2 of 12 rows"),
    ],
)
def test_a_wrong_argument_is_named(call, words):
    with pytest.raises(ValueError, match=words):
        call(rows())


def test_no_images_have_no_figures():
    none = torch.zeros(0, dtype=torch.int64)
    assert clusters(rows()[:0], 3, 0).tolist() == []
    for labels in (none, none.new_zeros(1)):
        assert all(np.isnan(score.value) for score in clustering(labels, labels, labels, 0).values())
    assert np.isnan(Units(none, 0, 5).scored(of_ranking(none, torch.rand(0, 3)))["AUROC"].value)
    assert neighbours(rows(), rows()[:0], 3)[0].shape == (12, 0)
    assert neighbours(rows()[:0], rows(), 3)[0].shape == (0, 3)
