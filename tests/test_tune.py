"""The search for settings: what it refuses, what it chooses, what it leaves, and how it goes on."""

import contextlib
import csv
import io
import json
import math
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
from trained import SMALL

from sslcells.cli import main
from sslcells.config import ConfigError, load
from sslcells.errors import TrainingError
from sslcells.overview.found import runs
from sslcells.run.interrupt import Stopped
from sslcells.run.metrics import read_metrics
from sslcells.tune import search, tune
from sslcells.tuning import results
from sslcells.tuning import study as of_optuna
from sslcells.tuning.ranges import ranges

TINY = [
    *SMALL,
    "method.hidden=16",
    "train.global_batch=16",
    "train.workers=0",
    "evaluate.k=5",
    "evaluate.pictures=false",
    "train.total_steps=12",
]
WORDS = ["optim.lr=1e-4..1:log", "method.temperature=0.05..0.5", "train.micro_batch=none,8"]


def pretended(run):
    """A training that is best at a rate of 0.001, and diverges above 0.1."""
    run.folder.mkdir(exist_ok=True)
    if run.optim.lr > 0.1:
        raise TrainingError(f"the loss became nan\nat a rate of {run.optim.lr}")
    figure = 0.9 - abs(math.log10(run.optim.lr) + 3) / 10
    rows = [{"step": step, "epoch": 1.0, "knn/top1": value} for step, value in ((0, 0.99), (12, figure))]
    (run.folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def wanted(folder, *overrides, trials=5, words=WORDS, seed=0):
    return search(words, None, [*TINY, f"out={folder}", "name=search", *overrides], trials, seed)


def table(folder):
    with (folder / "search" / "trials.csv").open() as file:
        return {int(row["trial"]): row for row in csv.DictReader(file)}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("optim.lrr=1e-4..1", "optim.lrr=0.0001: no such key (did you mean optim.lr?)"),
        ("optim.lr=-1..1", "optim.lr=-1: Input should be greater than 0"),
        ("optim.momentum=0.5..1", "optim.momentum=1.0: Input should be less than 1"),
        ("train.micro_batch=4.5..8", "train.micro_batch=4.5: Input should be a valid integer"),
        ("train.micro_batch=4..8.5", "train.micro_batch takes whole numbers"),
        ("optim.name=1..3", "optim.name takes no range of numbers; name its values, optim.name=A,B"),
        ("train.micro_batch=8,many", "train.micro_batch='many': Input should be a valid integer"),
        ("method.name=simclr,simclrr", "name='simclrr' is not known (did you mean simclr?)"),
        ("optim.lr=2..1", "optim.lr=2..1: expected LOW below HIGH"),
        ("optim.lr=0..1:log", "optim.lr=0..1:log: log needs LOW > 0"),
        ("optim.lr=0.1", "optim.lr=0.1: expected KEY=LOW..HIGH"),
        ("optim.lr", "optim.lr: expected KEY=LOW..HIGH"),
        ("optim.lr=0.1,0.1", "a value is given twice"),
        ("optim.lr=1..2 optim.lr=1..3", "optim.lr: given twice"),
        ("data.size=32..48", "data.size: it is also fixed"),
        ("name=a,b", "name: each trial has its own"),
        ("evaluate.k=1..5", "evaluate.k: it changes how trials are measured"),
        ("method.name=simclr,vicreg method.temperature=0.1..1", "method.temperature=0.1: no such key"),
    ],
)
def test_what_cannot_be_searched_is_refused(words, message):
    with pytest.raises(ConfigError) as error:
        ranges(words.split(), None, TINY)
    assert message in str(error.value)


def test_a_range_is_of_the_kind_that_its_key_takes():
    words = ["optim.weight_decay=0..1", "train.micro_batch=4..8", "model.args={width: 4},{width: 8, depth: 1}"]
    decay, batch, args = ranges(words, None, [word for word in TINY if not word.startswith("model.args")])
    assert (decay.whole, batch.whole) == (False, True)
    assert args.choices == ("{width: 4}", "{width: 8, depth: 1}")
    assert (decay.word(0.123456), batch.word(5), decay.word(0.999999)) == ("0.1235", "5", "1.0")


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    out, printed = tmp_path_factory.mktemp("searched"), io.StringIO()
    with contextlib.redirect_stdout(printed):
        tune(wanted(out, trials=10), pretended)
    return out, printed.getvalue()


def test_a_search_finds_the_best_and_names_what_failed(searched):
    out, printed = searched
    folder, rows = out / "search", table(out)
    assert len(rows) == 10
    rates = {number: float(row["optim.lr"]) for number, row in rows.items()}
    assert {number for number, row in rows.items() if row["state"] == "failed"} == {n for n in rates if rates[n] > 0.1}
    failed = next(row for row in rows.values() if row["state"] == "failed")
    assert failed["why"] == f"TrainingError: the loss became nan at a rate of {failed['optim.lr']}"
    best = min((number for number in rates if rates[number] <= 0.1), key=lambda n: abs(math.log10(rates[n]) + 3))
    assert next(iter(rows)) == best
    assert float(rows[best]["knn/top1 on val"]) < 0.95  # not the figure before training
    run = load(str(folder / "best.yaml"))
    assert (run.name, run.out, run.optim.lr) == ("search_best", str(out), rates[best])
    assert (folder / "search.png").stat().st_size > 10_000
    shares = dict(
        reversed(line.split("% of what differs is due to ")) for line in printed.splitlines() if "due to" in line
    )
    assert max(shares, key=lambda key: float(shares[key])) == "optim.lr"
    assert f"best: optim.lr={rates[best]}" in printed


def test_an_interrupted_search_goes_on_as_if_nothing_had_happened(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "draw", lambda *of: None)
    calls = []

    def stopped(run):
        calls.append(run.name)
        if len(calls) in (2, 5):
            raise Stopped(signal.SIGTERM, "stopped")
        pretended(run)

    for _ in range(2):
        with pytest.raises(Stopped):
            tune(wanted(tmp_path / "cut"), stopped)
    tune(wanted(tmp_path / "cut"), stopped)
    tune(wanted(tmp_path / "whole"), pretended)
    assert table(tmp_path / "cut") == table(tmp_path / "whole")
    assert calls.count("trial_0001") == calls.count("trial_0003") == 2
    tune(wanted(tmp_path / "whole"), lambda run: pytest.fail(f"{run.name} was trained again"))


def opened(folder):
    found = ranges(["optim.lr=1e-4..1e-2"], None, [])
    return of_optuna.Study(folder, found, 0, "knn/top1")


def kill(study, folder, number):
    """Leave a trial as a process that was killed does."""
    study.leave(number)
    claim = folder / ".claims" / str(number) / "lock.json"
    gone = subprocess.Popen([sys.executable, "-c", ""])
    started = psutil.Process(gone.pid).create_time()
    gone.wait()
    owner = {"host": os.uname().nodename, "process": gone.pid, "started": started, "job": "", "start": "0"}
    claim.write_text(json.dumps(owner | {"token": "gone", "beat": 0}))


def test_processes_share_a_study_and_take_over_what_is_abandoned(tmp_path):
    one, other = opened(tmp_path), opened(tmp_path)
    first, second = one.take(3), other.take(3)
    assert (first.number, second.number) == (0, 1)
    assert first.settings != second.settings  # not the same draw in both
    kill(one, tmp_path, 0)
    again = other.take(3)
    assert (again.number, again.settings, again.hopeless) == (0, first.settings, "")
    assert (one.take(3).number, one.take(3)) == (2, None)
    other.finish(0, 0.5)
    other.fail(1, "no")
    assert [(trial.number, trial.state) for trial in one.trials()] == [(0, "finished"), (1, "failed"), (2, "running")]


def test_a_trial_that_always_ends_its_process_is_given_up(tmp_path):
    study = opened(tmp_path)
    assert study.take(1).number == 0
    for _ in range(2):
        kill(study, tmp_path, 0)
        assert study.take(1).hopeless == ""
    kill(study, tmp_path, 0)
    assert "its process ended 3 times without a new checkpoint" in study.take(1).hopeless


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"seed": 1}, "holds another search (seed: 0 → 1)"),
        ({"words": WORDS[:1]}, "holds another search (search: "),
        ({"overrides": ["method.hidden=8"]}, "holds a search with another configuration (method.hidden: 16 → 8)"),
        ({"overrides": ["evaluate.k=3"]}, "holds a search with another configuration (evaluate)"),
    ],
)
def test_another_search_in_the_same_folder_is_refused(change, words, searched):
    overrides = change.pop("overrides", [])
    with pytest.raises(ConfigError) as error:
        tune(wanted(searched[0], *overrides, **change), pretended)
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["data.val=0", "evaluate.holdout=0"], ["optim.lr=1..2"]),
        ([], ["method.name=simclr,supervised"]),
    ],
)
def test_without_one_figure_on_val_nothing_is_trained(overrides, words, tmp_path):
    tiny = [word for word in TINY if not word.startswith("method.")]
    with pytest.raises(ConfigError, match=r"kNN on val, but the data: has no val|supervised has other figures"):
        tune(search(words, None, [*tiny, f"out={tmp_path}", *overrides]), lambda run: pytest.fail("trained"))
    assert not (tmp_path / "quickstart").exists()


def test_without_optuna_one_line_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "optuna", None)
    assert main(None, ["tune", *TINY, "--search", "optim.lr=1e-4..1e-2"]) == 2
    assert capsys.readouterr().err == "sslcells: sslcells tune needs optuna: pip install 'sslcells[optuna]'\n"


def test_check_says_what_is_searched(capsys):
    assert main(None, ["tune", *TINY, "--check", "--trials", "3", "--search", "optim.lr=1e-4..1e-2:log"]) == 0
    assert "search: optim.lr=0.0001..0.01:log; 3 trials" in capsys.readouterr().out


@pytest.mark.slow
def test_a_killed_search_resumes_its_trial_from_the_checkpoint(tmp_path):
    small = ["train.total_steps=60", "checkpoint.every_steps=5", "log.every_steps=1"]
    words = ["--trials", "2", "--search", "optim.lr=1e-4..1e-2:log"]
    argv = ["tune", *TINY, *small, f"out={tmp_path}", "name=cut", *words]
    with subprocess.Popen([sys.executable, "-m", "sslcells", *argv], stdout=subprocess.DEVNULL) as process:
        while not any((tmp_path / "cut" / "trial_0001" / "checkpoints").glob("step_*")):
            assert process.poll() is None
            time.sleep(0.02)
        process.kill()
    assert main(None, argv) == 0
    assert main(None, [word.replace("name=cut", "name=whole") for word in argv]) == 0
    for name in ("trial_0000", "trial_0001"):
        cut, whole = (read_metrics(tmp_path / study / name) for study in ("cut", "whole"))
        assert [row["step"] for row in cut] == [row["step"] for row in whole]
        assert [row.get("loss") for row in cut] == [row.get("loss") for row in whole]
    assert (tmp_path / "cut/trials.csv").read_text() == (tmp_path / "whole/trials.csv").read_text()
    assert {(one.folder.name, one.state) for one in runs(tmp_path)} == {
        ("trial_0000", "finished"),
        ("trial_0001", "finished"),
    }
