"""Laboratories of a folder's images, in `--check`, in batches and in the samplers."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from pydantic import ValidationError

from sslcells import ranks
from sslcells.config import ConfigError, Sampler
from sslcells.data import Batch, folder, open_splits, table
from sslcells.data.describe import brief, describe
from sslcells.data.loader import read, read_in_parts
from sslcells.data.sampler import Steps, build
from sslcells.data.subset import Subset
from tests.gloo import on_ranks

LAYOUT = {  # lab → class → images
    "north": {"a": 6, "b": 4},
    "south": {"a": 3, "b": 7},
}


def written(root: Path, path: str) -> Path:
    for lab, classes in LAYOUT.items():
        for split in ("train", "test"):
            for cell, count in classes.items():
                for i in range(count if split == "train" else 1):
                    file = root / path.format(split=split, lab=lab, cell=cell, i=i)
                    file.parent.mkdir(parents=True, exist_ok=True)
                    Image.new("RGB", (8, 8), 20 * i).save(file)
    return root


WAYS = {
    "above": ("{split}/{lab}/{cell}/{i}.png", {"lab_folder": "above"}),
    "below": ("{split}/{cell}/{lab}/{i}.png", {"lab_folder": "below"}),
    "pattern": ("{split}/{cell}/{lab}_{i}.png", {"lab_pattern": r"/([a-z]+)_\d"}),
}


def counts(images):
    pairs = zip(images.labs.tolist(), images.labels.tolist(), strict=True)
    found: dict[str, dict[str, int]] = {}
    for lab, label in pairs:
        of = found.setdefault(images.lab_names[lab - 1], {})
        of[images.classes[label]] = of.get(images.classes[label], 0) + 1
    return found


@pytest.mark.parametrize("way", WAYS)
def test_laboratories_and_classes_of_a_folder(tmp_path, way):
    path, fields = WAYS[way]
    splits = open_splits(folder.Config(path=str(written(tmp_path, path)), **fields))
    assert counts(splits["train"]) == LAYOUT
    assert counts(splits["test"]) == {lab: dict.fromkeys(classes, 1) for lab, classes in LAYOUT.items()}
    assert "2 sites: north 10, south 10" in describe(splits)
    assert "2 sites" in brief(splits)


def test_a_laboratory_of_one_split_keeps_its_number(tmp_path):
    written(tmp_path, "{split}/{cell}/{lab}_{i}.png")
    for file in (tmp_path / "train").glob("*/north_*"):
        file.unlink()
    splits = open_splits(folder.Config(path=str(tmp_path), lab_pattern=r"/([a-z]+)_\d"))
    assert set(counts(splits["train"])) == {"south"}
    assert set(counts(splits["test"])) == {"north", "south"}
    assert set(splits["train"].labs.tolist()) == {2}


def test_images_without_a_laboratory_are_counted_and_named(tmp_path):
    written(tmp_path, "{split}/{cell}/{lab}_{i}.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "train/a/9.png")
    splits = open_splits(folder.Config(path=str(tmp_path), lab_pattern=r"/([a-z]+)_\d"))
    assert "2 sites: north 10, south 10; 1 without one: train/a/9.png" in describe(splits)
    assert splits["train"].labs[0] == 0


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"lab_pattern": "site_(.)"}, "data.lab_pattern='site_(.)' gives no image a laboratory: 'test/"),
        ({"lab_folder": "below"}, "data.lab_folder=below gives no image a laboratory"),
    ],
)
def test_no_laboratory_anywhere_is_refused(tmp_path, fields, words):
    written(tmp_path, "{split}/{cell}/{lab}_{i}.png")
    with pytest.raises(ConfigError) as error:
        open_splits(folder.Config(path=str(tmp_path), **fields))
    assert words.replace("'test/", "'t") in str(error.value)


def test_classes_where_laboratories_should_be_are_refused(tmp_path):
    written(tmp_path / "one", "{split}/{cell}/{lab}_{i}.png")
    above = {"lab_folder": "above"}
    with pytest.raises(ConfigError) as error:
        open_splits(folder.Config(path=str(tmp_path / "one"), **above))
    assert "data.lab_folder=above takes a, b (below " in str(error.value)
    assert "use data.lab_folder=none; if laboratories hold images without a class, data.labels=none" in str(error.value)
    train = open_splits(folder.Config(path=str(tmp_path / "one"), labels="none", **above))["train"]
    assert (train.lab_names, train.classes) == (("a", "b"), ())
    written(tmp_path / "mixed", "{split}/{lab}/{cell}/{i}.png")
    (tmp_path / "mixed/test/north/a").rename(tmp_path / "mixed/test/a")
    with pytest.raises(ConfigError, match=r"above takes a \(below .*but they are classes elsewhere in it"):
        open_splits(folder.Config(path=str(tmp_path / "mixed"), **above))


def test_two_spellings_of_a_laboratory_are_refused(tmp_path):
    written(tmp_path, "{split}/{cell}/{lab}_{i}.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "train/a/North_9.png")
    with pytest.raises(ConfigError, match="the laboratories 'North' and 'north' differ only in spelling"):
        open_splits(folder.Config(path=str(tmp_path), lab_pattern=r"/([A-Za-z]+)_\d"))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"lab_pattern": "ab"}, "needs one group in parentheses, the laboratory; it has 0"),
        ({"lab_pattern": "(a", "lab_folder": "none"}, "not a regular expression"),
        ({"lab_pattern": "(a)", "lab_folder": "above"}, "both give the laboratory"),
    ],
)
def test_mistakes_in_the_fields(fields, words):
    with pytest.raises(ValidationError, match=words):
        folder.Config(path="x", **fields)


def table_of(tmp_path, site=None):
    """The images as rows of a table, with what `site` says of each in a column."""
    written(tmp_path, "{split}/{cell}/{lab}_{i}.png")
    names = sorted(file.relative_to(tmp_path).as_posix() for file in tmp_path.rglob("*.png"))
    rows = [[name, *name.split("/")[:2], *([site(name)] if site else [])] for name in names]
    header = ["path", "split", "label", *(["site"] if site else [])]
    file = tmp_path / "t.csv"
    file.write_text("\n".join(",".join(row) for row in [header, *rows]))
    return file


def test_a_pattern_names_the_laboratories_of_a_table(tmp_path):
    splits = open_splits(table.Config(table=str(table_of(tmp_path)), lab_pattern=r"/([a-z]+)_\d"))
    assert counts(splits["train"]) == LAYOUT
    assert counts(splits["test"]) == {lab: dict.fromkeys(classes, 1) for lab, classes in LAYOUT.items()}
    assert "2 sites: north 10, south 10" in describe(splits)


def test_the_column_is_before_the_pattern(tmp_path):
    file = table_of(tmp_path, lambda name: "east" if "north" in name else "")
    splits = open_splits(table.Config(table=str(file), lab_pattern=r"/([a-z]+)_\d"))
    assert set(counts(splits["train"])) == {"east", "south"}


def test_mistakes_in_the_laboratories_of_a_table(tmp_path):
    file = table_of(tmp_path, lambda name: "North" if "a/north" in name else "north")
    with pytest.raises(ConfigError, match="the laboratories 'North' and 'north' differ only in spelling"):
        open_splits(table.Config(table=str(file)))
    with pytest.raises(
        ConfigError, match=r"lab_pattern='site_\(.\)' gives no image a laboratory: 'test/a/north_0.png'"
    ):
        open_splits(table.Config(table=str(file), lab_pattern="site_(.)"))
    with pytest.raises(ValidationError, match="needs one group in parentheses, the laboratory"):
        table.Config(table="x", lab_pattern="ab")


@pytest.fixture
def train(tmp_path):
    path, fields = WAYS["above"]
    return open_splits(folder.Config(path=str(written(tmp_path, path)), **fields))["train"]


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_carry_the_laboratory(train, workers):
    sampling = build(Sampler(), train, 6, seed=3)
    for batch, chosen in zip(read(train, Steps(sampling, 0, 1, 0, 3), workers, False), range(3), strict=True):
        assert batch.lab.tolist() == train.labs[sampling.batch(chosen)].tolist()
    parts = next(read_in_parts(train, Steps(sampling, 0, 1, 0, 1), 3, 0, False))
    assert Batch.ids(parts).lab.tolist() == train.labs[sampling.batch(0)].tolist()


def test_without_laboratories_all_are_unknown(tmp_path):
    written(tmp_path, "{split}/{cell}/{lab}_{i}.png")
    images = open_splits(folder.Config(path=str(tmp_path)))["train"]
    assert images.labs is None
    batch = next(read(images, Steps(build(Sampler(), images, 6, 3), 0, 1, 0, 1), 0, False))
    assert batch.lab.tolist() == [0] * 6


def test_equal_parts(train):
    uneven = Subset(train, torch.tensor([*range(10), 10, 11, 12]))  # 10 of north, 3 of south
    sampling = build(Sampler(kind="labs"), uneven, 4, seed=0)
    for step in range(20):
        assert torch.bincount(uneven.labs[sampling.batch(step)]).tolist() == [0, 2, 2]
    assert "2 images of each of 2 laboratories in a global batch" in sampling.describe()
    assert not sampling.repeats


def test_natural_parts(train):
    uneven = Subset(train, torch.tensor([*range(10), *range(10, 15)]))  # 10 of north, 5 of south
    sampling = build(Sampler(kind="labs", labs="natural"), uneven, 6, seed=0)
    orders = set()
    for epoch in range(20):
        batches = [sampling.batch(2 * epoch + i) for i in range(2)]
        seen = torch.cat(batches)
        assert len(seen.unique()) == 12  # each at most once
        orders.add(tuple(seen.tolist()))
        for batch in batches:
            assert abs(int((uneven.labs[batch] == 1).sum()) - 4) <= 1
            for part in batch.chunk(2):
                assert abs(int((uneven.labs[part] == 1).sum()) - 2) <= 1
    assert len(orders) == 20
    assert "except 3 that do not fill a batch; in a global batch about 4 of north, 2 of south" in sampling.describe()


@pytest.mark.parametrize("labs", ["equal", "natural"])
def test_any_step_can_be_asked_for_at_once(train, labs):
    sampling = build(Sampler(kind="labs", labs=labs), train, 6, seed=5)
    in_turn = [sampling.batch(step).tolist() for step in range(12)]
    for step in (7, 2, 11):
        assert build(Sampler(kind="labs", labs=labs), train, 6, seed=5).batch(step).tolist() == in_turn[step]


def shares():
    generator = torch.Generator().manual_seed(1)
    labs = torch.randint(1, 4, (60,), generator=generator)
    images = Subset.__new__(Subset)
    images.labs, images.lab_names, images.labels = labs, ("x", "y", "z"), labs - 1
    sampling = build(Sampler(kind="labs", labs="natural"), images, 12, seed=0)
    steps = Steps(sampling, ranks.rank(), ranks.world(), 3, 5)
    return [[pick.image for pick in picks] for picks in steps]


def test_ranks_share_one_global_batch():
    alone = shares()
    by_rank = on_ranks(2, shares)
    assert [one + other for one, other in zip(*by_rank, strict=True)] == alone


def test_one_laboratory_is_too_few(train):
    for images in (Subset(train, torch.arange(5)), Subset(train, torch.arange(0))):
        with pytest.raises(ConfigError, match=r"sampler\.kind=labs needs images of two laboratories; train has [01]"):
            build(Sampler(kind="labs"), images, 4, seed=0)
