"""How far features are from the start's, and the warning where kNN falls below the start's."""

from itertools import cycle

import pytest
import torch
from torch.nn import functional as F
from trained import SMALL, make_run

from sslcells.config import load
from sslcells.evaluate import evaluate
from sslcells.evaluation import drift, during_training
from sslcells.run.metrics import read_metrics
from sslcells.train import train


def test_the_distance_is_one_minus_the_cosine_whatever_the_norm():
    start, now = torch.randn(20, 8), torch.randn(20, 8)
    expected = 1 - F.cosine_similarity(start, now).mean().item()
    assert drift.distance(now, start) == pytest.approx(expected, abs=1e-6)
    assert drift.distance(start * torch.rand(20, 1) * 9, start) == pytest.approx(0, abs=1e-6)
    assert drift.distance(-start, start) == pytest.approx(2)
    assert drift.distance(start, start) == 0
    with pytest.raises(ValueError, match=r"features \(19, 8\) cannot be compared with \(20, 8\) of the start"):
        drift.distance(now[1:], start)


def looks(*top1, key="knn/top1", first=0):
    return [{"step": step, "loss": 1.0} | {key: value} for step, value in enumerate(top1, start=first)]


@pytest.mark.parametrize(
    ("rows", "said", "newly"),
    [
        ([], False, False),
        (looks(0.9), False, False),
        (looks(0.9, 0.9), False, False),
        (looks(0.9, 0.8), True, True),
        (looks(0.9, 0.8, 0.85), True, False),
        (looks(0.9, 0.8, 0.95), False, False),
        (looks(0.9, 0.8, 0.95, 0.8), True, True),
        (looks(0.9, 0.8, key="knn_loo/top1"), True, True),
        (looks(0.9, 0.8, key="val/top1"), False, False),
        (looks(0.9, 0.8, first=3), False, False),
        (looks(0.9, float("nan")), False, False),
    ],
)
def test_a_fall_below_the_start_is_said_once(rows, said, newly):
    assert (drift.fallen(rows) is not None) == said
    assert (drift.fallen(rows, newly=True) is not None) == newly


class Killed(BaseException):
    pass


def die(station, x, seen=[]):  # noqa: B006
    seen.append(station)
    if seen.count("loss") == 4:
        raise Killed


def test_a_run_measures_its_distance_warns_of_a_fall_and_resumes(tmp_path, capsys, monkeypatch):
    planted = cycle([0.9, 0.8, 0.7, 0.95, 0.6, 0.5])
    monkeypatch.setattr(during_training, "knn_accuracy", lambda *_: {"top1": next(planted)})
    start = make_run(tmp_path / "start")
    steps = ["train.global_batch=20", "train.total_steps=5", "train.workers=0", "checkpoint.every_steps=2"]
    rest = ["evaluate.every_epochs=0.34", "evaluate.pictures=false", f"out={tmp_path}", f"model.encoder={start}"]
    run = load(None, [*SMALL, *steps, *rest, "name=whole", "model.freeze=1"])
    folder = train(run)
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: ")]
    assert len(said) == 2
    assert said[0].startswith("warning: after step 1 knn/top1 is 80.0%, below the 90.0% of the weights that training")
    assert said[1].startswith("warning: after step 4 knn/top1 is 60.0%")
    rows = [row for row in read_metrics(folder) if drift.DISTANCE in row]
    moved = [row[drift.DISTANCE] for row in rows]
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4, 5]
    assert moved[0] == 0 < min(moved[1:])
    assert drift.notes(read_metrics(folder)) == [
        f"the features lie at a cosine distance of {moved[-1]:.3g} from those of the start",
        said[0].replace("step 1 ", "step 5 ").replace("80.0%", "50.0%"),
    ]
    killed = run.model_copy(update={"name": "killed"})
    with pytest.raises(Killed):
        train(killed, die)
    train(killed)
    assert [row[drift.DISTANCE] for row in read_metrics(killed.folder) if drift.DISTANCE in row] == moved

    (folder / drift.FEATURES).unlink()
    train(run)
    assert f"{folder / drift.FEATURES} is not there: the distance" in capsys.readouterr().out


@pytest.mark.slow
def test_the_report_says_how_far_and_whether_it_fell(tmp_path, monkeypatch):
    planted = iter([0.9, 0.8])
    start = make_run(tmp_path / "start")
    steps = ["train.global_batch=20", "train.total_steps=1", "train.workers=0", f"model.encoder={start}"]
    run = load(None, [*SMALL, *steps, "evaluate.pictures=false", f"out={tmp_path}", "name=run"])
    with monkeypatch.context() as patch:
        patch.setattr(during_training, "knn_accuracy", lambda *_: {"top1": next(planted)})
        folder = train(run)
    notes = evaluate(folder, ["evaluate.bootstrap=100"])["notes"]
    assert any("cosine distance" in note for note in notes)
    assert any("knn/top1 is 80.0%, below the 90.0%" in note for note in notes)
    assert "below the 90.0%" in (folder / "report.html").read_text()
