"""Images of one photograph are found among others: turned, mirrored, shifted and scaled; no two photographs are one."""

import csv
import os

import numpy as np
import pytest
from PIL import Image

from sslcells.cli import main
from sslcells.data._smear import draw_smear
from sslcells.data.find_sources import Details, Sources, agreement, shared
from sslcells.delivery.sources import sources

cv2 = pytest.importorskip("cv2", reason="the extra `sources` is not installed")


def photograph(number):
    """A field of many small cells, 160 × 160."""
    tiles = [[draw_smear(3, number * 100 + 10 * y + x, (x + y) % 5, 40) for x in range(4)] for y in range(4)]
    return Image.fromarray(np.concatenate([np.concatenate(row, 1) for row in tiles], 0))


COPIES = {
    "plain": lambda image: image,
    "turned": lambda image: image.rotate(37, Image.Resampling.BICUBIC),
    "mirrored": lambda image: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT).rotate(90),
    "shifted": lambda image: image.crop((20, 12, 160, 152)),
    "smaller": lambda image: image.resize((120, 120), Image.Resampling.BICUBIC),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cells")
    for number in range(4):
        for name, change in COPIES.items():
            change(photograph(number)).save(folder / f"{name}_{number}.png")
    photograph(9).save(folder / "alone_9.png")
    (folder / "broken.png").write_bytes(b"no image")
    return folder


def test_copies_are_found_and_nothing_else(folder, tmp_path, capsys):
    known = tmp_path / "known.csv"
    lines = [f"{name}_{n}.png,{n}" for name in COPIES for n in range(4)] + ["alone_9.png,9"]
    known.write_text("\n".join(["path,source", *lines]), encoding="utf-8")
    assert main(None, ["sources", str(folder), "--out", str(tmp_path), "--known", str(known)]) == 0
    out = capsys.readouterr().out
    assert "precision 1.0000 of 40 pairs found, recall 1.0000 of 40 pairs known" in out
    assert "broken.png: not an image; left out" in out
    assert "21 images of 5 sources, 1 of them with one image alone" in out
    with (tmp_path / "sources.csv").open(encoding="utf-8") as file:
        rows = {row["path"]: row for row in csv.DictReader(file)}
    assert {rows[f"{name}_2.png"]["source"] for name in COPIES} == {"mirrored_2.png"}
    assert rows["alone_9.png"] == {"path": "alone_9.png", "source": "alone_9.png", "inliers": "0"}
    assert all(int(row["inliers"]) >= 12 for path, row in rows.items() if path != "alone_9.png")
    with Image.open(tmp_path / "sources.png") as picture:
        assert picture.width > 300


def test_a_limit_that_none_reaches_leaves_all_alone(folder, tmp_path):
    found = sources(str(folder), str(tmp_path), inliers=10_000, say=lambda line: None)
    assert found.group == list(range(21))
    assert not found.passed


def test_a_place_photographed_twice_is_one_source(folder, tmp_path):
    """In other colours it is nobody's neighbour: only the groups' comparison with one another finds it."""
    both = tmp_path / "both"
    both.mkdir()
    for name in ("plain", "shifted", "smaller"):
        for number in range(2):
            with Image.open(folder / f"{name}_{number}.png") as image:
                image.save(both / f"a_{name}_{number}.png")
                if number == 0:
                    Image.fromarray(np.asarray(image)[..., ::-1] // 2 + 90).save(both / f"b_{name}_{number}.png")
    apart = sources(str(both), str(tmp_path), neighbours=2, between=0, say=lambda line: None)
    together = sources(str(both), str(tmp_path), neighbours=2, say=lambda line: None)

    def groups(found):
        members = {}
        for path, g in zip(found.paths, found.group, strict=True):
            members.setdefault(g, set()).add((path[0], path[-5]))
        return sorted(map(sorted, members.values()))

    assert groups(apart) == [[("a", "0")], [("a", "1")], [("b", "0")]]
    assert groups(together) == [[("a", "0"), ("b", "0")], [("a", "1")]]


def test_nothing_readable_is_no_success(tmp_path, capsys):
    (tmp_path / "cells").mkdir()
    (tmp_path / "cells" / "1.png").write_bytes(b"no image")
    os.mkfifo(tmp_path / "cells" / "2.png")
    assert main(None, ["sources", str(tmp_path / "cells"), "--out", str(tmp_path / "out")]) == 1
    assert "none of the 2 images below" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_precision_and_recall_count_pairs():
    found = Sources(["a", "b", "c", "d", "x"], [0, 0, 0, 3, 4], [], [], [], [])
    said = agreement(found, {"a": "1", "b": "1", "c": "2", "d": "2"})
    known = "of 4 images with a known source (1 of 5 have none: x)"
    assert said == f"{known}: precision 0.3333 of 3 pairs found, recall 0.5000 of 2 pairs known"
    part = agreement(found, {"A": "1", "b": "1"})
    assert part.startswith("of 2 images with a known source (3 of 5 have none: c, d, x): precision")
    assert "none of these images" in agreement(found, {"q": "1"})


def test_images_without_details_share_none():
    nothing = np.zeros((0, 2), np.float32), np.zeros((0, 128), np.uint8)
    empty = Details((nothing[0], nothing[0]), (nothing[1], nothing[1]))
    assert shared(cv2, empty, empty) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "no such folder"),
        ([".", "--known", "nowhere.csv"], "cannot be read"),
        ([".", "--inliers", "3"], "--inliers 3 should be at least 4"),
        ([".", "--neighbours", "0"], "--neighbours 0 should be at least 1"),
    ],
)
def test_mistakes_are_named(folder, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(folder)
    assert main(None, ["sources", *arguments]) == 2
    assert message in capsys.readouterr().err
