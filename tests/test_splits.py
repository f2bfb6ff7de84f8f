"""What is read of which split when: nothing of test while anything is trained, also where it cannot be read at all."""

import json
import os
import signal
from collections import Counter

import pytest
from test_train import TINY, in_step, tiny, untimed

from sslcells import compare as comparison
from sslcells.cli import main
from sslcells.compare import compare
from sslcells.config import ConfigError, load
from sslcells.data import DataError, holdout, open_split, synthetic
from sslcells.evaluation.classifier import read_predictions
from sslcells.run.interrupt import Stopped
from sslcells.run.metrics import read_metrics
from sslcells.train import train

QUICK = ["evaluate.bootstrap=100", "train.workers=0"]
NO_VAL = ["data.val=0", "data.test=20", "train.total_steps=6", "evaluate.pictures=false"]


def supervised(folder, *changes):
    common = [change for change in TINY if not change.startswith("method.")]
    return load(None, [*common, "method.name=supervised", f"out={folder}", *changes])


@pytest.fixture
def read(monkeypatch):
    """Names of the images that were decoded, in this process, and how often; those of `forbidden` splits raise."""
    seen, plain = Counter(), synthetic.Smears.pixels
    seen.forbidden = ""

    def pixels(self, index):
        if seen.forbidden and self.name(index).startswith(f"synthetic/{seen.forbidden}/"):
            raise DataError(f"{self.name(index)}: must not be read now")
        seen[self.name(index)] += 1
        return plain(self, index)

    monkeypatch.setattr(synthetic.Smears, "pixels", pixels)
    return seen


@pytest.mark.parametrize(
    ("kind", "changes", "key"),
    [
        (tiny, [*NO_VAL, "evaluate.pictures=true"], "knn/top1"),
        pytest.param(tiny, ["data.val=20", "data.test=20", "train.total_steps=4"], "knn/top1", marks=pytest.mark.slow),
        pytest.param(supervised, [*NO_VAL, "evaluate.pictures=true"], "val/top1", marks=pytest.mark.slow),
    ],
)
def test_training_does_not_read_test(read, tmp_path, kind, changes, key):
    read.forbidden = "test"
    folder = train(kind(tmp_path, *changes))
    rows = read_metrics(folder)
    asked = [row["step"] for row in rows if key in row]
    assert (asked[0], asked[-1]) == (0, rows[-1]["step"])
    assert (folder / "plots" / "neighbours.png").is_file()


def test_what_is_held_out_is_never_trained_on_and_the_same_after_a_resume(read, tmp_path):
    """Seeds do not change it: a probe with another seed is asked what its encoder did not see."""
    seen = set()

    def watch(station, x):
        if station == "pixels":
            seen.update(p.numpy().tobytes() for p in x)

    whole = train(tiny(tmp_path / "whole", *NO_VAL), watch)
    held = json.loads((whole / holdout.FILE).read_text())
    images = open_split(load(None, ["data.size=32", "data.train=80"]).data, "train")
    of = {images.name(i): images.pixels(i).numpy().tobytes() for i in range(80)}
    assert len(held) == 10  # one or two of each class of 16: 0.1 rounded
    assert not seen & {of[name] for name in held}
    assert len(seen) > 60
    with pytest.raises(Stopped):
        train(tiny(tmp_path, *NO_VAL), in_step(3, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    assert untimed(train(tiny(tmp_path, *NO_VAL))) == untimed(whole)
    assert json.loads((tmp_path / "quickstart" / holdout.FILE).read_text()) == held
    with pytest.raises(ConfigError, match=r"evaluate\.holdout: 0\.1 → 0\.2"):
        train(tiny(tmp_path, *NO_VAL, "evaluate.holdout=0.2"))
    other = train(tiny(tmp_path / "other", *NO_VAL, "seed=5"))
    assert json.loads((other / holdout.FILE).read_text()) == held


@pytest.mark.slow
def test_the_log_and_check_say_what_is_held_out(tmp_path, capsys):
    said = "figures during training: on 10 of 80 images of train (sources unknown), held out"
    train(tiny(tmp_path, *NO_VAL))
    assert said in capsys.readouterr().out
    assert main("train", ["--check", *TINY, *NO_VAL, f"out={tmp_path}"]) == 0
    assert said in capsys.readouterr().out


@pytest.mark.slow
def test_evaluate_reads_test_and_shows_the_held_out_as_val(read, tmp_path):
    folder = train(tiny(tmp_path, *NO_VAL))
    assert not [name for name in read if "/test/" in name]
    assert main(None, ["evaluate", str(folder), *QUICK]) == 0
    result = json.loads((folder / "evaluation.json").read_text())
    assert result["asked"] == "test"
    assert any(note.startswith("val is 10 of 80 images of train") for note in result["notes"])
    assert len([name for name in read if "/test/" in name]) == 20
    assert main(None, ["evaluate", str(folder), *QUICK, "evaluate.split=val"]) == 0
    chosen = json.loads((folder / "evaluation.json").read_text())
    assert chosen["asked"] == "val"
    assert {row["images"] for row in chosen["figures"] if row["task"] == "kNN"} == {10}
    assert "test" not in chosen["health"]


@pytest.mark.slow
def test_who_asks_for_val_is_never_given_test(tmp_path):
    folder = train(tiny(tmp_path, *NO_VAL, "evaluate.holdout=0"))
    assert "knn_loo/top1" in read_metrics(folder)[-1]
    assert main(None, ["evaluate", str(folder), *QUICK, "evaluate.split=val"]) == 0
    assert json.loads((folder / "evaluation.json").read_text())["asked"] == "train"


@pytest.mark.slow
def test_a_classifier_is_asked_about_test_by_evaluate(tmp_path):
    folder = train(supervised(tmp_path, "data.val=20", "data.test=25", "train.total_steps=4"))
    assert len(read_predictions(folder, "val").names) == 20
    assert not (folder / "predictions_test.npz").exists()
    assert main(None, ["evaluate", str(folder), *QUICK]) == 0
    said = read_predictions(folder, "test")
    right = (said.probabilities.argmax(1) == said.labels).double().mean().item()
    figures = json.loads((folder / "evaluation.json").read_text())["figures"]
    own = next(row for row in figures if row["task"] == "the run's classifier" and row["unit"] == "image")
    assert own["images"] == 25
    assert own["scores"]["accuracy"]["value"] == pytest.approx(right)
    assert main(None, ["evaluate", str(folder), *QUICK, "data.classes=4"]) == 0
    notes = json.loads((folder / "evaluation.json").read_text())["notes"]
    assert "no figures of the run's own classifier: the data is not what it was trained on" in notes


@pytest.mark.slow
def test_compare_reads_test_when_all_is_trained(read, tmp_path, monkeypatch):
    read.forbidden, plain = "test", comparison.trained

    def trained(*arguments):
        read.forbidden = ""
        return plain(*arguments)

    monkeypatch.setattr(comparison, "trained", trained)
    small = ["compare.fractions=[1]", "compare.seeds=1", "compare.min_steps=2", "compare.total_epochs=1"]
    run = tiny(tmp_path, *NO_VAL, *small, "compare.global_batch=16", "evaluate.pictures=false")
    result = compare(run)
    assert result["asked"] == "test"
    assert {row["images"] for row in result["models"]} == {20}
    parts = sorted((run.folder / "compare").iterdir())
    assert len(parts) == 3
    assert len({(part / holdout.FILE).read_text() for part in [run.folder, *parts]}) == 1
