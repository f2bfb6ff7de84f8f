"""A run's figures minus those of another encoder: paired, on the same resamples, over seeds, and in words."""

import pytest
import torch
from sklearn.metrics import balanced_accuracy_score

from sslcells.evaluation.against import verdict
from sslcells.evaluation.scores import Units, difference, of_classes


def drawn(images=200, classes=4, right=0.7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (images,), generator=torch.Generator().manual_seed(99))
    other = torch.randint(classes, (images,), generator=generator)
    return labels, torch.where(torch.rand(images, generator=generator) < right, labels, other)


def test_a_difference_is_that_of_scikit_learns_scores():
    (labels, ours), (_, theirs) = drawn(right=0.8), drawn(right=0.6, seed=1)
    found = difference(Units(torch.arange(200), 0), labels, [ours], [theirs])["balanced accuracy"]
    expected = balanced_accuracy_score(labels, ours) - balanced_accuracy_score(labels, theirs)
    assert found.value == pytest.approx(expected)
    assert found.low < found.value < found.high


def test_what_both_find_hard_cancels():
    """Two encoders that differ in few images have a narrow interval, however wide that of each is."""
    labels, ours = drawn(right=0.7)
    theirs = ours.clone()
    theirs[:4] = -1
    units = Units(torch.arange(200) // 2, 0)
    paired = difference(units, labels, [ours], [theirs])["accuracy"]
    alone = units.scored(of_classes(labels, ours, 4))["accuracy"]
    assert paired.high - paired.low < 0.5 * (alone.high - alone.low)
    same = difference(units, labels, [ours], [ours], "source")["accuracy"]
    assert (same.value, same.low, same.high) == (0, 0, 0)


def test_over_seeds_the_means_of_the_scores_are_compared():
    labels, one = drawn(right=0.8)
    _, two = drawn(right=0.5, seed=1)
    _, theirs = drawn(right=0.6, seed=2)
    units = Units(torch.arange(200), 0)
    both = difference(units, labels, [one, two], [theirs])["macro F1"].value
    each = [difference(units, labels, [o], [theirs])["macro F1"].value for o in (one, two)]
    assert both == pytest.approx(sum(each) / 2)


@pytest.mark.parametrize(
    ("score", "words"),
    [
        ((0.05, 0.01, 0.09), "better, +5.0 points [+1.0, +9.0]"),
        ((-0.05, -0.09, -0.01), "worse, -5.0 points [-9.0, -1.0]"),
        ((0.02, -0.01, 0.05), "within the interval, +2.0 points [-1.0, +5.0]"),
        ((0.02, None, None), "+2.0 points, with too few sources for an interval"),
        ((None, None, None), "not defined"),
    ],
)
def test_it_is_better_or_worse_only_where_the_interval_leaves_out_zero(score, words):
    assert verdict(dict(zip(("value", "low", "high"), score, strict=True))) == words
