"""Ways to count answers: one vote of each source, and what has none."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from sslcells.config import load
from sslcells.evaluation.figures import Figures
from sslcells.evaluation.leaks import SplitFeatures
from sslcells.evaluation.scores import Units, of_classes
from sslcells.evaluation.ways import VOTE, ways, without_vote


def answers(sources, classes=3, seed=0):
    """Labels and scores of images of sources of one class each; sources answer better together than alone."""
    g = torch.Generator().manual_seed(seed)
    labels = sources % classes
    return labels, (F.one_hot(labels, classes) + 1.5 * torch.randn(len(sources), classes, generator=g)).softmax(1)


def counted(sources, labels, scores):
    return {way.unit: way for way in ways(Units(sources, 0, 200), labels, scores)}


def test_a_vote_is_the_mean_of_the_scores_of_its_images():
    sources = torch.tensor([4, 9, 4, 7, 7, 4, 9, 7, 11, 4]).repeat(6) + 20 * torch.arange(6).repeat_interleave(10)
    labels, scores = answers(sources)
    way = counted(sources, labels, scores)[VOTE]
    each = sorted(set(sources.tolist()))
    assert (way.sources, way.images) == (len(each), len(sources))
    for place, source in enumerate(each):
        np.testing.assert_allclose(way.scores[place], scores[sources == source].double().mean(0), rtol=1e-12)
        assert way.labels[place] == source % 3


def test_votes_are_better_than_images_and_are_resampled_by_source():
    sources = torch.arange(60).repeat_interleave(9)
    labels, scores = answers(sources)
    found = {
        unit: way.scored(of_classes(way.labels, way.predicted, 3))
        for unit, way in counted(sources, labels, scores).items()
    }
    assert list(found) == ["image", "source", VOTE]
    image, vote = (found[unit]["balanced accuracy"] for unit in ("image", VOTE))
    assert image.value < 0.8 < vote.value
    assert vote.low < vote.value <= vote.high <= 1
    spread = (vote.value * (1 - vote.value) / 60) ** 0.5
    assert vote.high - vote.low == pytest.approx(3.92 * spread, rel=0.4)


def test_a_source_of_two_classes_has_no_vote_and_is_named():
    sources = torch.arange(30).repeat_interleave(4)
    labels, scores = answers(sources)
    labels[1] = 2
    assert counted(sources, labels, scores)[VOTE].sources == 29
    assert counted(sources, labels, scores)[VOTE].images == 116
    assert without_vote(Units(sources, 0), labels) == "1 of 30 sources shows images of several classes, and has no vote"


def test_there_are_no_votes_where_nothing_is_to_be_counted_together():
    sources = torch.arange(12)
    labels, scores = answers(sources)
    assert list(counted(sources, labels, scores)) == ["image"]
    donors = torch.arange(12) // 6  # with cells of all classes
    assert list(counted(donors, labels, scores)) == ["image", "source"]
    assert without_vote(Units(donors, 0), labels) == ""


def split(sources, first, noise=1.5):
    g = torch.Generator().manual_seed(first)
    labels = sources % 2
    z = F.one_hot(labels, 2) + noise * torch.randn(len(sources), 2, generator=g)
    names = [str(first + i) for i in range(len(sources))]
    return SplitFeatures(torch.zeros(len(z), 2), torch.zeros(len(z), 1), z, labels, sources, names)


def test_figures_have_votes_and_say_what_sources_are_in_both_splits():
    train, test = torch.arange(40).repeat_interleave(4), torch.arange(36, 56).repeat_interleave(8)
    run = load(None, ["evaluate.bootstrap=100", "evaluate.split=test"])
    found = Figures(run, {"train": split(train, 0), "test": split(test, 1000)}, "test", ("a", "b"), brief=True)
    rows = {(row["task"], row["name"], row["unit"]): row for row in found.rows}
    for name in {(task, name) for task, name, _ in rows}:
        image, vote = rows[*name, "image"], rows[*name, VOTE]
        assert (image["images"], image["sources"]) == (vote["images"], vote["sources"]) == (160, 20)
        assert vote["scores"]["balanced accuracy"]["value"] > image["scores"]["balanced accuracy"]["value"]
    assert any(
        note.startswith("linear probe: 4 sources are in train and in test too; their 32 images") for note in found.notes
    )
