"""A run resumes with the images that it began with, in any place, and with no others."""

import gzip
import json
import shutil
import signal

import pytest
from test_train import TINY, signalled_in, untimed
from trained import make_cells

from sslcells.config import ConfigError, load
from sslcells.data import listing
from sslcells.run.interrupt import Stopped
from sslcells.train import train

SMALL = [word for word in TINY if not word.startswith(("data.", "train.total_epochs"))]
SMALL += [
    "data.kind=folder",
    "data.size=32",
    "evaluate.pictures=false",
    "evaluate.every_epochs=100",
    "train.total_steps=4",
]
SMALL += ["evaluate.holdout=0"]


def run_of(out, cells, *changes):
    return load(None, [*SMALL, f"out={out}", f"data.path={cells}", f"data.sources={cells}/sources.csv", *changes])


def table(cells, other=()):
    """Write sources.csv: two images per source, except the given ones."""
    names = sorted(p.relative_to(cells).as_posix() for p in cells.rglob("*.png"))
    lines = [f"{name},{'another' if name in other else f's{i // 2}'}" for i, name in enumerate(names)]
    (cells / "sources.csv").write_text("path,source\n" + "\n".join(lines))
    return names


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A folder of images, an undisturbed run on them, and one that was stopped after two steps."""
    folder = tmp_path_factory.mktemp("begun")
    cells = make_cells(folder / "cells", 36, classes=("a", "b"))
    table(cells)
    train(run_of(folder / "whole", cells))
    with pytest.raises(Stopped):
        train(run_of(folder / "stopped", cells), signalled_in(2, signal.SIGUSR1))
    return folder


@pytest.fixture
def job(begun, tmp_path):
    """The stopped run, and a copy of its images in another folder."""
    shutil.copytree(begun / "stopped", tmp_path / "out")
    shutil.copytree(begun / "cells", tmp_path / "scratch" / "cells")
    return tmp_path / "out", tmp_path / "scratch" / "cells"


def test_a_moved_folder_goes_on(begun, job):
    out, cells = job
    folder = train(run_of(out, cells))
    assert untimed(folder) == untimed(begun / "whole" / "quickstart")
    assert load(str(folder / "config.yaml")).data.path == str(cells)  # the newest is where they are


def grow(cells):
    shutil.copy(cells / "a" / "cell_000000.png", cells / "a" / "cell_000000b.png")
    table(cells)


def shrink(cells):
    (cells / "b" / "cell_000001.png").unlink()


def relabel(cells):
    shutil.move(cells / "a" / "cell_000002.png", cells / "b" / "cell_000002.png")
    table(cells)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (grow, r"on \d+ images and would resume with \d+; 1 new, such as a/cell_000000b\.png"),
        (shrink, r"on \d+ images and would resume with \d+; 1 no longer there, such as b/cell_000001\.png"),
        (relabel, r"1 new, such as b/cell_000002\.png; 1 no longer there, such as a/cell_000002\.png"),
    ],
)
def test_a_folder_of_other_images_does_not_go_on(begun, job, change, message):
    out, cells = job
    change(cells)
    with pytest.raises(ConfigError, match=rf"holds a run of other images: .*{message}.*choose another name="):
        train(run_of(out, cells))


def test_other_sources_do_not_go_on(begun, job):
    out, cells = job
    table(cells, {"a/cell_000004.png"})
    with pytest.raises(ConfigError, match=r"1 of \d+ images have another source, such as a/cell_000004\.png"):
        train(run_of(out, cells))


def rewritten(folder, change):
    file = folder / "quickstart" / listing.FILE
    written = json.loads(gzip.decompress(file.read_bytes()))
    change(written)
    file.write_bytes(gzip.compress(json.dumps(written).encode()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w["labels"].__setitem__(0, 1 - w["labels"][0]), r"1 of \d+ images have another label, such as a/"),
        (lambda w: w["classes"].append("c"), "its classes were a, b, c; now a, b"),
        (lambda w: w["names"].reverse(), "its images are in another order: image 0 was b/.*, now a/"),
        (lambda w: w.pop("names"), "cannot be read"),
    ],
)
def test_other_labels_and_orders_do_not_go_on(begun, job, change, message):
    out, cells = job
    rewritten(out, change)
    with pytest.raises(ConfigError, match=message):
        train(run_of(out, cells))


def test_a_run_that_wrote_nothing_down_goes_on_where_its_images_were(begun, job):
    """As an earlier version left it."""
    out, cells = job
    (out / "quickstart" / listing.FILE).unlink()
    with pytest.raises(ConfigError, match=r"another configuration \(data\.path: .*scratch"):
        train(run_of(out, cells))
    folder = train(run_of(out, begun / "cells"))
    assert untimed(folder) == untimed(begun / "whole" / "quickstart")
    assert listing.recorded(folder)
