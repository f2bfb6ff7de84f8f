"""Linear probe, few-shot and clustering, against scikit-learn on the same vectors."""

import math

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import adjusted_mutual_info_score, adjusted_rand_score, normalized_mutual_info_score
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from sslcells.evaluation import probe
from sslcells.evaluation.clustering import clustering, clusters
from sslcells.evaluation.fewshot import few_shot
from sslcells.evaluation.probe import Labelled, linear_probe


def labelled(n, classes=3, seed=0, noise=0.8, per_source=1):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) // per_source % classes
    z = 2 * torch.eye(classes, 6)[labels] + noise * torch.randn(n, 6, generator=generator)
    return Labelled(z, labels, torch.arange(n) // per_source + 1000 * seed)


def test_the_probe_is_scikit_learns_with_the_best_c_of_the_validation_split():
    train, val, test = labelled(90), labelled(45, seed=1), labelled(45, seed=2)
    right = {}
    for c in probe.STRENGTHS:
        model = make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=5000, tol=1e-8))
        model.fit(train.z.double(), train.labels)
        right[c] = model.score(val.z.double(), val.labels), model.predict_proba(test.z.double())
    found = linear_probe(train, test, val, 3, 0)
    best = max(score for score, _ in right.values())
    assert found.strength == min(c for c, (score, _) in right.items() if score == best)
    torch.testing.assert_close(found.scores, torch.from_numpy(right[found.strength][1]), atol=2e-3, rtol=0)
    assert found.converged


def test_without_a_validation_split_folds_keep_sources_together(monkeypatch):
    train, seen = labelled(120, per_source=10), []
    folds = probe._folds
    monkeypatch.setattr(probe, "_folds", lambda rows, seed: seen.append((rows, folds(rows, seed))) or seen[-1][1])
    found = linear_probe(train, labelled(30, seed=1), None, 3, 0)
    assert "3 folds of train, by source" in found.chosen_on
    for rows, parts in seen:
        for rest, out in parts:
            assert not set(rows.sources[rest].tolist()) & set(rows.sources[out].tolist())


def test_train_asked_itself_is_asked_by_probes_that_did_not_see_it():
    """Labels of sources at random: whoever has seen a source knows its label, nobody else can."""
    generator = torch.Generator().manual_seed(0)
    source = torch.arange(160) // 4
    z = torch.randn(40, 64, generator=generator)[source] + 0.01 * torch.randn(160, 64, generator=generator)
    train = Labelled(z, torch.randint(2, (40,), generator=generator)[source], source)
    found = linear_probe(train, None, None, 2, 0)
    assert 0.2 < float((found.scores.argmax(1) == train.labels).float().mean()) < 0.8


@pytest.mark.parametrize(("apart", "low", "high"), [(True, 0.2, 0.8), (False, 0.95, 1)])
def test_queries_are_asked_by_probes_that_did_not_see_their_source(apart, low, high, monkeypatch):
    """As above, with half of each source in train; queries of other sources are answered as they were."""
    monkeypatch.setattr(probe, "_chosen", lambda *_: (1.0, "nothing"))
    generator = torch.Generator().manual_seed(0)
    source = torch.arange(160) // 4
    z = torch.randn(40, 64, generator=generator)[source] + 0.01 * torch.randn(160, 64, generator=generator)
    rows = Labelled(z, torch.randint(2, (40,), generator=generator)[source], source)
    half = np.arange(160) % 2 == 0
    train, same = rows.at(half.nonzero()[0]), rows.at((~half).nonzero()[0])
    other = Labelled(z[:9].flip(1), rows.labels[:9], torch.arange(1000, 1009))
    asked = Labelled(*(torch.cat(columns) for columns in zip(other, same, strict=True)))
    found = linear_probe(train, asked, None, 2, 0, apart=apart).scores
    assert low < float((found[9:].argmax(1) == same.labels).double().mean()) <= high
    assert torch.equal(found[:9], linear_probe(train, other, None, 2, 0).scores)


def test_a_probe_without_the_only_source_of_a_class_has_no_answer():
    train = labelled(20, classes=2, per_source=10)
    found = linear_probe(train, train, None, 2, 0)
    assert not found.scores.any()


@pytest.mark.parametrize(
    "train",
    [
        Labelled(torch.randn(3, 6), torch.arange(3), torch.arange(3)),  # one image a class
        Labelled(torch.ones(30, 6), torch.arange(30) % 3, torch.arange(30)),  # all equal
        Labelled(torch.randn(30, 6), (torch.arange(30) == 0).long() * 2, torch.arange(30)),  # a class missing, one rare
    ],
)
def test_hard_cases_of_the_probe(train):
    for asked in (labelled(12, seed=3), None):
        found = linear_probe(train, asked, None, 3, 0)
        assert found.scores.shape == (12 if asked else len(train.labels), 3)
        assert found.scores.isfinite().all()


def test_one_class_has_no_probe():
    rows = Labelled(torch.randn(5, 2), torch.zeros(5, dtype=torch.int64), torch.arange(5))
    assert linear_probe(rows, None, None, 1, 0) is None


def test_few_shot_with_all_images_is_the_nearest_centroid():
    train, test = labelled(30), labelled(60, seed=1, noise=1.5)
    unit = [torch.nn.functional.normalize(x.z.double(), dim=1) for x in (train, test)]
    centroids = torch.stack([unit[0][train.labels == c].mean(0) for c in range(3)])
    peer = KNeighborsClassifier(1).fit(torch.nn.functional.normalize(centroids, dim=1), [0, 1, 2])
    hits, spread, smallest = few_shot(test.z, test.sources, test.labels, train.z, train.labels, train.sources, 10, 0)
    assert torch.equal(hits, torch.from_numpy(peer.predict(unit[1]) == test.labels.numpy()).float())
    assert spread == 0
    assert smallest == 10


def test_few_shot_draws_sources_apart_and_asks_no_source_that_it_drew():
    train = labelled(60, per_source=5)
    hits, _, _ = few_shot(train.z, train.sources, train.labels, train.z, train.labels, train.sources, 4, 0)
    assert hits.isnan().all(), "each class has four sources, and all are drawn"
    hits, _, smallest = few_shot(train.z, train.sources, train.labels, train.z, train.labels, train.sources, 3, 0)
    assert hits.isfinite().all()
    assert smallest == 20


def test_clusters_are_scikit_learns():
    rows = labelled(120, noise=1.2)
    unit = torch.nn.functional.normalize(rows.z.double(), dim=1).numpy()
    expected = KMeans(3, n_init=10, random_state=5).fit_predict(unit)
    cluster = clusters(rows.z, 3, 5)
    assert normalized_mutual_info_score(expected, cluster) == 1
    found, true = clustering(cluster, rows.labels, rows.sources, 0), rows.labels.numpy()
    assert found["NMI"].value == normalized_mutual_info_score(true, expected)
    assert found["ARI"].value == pytest.approx(adjusted_rand_score(true, expected))
    assert found["AMI"].value == pytest.approx(adjusted_mutual_info_score(true, expected))
    assert all(s.low < s.value < s.high for s in found.values())


def test_collapsed_rows_cluster_into_nothing():
    labels = torch.arange(40) % 4
    cluster = clusters(torch.ones(40, 8), 4, 0)
    found = clustering(cluster, labels, torch.arange(40), 0)
    assert {k: v.value for k, v in found.items()} == pytest.approx({"NMI": 0, "ARI": 0, "AMI": 0}, abs=1e-9)
    assert math.isfinite(np.sum([v.low for v in found.values()]))
