"""Sending a run to W&B from a process of its own: started by training, by `sslcells evaluate` and by `sslcells sync`.

The process, `sslcells.run.wandb_sender`, reads metrics.jsonl and plots/ and sends the steps that W&B's run does not
hold yet. W&B's own way, an offline folder for each start and `wandb sync` later, was tried with wandb 0.31. It does not
replace this:

- A requeued run repeats the steps after its checkpoint. `wandb sync` of both starts keeps both and gives the second a
  new step number. metrics.jsonl holds each step once, and the sender begins where W&B's run ends.
- `wandb sync` exits with 0 where the server refused every figure. The sender looks at what W&B holds in the end.
- W&B's client waits for the network in `init` and `finish`, takes over signals, and can end the process that it runs
  in. Here it may fail, hang or die, and training continues.

Credentials, settings, retries, media files, machine figures and the merging of a step's rows are left to W&B's client.
"""

import contextlib
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil

from sslcells.errors import ConfigError, UserError
from sslcells.names import CONFIG
from sslcells.run.metrics import METRICS

FINISH = {"ended": 60.0, "stopped": 15.0, "died": 15.0}
"""How training ended → seconds that the last figures may take; a scheduler soon kills a stopped run."""


class TrackingError(UserError):
    """W&B does not hold every figure; the message says why."""


class Sender:
    """The process that sends to W&B. Training waits for it only in `wait`."""

    def __init__(self, folder: Path, after: int = -1, how: str = "") -> None:
        """Start it. In W&B's offline mode it sends the steps after `after`, otherwise those that W&B lacks.

        `how` is how the run ended: `ended`, `stopped` or `died`; empty while it trains.
        """
        self.error = ""
        """why the process ended too early"""
        self._process = subprocess.Popen(
            [sys.executable, "-m", "sslcells.run.wandb_sender", str(folder.resolve()), str(after), how, *sys.argv],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            env=environment(folder.resolve()),
            start_new_session=True,  # so that signals to training's process group do not reach it
        )
        assert self._process.stdout is not None
        os.set_blocking(self._process.stdout.fileno(), False)
        self._unread = b""

    def read(self) -> list[dict[str, Any]]:
        """The messages that it has sent since the last call."""
        assert self._process.stdout is not None
        status = self._process.poll()  # before reading, so that everything it wrote is in the pipe
        self._unread += self._process.stdout.read() or b""
        *lines, self._unread = self._unread.split(b"\n")
        messages = [json.loads(line) for line in lines]
        self.error = self.error or next((m["error"] for m in messages if "error" in m), "")
        if status:
            self.error = self.error or f"its process ended with status {status}"
        return messages

    def wait(self, how: str) -> None:
        """Tell the process how training ended, and give it FINISH seconds."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):  # it has ended already
            self._process.stdin.write(f"{how}\n".encode())
        try:
            self._process.wait(FINISH[how])
        except subprocess.TimeoutExpired:
            self.error = f"not everything was sent after {FINISH[how]:.0f} s"

    def join(self) -> None:
        """Wait for its end; it has time limits of its own."""
        self._process.wait()

    def close(self) -> None:
        """Kill it if it still runs, with the processes that W&B started."""
        kill_children(self._process.pid)
        self._process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):  # it hangs in the file system
            self._process.wait(5)
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()


def sync(folder: Path, how: str) -> str:
    """Send to W&B the steps of a run's folder that W&B lacks; returns a line about what was done.

    `how` is how the run ended: `ended`, `stopped` (to be resumed), or `died`. After `died` the newest step may lack
    figures and is not sent.

    Raises:
        ConfigError: if the folder is not that of a run with figures.
        TrackingError: if not everything was sent.
    """
    for name in (".", CONFIG, METRICS):
        if not (folder / name).exists():
            raise ConfigError(f"{folder}: {'no such folder' if name == '.' else f'no run: there is no {name}'}")
    if (mode := os.environ.get("WANDB_MODE")) in ("offline", "disabled"):
        raise TrackingError(f"{folder}: WANDB_MODE={mode}, so nothing was sent")
    sender = Sender(folder, how=how)
    try:
        sender.join()
        done: dict[str, Any] = {}
        for message in sender.read():
            done |= message
    finally:
        sender.close()
    if sender.error:
        raise TrackingError(f"{folder}: {sender.error}")
    sent, last = done["sent"], done["last"]
    text = f"{sent} step{'s' * (sent > 1)} sent, up to step {last}" if sent else "W&B has every step already"
    if done["kept"] is not None:
        text += f"; step {done['kept']} is kept back until the run resumes or ends"
    return f"{folder}: {text}: {done['url']}"


def later(folder: Path) -> str:
    """The command that sends a run's folder later."""
    return f"sslcells sync {shlex.quote(str(folder))}"


def kill_children(process: int) -> None:
    """Kill all children of a process, and their children."""
    with contextlib.suppress(psutil.NoSuchProcess):
        for child in psutil.Process(process).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()


def environment(folder: Path) -> dict[str, str]:
    """Environment variables of the sender: W&B's files go to the run's folder, and W&B prints nothing."""
    new = {k: v for k, v in os.environ.items() if k != "WANDB_SERVICE"}
    return {"WANDB_DIR": str(folder), "WANDB_PROGRAM": sys.argv[0], "WANDB_SILENT": "true", **new}
