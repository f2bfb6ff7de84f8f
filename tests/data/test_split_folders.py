"""Splits by the names of folders: used, or refused with where they are; never trained on as classes."""

from pathlib import Path

import pytest
from PIL import Image

from sslcells.config import ConfigError
from sslcells.data import folder, open_splits
from sslcells.data._splits import class_below, split_named


def made(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(root / name)
    return root


def read(root: Path, **fields) -> dict[str, list[str]]:
    splits = open_splits(folder.Config(path=str(root), **fields))
    return {split: [images.name(i) for i in range(len(images))] for split, images in splits.items()}


def refused(root: Path, **fields) -> str:
    with pytest.raises(ConfigError) as error:
        read(root, **fields)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("name", "split"),
    [
        *[
            (name, "train")
            for name in ("train", "TRAIN", "Training", "train_set", "TrainSet", "trainset", "images-train")
        ],
        *[(name, "train") for name in ("train images", "training_data", "TrainImages", "train.split")],
        *[(name, "val") for name in ("valid", "Validation", "validation_set", "valset", "VAL_images")],
        *[(name, "test") for name in ("testing", "Test-Set", "testset", "test_data", "TestData")],
        *[(name, None) for name in ("TEST_SIMPLE", "my_train", "set", "data", "mono", "test1", "contest", "", "träin")],
        *[(name, None) for name in ("train_test", "valine", "trainees", "latest", "set_test_2")],
    ],
)
def test_names_of_splits(name, split):
    assert split_named(name) == split


def test_other_spellings_are_used(tmp_path):
    made(tmp_path, "train_set/a/1.png", "ValidationSet/a/1.png", "Test-Images/a/1.png")
    assert read(tmp_path) == {
        "train": ["train_set/a/1.png"],
        "val": ["ValidationSet/a/1.png"],
        "test": ["Test-Images/a/1.png"],
    }


def test_the_plain_name_wins_and_two_others_are_asked_about(tmp_path):
    made(tmp_path, "train/a/1.png", "train_set/a/1.png")
    assert read(tmp_path) == {"train": ["train/a/1.png"]}
    made(tmp_path, "train/a/1.png", "val_set/a/1.png", "val_data/a/1.png")
    assert "val_data and val_set: set data.val= to one of them" in refused(tmp_path)


@pytest.mark.parametrize("way", ["images", "download/images", "a/b/c"])
def test_splits_further_down_are_used(tmp_path, way):
    made(tmp_path, f"{way}/train/a/1.png", f"{way}/train/b/1.png", f"{way}/test/b/1.png")
    (tmp_path / "README.txt").write_text("no image")
    made(tmp_path, "@eaDir/1.png")
    splits = open_splits(folder.Config(path=str(tmp_path)))
    assert splits["train"].name(0) == f"{way}/train/a/1.png"
    assert splits["train"].classes == splits["test"].classes == ("a", "b")
    assert splits["test"].labels.tolist() == [1]
    assert splits["train"].found.where == f"{tmp_path}/{way}/train, by its name"


@pytest.mark.parametrize(
    ("names", "said"),
    [
        # beside other folders with images
        (
            ["images/train/a/1.png", "images/test/a/1.png", "more/1.png"],
            "data.train=images/train data.test=images/test",
        ),
        # beside loose images
        (["images/train/a/1.png", "images/val/a/1.png", "1.png"], "data.train=images/train data.val=images/val"),
        # inside classes
        (["mono/train/1.png", "mono/test/1.png", "neutro/train/1.png"], "data.train=mono/train data.test=mono/test"),
        # unpacked twice
        (["train/train/a/1.png", "test/test/a/1.png"], "train/train, and all would be train"),
        (["train/a/1.png", "train/validation/a/1.png"], "train/validation, and all would be train"),
        # at the bottom
        (["mono/d1/test/1.png", "neutro/d2/1.png"], "mono/d1/test, and all would be train"),
        # other names
        (["my_train/a/1.png", "my_test/a/1.png"], "data.train=my_train data.test=my_test"),
        (["train1/a/1.png", "train_2/a/1.png"], "train_2"),
    ],
)
def test_splits_elsewhere_are_refused_with_where(tmp_path, names, said):
    made(tmp_path, *names)
    message = refused(tmp_path)
    assert said in message
    assert "called like splits" in message
    advised = dict(word.removesuffix(";").split("=", 1) for word in message.split() if word.startswith("data."))
    assert "data.train" in advised or "data.kind" in advised


def test_what_the_message_advises_works(tmp_path):
    made(tmp_path, "my_train/a/1.png", "my_test/a/1.png", "mono/1.png")
    message = refused(tmp_path)
    assert "data.train=my_train data.test=my_test; or data.train=. if all of them are train" in message
    assert [*read(tmp_path, train="my_train", test="my_test")] == ["train", "test"]
    assert len(read(tmp_path, train=".")["train"]) == 3
    nested = made(tmp_path / "nested", "train/train/a/1.png", "train/test/a/1.png")
    assert "data.train=train/train data.test=train/test; or data.train=train if all" in refused(nested)
    assert len(read(nested, train="train")["train"]) == 2
    assert [*read(nested, train="train/train", test="train/test")] == ["train", "test"]


@pytest.mark.parametrize(
    "names",
    [
        ["mono/1.png", "neutro/1.png"],
        ["val_139/1.png", "wild/1.png"],  # no split: nothing there is called train
        ["images/mono/1.png", "images/neutro/1.png"],
        ["plate_1/latest/1.png", "plate_2/contest/1.png"],
    ],
)
def test_other_folders_are_classes_as_before(tmp_path, names):
    assert read(made(tmp_path, *names)) == {"train": sorted(names)}


def test_empty_folders_called_like_splits_disturb_nothing(tmp_path):
    made(tmp_path, "mono/1.png", "neutro/1.png")
    (tmp_path / "mono/test").mkdir()
    (tmp_path / "labels/train").mkdir(parents=True)
    (tmp_path / "labels/train/1.txt").write_text("0 0.5 0.5 1 1")
    assert read(tmp_path) == {"train": ["mono/1.png", "neutro/1.png"]}


def test_splits_inside_an_excluded_folder_disturb_nothing(tmp_path):
    made(tmp_path, "mono/1.png", "old/train/mono/1.png", "old/test/mono/1.png")
    assert "called like splits" in refused(tmp_path)
    assert read(tmp_path, exclude=["old"]) == {"train": ["mono/1.png"]}


def test_the_class_of_a_path():
    assert class_below(["train_set", "mono", "d1"]) == "mono"
    assert class_below(["images", "train", "mono"]) == "mono"
    assert class_below(["mono", "d1"]) == "mono"
    assert class_below(["images", "train"]) is None
    assert class_below([]) is None
