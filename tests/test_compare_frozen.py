"""`sslcells compare --frozen NAME --lab NAME=FOLDER`: frozen encoders and laboratories that were left out."""

import json

import pytest
import torch
from test_compare import TINY
from test_evaluate_labs import clinic
from trained import make_run

from sslcells import compare as module
from sslcells.cli import main
from sslcells.compare import compare
from sslcells.config import ConfigError, load
from sslcells.data import open_splits
from sslcells.evaluation.answers import Answer, differences, of_lab, said
from sslcells.evaluation.classifier import Predictions
from sslcells.plan import leave_out

FEW = ["compare.fractions=[1]", "compare.seeds=1", "log.every_steps=9"]


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("frozen") / "other", "augment.size=40", "model.mean=[0.7]", seed=3)


def models(rows):
    return [row["model"] for row in rows]


@pytest.mark.slow
def test_frozen_encoders_and_a_new_laboratory(other, tmp_path, capsys):
    path = clinic(tmp_path / "clinic", {"lymphocyte": 3, "eosinophil": 1}, tint=0.5)
    clinic(tmp_path / "clinic", {"basophil": 2}, each=4)
    given = ["--frozen", str(other), "--lab", f"clinic={path}"]
    assert main(None, ["compare", *TINY, *FEW, f"out={tmp_path}", *given]) == 0
    out = capsys.readouterr().out
    result = json.loads((tmp_path / "quickstart" / "comparison.json").read_text())
    expected = ["supervised", "probe", "fine-tuned", "frozen quickstart", "frozen other"]
    assert models(result["models"]) == expected
    assert [row["images"] for row in result["models"]] == [20] * 5
    (lab,) = result["labs"]
    assert lab["by class"] == {"eosinophil": 12, "basophil": 4, "lymphocyte": 12}
    assert lab["few"] == ["basophil"]
    assert models(lab["models"]) == expected
    assert {row["images"] for row in lab["models"]} == {24}
    both = [("fine-tuned", "frozen other"), ("frozen quickstart", "frozen other")]
    for of in (result, lab):
        assert [(one["model"], one["against"]) for one in of["differences"]] == both
    assert "images of 40×40 px, mean 0.7" in result["frozen"][0]
    page = (tmp_path / "quickstart" / "comparison.html").read_text()
    for text in ("clinic: fine-tuned against frozen other", "Laboratories that were left out", "logistic regression"):
        assert text in out
        assert text in page


def of_two_labs(tmp_path):
    for lab, tint in (("north", 1.0), ("south", 0.5)):
        for split in ("train", "test"):
            clinic(tmp_path / "cells" / split / lab, {"lymphocyte": 3, "eosinophil": 1}, tint=tint)
    return ["data.kind=folder", f"data.path={tmp_path / 'cells'}", "data.lab_folder=above", "data.size=32"]


def test_a_laboratory_of_the_data_is_left_out(tmp_path, monkeypatch):
    tiny = [change for change in TINY if not change.startswith("data.")]
    left_out = ["train.without_labs=[south]", "train.global_batch=8", "compare.global_batch=8", "evaluate.holdout=0"]
    run = load(None, [*tiny, *FEW, *of_two_labs(tmp_path), *left_out, f"out={tmp_path}"])
    trained_on = []
    real = module.train
    monkeypatch.setattr(module, "train", lambda run: trained_on.append(run.train.without_labs) or real(run))
    result = compare(run)
    assert trained_on == [("south",)] * 4
    assert {row["images"] for row in result["models"]} == {24}  # of north
    assert [lab["lab"] for lab in result["labs"]] == ["south"]
    assert result["labs"][0]["by class"] == {"eosinophil": 12, "lymphocyte": 12}
    assert models(result["labs"][0]["models"]) == ["supervised", "probe", "fine-tuned"]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"frozen": ["no_such_network"]}, "--frozen no_such_network: no such file, and timm has no weights"),
        ({"labs": ["clinic"]}, "--lab clinic: expected NAME=FOLDER"),
    ],
)
def test_mistakes_are_named_before_anything_is_trained(given, words, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "train", lambda run: pytest.fail("nothing should be trained"))
    with pytest.raises(ConfigError, match=words):
        compare(load(None, [*TINY, *FEW, f"out={tmp_path}"]), **given)


def answer(model, right, seed=0, images=40):
    labels = torch.arange(images) % 2
    labels[:3] = 2
    guess = torch.where(torch.rand(images, generator=torch.Generator().manual_seed(seed)) < right, labels, 1 - labels)
    p = torch.nn.functional.one_hot(guess.clamp(min=0), 3).double()
    return Answer(
        model, 1.0, seed, Predictions([str(i) for i in range(images)], "abc", labels, torch.arange(images), p)
    )


def test_differences_are_paired_and_over_seeds():
    found = [answer("fine-tuned", 1.0, s) for s in (0, 1)] + [answer("frozen own", 1.0), answer("frozen x", 0.3)]
    (tuned, own) = differences(found)
    assert (tuned["model"], own["model"]) == ("fine-tuned", "frozen own")
    assert tuned["scores"]["accuracy"]["low"] > 0.3
    (first, _) = said([tuned, own], "test")
    assert first["text"].startswith("test: fine-tuned against frozen x, in balanced accuracy: better, +")
    assert not first["warning"]
    worse = differences([answer("frozen own", 0.3), answer("frozen x", 1.0)])
    assert said(worse, "test")[0]["warning"]
    assert differences([answer("fine-tuned", 1.0)]) == []


def test_rare_classes_of_a_laboratory_are_named_and_not_counted():
    lab = of_lab("clinic", [answer("fine-tuned", 1.0)])
    assert (lab["few"], lab["by class"]) == (["c"], {"a": 18, "b": 19, "c": 3})
    assert lab["models"][0]["images"] == 37
    assert of_lab("small", [answer("fine-tuned", 1.0, images=9)])["models"] == []


def test_images_of_unknown_laboratories_are_of_none_that_is_left_out(tmp_path, monkeypatch):
    run = load(None, [*TINY, "train.without_labs=[south]", f"out={tmp_path}"])
    whole = open_splits(run.data)
    for images in whole.values():
        images.labs, images.lab_names = torch.arange(len(images)) % 3, ("north", "south")
    monkeypatch.setattr(module, "open_splits", lambda data: whole)
    asked = module._asked(run, leave_out(whole, run.train.without_labs), ())
    labs = {what: sorted({n for images in parts for n in images.labs.tolist()}) for what, parts in asked.items()}
    assert labs == {"test": [0, 1], "south": [2]}
