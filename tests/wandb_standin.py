"""W&B's server, as much of it as W&B's client asks for, and what the tests of tracking share."""

import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import psutil
import pytest
from test_train import Killed, killed_after, tiny

from sslcells.config import dump
from sslcells.run import metrics, wandb_sync
from sslcells.train import train

ROOT = Path(__file__).parent.parent


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

    def steps(self):
        return [row["_step"] for row in self.history()]


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


def home_of(tmp_path):
    """A test's own home, beside its folder."""
    return tmp_path.with_name(f"{tmp_path.name}-home")


@pytest.fixture(autouse=True)
def no_credentials(monkeypatch, tmp_path):
    for name in [n for n in os.environ if n.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    home = home_of(tmp_path)
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("NETRC", str(home / ".netrc"))


@pytest.fixture
def server(monkeypatch):
    server = Server()
    monkeypatch.setenv("WANDB_BASE_URL", server.url)
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def mute():
    """A server that takes every connection and never answers."""
    with socket.create_server(("127.0.0.1", 0), backlog=100) as listening:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"


def handmade(folder, *steps, **more):
    """A run's folder with a figure a step."""
    folder.mkdir()
    (folder / "config.yaml").write_text(dump(tiny(folder.parent, f"name={folder.name}", "log.tags=[a, b]")))
    lines = [json.dumps({"step": s, "loss": s / 10, **more}) + "\n" for s in steps]
    (folder / "metrics.jsonl").write_text("".join(lines))
    return folder


def by_step(folder):
    """The rows of metrics.jsonl, all of a step as one."""
    steps = {}
    for row in metrics.read_metrics(folder):
        steps.setdefault(row["step"], {}).update(row)
    return list(steps.values())


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
