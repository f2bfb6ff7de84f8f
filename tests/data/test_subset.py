"""Part of the labels: of each class its share, whole sources together, more containing less."""

import pytest
import torch

from sslcells.config import ConfigError
from sslcells.data import ImageSet
from sslcells.data.subset import labelled_part


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
    assert len(set(part.sources.tolist())) in (3, 4)  # 20 images of class 0 in 2 or 3 sources, 2 of class 1 in 1


def test_of_images_with_several_classes_a_part_of_all():
    images = Images(known=False)
    images.targets = torch.ones(220, 3, dtype=torch.uint8)
    part = labelled_part(images, 0.1, 0)
    assert part.targets.shape == (22, 3)


def test_all_is_all_and_without_labels_there_is_no_part():
    images = Images(known=False)
    assert labelled_part(images, 1.0, 0) is images
    with pytest.raises(ConfigError, match=r"^train.label_fraction=0.5: .* no labels"):
        labelled_part(images, 0.5, 0)
