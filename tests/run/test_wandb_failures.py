"""Training ends as it would without W&B, whatever becomes of W&B, its server, its process, its disk or its home."""

import subprocess
import time

import pytest
from test_train import TINY, in_step, tiny, untimed
from wandb_standin import by_step, handmade, home_of, run_python, senders, wait_for

from sslcells.run import wandb_sync
from sslcells.run.wandb_sync import TrackingError
from sslcells.train import train


@pytest.mark.slow
@pytest.mark.parametrize("answers", ["nobody", "silence"])
def test_training_without_a_network(tmp_path, server, mute, answers):
    arguments = [*TINY, f"out={tmp_path}", "log.tracker=wandb"]
    url = mute if answers == "silence" else "http://127.0.0.1:9"
    began = time.monotonic()
    done = run_python("-m", "sslcells.train", *arguments, WANDB_BASE_URL=url, WANDB_INIT_TIMEOUT="5")
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - began < 90
    assert done.stdout.count("disabled for the rest") == done.stdout.count("sslcells sync") == 1, done.stdout
    folder = tmp_path / "quickstart"
    assert not senders(folder)
    assert "sent, up to step 15" in wandb_sync.sync(folder, "ended")
    assert server.steps() == [row["step"] for row in by_step(folder)]


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
    assert capsys.readouterr().out.count("disabled for the rest") == 1
    assert not senders(folder)
    server.stream_status = 200
    wandb_sync.sync(folder, "ended")
    assert server.steps() == [row["step"] for row in by_step(folder)]


@pytest.mark.slow
@pytest.mark.parametrize("who", ["sslcells.run.wandb_sender", "wandb-core"])
def test_a_killed_sender(tmp_path, server, capsys, who):
    def kill():
        wait_for(lambda: server.runs)
        for process in senders(tmp_path / "quickstart"):
            if who in " ".join(process.cmdline()):
                process.kill()

    began = time.monotonic()
    folder = train(tiny(tmp_path, "log.tracker=wandb"), in_step(6, kill))
    assert time.monotonic() - began < 90
    assert capsys.readouterr().out.count("disabled for the rest") == 1
    wait_for(lambda: not senders(folder))


@pytest.mark.slow
def test_sync_notices_a_server_that_refuses(tmp_path, server):
    server.stream_status = 403
    with pytest.raises(TrackingError, match="sent step 5, but holds none"):
        wandb_sync.sync(handmade(tmp_path / "run", 0, 5), "ended")


BROKEN = """
import os, subprocess, sys, time

def settle(how):
    if how == "dies":
        os._exit(7)
    if how == "prints":
        print("W&B likes to talk " * 10000, flush=True)
    if how == "raises":
        raise ConnectionError("nobody there\\nin many words")
    if how == "hangs":
        subprocess.Popen(["sleep", "1000"], start_new_session=True)
        time.sleep(1000)

class errors:
    class UsageError(Exception):
        pass

def setup():
    settle(os.environ["BROKEN"])
    raise RuntimeError("no more")
"""
"""A module `wandb` whose first call does what the client did in some version, and cannot be made to do."""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "told"),
    [
        ("raises", "ConnectionError: nobody there in many words. Every"),
        ("dies", "status 7"),
        ("hangs", "not everything was sent after 10 s"),
        ("prints", "RuntimeError: no more"),
    ],
)
def test_training_goes_on_whatever_the_client_does(tmp_path, monkeypatch, capsys, how, told):
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "wandb.py").write_text(BROKEN)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "modules"), prepend=":")
    monkeypatch.setenv("BROKEN", how)
    monkeypatch.setitem(wandb_sync.FINISH, "ended", 10.0)
    folder = train(tiny(tmp_path, "log.tracker=wandb"))
    assert (folder / "encoder.json").exists()
    out = capsys.readouterr().out
    assert out.count("disabled for the rest") == out.count("sslcells sync") == 1
    assert told in out
    wait_for(lambda: not senders(folder))


@pytest.mark.slow
@pytest.mark.parametrize("home", ["/proc", "/proc/none"])
def test_wandb_needs_no_home(tmp_path, server, monkeypatch, home):
    """W&B's client itself does without one."""
    monkeypatch.setenv("HOME", home)
    monkeypatch.delenv("NETRC")
    folder = handmade(tmp_path / "run", 0, 5)
    assert "2 steps sent" in wandb_sync.sync(folder, "ended")
    assert not list(home_of(tmp_path).iterdir())


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
        told = capsys.readouterr().out.count("disabled for the rest")
        assert told == 1 or (full_at and server.steps() == [r["step"] for r in by_step(folder)])
    finally:
        wait_for(lambda: not senders(disk))
        subprocess.run(["umount", disk], check=True)
