"""The baselines: the same images, neighbours and resamples for the encoder, its colours and its untrained network."""

import numpy as np
import pytest
import torch
from sklearn.metrics import balanced_accuracy_score
from sklearn.neighbors import KNeighborsClassifier
from torch import nn
from torch.nn import functional as F

from sslcells import models
from sslcells.config import load
from sslcells.evaluation.baselines import COLOUR, RUN, UNTRAINED, Baselines, baseline_table, network
from sslcells.evaluation.encode import NotFinite
from sslcells.evaluation.knn import neighbours
from sslcells.evaluation.leaks import SplitFeatures

CLASSES = ("round", "square")
SPEC = {"timm": {"model_name": "small_cnn", "in_chans": 3, "num_classes": 0, "width": 8}, "stem": "timm", "channels": 3}


def split_of(count, first=0, noise=0.3, unlabelled=0):
    """Features that show the class and histograms that do not; the first rows have no label."""
    generator = torch.Generator().manual_seed(first)
    labels = torch.arange(count) % 2
    z = F.one_hot(labels, 2) + noise * torch.randn(count, 2, generator=generator)
    labels[:unlabelled] = -1
    sources = first + torch.arange(count) // 2
    histogram = torch.rand(count, 6, generator=generator)
    return SplitFeatures(torch.zeros(count, 2), histogram, z, labels, sources, [str(i) for i in range(count)])


def measured(splits, query="test", features=None, asked=None, *overrides):
    run = load(None, ["evaluate.bootstrap=100", *overrides])
    rows = range(len(splits[query or "train"].z)) if asked is None else asked
    made = Baselines(run, splits, query, list(rows))
    made.encode(SPEC, features or (lambda network, split, rows: splits[split].histogram[rows]))
    made.search(neighbours)
    return made


def balanced(found, name):
    (row,) = [r for r in found["figures"] if (r["name"], r["unit"]) == (name, "image")]
    return row["scores"]["balanced accuracy"]["value"]


def test_all_three_are_asked_the_same():
    splits = {"train": split_of(200, unlabelled=20), "test": split_of(120, 1000)}
    found = measured(splits, features=lambda network, split, rows: splits[split].z[rows]).result(CLASSES)
    assert [r["name"] for r in found["figures"] if r["unit"] == "image"] == [RUN, COLOUR, UNTRAINED]
    assert found["images of train"] == 180  # those with a label
    assert balanced(found, RUN) == balanced(found, UNTRAINED)  # the same features
    train, test = splits["train"], splits["test"]
    nearest = KNeighborsClassifier(20, metric="cosine", weights=lambda distance: np.exp(-distance / 0.07))
    knn = nearest.fit(train.histogram[20:].numpy(), train.labels[20:].numpy())
    want = balanced_accuracy_score(test.labels, knn.predict(test.histogram.numpy()))
    assert balanced(found, COLOUR) == pytest.approx(want)
    less = {(of["baseline"], of["unit"]): of["scores"]["balanced accuracy"] for of in found["differences"]}
    assert set(less[UNTRAINED, "image"].values()) == {0}
    assert less[COLOUR, "image"]["low"] > 0.1
    table = baseline_table({"baselines": found, "asked": "test"})
    assert len(table.rows) == len(found["figures"])
    assert {len(row) for row in table.rows} == {len(table.columns)}


def test_few_of_train_and_of_the_queries():
    splits = {"train": split_of(200), "test": split_of(120, 1000)}
    seen = []

    def features(network, split, rows):
        seen.append((split, len(rows)))
        return splits[split].z[rows]

    found = measured(splits, "test", features, range(0, 120, 3), "evaluate.bank=50").result(CLASSES)
    assert seen == [("train", 50), ("test", 40)]
    assert {row["images"] for row in found["figures"] if row["unit"] == "image"} == {40}


def test_train_asks_itself_without_an_images_own_source():
    one = split_of(80)
    alike = one._replace(z=one.sources[:, None] + torch.tensor([0.0, 1.0]), labels=one.sources % 2)
    found = measured({"train": alike}, "train").result(CLASSES)
    assert balanced(found, RUN) < 0.9  # rows of a source are equal, and would be all right


def test_nothing_without_labels_and_no_untrained_network_unless_asked():
    splits = {"train": split_of(40), "test": split_of(40, 1000)}
    assert measured(splits, None).result(()) is None
    nobody = {split: of._replace(labels=torch.full_like(of.labels, -1)) for split, of in splits.items()}
    assert measured(nobody, "test").result(CLASSES) is None

    def never(*given):
        pytest.fail("encoded")

    found = measured(splits, "test", never, None, "evaluate.untrained=false").result(CLASSES)
    assert {row["name"] for row in found["figures"]} == {RUN, COLOUR}


def test_features_that_are_not_finite_are_said_and_nothing_else_is_lost():
    splits = {"train": split_of(40), "test": split_of(40, 1000)}

    def broken(*given):
        raise NotFinite("the encoder gives no finite features for 3 of 40 images")

    made = measured(splits, "test", broken)
    assert {row["name"] for row in made.result(CLASSES)["figures"]} == {RUN, COLOUR}
    assert made.notes == ["with random weights the encoder gives no finite features for 3 of 40 images: it is left out"]


def test_the_untrained_network_is_the_same_for_a_seed_and_leaves_the_draws_alone():
    torch.manual_seed(5)
    want = torch.rand(1)
    torch.manual_seed(5)
    one, same, other = (network(SPEC, seed).state_dict() for seed in (0, 0, 1))
    assert torch.equal(torch.rand(1), want)
    assert all(torch.equal(one[key], same[key]) for key in one)
    assert not all(torch.equal(one[key], other[key]) for key in one)
    assert isinstance(network(SPEC, 0), nn.Module)
    assert set(one) == set(models.create("small_cnn", 3, {"width": 8}).state_dict())
