"""Scores against scikit-learn's, each resample too; what counts once, and what means nothing."""

import math
import warnings

import numpy as np
import pytest
import torch
from sklearn import metrics

from sslcells.evaluation.scores import Units, mean_of, of_class, of_classes, of_ranking

M, K = 60, 4


def predictions(seed=0, missing=None):
    rng = np.random.default_rng(seed)
    labels = torch.from_numpy(rng.integers(0, K, M))
    if missing is not None:
        labels[labels == missing] = (missing + 1) % K
    scores = torch.from_numpy(np.round(rng.random((M, K)) + np.eye(K)[labels] * 0.4, 1))  # with ties
    return labels, scores / scores.sum(1, keepdim=True)


def of_sklearn(labels, scores, weight):
    guess, present = scores.argmax(1), np.unique(labels[weight > 0])
    kinds = {"sample_weight": weight, "labels": present, "average": "macro", "zero_division": 0}
    return {
        "accuracy": metrics.accuracy_score(labels, guess, sample_weight=weight),
        "balanced accuracy": metrics.recall_score(labels, guess, **kinds),
        "macro F1": metrics.f1_score(labels, guess, **kinds),
        "AUROC": np.mean([metrics.roc_auc_score(labels == c, scores[:, c], sample_weight=weight) for c in present]),
    }


@pytest.mark.parametrize("missing", [None, 2])
def test_every_weighting_is_scikit_learns(missing):
    labels, scores = predictions(missing=missing)
    weights = np.concatenate([np.ones((1, M)), np.random.default_rng(1).integers(0, 3, (5, M))]).astype(float)
    found = of_classes(labels, scores.argmax(1), K)(weights) | of_ranking(labels, scores)(weights)
    for row, weight in enumerate(weights):
        expected = of_sklearn(labels.numpy(), scores.numpy(), weight)
        assert {k: v[row] for k, v in found.items()} == pytest.approx(expected, abs=1e-12)


def test_each_class_is_scikit_learns():
    labels, scores = predictions()
    expected = metrics.classification_report(labels, scores.argmax(1), output_dict=True, zero_division=0)
    for c in range(K):
        found = {k: v[0] for k, v in of_class(c, labels, scores, scores.argmax(1))(np.ones((1, M))).items()}
        assert found["recall"] == pytest.approx(expected[str(c)]["recall"])
        assert found["precision"] == pytest.approx(expected[str(c)]["precision"])
        assert found["F1"] == pytest.approx(expected[str(c)]["f1-score"])


def test_a_source_counts_once_and_is_drawn_whole():
    """49 right images of one photograph and one wrong of another: half of the photographs."""
    right = torch.tensor([1.0] * 49 + [0.0])
    sources = torch.tensor([7] * 49 + [9])
    units = Units(sources, 0)
    assert units.names == ["image", "source"]
    by_image, by_source = (units.scored(mean_of({"x": right}), unit)["x"] for unit in units.names)
    assert (by_image.value, by_source.value) == (0.98, 0.5)
    assert (by_image.low, by_image.high) == (0, 1), "a bootstrap over images would say 0.94 to 1"


def test_the_interval_covers_as_often_as_it_says():
    """Of 200 samples of 30 sources of 4 equal images each; 95 % are to hold the truth, over images it would be half."""
    rng, hits = np.random.default_rng(0), 0
    for seed in range(200):
        right = torch.from_numpy((rng.random(30) < 0.7).repeat(4).astype(float))
        score = Units(torch.arange(30).repeat_interleave(4), seed, 200).scored(mean_of({"x": right}))["x"]
        hits += score.low <= 0.7 <= score.high
    assert 0.88 <= hits / 200 <= 0.99


def test_unknown_sources_are_images_and_one_source_has_no_interval():
    assert Units(torch.arange(5), 0).names == ["image"]
    score = Units(torch.zeros(5), 0).scored(mean_of({"x": torch.ones(5)}))["x"]
    assert score.value == 1
    assert math.isnan(score.low)


def test_what_was_not_asked_does_not_count():
    values = torch.tensor([1.0, math.nan, 0.0, math.nan])
    assert Units(torch.arange(4), 0).scored(mean_of({"x": values}))["x"].value == 0.5
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert math.isnan(Units(torch.arange(4), 0).scored(mean_of({"x": values * torch.nan}))["x"].value)


def test_no_answer_is_wrong():
    labels = torch.tensor([0, 0, 1, 1])
    found = of_classes(labels, torch.tensor([0, -1, 1, -1]), 3)(np.ones((1, 4)))
    assert found["accuracy"][0] == found["balanced accuracy"][0] == 0.5


def test_all_right_is_one_and_no_more():
    """Weights of sources are no round numbers, and two ways to sum them differed in the last digit."""
    drawn = torch.Generator().manual_seed(0)
    for images in range(50, 250):
        sources = torch.randint(0, images // 3, (images,), generator=drawn)
        labels = torch.randint(0, 3, (images,), generator=drawn)
        found = Units(sources, 0, 10).scored(of_classes(labels, labels, 3), "source")
        assert {score.value for score in found.values()} == {1.0}
