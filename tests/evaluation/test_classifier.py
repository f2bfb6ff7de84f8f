"""A classifier's predictions: figures as scikit-learn has them, and the file they are kept in."""

import numpy as np
import pytest
import torch
from sklearn.metrics import balanced_accuracy_score, log_loss, roc_auc_score

from sslcells.evaluation.classifier import Predictions, read_predictions

NAMES = [f"image {i}" for i in range(40)]
GENERATOR = torch.Generator().manual_seed(0)
P = torch.rand(40, 3, dtype=torch.float64, generator=GENERATOR)


def said(labels, probabilities):
    return Predictions(NAMES, ["a", "b", "c"], labels, torch.arange(40), probabilities)


def test_one_class_an_image():
    labels, p = torch.arange(40) % 3 % 2, P / P.sum(1, keepdim=True)  # class 2 is missing
    found = said(labels, p).figures()
    assert found["loss"] == pytest.approx(log_loss(labels, p, labels=[0, 1, 2]))
    assert found["top1"] == pytest.approx((p.argmax(1) == labels).double().mean().item())
    with pytest.warns(UserWarning, match="y_pred contains classes not in y_true"):
        assert found["balanced"] == pytest.approx(balanced_accuracy_score(labels, p.argmax(1)))


def test_several_classes_an_image():
    labels = (P + 0.3 * torch.rand(40, 3, dtype=torch.float64, generator=GENERATOR) > 0.7).to(torch.uint8)
    labels[:, 2] = 0  # never there: no AUROC
    found = said(labels, P).figures()
    assert found["auroc"] == pytest.approx(roc_auc_score(labels[:, :2], P[:, :2], average="macro"))
    assert found["loss"] == pytest.approx(np.mean([log_loss(labels[:, c], P[:, c], labels=[0, 1]) for c in range(3)]))


def test_the_file_reads_back_equal(tmp_path):
    before = said(torch.arange(40) % 3, P)
    before.write(tmp_path, "val")
    after = read_predictions(tmp_path, "val")
    assert after.names == before.names
    assert after.classes == before.classes
    for a, b in zip(after[2:], before[2:], strict=True):
        assert torch.equal(a, b)


def test_nothing_asked_is_no_figure():
    assert Predictions([], ["a"], torch.zeros(0, dtype=torch.int64), torch.zeros(0), torch.zeros(0, 1)).figures() == {}
