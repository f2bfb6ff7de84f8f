"""The same training on real images: Kaggle's blood cells and PBC-28."""

import sys

import pytest
from test_launch import LAUNCH, finish, start

from sslcells.config import load
from sslcells.metrics import read_metrics
from sslcells.train import train

pytestmark = pytest.mark.realdata

SHORT = ["train.steps=6", "log.every=1", "evaluate.max_images=300", "train.workers=0", "train.precision=no"]
SMALL = ["model.backbone=test_resnet", "augment.size=40", "train.global_batch=64"]
BLOOD = ["data.kind=folder", "data.size=[48,64]", "data.verify=none", "method.same_source=ignore"]


def losses(folder):
    return [row["loss"] for row in read_metrics(folder) if "loss" in row]


def test_blood_cells_as_they_are_downloaded(realdata, tmp_path):
    changes = [f"data.path={realdata / 'blood-cells'}", f"data.sources={realdata / 'blood-cells' / 'sources.csv'}"]
    folder = train(load(None, [*BLOOD, *changes, *SMALL, *SHORT, f"out={tmp_path}"]))
    assert len(losses(folder)) == 6
    assert losses(folder)[-1] < losses(folder)[0]
    assert 0.2 < read_metrics(folder)[-1]["knn/top1"] < 1


def test_pbc28(realdata, tmp_path):
    changes = ["data.kind=medmnist", f"data.path={realdata / 'pbc28.npz'}"]
    folder = train(load(None, [*changes, *SMALL, *SHORT, f"out={tmp_path}"]))
    assert losses(folder)[-1] < losses(folder)[0]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["folder", "medmnist"])
def test_on_two_ranks(realdata, tmp_path, kind):
    path = realdata / ("blood-cells" if kind == "folder" else "pbc28.npz")
    changes = [*(BLOOD if kind == "folder" else ["data.kind=medmnist"]), f"data.path={path}", *SMALL, *SHORT]
    two = finish(start(*LAUNCH, "-m", "sslcells.train", *changes, f"out={tmp_path}", "name=two"))
    one = finish(start(sys.executable, "-m", "sslcells.train", *changes, f"out={tmp_path}", "name=one"))
    assert "world size 2" in two
    assert "world size 1" in one
    ranks, alone = losses(tmp_path / "two"), losses(tmp_path / "one")
    assert ranks[-1] < ranks[0]
    assert ranks[0] == pytest.approx(alone[0], rel=0.05)  # BatchNorm sees half of the batch on each rank
