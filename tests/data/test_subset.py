"""A part of the labels has its share of each class, in whole sources; a larger part contains a smaller one."""

import pytest
import torch

from sslcells.config import ConfigError
from sslcells.data import ImageSet, synthetic
from sslcells.data.subset import labelled_part
from sslcells.plan import leave_out


class Images(ImageSet):
    channels, classes = 1, ("many", "few")

    def __init__(self, known=True, per_source=1):
        number = torch.arange(220)
        self.labels = (number >= 200).long() if known else torch.full((220,), -1)
        self.sources = number // per_source
        self.labels[7] = -1

    def pixels(self, index):
        return torch.full((1, 2, 2), index, dtype=torch.uint8)

    def name(self, index):
        return str(index)


def names(fraction, seed=0, **options):
    part = labelled_part(Images(**options), fraction, seed)
    return [int(part.name(i)) for i in range(len(part))]


def test_each_class_has_its_share_and_at_least_one():
    part = labelled_part(Images(), 0.1, 0)
    assert part.labels.bincount().tolist() == [20, 2]
    assert labelled_part(Images(), 0.01, 0).labels.bincount().tolist() == [2, 1]
    assert part.pixels(3)[0, 0, 0] == names(0.1)[3]
    assert len(part.sources) == len(part) == 22


def test_parts_of_a_seed_are_nested_and_seeds_differ():
    assert set(names(0.1)) < set(names(0.5))
    assert names(0.1) == names(0.1) != names(0.1, seed=1)


def test_sources_stay_whole():
    part = labelled_part(Images(per_source=10), 0.1, 0)
    assert part.sources.bincount().unique().tolist() in ([0, 10], [0, 9, 10])  # image 7 has no label
    assert len(part.sources.unique()) == 3  # 2 of class 0, and 1 of class 1


class Drawn(ImageSet):
    """Classes and sources of uneven size, at random; sources hold several classes, and some labels are unknown."""

    channels = 1

    def __init__(self, seed, several):
        generator = torch.Generator().manual_seed(seed)
        count, classes, sources = (int(torch.randint(2, high, (), generator=generator)) for high in (200, 8, 60))
        self.classes = tuple(map(str, range(classes)))
        self.labels = (torch.rand(count, generator=generator).square() * (classes + 1)).long() - 1
        self.labels[0] = 0
        self.sources = 1000 - 7 * (torch.rand(count, generator=generator).square() * sources).long()
        if several:
            self.targets = (torch.rand(count, classes, generator=generator) < 0.2).byte()
            self.labels = torch.full((count,), -1)

    def pixels(self, index):
        raise NotImplementedError

    def name(self, index):
        return str(index)


@pytest.mark.parametrize("several", [False, True])
def test_random_sets(several):
    for seed in range(40):
        images, within = Drawn(seed, several), set()
        kinds = images.labels if not several else torch.cat([images.targets, images.targets.sum(1)[:, None] == 0], 1)
        known = torch.ones(len(images), dtype=torch.bool) if several else images.labels >= 0
        for fraction in (0.01, 0.1, 0.3, 0.31, 0.8, 0.99):
            part = labelled_part(images, fraction, seed)
            taken = torch.tensor([int(part.name(i)) for i in range(len(part))])
            drawn = torch.isin(images.sources, part.sources)
            assert taken.tolist() == (drawn & known).nonzero()[:, 0].tolist(), "a source was split"
            assert within <= set(taken.tolist()), "a larger part does not contain a smaller one"
            within = set(taken.tolist())
            for c in range(len(images.classes) + several):
                of_class = kinds[:, c] > 0 if several else kinds == c
                total, got = int(of_class.sum()), int(of_class[taken].sum())
                assert got or not total, "a class was left out"
                largest = int(images.sources[of_class].unique(return_counts=True)[1].max()) if total else 0
                assert got >= fraction * total - largest / 2, "too few of a class"


def test_of_images_with_several_classes_a_part_of_all():
    images = Images(known=False)
    images.targets = torch.ones(220, 3, dtype=torch.uint8)
    part = labelled_part(images, 0.1, 0)
    assert part.targets.shape == (22, 3)


def test_all_is_all_and_without_labels_there_is_no_part():
    images = Images(known=False)
    assert labelled_part(images, 1.0, 0) is images
    with pytest.raises(ConfigError, match=r"^train.label_fraction=0.5 needs labels"):
        labelled_part(images, 0.5, 0)


def of_labs(labs, names=("north", "south")):
    images = synthetic.open_splits(synthetic.Config(train=len(labs), val=0, test=0))["train"]
    images.labs, images.lab_names = torch.tensor(labs), names
    return images


def test_laboratories_are_left_out_of_train_and_val_alone():
    splits = {"train": of_labs([1, 2, 0, 2]), "val": of_labs([2, 2]), "test": of_labs([2, 1])}
    left = leave_out(splits, ["south"])
    assert left["train"].labs.tolist() == [1, 0]
    assert left["test"] is splits["test"]
    assert "val" not in left
    assert leave_out(splits, []) == splits


@pytest.mark.parametrize(
    ("labs", "without", "words"),
    [
        ([1, 2], ["soth"], r"no laboratory soth \(did you mean south\?\)"),
        ([1, 1], ["north"], "train has no images of other laboratories"),
        (None, ["north"], "the data names no laboratories"),
    ],
)
def test_laboratories_that_cannot_be_left_out(labs, without, words):
    images = of_labs(labs or [1, 2])
    images.labs = images.labs if labs else None
    with pytest.raises(ConfigError, match=words):
        leave_out({"train": images}, without)
