"""Figures of large splits use some of their images: which ones, the same on any number of ranks, and said."""

import pytest
import torch
from gloo import on_ranks

from sslcells import ranks
from sslcells.augment import Augment
from sslcells.config import load
from sslcells.data import ImageSet, holdout
from sslcells.evaluation import during_training, knn
from sslcells.evaluation.during_training import Evaluation
from sslcells.evaluation.encode import drawn


def labels_of(counts):
    """Labels in turn, so that every n-th image would miss classes; −1 is unlabelled."""
    return torch.tensor([c for place in range(max(counts.values())) for c, n in counts.items() if place < n])


@pytest.mark.parametrize("most", [3, 10, 100, 999])
def test_each_class_has_its_share_and_one_image_at_least(most):
    labels = labels_of({0: 700, 1: 250, 2: 45, 3: 5})
    index = drawn(labels, most)
    assert index == sorted(set(index))
    assert len(index) == most
    counts = labels[index].bincount(minlength=4)
    assert int((counts > 0).sum()) == min(most, 4)
    assert (counts - most * torch.tensor([0.7, 0.25, 0.045, 0.005])).abs().max() <= 2
    assert set(drawn(labels, most // 2 or 1)) <= set(index), "a smaller choice is a part of a larger one"


def test_all_images_if_there_are_not_more():
    assert drawn(torch.tensor([0, 1, 1]), 3) == drawn(torch.tensor([0, 1, 1]), None) == [0, 1, 2]
    assert drawn(torch.zeros(0, dtype=torch.int64), 5) == []


def test_images_without_a_label_fill_what_the_others_leave():
    labels = labels_of({-1: 900, 0: 50, 1: 50})
    assert (labels[drawn(labels, 60)] >= 0).all()
    assert int((labels[drawn(labels, 150)] >= 0).sum()) == 100


class Images(ImageSet):
    """Random pixels in classes of 5:3:2; three images in a row are of one source."""

    channels, classes = 3, ("a", "b", "c")

    def __init__(self, count, seed):
        self.labels = torch.tensor([0, 1, 0, 2, 0, 1, 0, 1, 0, 2])[torch.arange(count) % 10]
        self.sources = torch.arange(count) // 3 + 1000 * seed
        self._pixels = torch.randint(256, (count, 3, 8, 8), generator=torch.Generator().manual_seed(seed)).byte()

    def pixels(self, index):
        return self._pixels[index]

    def name(self, index):
        return str(index)


def figures(val, limits):
    """Figures of an untrained encoder on 90 images of train and `val` of val; how many rows each rank compared."""
    seen, asked = [], knn.knn_scores

    def counted(query, bank, *rest):
        seen.append((len(query), len(bank)))
        return asked(query, bank, *rest)

    with pytest.MonkeyPatch.context() as patch:
        for module in (knn, during_training):
            patch.setattr(module, "QUERIES", 8)
        patch.setattr(during_training, "knn_scores", counted)
        small = ["augment.size=8", "augment.recipe=none", "train.workers=0", "evaluate.batch=16", "evaluate.k=5"]
        run = load(None, [*small, *limits])
        splits = {"train": Images(90, 0)} | ({"val": Images(val, 1)} if val else {})
        torch.manual_seed(0)
        encoder = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 8 * 8, 8))
        evaluation = Evaluation(run, splits, Augment(run.augment, (0.5,), (0.25,)), torch.device("cpu"))
        out = evaluation._encoder_figures(encoder)
        return out, ranks.all_ranks(seen), (evaluation._bank_index, evaluation._val_index)


VAL, NO_VAL = 40, 0


def test_of_val_and_of_train_only_so_many_are_used():
    found, seen, (bank, val) = figures(VAL, ["evaluate.bank=50", "evaluate.queries=20"])
    assert (len(bank), len(val)) == (50, 20)
    assert seen == [[(20, 50)]]
    assert "knn/top1" in found
    assert figures(VAL, ["evaluate.bank=none", "evaluate.queries=none"])[1] == [[(40, 90)]]
    assert figures(VAL, ["evaluate.max_images=30"])[1] == [[(30, 30)]]


def test_leave_one_out_asks_some_of_the_bank():
    found, seen, _ = figures(NO_VAL, ["evaluate.bank=50", "evaluate.queries=20"])
    assert seen == [[(20, 50)]]
    assert "knn_loo/top1" in found


@pytest.mark.parametrize("val", [VAL, NO_VAL])
def test_the_figures_of_ranks_are_those_of_one_process(val):
    limits = ["evaluate.bank=50", "evaluate.queries=30"]
    alone, _, chosen = figures(val, limits)
    for found, seen, same in on_ranks(3, figures, val, limits):
        assert found == alone
        assert same == chosen
        assert [sum(queries for queries, _ in mine) for mine in seen] == [14, 8, 8], "each rank asks its part"


def test_what_is_left_out_is_said():
    splits = {"train": Images(90, 0), "val": Images(40, 1)}
    assert holdout.limits(splits, load(None, []).evaluate) == ""
    few = load(None, ["evaluate.bank=50", "evaluate.queries=20"]).evaluate
    said = "; measured on 20 of the 40 images of val, compared with 50 of the 90 images of train"
    assert holdout.limits(splits, few) == f"{said} (evaluate.queries, evaluate.bank)"
    assert "20 of the 90 images of train, compared" in holdout.limits({"train": splits["train"]}, few)
