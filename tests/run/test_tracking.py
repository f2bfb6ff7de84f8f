"""metrics.jsonl never repeats a step, the console stays narrow, and a tracker that fails does not stop training."""

import json
import math
from types import SimpleNamespace

import pytest
from test_train import TINY, tiny
from wandb_standin import ROOT, run_python

from sslcells.evaluation.pictures import curves
from sslcells.run import metrics, tracking
from sslcells.run.tracking import console_line
from sslcells.train import train


def log_of(run, steps=10):
    """The Log of a run that nobody trains."""
    run.folder.mkdir()
    return tracking.Log(run, steps, 0, SimpleNamespace(is_main_process=True, trackers=[], log=print))


TRAINED = {"loss": 2.34567, "gradient_norm": 1.5, "images_per_second": 523.4, "data_wait": 0.034, "lr": 0.0012}


def test_a_line_of_the_console_has_its_columns_and_nothing_else():
    line = console_line(120, 4800, 3.2, TRAINED)
    assert line == "step  120/4800  epoch   3.20  loss 2.346     lr 1.2e-03    523 images/s  wait   3%"


def test_columns_stand_in_the_same_places():
    late = TRAINED | {"loss": 0.001234, "images_per_second": 98765, "data_wait": 1, "lr": 1}
    first, second = console_line(20, 4800, 0.5, TRAINED), console_line(4800, 4800, 128.25, late)
    evaluated = console_line(4800, 4800, 128.25, {"knn/top1": 0.8831, "health/alignment": 0.4})
    for column in ("epoch", "loss", "lr", "images/s", "wait"):
        assert first.index(column) == second.index(column)
    both = console_line(4800, 4800, 128.25, late | {"knn/top1": 1})
    assert both.startswith(second)
    assert evaluated.index("kNN") == both.index("kNN")
    assert evaluated.split() == ["step", "4800/4800", "epoch", "128.25", "kNN", "88.3%"]


@pytest.mark.parametrize(("steps", "width"), [(999, 100), (99_999, 104)])
def test_a_line_is_about_100_characters_wide(steps, width):
    widest = {"loss": 1234.5, "lr": 1e-5, "images_per_second": 99_999, "data_wait": 1, "knn/top1": 1, "more": 0.5}
    assert len("23:59:59 " + console_line(steps, steps, 999.99, widest)) <= width + 1


def test_figures_without_a_column_make_no_line(tmp_path, capsys):
    log = log_of(tiny(tmp_path))
    log.metrics(1, 0.1, {"health/alignment": 0.5})
    log.metrics(2, 0.2, {"health/alignment": 0.4, "knn/top1": 0.25})
    log.close()
    (line,) = capsys.readouterr().out.splitlines()
    assert line[9:].split() == ["step", "2/10", "epoch", "0.20", "kNN", "25.0%"]
    assert [row["health/alignment"] for row in metrics.read_metrics(tmp_path / "quickstart")] == [0.5, 0.4]


def test_what_came_after_the_checkpoint_is_forgotten(tmp_path):
    path = tmp_path / "metrics.jsonl"
    rows = [json.dumps({"step": s}) for s in (0, 10, 20, 30)]
    path.write_text("\n".join(rows) + '\n{"step": 4')
    metrics.forget_after(path, 20)
    assert [r["step"] for r in metrics.read_metrics(tmp_path)] == [0, 10, 20]
    metrics.forget_after(path, 0)
    assert metrics.read_metrics(tmp_path) == []


def test_a_row_that_cannot_be_written_ends_the_training(tmp_path):
    run = tiny(tmp_path)
    run.folder.mkdir()
    (run.folder / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        train(run)


def test_a_figure_that_is_not_finite_is_null_in_the_file_and_nan_where_it_is_read(tmp_path):
    """Bare NaN is no JSON: most readers but Python's refuse the whole file."""
    run = tiny(tmp_path)
    log = log_of(run)
    log.metrics(1, 0.1, {"loss": 2.0, "gradient_norm": math.inf, "knn/top1": math.nan})
    log.close()
    text = (run.folder / "metrics.jsonl").read_text()
    strict = json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} in {text}"))
    assert strict == {"step": 1, "epoch": 0.1, "loss": 2.0, "gradient_norm": None, "knn/top1": None}
    (row,) = metrics.read_metrics(run.folder)
    assert math.isnan(row["gradient_norm"])
    assert curves([row], tmp_path / "curves.png").is_file()


@pytest.mark.slow
def test_tensorboard_writes_events(tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    folder = train(tiny(tmp_path, "log.tracker=tensorboard", "train.total_steps=2"))
    assert list(folder.rglob("events.out.tfevents.*"))


def test_a_failing_tracker_does_not_stop_training(tmp_path, monkeypatch, capsys):
    def fail(self, *args, **kwargs):
        raise OSError("no space left")

    monkeypatch.setattr("accelerate.Accelerator.init_trackers", fail)
    folder = train(tiny(tmp_path, "log.tracker=tensorboard", "train.total_steps=2"))
    assert (folder / "encoder.json").exists()
    assert capsys.readouterr().out.count("no space left") == 1


@pytest.mark.slow
def test_tensorboard_on_two_ranks(tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    launch = ["accelerate.commands.launch", "--config_file", str(ROOT / "launch" / "cpu2.yaml"), "-m", "sslcells.train"]
    done = run_python("-m", *launch, *TINY, f"out={tmp_path}", "train.total_steps=2", "log.tracker=tensorboard")
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.rglob("events.out.tfevents.*"))
