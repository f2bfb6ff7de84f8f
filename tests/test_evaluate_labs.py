"""`sslcells evaluate RUN --lab NAME=FOLDER`: what it prints and leaves, and what it refuses."""

import json
import re
from pathlib import Path

import pytest
import torch
from PIL import Image
from trained import SMALL, make_run

from sslcells import inputs
from sslcells.cli import main
from sslcells.config import load
from sslcells.data import folder, open_split, open_splits, synthetic
from sslcells.data._smear import CLASSES, draw_smear
from sslcells.evaluation import answer_table
from sslcells.evaluation.new_labs import opened

QUICK = ["evaluate.bootstrap=100", "evaluate.batch=32", "train.workers=0"]


def clinic(root: Path, classes: dict[str, int], each: int = 12, tint: float = 1.0) -> Path:
    for name, drawn in classes.items():
        (root / name).mkdir(parents=True)
        for i in range(each):
            pixels = (draw_smear(3, i, drawn, 40) * (1.0, tint, 1.0)).astype("uint8")
            Image.fromarray(pixels).save(root / name / f"{i}.png")
    return root


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path / "run", *SMALL[1:3], "data.test=60")


@pytest.mark.slow
def test_a_laboratory_that_training_never_saw(run, tmp_path, capsys):
    path = clinic(tmp_path / "clinic", {"Neutrophil": 0, "lymphocyte": 3, "blast": 4}, tint=0.5)
    assert main(None, ["evaluate", str(run), "--lab", f"clinic={path}", *QUICK]) == 0
    out = capsys.readouterr().out
    assert "Each laboratory by the labels of the others" in out
    assert "clinic: 24 images of the run's classes; left out, as training has no such class: blast (12)" in out
    result = json.loads((run / "evaluation.json").read_text())
    labs = result["labs"]
    assert labs["labs"][0]["by class"] == {"neutrophil": 12, "lymphocyte": 12}
    assert labs["pairs"][0]["labs"] == ["training data", "clinic"]
    assert labs["pairs"][0]["classes"] == ["neutrophil", "lymphocyte"]
    answers = answer_table.read_labs(run)["clinic"]
    assert len(answers.images) == len({*answers.images}) == 24
    assert {*answers.classes} == {"neutrophil", "lymphocyte"}
    page = (run / "report.html").read_text()
    assert page.index("<h2>Figures") < page.index("<h2>Across laboratories") < page.index("<h2>Pictures")
    assert "Map by class and by laboratory" in page
    assert main(None, ["export", str(run), "--no-onnx"]) == 0
    card = (run / "export" / "README.md").read_text()
    assert "Across laboratories" in card
    assert "clinic" in card


@pytest.mark.slow
def test_a_new_laboratory_is_measured_and_images_without_a_cell_are_counted(tmp_path):
    """Without labels, on its own images; every image of train and of the laboratory is looked at."""
    own = clinic(tmp_path / "own" / "train" / "north", {"neutrophil": 0, "lymphocyte": 3}, each=10)
    data = ["data.kind=folder", f"data.path={own.parent.parent}", "data.lab_folder=above"]
    how = ["standardise.colour=two_point", "standardise.by=lab"]
    run = make_run(tmp_path / "run", *data, *how)
    config = load(str(run / "config.yaml"))
    spec = json.loads((run / "encoder.json").read_text())
    spec["standardise"] = inputs.measured(config, open_splits(config.data))
    (run / "encoder.json").write_text(json.dumps(spec))
    path = clinic(tmp_path / "clinic", {"neutrophil": 0, "lymphocyte": 3}, tint=0.5)
    for i in range(3):
        Image.new("RGB", (40, 40), "white").save(path / "lymphocyte" / f"white_{i}.png")
    assert main(None, ["evaluate", str(run), "--lab", f"clinic={path}", *QUICK]) == 0
    notes = json.loads((run / "evaluation.json").read_text())["notes"]
    missed = [re.match(r"clinic: no cell was found in (\d+) of 27 images; their size", note) for note in notes]
    assert [int(found[1]) >= 3 for found in missed if found] == [True]
    assert any(re.match(r"clinic: standardised by 27 of its own images, without labels, in \d+ of", n) for n in notes)
    assert not any(note.startswith("north: standardised by") for note in notes)


@pytest.mark.slow
def test_laboratories_of_the_runs_own_data(tmp_path, capsys):
    for lab, tint in (("north", 1.0), ("south", 0.5)):
        for split in ("train", "test"):
            clinic(tmp_path / "cells" / split / lab, {"lymphocyte": 3, "eosinophil": 1}, tint=tint)
    data = ["data.kind=folder", f"data.path={tmp_path / 'cells'}", "data.lab_folder=above"]
    run = make_run(tmp_path / "run", *data)
    assert main(None, ["evaluate", str(run), *QUICK]) == 0
    labs = json.loads((run / "evaluation.json").read_text())["labs"]
    assert [lab["lab"] for lab in labs["labs"]] == ["north", "south"]
    assert all(len({*of.images}) == 24 for of in answer_table.read_labs(run).values())
    assert [lab["by class"] for lab in labs["labs"]] == [{"eosinophil": 12, "lymphocyte": 12}] * 2
    assert labs["pairs"][0]["labs"] == ["north", "south"]
    assert labs["pairs"][0]["lab predictability"]["value"] > labs["pairs"][0]["lab predictability"]["null high"]
    assert "north and south: neighbours tell the laboratory" in capsys.readouterr().out


@pytest.mark.slow
def test_other_data_by_its_own_labels_and_a_laboratory_with_sources_beside_it(run, tmp_path, capsys):
    """Three images of each photograph; the results lie elsewhere, and the run is left as it was."""
    for split, of in (("train", 0), ("test", 100)):
        for name, drawn in (("lymphocyte", 3), ("eosinophil", 1)):
            (tmp_path / "cells" / split / name).mkdir(parents=True)
            for i in range(18):
                pixels = draw_smear(3, of + i // 3, drawn, 40)
                Image.fromarray(pixels - i % 3).save(tmp_path / "cells" / split / name / f"{of + i // 3}_{i % 3}.png")
    files = [file.relative_to(tmp_path / "cells").as_posix() for file in (tmp_path / "cells").rglob("*.png")]
    rows = [f"{file},{file.split('/', 1)[1].split('_')[0]}" for file in files]
    (tmp_path / "sources.csv").write_text("\n".join(["path,source", *rows]))
    before = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    data = [f"data={{kind: folder, path: {tmp_path / 'cells'}, sources: {tmp_path / 'sources.csv'}, size: 32}}"]
    lab = ["--lab", f"clinic={tmp_path / 'cells'}", "--lab-sources", f"clinic={tmp_path / 'sources.csv'}"]
    for place, asked in (("by_its_own", data), ("from_outside", lab)):
        assert main(None, ["evaluate", str(run), *asked, *QUICK, "--out", str(tmp_path / place)]) == 0
        out = capsys.readouterr().out
        assert "source vote" in out
        assert "36 of 12 sources" in out or "72 of 24 sources" in out
    assert before == {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    result = json.loads((tmp_path / "by_its_own" / "evaluation.json").read_text())
    vote = [row for row in result["figures"] if row["unit"] == "source vote"]
    assert {(row["images"], row["sources"]) for row in vote} == {(36, 12)}
    assert any(note.startswith("the data is that of data={kind: folder, path: ") for note in result["notes"])
    assert "source vote" in (tmp_path / "by_its_own" / "report.html").read_text()
    outside = json.loads((tmp_path / "from_outside" / "evaluation.json").read_text())["labs"]["labs"][0]
    assert outside["sources"] == 24
    assert "source vote" in {row["unit"] for row in outside["figures"]}
    other = make_run(tmp_path / "other")
    assert main(None, ["evaluate", str(run), *QUICK, "--out", str(other)]) == 2
    assert f"--out {other} is the folder of another run" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--lab-sources", "clinic=x.csv"], "--lab-sources clinic=x.csv: no --lab has that name"),
        (["--lab", "clinic={there}/new", "--lab-sources", "clinic"], "--lab-sources clinic: expected NAME=CSV"),
        (["--lab", "clinic={there}/new", "--lab-sources", "clinic=x.csv"], "x.csv: data.sources='x.csv': no such file"),
        (["--lab", "clinic=x.csv", "--lab-sources", "clinic=y.csv"], "x.csv is a table; its own column names"),
    ],
)
def test_mistakes_in_sources(run, tmp_path, capsys, arguments, words):
    clinic(tmp_path / "new", {"monocyte": 4}, each=1)
    assert main(None, ["evaluate", str(run), *(a.format(there=tmp_path) for a in arguments), *QUICK]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert "Traceback" not in error


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("clinic", "--lab clinic: expected NAME=FOLDER"),
        ("=x", "--lab =x: expected NAME=FOLDER"),
        ("clinic={there}/none", "has no folder 'none'"),
        ("clinic={there}/strange", "none of its classes, blast, is one of the run's: neutrophil, eosinophil"),
    ],
)
def test_mistakes(run, tmp_path, capsys, argument, words):
    clinic(tmp_path / "strange", {"blast": 4})
    assert main(None, ["evaluate", str(run), "--lab", argument.format(there=tmp_path), *QUICK]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert "Traceback" not in error


def test_two_laboratories_of_one_name(run, tmp_path, capsys):
    path = clinic(tmp_path / "clinic", {"monocyte": 4})
    twice = ["--lab", f"clinic={path}", "--lab", f"clinic={path}"]
    assert main(None, ["evaluate", str(run), *twice, *QUICK]) == 2
    assert "there is a laboratory clinic already" in capsys.readouterr().err


def images(path, config=None):
    train = open_split(synthetic.Config(size=32, train=10), "train")
    return opened([f"x={path}"], config or synthetic.Config(size=32), train, 32)[0]


def test_classes_are_matched_by_name_and_splits_are_joined(tmp_path):
    for split in ("train", "test"):
        clinic(tmp_path / split, {"MONOCYTE": 4, "neutro-phil": 0, "other": 1}, each=3)
    lab = images(tmp_path)
    assert [len(part) for part in lab.parts] == [6, 6]
    assert lab.left_out == {"other": 6}
    for part in lab.parts:
        for i, label in enumerate(part.labels.tolist()):
            assert part.name(i).split("/")[1].casefold().replace("-", "") == CLASSES[label]
        assert part.pixels(0).shape == (3, 32, 32)


def test_a_laboratory_is_read_as_the_runs_images_were(tmp_path):
    clinic(tmp_path, {"monocyte": 4}, each=2)
    config = folder.Config(path="elsewhere", size=24, fit="stretch", source_pattern="(nothing)")
    assert images(tmp_path, config).parts[0].pixels(0).shape == (3, 24, 24)
    whole = images(tmp_path, folder.Config(path="elsewhere"))  # of the size of the run's own images
    assert whole.parts[0].pixels(0).shape == (3, 32, 32)


def test_a_table_as_a_laboratory(tmp_path):
    clinic(tmp_path, {"monocyte": 4, "basophil": 2}, each=2)
    rows = [f"{c}/{i}.png,{c},donor{i}" for c in ("monocyte", "basophil") for i in range(2)]
    (tmp_path / "cells.csv").write_text("\n".join(["path,label,donor", *rows]))
    lab = images(tmp_path / "cells.csv")
    assert len(lab.parts[0]) == 4
    assert len(torch.unique(lab.parts[0].sources)) == 2
