"""Patterns that take or leave out images of a folder, in every place that they may be given."""

import itertools
from pathlib import Path

import pytest
from PIL import Image

from sslcells.config import ConfigError, dump, load
from sslcells.data import folder, open_splits
from sslcells.data._patterns import Patterns, checked, given
from sslcells.data.describe import brief, describe

PATHS = ["a.png", "train/mono/1.png", "train/mono/1_dup.png", "train/mono/deep/2.tif", "test/dups/[x].png", "ünï/1.png"]


@pytest.mark.parametrize(
    ("pattern", "matched"),
    [
        ("*.png", [0, 1, 2, 4, 5]),
        ("mono", [1, 2, 3]),
        ("mono/", [1, 2, 3]),
        ("mono/1.png", []),
        ("train/mono", [1, 2, 3]),
        ("train/*/1.png", [1]),
        ("train/*.png", []),
        ("train/**/*.tif", [3]),
        ("**/mono/1.png", [1]),
        ("train/**", [1, 2, 3]),
        ("**", [0, 1, 2, 3, 4, 5]),
        ("?.png", [0, 1, 5]),
        ("[0-9].*", [1, 3, 5]),
        ("[!a-z].png", [1, 5]),
        ("[[]x].png", [4]),
        ("[x].png", []),
        ("Mono", []),
        ("*dup*", [2, 4]),
        ("./train/mono/1.png", [1]),
        ("u\u0308ni\u0308", [5]),
        ("a.p", []),
        ("a+png", []),
    ],
)
def test_what_a_pattern_matches(pattern, matched):
    left = [Patterns(exclude=[pattern]).leaves_out(path) is not None for path in PATHS]
    taken = [Patterns(include=[pattern]).leaves_out(path) is None for path in PATHS]
    assert left == taken
    assert list(itertools.compress(range(len(PATHS)), left)) == matched


@pytest.mark.parametrize("pattern", ["", "/", "/data/train", "../train", "train\\mono"])
def test_a_pattern_that_can_match_nothing_is_refused(pattern):
    with pytest.raises(ValueError, match="relative to the folder"):
        checked([pattern])
    with pytest.raises(ConfigError, match=r"--include .* relative to the folder"):
        given([pattern], [])
    with pytest.raises(ConfigError, match=r"1 mistake in the configuration:\n  data.exclude=.* relative to the folder"):
        load(None, ["data.kind=folder", "data.path=x", f"data.exclude=[{pattern}, b]"])


@pytest.mark.parametrize(
    ("typed", "read"),
    [
        ("*_dup*", ("*_dup*",)),
        ("[*_dup*, '*.tif']", ("*_dup*", "*.tif")),
        ("[ab]*", ("[ab]*",)),
        ("[ab][cd]", ("[ab][cd]",)),
        ("[[ab]*,c]", ("[ab]*", "c")),
        ('["a","b"]', ("a", "b")),
        ("2024_01", ("2024_01",)),
        ("[]", ()),
        ("none", ()),
    ],
)
def test_patterns_as_typed(typed, read):
    assert load(None, ["data.kind=folder", "data.path=x", f"data.exclude={typed}"]).data.exclude == read


@pytest.fixture
def cells(tmp_path: Path) -> Path:
    for name in ("train/a/1.png", "train/a/1_dup.png", "train/b/1.png", "train/c/1_dup.png", "test/a/1_dup.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    Image.new("RGB", (8, 8)).save(tmp_path / "test/a/2.png")
    return tmp_path


def read_of(path: Path, **fields):
    return open_splits(folder.Config(path=str(path), **fields))


def test_patterns_survive_the_runs_configuration(tmp_path):
    typed = ["data.kind=folder", "data.path=x", "data.include=[2024_01,[ab]*]", "data.exclude=*_dup*"]
    run = load(None, typed)
    (tmp_path / "config.yaml").write_text(dump(run))
    assert load(str(tmp_path / "config.yaml")) == run
    assert run.data.include == ("2024_01", "[ab]*")


def test_excluded_images_are_counted_and_give_no_class(cells):
    splits = read_of(cells, exclude=["*_dup*"])
    train = splits["train"]
    assert [train.name(i) for i in range(len(train))] == ["train/a/1.png", "train/b/1.png"]
    assert train.classes == splits["test"].classes == ("a", "b")
    assert "excluded by *_dup*: 2, such as train/a/1_dup.png" in describe(splits)
    assert [part.count("excluded by *_dup*") for part in brief(splits).split(";")] == [1, 1]


def test_included_images_alone_are_read(cells):
    splits = read_of(cells, include=["train/a", "test/**/2.png"], exclude=["1_dup.png"])
    assert [len(images) for images in splits.values()] == [1, 1]
    assert "not included by train/a, test/**/2.png: 1, such as train/b/1.png" in describe(splits)


def test_laboratories_of_left_out_images_are_none(tmp_path):
    for name in ("a/site1/1.png", "a/site2/1.png", "b/site2/1.png", "b/site3/1.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    train = read_of(tmp_path, lab_folder="below", exclude=["site2"])["train"]
    assert (train.lab_names, train.labs.tolist()) == (("site1", "site3"), [1, 2])
    above = read_of(tmp_path, lab_folder="above", exclude=["a/site1"])["train"]
    assert above.classes == ("site2", "site3")


def test_a_pattern_may_match_in_one_split_alone(cells):
    assert {name: len(images) for name, images in read_of(cells, exclude=["2.png"]).items()} == {"train": 4, "test": 1}


def test_a_pattern_that_matches_no_image_is_refused(cells):
    with pytest.raises(ConfigError, match=r"data.exclude='\*_dub\*' matches no image below .*, such as train/a/1"):
        read_of(cells, exclude=["*_dup*", "*_dub*"])
    with pytest.raises(ConfigError, match=r"holds no images .* that data.include and data.exclude take"):
        read_of(cells, exclude=["train"])


def test_the_images_of_a_command(cells):
    patterns = Patterns(["train"], ["*_dup*"])
    assert folder.list_images(cells, patterns=patterns) == ["train/a/1.png", "train/b/1.png"]
    with pytest.raises(ConfigError, match="--include='nothing' matches no image"):
        folder.list_images(cells, patterns=Patterns(["nothing"]))
    with pytest.raises(ConfigError, match="leave out every image"):
        folder.list_images(cells, patterns=Patterns(["train"], ["train"]))
