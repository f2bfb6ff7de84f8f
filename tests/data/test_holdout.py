"""What is held out of train: whole sources of each class, always the same ones, and nothing without labels."""

import re

import pytest
import torch
from gloo import on_ranks

from sslcells.config import ConfigError
from sslcells.data import ImageSet, holdout
from sslcells.data.holdout import choose, hold_out, summary


class Images(ImageSet):
    channels = 1

    def __init__(self, labels, sources=None, classes=3, targets=None):
        self.labels, self.classes = torch.as_tensor(labels), tuple("abcdefghij"[:classes])
        self.sources = torch.arange(len(self.labels)) if sources is None else torch.as_tensor(sources)
        self.targets = targets

    def pixels(self, index):
        return torch.full((1, 2, 2), index, dtype=torch.uint8)

    def name(self, index):
        return f"cell\n{index}"


def photographs():
    """40 photographs of 10 to 49 cells, each with cells of two or three of 3 classes, and cells of none."""
    generator = torch.Generator().manual_seed(0)
    sizes = torch.arange(10, 50)
    source = torch.repeat_interleave(torch.arange(40), sizes)
    chance = torch.tensor([0.7, 0.25, 0.05]).expand(len(source), 3)
    labels = chance.multinomial(1, generator=generator)[:, 0]
    labels[torch.rand(len(labels), generator=generator) < 0.1] = -1
    return Images(labels, source * 1_000_003 % 2**40)


def test_each_class_gives_its_part_and_at_least_one():
    labels = torch.cat([torch.zeros(200), torch.ones(37), torch.full((3,), 2), torch.full((1,), 3)]).long()
    held = choose(Images(labels, classes=4), 0.1)
    assert labels[held].bincount(minlength=4).tolist() == [20, 4, 1, 0], "the single image of a class stays in train"


def test_sources_stay_whole_and_classes_near_their_part():
    images = photographs()
    held = choose(images, 0.2)
    assert not set(images.sources[held].tolist()) & set(images.sources[~held].tolist())
    known = images.labels >= 0
    for c in range(3):
        mine = known & (images.labels == c)
        assert 0.1 < held[mine].float().mean() <= 0.2 + 1 / int(mine.sum())
    assert held[~known].any(), "images without a class go with their source"


def test_a_large_source_is_held_out_only_where_half_of_each_class_stays():
    labels, sources = [0] * 40 + [1] * 40, [0] * 25 + [1] * 15 + [2] * 22 + [3] * 18
    held = choose(Images(labels, sources, classes=2), 0.1)
    assert set(torch.tensor(sources)[held].tolist()) == {1, 3}, "the smaller one of two"
    alone = choose(Images([0] * 40 + [1] * 40, [0] * 40 + [2] * 22 + [3] * 18, classes=2), 0.1)
    assert not alone[:40].any(), "a class of a single source stays"


def test_the_parts_are_all_of_train_once_and_say_what_they_are():
    train, test = photographs(), Images([0, 1])
    splits = hold_out({"train": train, "test": test}, 0.2)
    names = [splits[s].name(i) for s in ("train", "val") for i in range(len(splits[s]))]
    assert sorted(names) == sorted(train.name(i) for i in range(len(train)))
    assert splits["test"] is test
    assert splits["val"].pixels(3)[0, 0, 0] == int(splits["val"].name(3).split()[1]) % 256
    held, sources = len(splits["val"]), len(splits["val"].sources.unique())
    about = f"{held} of {len(train)} images of train ({sources} of 40 sources), held out as there is no val split"
    assert summary(splits, 0.2) == f"figures during training: on {about}"


@pytest.mark.parametrize(
    ("splits", "part", "why"),
    [
        ({"train": Images([0, 1] * 9), "val": Images([0, 1])}, 0.1, "on the val split, 2 images"),
        (
            {"train": Images([-1] * 9, classes=0)},
            0.1,
            "need no labels, and nothing is held out, as train has no labels",
        ),
        ({"train": Images([0, 1] * 9)}, 0.0, "train itself.*evaluate.holdout=0 holds nothing out"),
        ({"train": Images([0, 1] * 9, [5] * 18)}, 0.1, "train itself.*no class has a second source"),
        ({"train": Images([0, 1] * 9), "val": Images([-1, -1])}, 0.1, "train itself.*val has no labels"),
    ],
)
def test_if_nothing_is_held_out_the_summary_says_why(splits, part, why):
    assert hold_out(splits, part) == splits
    assert re.search(why, summary(hold_out(splits, part), part))


def test_of_several_classes_an_image_each_gives_its_part():
    generator = torch.Generator().manual_seed(0)
    targets = (torch.rand(500, 4, generator=generator) < torch.tensor([0.4, 0.2, 0.1, 0.02])).to(torch.uint8)
    held = choose(Images([-1] * 500, classes=0, targets=targets), 0.1)
    share = targets[held].sum(0) / targets.sum(0)
    assert ((share > 0.06) & (share < 0.15)).all(), share
    assert 40 <= held.sum() <= 60


def drawn():
    return choose(photographs(), 0.2).tolist()


def test_the_same_on_every_rank():
    assert on_ranks(2, drawn) == [drawn()] * 2


def test_what_was_held_out_is_found_again_by_name_whatever_the_sources_are(tmp_path):
    train = photographs()
    splits = hold_out({"train": train}, 0.2)
    holdout.record(tmp_path, splits, resumes=False)
    names = holdout.held_out_by(tmp_path)
    train.sources = torch.arange(len(train))
    again = holdout.hold_out_named({"train": train}, names)
    assert [again["val"].name(i) for i in range(len(again["val"]))] == names
    assert len(again["train"]) == len(train) - len(names)
    other = {"train": Images([0, 1])}
    assert holdout.hold_out_named(other, ["another"]) == other


def test_a_warning_if_the_encoder_was_trained_on_held_out_images(tmp_path):
    train = photographs()
    splits = hold_out({"train": train}, 0.2)
    assert holdout.overlap_warning(splits, tmp_path) == "", "its folder has no list"
    holdout.record(tmp_path, splits, resumes=False)
    assert holdout.overlap_warning(splits, tmp_path) == ""
    train.sources = torch.arange(len(train))
    other = hold_out({"train": train}, 0.2)
    told = r"warning: model.encoder=.* was trained on \d+ of the \d+ images held out here"
    assert re.match(told, holdout.overlap_warning(other, tmp_path))


def test_a_run_resumes_only_with_the_images_that_it_held_out(tmp_path):
    splits = hold_out({"train": photographs()}, 0.2)
    holdout.record(tmp_path, splits, resumes=False)
    holdout.record(tmp_path, splits, resumes=True)
    with pytest.raises(ConfigError, match=r"now it would hold out .*, not the same ones"):
        holdout.record(tmp_path, hold_out({"train": photographs()}, 0.1), resumes=True)
    (tmp_path / holdout.FILE).unlink()  # as in an earlier version
    with pytest.raises(ConfigError, match="held out 0 images of train; now it would hold out"):
        holdout.record(tmp_path, splits, resumes=True)
