"""`sslcells evaluate RUN --against NAME`: what it prints and leaves, and what it refuses before anything is read."""

import json

import pytest
import timm
import torch
from gloo import on_ranks
from test_evaluate_labs import clinic
from trained import SMALL, make_run

from sslcells import evaluate as module
from sslcells.cli import main
from sslcells.config import ConfigError, load
from sslcells.data import listing, open_splits
from sslcells.data.subset import Subset
from sslcells.evaluate import measured

QUICK = ["evaluate.bootstrap=100", "evaluate.batch=32", "train.workers=0", "evaluate.max_images=60"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("against") / "run", *SMALL[1:3], "data.test=40")


def published(folder):
    """An argument that names a file of weights of a network of another size, with a preparation of its own."""
    torch.save(timm.create_model("test_resnet", num_classes=0).state_dict(), folder / "resnet.pth")
    own = "size: 40, mean: [0.485, 0.456, 0.406], std: [0.229, 0.224, 0.225], crop: 0.875"
    return f"{{weights: {folder}/resnet.pth, backbone: test_resnet, {own}}}"


def test_published_weights_and_the_run_itself_beside_it(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(module, "draw", lambda *given: [])  # pictures take most of the time
    given = ["--against", published(tmp_path), "--against", str(run)]
    assert main(None, ["evaluate", str(run), *given, *QUICK]) == 0
    out = " ".join(capsys.readouterr().out.split())
    result = json.loads((run / "evaluation.json").read_text())
    other, itself = result["against"]
    assert (other["encoder"], itself["encoder"]) == ("resnet.pth", "run")
    own = [row for row in result["figures"] if row["task"] in ("kNN", "linear probe")]
    assert itself["figures"] == own  # the same images, neighbours, probe and intervals
    assert other["figures"] != own
    for of in itself["differences"]:
        assert {(s["value"], s["low"], s["high"]) for s in of["scores"].values()} == {(0, 0, 0)}
    assert "linear probe" in itself["finding"]["text"]
    assert itself["finding"]["text"].count("within the interval, +0.0 points [+0.0, +0.0]") == 2
    page = (run / "report.html").read_text()
    for one in (other, itself):
        assert one["finding"]["text"] in page
        assert one["finding"]["text"] in out
    assert "images of 40×40 px, mean 0.485, 0.456, 0.406, std 0.229, 0.224, 0.225, bilinear, crop 0.875" in out


def on_a_rank(folder, other):
    result, _ = measured(load(f"{folder}/config.yaml", QUICK), folder, torch.device("cpu"), frozen=[str(other)])
    return json.dumps(result.get("against"))


@pytest.mark.slow
def test_the_same_on_two_ranks(run, tmp_path):
    other = make_run(tmp_path / "other", "augment.size=48", seed=3)
    assert on_ranks(2, on_a_rank, run, other)[0] == on_a_rank(run, other)


@pytest.mark.slow
def test_laboratories_by_frozen_encoders(run, tmp_path, capsys):
    path = clinic(tmp_path / "clinic", {"neutrophil": 0, "lymphocyte": 3}, tint=0.5)
    given = ["--lab", f"clinic={path}", "--against", str(run)]
    assert main(None, ["evaluate", str(run), *given, *QUICK]) == 0
    assert "Laboratories by frozen encoders" in capsys.readouterr().out
    result = json.loads((run / "evaluation.json").read_text())
    assert result["against"][0]["labs"]["labs"] == result["labs"]["labs"]


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("no_such_network", "--against no_such_network: no such file, and timm has no weights of that name"),
        ("{{weights: {there}/resnet.pth}}", "nothing says which of timm's networks it is: set backbone"),
        ("{{weights: x, bakbone: resnet18}}", "bakbone: Extra inputs are not permitted"),
        ("{there}", "holds no encoder.json: is it the folder of a finished run?"),
        ("{{weights: {run}, backbone: resnet18}}", "is the folder of an encoder, which says it itself"),
    ],
)
def test_what_cannot_be_had_stops_before_anything_is_encoded(run, tmp_path, capsys, monkeypatch, argument, words):
    monkeypatch.setattr(module, "Encoded", lambda *given: pytest.fail("images were encoded"))
    published(tmp_path)
    assert main(None, ["evaluate", str(run), "--against", argument.format(there=tmp_path, run=run), *QUICK]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert "Traceback" not in error


def test_it_needs_labels(run, tmp_path, capsys):
    clinic(tmp_path / "cells", {"": 0}, each=4)
    data = f"data={{kind: folder, path: {tmp_path / 'cells'}, labels: none}}"
    assert main(None, ["evaluate", str(run), "--against", str(run), *QUICK, data]) == 2
    assert "--against needs images of one known class each, and the train split has none" in capsys.readouterr().err


def test_two_of_one_name(run, capsys):
    assert main(None, ["evaluate", str(run), "--against", str(run), "--against", str(run), *QUICK]) == 2
    assert "there is an encoder run already" in capsys.readouterr().err


def test_an_encoder_that_was_trained_on_what_is_asked_is_named(run, tmp_path):
    other = make_run(tmp_path / "other", seed=3)
    splits = open_splits(load(f"{run}/config.yaml").data)
    assert listing.warning("other", other, splits["test"], "test") == []  # its folder has no list
    listing.record(other, splits["train"])
    assert listing.warning("other", other, splits["test"], "test") == []
    assert listing.warning("other", None, splits["train"], "val") == []
    listing.record(other, Subset(splits["test"], torch.arange(7)))
    (said,) = listing.warning("other", other, splits["test"], "test")
    assert said == "warning: other was trained on 7 of the 40 images of test: figures are too high"
    result, _ = measured(load(f"{run}/config.yaml", QUICK), run, torch.device("cpu"), frozen=[str(other)])
    assert said in result["notes"]
    (other / listing.FILE).write_bytes(b"x")
    with pytest.raises(ConfigError, match="cannot be read"):
        listing.warning("other", other, splits["test"], "test")
