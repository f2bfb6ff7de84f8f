import math

import pytest
import torch

from sslcells.evaluation import retrieval as retrieval_module
from sslcells.evaluation.retrieval import retrieval


def rows(n, classes=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (n,), generator=generator)
    return torch.eye(classes, 12)[labels] + 0.6 * torch.randn(n, 12, generator=generator), labels


class Exact:
    """Nearest by cosine, for a peer that would take faiss."""

    def __call__(self, query, k, reference=None, ref_includes_query=False):
        query, reference = (torch.nn.functional.normalize(x.double(), dim=1) for x in (query, reference))
        cosine = query @ reference.T
        if ref_includes_query:
            cosine.fill_diagonal_(-math.inf)
        return cosine.sort(dim=1, descending=True)[0][:, :k], cosine.sort(dim=1, descending=True)[1][:, :k]


@pytest.mark.parametrize("tile", [2**24, 150 * 7])
def test_it_is_pytorch_metric_learnings(monkeypatch, tile):
    peers = pytest.importorskip("pytorch_metric_learning.utils.accuracy_calculator", reason="the peer is not installed")
    monkeypatch.setattr(retrieval_module, "_TILE", tile)
    z, labels = rows(150)
    names = ("precision_at_1", "r_precision", "mean_average_precision_at_r")
    peer = peers.AccuracyCalculator(include=names, k="max_bin_count", knn_func=Exact(), device=torch.device("cpu"))
    expected = peer.get_accuracy(z, labels, z, labels, ref_includes_query=True)
    found = {name: float(value.mean()) for name, value in retrieval(z, labels, torch.arange(150)).items()}
    assert found["recall@1"] == pytest.approx(expected["precision_at_1"])
    assert found["R-precision"] == pytest.approx(expected["r_precision"])
    assert found["mAP@R"] == pytest.approx(expected["mean_average_precision_at_r"])


def naive(z, labels, sources):
    """Each query by itself, in a plain loop."""
    z = torch.nn.functional.normalize(z.double(), dim=1)
    out = []
    for i in range(len(z)):
        others = [j for j in range(len(z)) if sources[j] != sources[i]]
        others.sort(key=lambda j, i=i: -float(z[i] @ z[j]))
        right = [bool(labels[j] == labels[i]) for j in others]
        r = sum(right)
        if not r:
            out.append([math.nan] * 5)
            continue
        precision = [sum(right[: i + 1]) / (i + 1) for i in range(r)]
        ap = sum(p for p, hit in zip(precision, right, strict=False) if hit) / r
        out.append([*(float(any(right[:k])) for k in (1, 5, 10)), sum(right[:r]) / r, ap])
    return torch.tensor(out, dtype=torch.float64)


def test_own_source_is_left_out_and_a_query_without_answer_is_not_asked():
    z, labels = rows(80)
    sources = torch.arange(80) // 3
    labels[5], sources[5] = 9, 999  # one image of its class
    found = torch.stack([*retrieval(z, labels, sources).values()], dim=1)
    torch.testing.assert_close(found, naive(z, labels, sources), equal_nan=True)
    assert found[5].isnan().all()


def test_unknown_labels_neither_ask_nor_count():
    z, labels = rows(60)
    labels[::3] = -1
    known = labels >= 0
    found, alone = (retrieval(z[m], labels[m], torch.arange(60)[m]) for m in (labels > -2, known))
    for name, value in found.items():
        assert value[~known].isnan().all()
        torch.testing.assert_close(value[known], alone[name])


def test_collapsed_rows_are_no_better_than_chance():
    found = retrieval(torch.ones(40, 8), torch.arange(40) % 4, torch.arange(40))
    assert found["R-precision"].mean() < 0.3
    assert found["mAP@R"].mean() < 0.3


def test_one_image_a_class_asks_nothing():
    assert all(v.isnan().all() for v in retrieval(rows(6)[0], torch.arange(6), torch.arange(6)).values())
