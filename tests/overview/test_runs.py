"""`sslcells runs`: what it says of runs in every state, and of broken folders."""

import json
import os
import random
import shutil
import socket
import stat
import subprocess
import sys
import time

import psutil
import pytest
import run_folders
from run_folders import age, lock, make

from sslcells.cli import main
from sslcells.overview import console
from sslcells.overview.figures import figures
from sslcells.overview.found import runs
from sslcells.overview.summary import summary
from sslcells.run.lock import Lock

HERE = {"host": socket.gethostname(), "process": os.getpid(), "started": psutil.Process().create_time()}


def seen(folder):
    return summary(folder).state, summary(folder).note


def test_a_running_run_says_step_time_left_and_best_figure(tmp_path):
    folder = make(tmp_path / "one", done=150)
    held = Lock(folder)
    one = summary(folder)
    held.release()
    assert one.state == "running"
    assert f"process {os.getpid()} on" in one.note
    assert (one.figures.step, one.steps) == (150, 200)
    assert one.left == 50 * 100 / 200
    assert (one.figures.best.name, one.figures.best.value, one.figures.best.step) == ("kNN", 0.6, 100)
    assert one.figures.loss[0] == 4.9
    assert one.figures.loss[-1] == 3.5
    assert one.method == "simclr"


@pytest.mark.parametrize(("beat", "state"), [(20, "running"), (90, "silent")])
def test_on_another_host_the_beat_tells(tmp_path, beat, state):
    lock(make(tmp_path / "one"), silent=beat, job="7")
    assert summary(tmp_path / "one").state == state
    assert "job 7, process 1 on elsewhere" in summary(tmp_path / "one").note
    assert ("no beat" in summary(tmp_path / "one").note) == (state == "silent")


def test_a_process_that_lives_and_writes_nothing_is_silent(tmp_path):
    folder = make(tmp_path / "one")
    age(folder / "metrics.jsonl", 3600)
    with subprocess.Popen(["sleep", "600"]) as started:
        lock(folder, **HERE | {"process": started.pid, "started": psutil.Process(started.pid).create_time()})
        assert seen(folder)[0] == "running"  # it is younger than that
        started.kill()
    lock(folder, started=time.time() - 4000)  # on another host
    state, note = seen(folder)
    assert state == "silent"
    assert "no new figures for 60 min" in note
    slow = [{"step": s, "epoch": s / 50, "loss": 1.0, "images_per_second": 2.0} for s in (10, 20)]  # a line in 500 s
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in slow))
    age(folder / "metrics.jsonl", 3600)
    assert seen(folder)[0] == "running"


def test_why_a_run_is_over(tmp_path):
    assert seen(make(tmp_path / "a", done=200, finished=True)) == ("finished", "")
    assert seen(make(tmp_path / "b", done=100, finished=True))[0] == "stopped"  # an earlier run of that name finished
    assert seen(make(tmp_path / "c", stopped="rank 0: TrainingError: the loss\nbecame nan")) == (
        "failed",
        "rank 0: TrainingError: the loss became nan",
    )
    state, note = seen(make(tmp_path / "d", done=90))
    assert (state, note.split("; ")[1]) == ("stopped", "the same command resumes it after step 90")
    gone = make(tmp_path / "e")
    lock(gone, **HERE | {"started": 1.0})
    assert seen(gone)[0] == "stopped"
    assert f"process {os.getpid()} on {HERE['host']} is gone" in seen(gone)[1]
    assert seen(make(tmp_path / "f", done=200, finished=True, stopped="ConfigError: x")) == (
        "finished",
        "a later start: ConfigError: x",
    )


def test_total_steps_count_before_epochs(tmp_path):
    assert summary(make(tmp_path / "a", done=70, steps=300)).steps == 300
    short = make(tmp_path / "b", done=0)
    assert summary(short).steps is None
    assert console.step(summary(short)) == "0/?"


def test_rows_of_an_evaluation_are_no_steps(tmp_path):
    folder = make(tmp_path / "one", done=200, finished=True)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 201, "epoch": 4.0, "evaluation/test/kNN/accuracy": 0.99}) + "\n")
    assert summary(folder).figures.step == 200
    assert seen(folder)[0] == "finished"


def test_a_classifier_is_known_by_its_accuracy_and_null_is_no_figure():
    written = [{"step": 5, "val/top1": None}, {"step": 6, "val/top1": 0.7, "loss": None}, {"step": 7, "loss": 2.0}]
    found = figures("".join(json.dumps(row) + "\n" for row in written).encode())
    assert found.best[:2] == ("accuracy", 0.7)
    assert found.loss == (2.0,)
    assert found.step == 7


def broken(folder, how):
    if how == "no config":
        (folder / "config.yaml").unlink()
    elif how == "cut config":
        (folder / "config.yaml").write_text("name: x\ntrain:\n  glob")
    elif how == "config":
        (folder / "config.yaml").write_text("name: [x\ntrain: }")
    elif how == "number":
        (folder / "config.yaml").write_text(run_folders.CONFIG.format(name="x", steps="many"))
    elif how == "pipe":
        (folder / "config.yaml").unlink()
        os.mkfifo(folder / "config.yaml")
    elif how == "line":
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        (folder / "metrics.jsonl").write_text("\n".join([*lines[:3], lines[3][:20], *lines[4:]]) + "\n")
    elif how == "binary":
        (folder / "metrics.jsonl").write_bytes(bytes(range(256)) * 20)
    elif how == "lock":
        (folder / "lock.json").write_text('{"host": 5')
    elif how == "folder":
        (folder / "lock.json").mkdir()


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("no config", "config.yaml: there is no such file"),
        ("cut config", "config.yaml: it has no train.global_batch"),
        ("config", "config.yaml: it is no YAML, line 2"),
        ("number", "train.total_steps='many' is no number above 0"),
        ("pipe", "config.yaml: there is no such file"),
        ("line", "metrics.jsonl: line 4 is cut off or no JSON"),
        ("binary", "metrics.jsonl: line 1 is cut off or no JSON"),
        ("lock", "lock.json: it names no owner"),
        ("folder", "lock.json: Is a directory"),
    ],
)
def test_a_broken_folder_says_what_is_broken(tmp_path, how, words, capsys):
    make(tmp_path / "sound")
    broken(make(tmp_path / "one"), how)
    assert main(None, ["runs", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].startswith("one")
    assert "broken" in lines[2]
    assert words in lines[2]
    assert "kNN 60.0 % at 100" in lines[3]


def test_a_last_line_that_is_being_written_is_no_fault(tmp_path):
    folder = make(tmp_path / "one")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 110, "epo')
    assert seen(folder)[0] == "stopped"


def test_random_damage_never_ends_it(tmp_path):
    draw = random.Random(0)
    folder = make(tmp_path / "one")
    lock(folder)
    sound = {name: (folder / name).read_bytes() for name in ("config.yaml", "metrics.jsonl", "lock.json")}
    words = [b"\x1b[2J", b"null", b"NaN", b"[[", b"1e999", b"\xff\xfe", b"\n", b"{}", b"-1", b'"', b": "]
    states = set()
    for _ in range(60):
        for name, content in sound.items():
            at, cut = draw.randrange(len(content)), draw.choice([0, 0, 1, 5, 400])
            (folder / name).write_bytes(content[:at] + draw.choice(words) + content[at + cut :])
        (one,) = runs(tmp_path)
        text = "".join(str(line) for line in console.lines(tmp_path, [one]))
        assert text.isprintable()
        states.add(one.state)
    assert {"broken", "running"} <= states


def test_every_folder_is_found_and_none_is_touched(tmp_path):
    make(tmp_path / "deep" / "er" / "two")
    inner = make(make(tmp_path / "one", done=200, finished=True) / "compare" / "probe_1_0")
    make(tmp_path / "one" / "checkpoints" / "no_run")
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "config.yaml").write_text("name: x")  # no run
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "itself").symlink_to(tmp_path / "itself")
    before = {path: os.lstat(path).st_mtime_ns for path in tmp_path.rglob("*")}
    names = {console.name(tmp_path, one) for one in runs(tmp_path)}
    assert names == {"deep/er/two", "one", "one/compare/probe_1_0"}
    assert {path: os.lstat(path).st_mtime_ns for path in tmp_path.rglob("*")} == before
    assert [console.name(inner, one) for one in runs(inner)] == ["probe_1_0"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_of_another_user(tmp_path):
    folder = make(tmp_path / "one")
    folder.chmod(0)
    try:
        assert [(one.state, one.note) for one in runs(tmp_path)] == [("broken", "the folder: Permission denied")]
    finally:
        folder.chmod(stat.S_IRWXU)


def test_mistakes(tmp_path, capsys):
    assert main(None, ["runs", str(tmp_path / "nothing")]) == 2
    assert "nothing: no such folder" in capsys.readouterr().err
    assert main(None, ["runs", str(tmp_path)]) == 0
    assert "no runs" in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        main(None, ["runs", str(tmp_path), "--watch", "never"])
    assert ended.value.code == 2
    assert "'never' is no number of seconds" in capsys.readouterr().err


def test_watch_shows_what_changed(tmp_path, capsys):
    folder = make(tmp_path / "one", done=50)
    shown = []

    def pause(seconds):
        shown.append((seconds, capsys.readouterr().out))
        if len(shown) == 2:
            raise KeyboardInterrupt
        shutil.rmtree(folder)
        make(folder, done=200, finished=True)

    with pytest.raises(KeyboardInterrupt):
        console.watch(tmp_path, 3.0, pause)
    assert [seconds for seconds, _ in shown] == [3.0, 3.0]
    assert "stopped" in shown[0][1]
    assert "finished" in shown[1][1]


def test_in_a_terminal_it_fits_the_window(tmp_path):
    for number in range(30):
        make(tmp_path / f"run_{number}", stopped="a long reason " * 20)
    shown = console.lines(tmp_path, runs(tmp_path))
    fitted = console._fitted(shown, height=10)
    assert len(fitted.renderables) == 9
    assert str(fitted.renderables[-1]) == "and 24 more lines; sslcells runs shows all"


@pytest.mark.parametrize(
    ("values", "bars"), [([], ""), ([1], ""), ([1, 2, 3], "▁▅█"), ([2, 2], "▁▁"), (range(100), "▁▁▂▂▃▃▄▄▅▅▆▆▇▇██")]
)
def test_a_curve(values, bars):
    assert console.curve(tuple(values)) == bars


def test_torch_is_not_imported(tmp_path):
    make(tmp_path / "one")
    code = (
        "import sys; from sslcells.cli import main; assert main(None, ['runs', sys.argv[1]]) == 0\n"
        "heavy = {'torch', 'numpy', 'pydantic', 'omegaconf'} & set(sys.modules); assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "kNN 60.0 % at 100" in done.stdout
