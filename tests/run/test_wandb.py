"""W&B's run gets every step once and in order, with the pictures of each, however often training starts.

W&B's own client takes part in every test; the server is `wandb_standin.Server`.
"""

import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from PIL import Image
from test_train import TINY, tiny
from wandb_standin import ROOT, by_step, handmade, home_of, killed_at_7, run_python, senders, wait_for

from sslcells.config import ConfigError, dump
from sslcells.run import metrics, tracking, wandb_sender, wandb_sync
from sslcells.train import train

PICTURES = {"views", "curves", "embedding", "neighbours"}


def logged(out):
    """The folder of a run without training: one line, and the end."""
    run = tiny(out, "log.tracker=wandb")
    run.folder.mkdir()
    (run.folder / "config.yaml").write_text(dump(run))
    log = tracking.Log(run, 1, 0, SimpleNamespace(is_main_process=True, trackers=[]))
    log.metrics(1, 1.0, {"loss": 0.5})
    log.close()
    return run.folder


def test_a_step_is_read_once_it_is_whole(tmp_path):
    path = tmp_path / "metrics.jsonl"
    steps = wandb_sender.Steps(path)
    assert list(steps.read()) == []
    path.write_text('{"step": 0, "a": 1}\n{"step": 0, "b": 2}\n{"step": 5, "a"')
    assert list(steps.read()) == []
    with path.open("a") as file:
        file.write(': 3}\nnonsense\n{"step": 6, "a": 4}\n')
    assert list(steps.read()) == [(0, {"a": 1, "b": 2}), (5, {"a": 3})]
    assert steps.newest == 6
    assert list(steps.read(ended=True)) == [(6, {"a": 4})]
    assert list(steps.read(ended=True)) == []


def test_without_credentials_one_line_says_what_to_do_later(tmp_path, capsys):
    folder = logged(tmp_path)
    lines = [line for line in capsys.readouterr().out.splitlines() if "W&B" in line]
    assert len(lines) == 1
    assert "no key" in lines[0]
    assert f"sslcells sync {folder}" in lines[0]
    assert not (folder / "wandb").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("host", "found"), [("api.wandb.ai", False), ("the server's", True)])
def test_credentials_that_wandb_login_wrote_down(tmp_path, server, monkeypatch, host, found):
    """The key is in ~/.netrc, for a server, and the server in W&B's settings."""
    for name in ("WANDB_API_KEY", "WANDB_BASE_URL"):
        monkeypatch.delenv(name)
    host = server.url.removeprefix("http://") if found else host  # with its port, as `wandb login` writes it
    (home_of(tmp_path) / ".netrc").write_text(f"machine {host} login user password {'x' * 40}\n")
    settings = home_of(tmp_path) / ".config" / "wandb" / "settings"
    settings.parent.mkdir(parents=True)
    settings.write_text(f"[default]\nbase_url = {server.url}\n")
    folder = handmade(tmp_path / "run", 0)
    if found:
        assert "1 step sent" in wandb_sync.sync(folder, "ended")
    else:
        with pytest.raises(wandb_sync.TrackingError, match="no key for W&B here"):
            wandb_sync.sync(folder, "ended")


def test_disabled_starts_nothing(tmp_path, server, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    logged(tmp_path)
    assert not server.runs
    assert "W&B" not in capsys.readouterr().out


@pytest.mark.slow
def test_training_sends_every_step_and_keeps_its_signals(tmp_path, server, capsys):
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    folder = train(tiny(tmp_path, "log.tracker=wandb", "log.tags=[x]"))
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    rows, wanted = server.history(), by_step(folder)
    assert server.steps() == [row["step"] for row in wanted]
    for row, want in zip(rows, wanted, strict=True):
        assert want.items() <= (row | {"step": row["_step"]}).items()
    assert [PICTURES & row.keys() for row in rows if PICTURES & row.keys()] == [{"views"}, PICTURES - {"views"}]
    assert "views" in rows[0]
    assert "curves" in rows[-1]
    ((name, run),) = server.runs.items()
    assert name == (folder / "wandb_id.txt").read_text()
    assert (run["displayName"], run["tags"], run["exitcode"]) == ("quickstart", ["x"], 0)
    assert json.loads(run["config"])["optim.lr"]["value"] == 0.002
    assert "W&B: http://127.0.0.1" in capsys.readouterr().out


@pytest.mark.slow
def test_a_killed_run_goes_on_as_one_run_at_wandb(tmp_path, server, monkeypatch):
    killed_at_7(tmp_path, monkeypatch)
    assert server.steps() == [0, 2, 4]
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
def test_offline_folders_hold_each_step_once(tmp_path, server, monkeypatch, capsys):
    """Killed and resumed, each start leaves a folder of W&B's; `wandb sync` sends them as one run."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    killed_at_7(tmp_path, monkeypatch)
    folder = train(tiny(tmp_path, "log.tracker=wandb"))
    assert f"W&B: offline; to send later: sslcells sync {folder}" in capsys.readouterr().out
    assert not senders(folder)
    assert not server.runs
    name = (folder / "wandb_id.txt").read_text()
    starts = sorted((folder / "wandb").glob(f"offline-run-*-{name}"))
    monkeypatch.delenv("WANDB_MODE")
    held = []
    for start in starts:
        assert run_python("-m", "wandb", "sync", str(start), WANDB_DIR=str(folder)).returncode == 0
        held.append(server.steps())
    assert held == [[0, 2, 4], [0, 2, 4, 6, 8, 10, 12, 14, 15]]


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
    assert server.steps() == [row["step"] for row in by_step(folder)]
    (run,) = server.runs.values()
    assert run["exitcode"] == 1
    assert run["preempting"] is True


def test_a_step_is_sent_as_one_row_with_its_pictures(tmp_path, server):
    folder = pictured(tmp_path / "run")
    assert f"3 steps sent, up to step 10: {server.url}" in wandb_sync.sync(folder, "ended")
    assert [figures(row) for row in server.history()] == SENT


def pictured(folder):
    """A run with pictures of steps 0 and 10, one without a step, and a last row that is still being written."""
    handmade(folder, 0, 5, 10)
    (folder / "plots").mkdir()
    for name in ("views", "curves"):
        Image.new("RGB", (4, 4)).save(folder / "plots" / f"{name}.png")
    metrics.note_steps({"views": folder / "plots" / "views.png"}, 0)
    metrics.note_steps({"curves": folder / "plots" / "curves.png"}, 10)
    Image.new("RGB", (4, 4)).save(folder / "plots" / "older.png")  # drawn before such notes were taken
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 10, "knn": 0.5}\n{"step": 15, "lo')
    return folder


SENT = [
    {"step": 0, "loss": 0.0, "views": "views"},
    {"step": 5, "loss": 0.5},
    {"step": 10, "loss": 1.0, "knn": 0.5, "curves": "curves", "older": "older"},
]


def figures(row):
    """A row as it was sent: its step, its figures, and its pictures by the names of their files."""
    sent = {k: v["path"].split("/")[-1].split("_")[0] if isinstance(v, dict) else v for k, v in row.items()}
    return {"step": row["_step"]} | {k: v for k, v in sent.items() if not k.startswith("_")}


@pytest.mark.slow
def test_sync_sends_what_wandb_lacks_and_nothing_twice(tmp_path, server):
    folder = pictured(tmp_path / "run")
    wandb_sync.sync(folder, "ended")
    assert "W&B has every step already" in wandb_sync.sync(folder, "ended")
    assert [figures(row) for row in server.history()] == SENT
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('ss": 1.5}\n')
    wandb_sync.sync(folder, "stopped")
    assert [figures(row) for row in server.history()] == [*SENT, {"step": 15, "loss": 1.5, "older": "older"}]
    (run,) = server.runs.values()
    assert (run["displayName"], run["tags"]) == ("run", ["a", "b"])


@pytest.mark.slow
def test_sync_keeps_back_what_may_be_half(tmp_path, server):
    folder = handmade(tmp_path / "run", 0, 5, 10)
    assert "step 10 is kept back" in wandb_sync.sync(folder, "died")
    assert server.steps() == [0, 5]
    (run,) = server.runs.values()
    assert run["exitcode"] == 1
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 10, "knn": 0.5}\n')
    wandb_sync.sync(folder, "ended")
    assert figures(server.history()[-1]) == {"step": 10, "loss": 1.0, "knn": 0.5}
    assert run["exitcode"] == 0


@pytest.mark.slow
def test_sync_to_a_server_twice_adds_nothing(tmp_path, server):
    folder = handmade(tmp_path / "run", *range(0, 1000, 5), odd=float("nan"))
    assert "200 steps sent, up to step 995" in wandb_sync.sync(folder, "ended")
    assert "every step already" in wandb_sync.sync(folder, "ended")
    assert server.steps() == list(range(0, 1000, 5))
    (run,) = server.runs.values()
    assert (run["displayName"], run["tags"], run["exitcode"]) == ("run", ["a", "b"], 0)
    assert json.loads(run["config"])["optim.lr"]["value"] == 0.002


@pytest.mark.slow
def test_two_do_not_send_a_run_at_once(tmp_path, server):
    folder = handmade(tmp_path / "run", 0)
    with wandb_sender._only_sender(folder) as name:
        other = wandb_sync.Sender(folder, how="ended")
        time.sleep(4)
        assert other.read() == []
        assert not server.runs
    wait_for(lambda: other.read() or other.error)
    other.close()
    assert list(server.runs) == [name]


def test_sync_wants_a_run(tmp_path):
    with pytest.raises(ConfigError, match="no such folder"):
        wandb_sync.sync(tmp_path / "none", "ended")
