"""The same training on real images: Kaggle's blood cells and PBC-28."""

import re
import sys

import pytest
from test_launch import LAUNCH, finish, start
from trained import make_run

from sslcells.config import load
from sslcells.delivery.sources import sources
from sslcells.evaluate import evaluate
from sslcells.run.metrics import read_metrics
from sslcells.train import train

pytestmark = pytest.mark.realdata

SHORT = ["train.total_steps=6", "log.every_steps=1", "evaluate.max_images=300", "train.workers=0", "train.precision=no"]
SMALL = ["model.backbone=test_resnet", "augment.size=40", "train.global_batch=64"]
BLOOD = ["data.kind=folder", "data.size=[48,64]", "data.verify=none", "method.same_source=ignore"]


def losses(folder):
    return [row["loss"] for row in read_metrics(folder) if "loss" in row]


@pytest.mark.slow
def test_blood_cells_as_they_are_downloaded(realdata, tmp_path):
    changes = [f"data.path={realdata / 'blood-cells'}", f"data.sources={realdata / 'blood-cells' / 'sources.csv'}"]
    folder = train(load(None, [*BLOOD, *changes, *SMALL, *SHORT, f"out={tmp_path}"]))
    assert len(losses(folder)) == 6
    assert losses(folder)[-1] < losses(folder)[0]
    assert 0.2 < read_metrics(folder)[-1]["knn/top1"] < 1


@pytest.mark.slow
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


@pytest.mark.slow
def test_the_leaks_of_the_blood_cells(realdata, tmp_path):
    """They are photographs, not images, and a random split of them is worthless."""
    blood = realdata / "blood-cells"
    changes = [*BLOOD[:3], f"data.path={blood}", f"data.sources={blood / 'sources.csv'}", "data.size=[48,64]"]
    run = make_run(tmp_path / "run", *changes)
    found = evaluate(run, ["evaluate.bootstrap=100", "train.workers=0"])["leaks"]
    said = [finding["text"] for finding in found["findings"]]
    counted = dict(re.findall(r"^(train|test): [\d,]+ images of (\d+) sources", "\n".join(said), re.M))
    assert 277 <= int(counted["train"]) <= 279  # a few rows of the table name no sure photograph
    assert 71 <= int(counted["test"]) <= 72
    assert "0 images of test are in train too, byte for byte" in said
    assert any(text.startswith("a random split of train is worthless") for text in said)
    assert found["shortcut"]["random split of train"]["top1"] > 0.97
    assert found["shortcut"]["test"]["top1"] < 0.4


@pytest.mark.slow
def test_the_photographs_of_the_blood_cells_are_found(realdata, tmp_path):
    pytest.importorskip("cv2", reason="the extra `sources` is not installed")
    root = realdata / "blood-cells"
    images = sorted((root / "TEST").rglob("*.jpeg"))[::8]
    for image in images:
        link = tmp_path / "images" / image.relative_to(root)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(image)
    said = []
    sources(str(tmp_path / "images"), str(tmp_path), known=str(root / "sources.csv"), say=said.append)
    precision, recall = (float(x) for x in re.findall(r"(?:precision|recall) ([\d.]+)", said[-1]))
    assert precision >= 0.95
    assert recall >= 0.8


@pytest.mark.slow
def test_from_one_laboratory_to_another(realdata, tmp_path, capsys):
    """An encoder that was not trained, asked by PBC's labels about BCCD: the report is whole, and its figures poor."""
    changes = ["data.kind=folder", f"data.path={realdata / 'pbc96'}", "data.size=48", "data.verify=none"]
    run = make_run(tmp_path / "run", *changes, "model.backbone=test_resnet", "model.args={}")
    quick = ["evaluate.bootstrap=100", "evaluate.max_images=1500", "train.workers=0"]
    found = evaluate(run, quick, labs=[f"BCCD={realdata / 'bccd96'}"])["labs"]
    (lab,), (pair,) = found["labs"], found["pairs"]
    assert lab["by class"] == {"eosinophil": 84, "lymphocyte": 33, "monocyte": 20, "neutrophil": 202}
    assert pair["labs"] == ["training data", "BCCD"]
    assert set(pair["classes"]) == set(lab["by class"])
    told = pair["lab predictability"]
    assert told["null low"] < 0.5 < told["null high"] < told["value"]
    reached = {
        (row["labels of"], row["method"].split(",")[0], row["among"]): row["scores"]["balanced accuracy"]["value"]
        for row in lab["figures"]
    }
    ceiling = reached["its own", "linear probe", "all classes"]
    assert reached["the others", "linear probe", "all classes"] < ceiling
    out = capsys.readouterr().out
    assert "Each laboratory by the labels of the others" in out
    assert "training data and BCCD: neighbours tell the laboratory in" in out
