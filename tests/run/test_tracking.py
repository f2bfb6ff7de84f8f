"""Where figures go: metrics.jsonl that never repeats a step, and trackers that training never waits for.

W&B is the real one where a test is slow, with a server that this file has; elsewhere it is a module of that name.
"""

import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from PIL import Image
from test_train import TINY, Killed, in_step, killed_after, tiny, untimed

from sslcells.config import ConfigError, dump
from sslcells.evaluation.pictures import curves
from sslcells.run import metrics, tracking, wandb_sync
from sslcells.run.wandb_sync import TrackingError
from sslcells.train import train

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def no_credentials(monkeypatch, tmp_path):
    for name in [n for n in os.environ if n.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "home" / ".netrc"))


# ---- credentials


def test_wandb_needs_credentials(monkeypatch):
    assert wandb_sync.wandb_mode() is None
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    assert wandb_sync.wandb_mode() == "online"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert wandb_sync.wandb_mode() == "disabled"


@pytest.mark.parametrize(("host", "mode"), [("api.wandb.ai", "online"), ("other.example", None)])
def test_wandb_credentials_in_netrc(tmp_path, host, mode):
    (tmp_path / "home" / ".netrc").write_text(f"machine {host} login user password secret\n")
    assert wandb_sync.wandb_mode() == mode


def test_the_server_that_wandb_login_wrote_down(tmp_path):
    (tmp_path / "home" / ".netrc").write_text("machine wandb.lab:8080 login user password secret\n")
    settings = tmp_path / "home" / ".config" / "wandb" / "settings"
    settings.parent.mkdir(parents=True)
    assert wandb_sync.wandb_mode() is None
    settings.write_text("[default]\nbase_url = http://wandb.lab:8080\n")
    assert wandb_sync.wandb_mode() == "online"


def logged(out):
    """The folder of a run without training: one line, and the end."""
    run = tiny(out, "log.tracker=wandb")
    run.folder.mkdir()
    (run.folder / "config.yaml").write_text(dump(run))
    log = tracking.Log(run, 1, 0, SimpleNamespace(is_main_process=True, trackers=[]))
    log.metrics(1, 1.0, {"loss": 0.5})
    log.close()
    return run.folder


def test_without_credentials_one_line_says_what_to_do_later(tmp_path, capsys):
    folder = logged(tmp_path)
    lines = [line for line in capsys.readouterr().out.splitlines() if "W&B" in line]
    assert len(lines) == 1
    assert "no key" in lines[0]
    assert f"sslcells sync {folder}" in lines[0]
    assert not (folder / "wandb").exists()


# ---- metrics.jsonl


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
    run.folder.mkdir()
    log = tracking.Log(run, 10, 0, SimpleNamespace(is_main_process=True, trackers=[], log=print))
    log.metrics(1, 0.1, {"loss": 2.0, "gradient_norm": math.inf, "knn/top1": math.nan})
    log.close()
    text = (run.folder / "metrics.jsonl").read_text()
    strict = json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} in {text}"))
    assert strict == {"step": 1, "epoch": 0.1, "loss": 2.0, "gradient_norm": None, "knn/top1": None}
    (row,) = metrics.read_metrics(run.folder)
    assert math.isnan(row["gradient_norm"])
    assert curves([row], tmp_path / "curves.png").is_file()


def test_a_step_is_read_once_it_is_whole(tmp_path):
    path = tmp_path / "metrics.jsonl"
    steps = wandb_sync.Steps(path)
    assert list(steps.read()) == []
    path.write_text('{"step": 0, "a": 1}\n{"step": 0, "b": 2}\n{"step": 5, "a"')
    assert list(steps.read()) == []
    with path.open("a") as file:
        file.write(': 3}\nnonsense\n{"step": 6, "a": 4}\n')
    assert list(steps.read()) == [(0, {"a": 1, "b": 2}), (5, {"a": 3})]
    assert steps.newest == 6
    assert list(steps.rest()) == [(6, {"a": 4})]
    assert list(steps.rest()) == []


# ---- TensorBoard


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


# ---- W&B, a module that stands in for it

STANDIN = """
import json, os, subprocess, sys, time
from pathlib import Path

STORE = Path(os.environ["STANDIN_STORE"])
HOW = os.environ.get("STANDIN_HOW", "")

class Settings:
    model_fields = ["console"]
    def __init__(self, console):
        assert console == "off"

class Image:
    def __init__(self, path):
        self.path = path

class Run:
    def __init__(self, options):
        self.known = json.loads(STORE.read_text()) if STORE.exists() else {"rows": [], "finished": []}
        self.known |= {"id": options["id"], "name": options["name"], "tags": options["tags"], "mode": options["mode"]}
        self.config, self.url = self, "http://stand.in/" + options["id"]
        self.starting_step = self.known["rows"][-1]["step"] + 1 if self.known["rows"] else 0
    def update(self, config, allow_val_change):
        self.known["config"] = config
    def log(self, figures, step):
        if HOW == "fails at 6" and step == 6:
            raise RuntimeError("no more")
        assert not self.known["rows"] or step > self.known["rows"][-1]["step"]
        figures = {k: os.path.basename(v.path) if isinstance(v, Image) else v for k, v in figures.items()}
        self.known["rows"].append({"step": step, **figures})
    def mark_preempting(self):
        self.known["finished"].append("preempting")
    def finish(self, exit_code):
        self.known["finished"].append(exit_code)
        if HOW == "hangs at the end":
            service = subprocess.Popen(["sleep", "1000"], start_new_session=True)
            STORE.with_name("service").touch()
            time.sleep(1000)
        if HOW == "is refused":
            self.known["rows"] = []
        STORE.write_text(json.dumps(self.known))

def init(**options):
    if HOW == "raises":
        raise ConnectionError("nobody there\\nin many words")
    if HOW == "dies":
        os._exit(7)
    if HOW == "prints":
        print("W&B likes to talk " * 10000, flush=True)
    return Run(options)

def teardown():
    pass
"""


@pytest.fixture
def standin(tmp_path, monkeypatch):
    """What the module `wandb` of other processes is given, as a function that reads it."""
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "wandb.py").write_text(STANDIN)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "modules"))
    monkeypatch.setenv("STANDIN_STORE", str(tmp_path / "store"))
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    return lambda: json.loads((tmp_path / "store").read_text())


def killed_at_7(out, monkeypatch):
    """Killed after step 7, with a checkpoint of step 4, and steps 0, 2, 4 and 6 in metrics.jsonl."""
    with monkeypatch.context() as patch:
        started, plainly = [], wandb_sync.Sender
        patch.setattr(wandb_sync, "Sender", lambda *a, **k: started.append(plainly(*a, **k)) or started[0])
        with pytest.raises(Killed):
            train(tiny(out, "log.tracker=wandb"), killed_after(7))
    started[0]._process.stdin.close()  # as the system does for a process that is no more
    assert started[0]._process.wait(30) == 0
    started[0].close()


def by_step(folder):
    """The rows of metrics.jsonl, all of a step as one."""
    steps = {}
    for row in metrics.read_metrics(folder):
        steps.setdefault(row["step"], {}).update(row)
    return list(steps.values())


def plain(rows):
    return [{k: v for k, v in row.items() if k not in ("views", "curves", "embedding", "neighbours")} for row in rows]


def handmade(folder, *steps, **more):
    """A run's folder with a figure a step."""
    folder.mkdir()
    (folder / "config.yaml").write_text(dump(tiny(folder.parent, f"name={folder.name}", "log.tags=[a, b]")))
    lines = [json.dumps({"step": s, "loss": s / 10, **more}) + "\n" for s in steps]
    (folder / "metrics.jsonl").write_text("".join(lines))
    return folder


@pytest.mark.slow
def test_wandb_gets_every_step_while_it_trains(tmp_path, standin, capsys):
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    folder = train(tiny(tmp_path, "log.tracker=wandb", "log.tags=[x]"))
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    got = standin()
    assert plain(got["rows"]) == by_step(folder)
    assert got["rows"][0]["views"] == "views.png"
    assert {"curves", "embedding", "neighbours"} <= got["rows"][-1].keys()
    assert sum("views" in row or "curves" in row for row in got["rows"]) == 2
    assert got["id"] == (folder / "wandb_id.txt").read_text()
    assert (got["name"], got["tags"], got["mode"]) == ("quickstart", ["x"], "online")
    assert got["config"]["optim.lr"] == 0.002
    assert got["finished"][0] == 0
    assert "W&B: http://stand.in/" in capsys.readouterr().out


@pytest.mark.slow
def test_a_resumed_run_repeats_no_step(tmp_path, standin, monkeypatch):
    """Killed after step 7 it goes on from step 4; W&B, which has step 6 already, gets the steps from there."""
    killed_at_7(tmp_path, monkeypatch)
    assert [row["step"] for row in standin()["rows"]] == [0, 2, 4]  # 6 was the newest: more may come for it
    folder = train(tiny(tmp_path, "log.tracker=wandb"))
    assert plain(standin()["rows"])[3:] == by_step(folder)[3:]
    assert [row["step"] for row in standin()["rows"]] == [row["step"] for row in by_step(folder)]


@pytest.mark.slow
def test_offline_has_what_came_after_the_checkpoint(tmp_path, standin, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    killed_at_7(tmp_path, monkeypatch)
    (tmp_path / "store").unlink()  # W&B's offline mode knows nothing of the files before
    train(tiny(tmp_path, "log.tracker=wandb"))
    assert [row["step"] for row in standin()["rows"]] == [6, 8, 10, 12, 14, 15]


def test_disabled_starts_nothing(tmp_path, standin, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    logged(tmp_path)
    assert not (tmp_path / "store").exists()
    assert "W&B" not in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "told"),
    [
        ("raises", "ConnectionError: nobody there in many words. Every"),
        pytest.param("fails at 6", "RuntimeError: no more", marks=pytest.mark.slow),
        pytest.param("dies", "status 7", marks=pytest.mark.slow),
        pytest.param("hangs at the end", "not got everything after 10 s", marks=pytest.mark.slow),
        pytest.param("is refused", "sent step 15, but holds none", marks=pytest.mark.slow),
        pytest.param("prints", None, marks=pytest.mark.slow),
    ],
)
def test_training_goes_on_whatever_wandb_does(tmp_path, standin, monkeypatch, capsys, how, told):
    monkeypatch.setenv("STANDIN_HOW", how)
    if how == "hangs at the end":
        monkeypatch.setitem(wandb_sync.FINISH, "ended", 10.0)
    began = time.monotonic()
    folder = train(tiny(tmp_path, "log.tracker=wandb"))
    assert time.monotonic() - began < 60
    assert (folder / "encoder.json").exists()
    out = capsys.readouterr().out
    assert out.count("left alone") == out.count("sslcells sync") == (told is not None)
    assert told is None or told in out
    wait_for(lambda: not senders(folder))
    if how == "hangs at the end":
        assert (tmp_path / "service").exists()  # and it was among the senders


def test_sync_sends_what_wandb_lacks_and_nothing_twice(tmp_path, standin):
    folder = handmade(tmp_path / "run", 0, 5, 10)
    (folder / "plots").mkdir()
    for name in ("views", "curves"):
        Image.new("RGB", (4, 4)).save(folder / "plots" / f"{name}.png")
    metrics.note_steps({"views": folder / "plots" / "views.png"}, 0)
    metrics.note_steps({"curves": folder / "plots" / "curves.png"}, 10)
    Image.new("RGB", (4, 4)).save(folder / "plots" / "older.png")  # drawn before such notes were taken
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 10, "knn": 0.5}\n{"step": 15, "lo')
    assert "3 steps sent, up to step 10: http://stand.in/" in wandb_sync.sync(folder, "ended")
    rows = [
        {"step": 0, "loss": 0.0, "views": "views.png"},
        {"step": 5, "loss": 0.5},
        {"step": 10, "loss": 1.0, "knn": 0.5, "curves": "curves.png", "older": "older.png"},
    ]
    assert standin()["rows"] == rows
    assert (standin()["name"], standin()["tags"]) == ("run", ["a", "b"])
    assert "W&B has every step already" in wandb_sync.sync(folder, "ended")
    assert standin()["rows"] == rows
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('ss": 1.5}\n')
    wandb_sync.sync(folder, "stopped")
    assert standin()["rows"] == [*rows, {"step": 15, "loss": 1.5, "older": "older.png"}]


def test_sync_keeps_back_what_may_be_half(tmp_path, standin):
    folder = handmade(tmp_path / "run", 0, 5, 10)
    assert "step 10 is kept back" in wandb_sync.sync(folder, "died")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 10, "knn": 0.5}\n')
    wandb_sync.sync(folder, "ended")
    assert standin()["rows"][-1] == {"step": 10, "loss": 1.0, "knn": 0.5}
    assert standin()["finished"] == [1, 1, 0, 0]  # each is looked at again to see what W&B holds


@pytest.mark.parametrize(
    ("how", "told"), [("raises", "ConnectionError: nobody there"), ("is refused", "holds none"), ("dies", "with 7")]
)
def test_sync_says_why_it_failed(tmp_path, standin, monkeypatch, how, told):
    monkeypatch.setenv("STANDIN_HOW", how)
    with pytest.raises(TrackingError, match=told):
        wandb_sync.sync(handmade(tmp_path / "run", 0, 5), "ended")


@pytest.mark.slow
def test_two_do_not_send_a_run_at_once(tmp_path, standin, monkeypatch):
    folder = handmade(tmp_path / "run", 0)
    with wandb_sync._alone(folder / "wandb_id.txt") as name:
        other = wandb_sync._start(folder, "online", -1, "ended", stdin=subprocess.DEVNULL)
        time.sleep(3)
        assert other.poll() is None
        assert not (tmp_path / "store").exists()
    other.communicate(timeout=20)
    assert standin()["id"] == name


def test_a_home_that_cannot_be_written(tmp_path, monkeypatch):
    kinds = {"WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"}
    assert not kinds & wandb_sync._environment(tmp_path).keys()
    monkeypatch.setenv("HOME", "/proc")
    monkeypatch.setenv("WANDB_CACHE_DIR", "/mine")
    new = wandb_sync._environment(tmp_path)
    assert new["WANDB_CACHE_DIR"] == "/mine"
    assert new["HOME"] == "/proc"
    assert all(new[kind].startswith(str(tmp_path)) for kind in kinds - {"WANDB_CACHE_DIR"})
    monkeypatch.setenv("HOME", "/proc/none")
    assert wandb_sync._environment(tmp_path)["HOME"].startswith(str(tmp_path))


# ---- W&B itself


class Server(ThreadingHTTPServer):
    """As much of W&B's server as its client asks for: runs, their streams of lines by offset, and a place for files."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answer)
        self.runs, self.stream_status = {}, 200
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def handle_error(self, request, address):  # a client that was killed
        pass

    def history(self):
        (run,) = self.runs.values()
        return [json.loads(line) for line in run["streams"].get("wandb-history.jsonl", [])]


class Answer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def answer(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path, status, out = self.path.strip("/").split("/"), 200, {}
        if path == ["graphql"]:
            asked = json.loads(body)
            name = re.search(r"(query|mutation)\s+(\w+)", asked["query"])[2]
            out = {"data": getattr(self, name, lambda **_: {"entity": None})(**asked.get("variables") or {})}
        elif path[-1] == "file_stream":
            status, run, sent = self.server.stream_status, self.server.runs[path[-2]], json.loads(body)
            if status == 200:
                for name, part in (sent.get("files") or {}).items():
                    run["streams"].setdefault(name, [])[part["offset"] :] = part["content"]
                run |= {k: sent[k] for k in ("exitcode", "preempting") if k in sent}
        elif path[0] == "upload":
            self.server.runs[path[1]]["files"]["/".join(path[2:])] = body
        text = json.dumps(out).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    do_GET = do_POST = do_PUT = answer

    def Viewer(self):
        return {"viewer": {"id": "u", "entity": "lab", "username": "u", "flags": "{}", "teams": {"edges": []}}}

    def ServerFeaturesQuery(self):
        return {"serverInfo": {"features": []}}

    def RunResumeStatus(self, name, project, **_):
        run, bucket = self.server.runs.get(name), None
        if run:
            lines = run["streams"].get("wandb-history.jsonl", [])
            events = run["streams"].get("wandb-events.jsonl", [])
            bucket = {
                **self.bucket(name, project),
                "summaryMetrics": lines[-1] if lines else "{}",
                "logLineCount": 0,
                "historyLineCount": len(lines),
                "eventsLineCount": len(events),
                "historyTail": json.dumps(lines[-1:]),
                "eventsTail": json.dumps(events[-1:]),
                "tags": run["tags"],
                "notes": None,
                "wandbConfig": '{"t": 1}',
            }
        return {"model": {"id": "p", "name": project, "entity": {"id": "e", "name": "lab"}, "bucket": bucket}}

    def UpsertBucket(self, name, project, **given):
        new = {"files": {}, "streams": {}, "displayName": None, "config": "{}", "tags": []}
        run = self.server.runs.setdefault(name, new)
        run |= {k: v for k, v in given.items() if v is not None}
        return {"upsertBucket": {"inserted": True, "bucket": self.bucket(name, project)}}

    def bucket(self, name, project):
        run = self.server.runs[name]
        return {
            "id": name,
            "name": name,
            "displayName": run["displayName"],
            "description": None,
            "config": run["config"],
            "sweepName": None,
            "project": {"id": "p", "name": project, "entity": {"id": "e", "name": "lab"}},
            "historyLineCount": len(run["streams"].get("wandb-history.jsonl", [])),
        }

    def CreateRunFiles(self, run, files, **_):
        places = [{"name": f, "uploadUrl": f"{self.server.url}/upload/{run}/{f}"} for f in files]
        return {"createRunFiles": {"runID": run, "uploadHeaders": [], "files": places}}


@pytest.fixture
def server(monkeypatch):
    server = Server()
    monkeypatch.setenv("WANDB_BASE_URL", server.url)
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    yield server
    server.shutdown()
    server.server_close()


def run_python(*arguments, **more):
    environment = {k: v for k, v in os.environ.items() if v is not None} | {"OMP_NUM_THREADS": "1"} | more
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def senders(folder):
    """Processes that were started to send this run, W&B's own among them."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("WANDB_DIR") == str(folder) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found


def wait_for(condition, seconds=30):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.1)


@pytest.mark.slow
def test_wandb_offline_keeps_one_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_MODE", "offline")
    folder = train(tiny(tmp_path, "log.tracker=wandb", "train.total_steps=4"))
    name = (folder / "wandb_id.txt").read_text()
    assert list(Path(folder / "wandb").glob(f"offline-run-*-{name}/run-{name}.wandb"))
    assert f"W&B: offline; later: sslcells sync {folder}" in capsys.readouterr().out
    assert not senders(folder)


@pytest.mark.slow
def test_a_killed_run_goes_on_as_one_run_at_wandb(tmp_path, server, monkeypatch):
    killed_at_7(tmp_path, monkeypatch)
    assert [row["_step"] for row in server.history()] == [0, 2, 4]
    folder = train(tiny(tmp_path, "log.tracker=wandb"))
    assert not senders(folder)
    rows, wanted = server.history(), by_step(folder)
    assert [row["_step"] for row in rows] == [row["step"] for row in wanted]
    for row, want in zip(rows[3:], wanted[3:], strict=True):
        assert want.items() <= (row | {"step": row["_step"]}).items()
    (run,) = server.runs.values()
    assert run["exitcode"] == 0
    assert len([name for name in run["files"] if name.startswith("media/images/")]) == 4


@pytest.mark.slow
def test_asked_to_stop_it_sends_what_it_has(tmp_path, server):
    """SIGTERM goes to the whole process group; the sender is no part of it, and ends when training has stopped."""
    arguments = ["-m", "sslcells.train", *TINY, "log.tracker=wandb", f"out={tmp_path}", "train.total_epochs=4000"]
    folder = tmp_path / "quickstart"
    process = subprocess.Popen([sys.executable, *arguments], cwd=ROOT, start_new_session=True)
    wait_for(lambda: server.runs and len(server.history()) > 3, 60)
    os.killpg(process.pid, signal.SIGTERM)
    assert process.wait(60) == 128 + signal.SIGTERM
    assert not senders(folder)
    assert [row["_step"] for row in server.history()] == [row["step"] for row in by_step(folder)]
    (run,) = server.runs.values()
    assert run["exitcode"] == 1
    assert run["preempting"] is True


@pytest.fixture
def mute():
    """A server that takes every connection and never answers."""
    with socket.create_server(("127.0.0.1", 0), backlog=100) as listening:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"


@pytest.mark.slow
@pytest.mark.parametrize("answers", ["nobody", "silence"])
def test_training_without_a_network(tmp_path, server, mute, answers):
    arguments = [*TINY, f"out={tmp_path}", "log.tracker=wandb"]
    url = mute if answers == "silence" else "http://127.0.0.1:9"
    began = time.monotonic()
    done = run_python("-m", "sslcells.train", *arguments, WANDB_BASE_URL=url, WANDB_INIT_TIMEOUT="5")
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - began < 90
    assert done.stdout.count("left alone") == done.stdout.count("sslcells sync") == 1, done.stdout
    folder = tmp_path / "quickstart"
    assert not senders(folder)
    assert "sent, up to step 15" in wandb_sync.sync(folder, "ended")
    assert [row["_step"] for row in server.history()] == [row["step"] for row in by_step(folder)]


@pytest.mark.slow
def test_a_network_that_goes_away(tmp_path, server, monkeypatch, capsys):
    """The server answers at the start, and no more from step 6 on."""
    monkeypatch.setitem(wandb_sync.FINISH, "ended", 6.0)

    def refuse():
        wait_for(lambda: server.runs)
        server.stream_status = 500

    began = time.monotonic()
    folder = train(tiny(tmp_path, "log.tracker=wandb"), in_step(6, refuse))
    assert time.monotonic() - began < 60
    assert capsys.readouterr().out.count("left alone") == 1
    assert not senders(folder)
    server.stream_status = 200
    wandb_sync.sync(folder, "ended")
    assert [row["_step"] for row in server.history()] == [row["step"] for row in by_step(folder)]


@pytest.mark.slow
@pytest.mark.parametrize("who", ["sslcells.run.wandb_sync", "wandb-core"])
def test_a_killed_sender(tmp_path, server, capsys, who):
    def kill():
        wait_for(lambda: server.runs)
        for process in senders(tmp_path / "quickstart"):
            if who in " ".join(process.cmdline()):
                process.kill()

    began = time.monotonic()
    folder = train(tiny(tmp_path, "log.tracker=wandb"), in_step(6, kill))
    assert time.monotonic() - began < 90
    assert capsys.readouterr().out.count("left alone") == 1
    wait_for(lambda: not senders(folder))


@pytest.mark.slow
def test_sync_to_a_server_twice_adds_nothing(tmp_path, server):
    folder = handmade(tmp_path / "run", *range(0, 1000, 5), odd=float("nan"))
    assert "200 steps sent, up to step 995" in wandb_sync.sync(folder, "ended")
    assert "every step already" in wandb_sync.sync(folder, "ended")
    assert [row["_step"] for row in server.history()] == list(range(0, 1000, 5))
    (run,) = server.runs.values()
    assert (run["displayName"], run["tags"], run["exitcode"]) == ("run", ["a", "b"], 0)
    assert json.loads(run["config"])["optim.lr"]["value"] == 0.002


@pytest.mark.slow
def test_sync_notices_a_server_that_refuses(tmp_path, server):
    server.stream_status = 403
    with pytest.raises(TrackingError, match="sent step 5, but holds none"):
        wandb_sync.sync(handmade(tmp_path / "run", 0, 5), "ended")


@pytest.mark.slow
def test_wandb_needs_no_home(tmp_path, server, monkeypatch):
    monkeypatch.setenv("HOME", "/proc/none")
    monkeypatch.delenv("NETRC")
    folder = handmade(tmp_path / "run", 0, 5)
    assert "2 steps sent" in wandb_sync.sync(folder, "ended")
    assert not list((tmp_path / "home").iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("full_at", [0, 6])
def test_a_full_disk_under_wandb(tmp_path, server, capsys, monkeypatch, full_at):
    """Only W&B's own files are on the disk that is full, from the start or from step 6."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip("a small file system cannot be mounted here")
    count = 0

    def watch(station, x):
        nonlocal count
        if station == "pixels":
            if count == full_at:
                if full_at:
                    wait_for(lambda: server.runs)
                subprocess.run(["cp", "/dev/zero", disk / "rest"], capture_output=True, check=False)
            count += 1

    monkeypatch.setenv("WANDB_DIR", str(disk))
    try:
        began = time.monotonic()
        folder = train(tiny(tmp_path, "log.tracker=wandb"), watch)
        assert time.monotonic() - began < 120
        assert untimed(folder)[-1]["step"] == 15
        told = capsys.readouterr().out.count("left alone")
        assert told == 1 or (full_at and [r["_step"] for r in server.history()] == [r["step"] for r in by_step(folder)])
    finally:
        wait_for(lambda: not senders(disk))
        subprocess.run(["umount", disk], check=True)


def test_sync_wants_a_run(tmp_path):
    with pytest.raises(ConfigError, match="no such folder"):
        wandb_sync.sync(tmp_path / "none", "ended")
