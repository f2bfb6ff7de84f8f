"""The process that sends a run to W&B: `python -m sslcells.run.wandb_sync`, started by training or by `sslcells sync`.

It reads metrics.jsonl and plots/, and sends the steps that W&B's run does not hold yet. So training never waits for the
network, keeps its signals, and goes on whatever becomes of W&B; and `sslcells sync` does later what could not be done
before.
"""

import configparser
import contextlib
import json
import netrc
import os
import secrets
import select
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import urlsplit

import psutil

from sslcells import values
from sslcells.errors import ConfigError, UserError
from sslcells.run.metrics import METRICS, flat, pictures_of, row_of
from sslcells.storage import json_text

WANDB_ID = "wandb_id.txt"

START = 60.0
"""Seconds until W&B must have answered."""
FINISH = {"ended": 60.0, "stopped": 15.0, "died": 15.0}
"""Seconds that the last figures may take, by how training came to its end; a scheduler gives a stopped one no more."""
SYNC = 600.0
"""Seconds that the last figures may take where a person waits for them."""


class TrackingError(UserError):
    """W&B has not got everything; the message says why."""


class Sender:
    """The process that sends to W&B, seen from training, which waits for it nowhere but in `wait`."""

    def __init__(self, folder: Path, mode: str, after: int) -> None:
        """Start it for the steps after `after`, where the mode is W&B's offline one, and else for those W&B lacks."""
        self.error = ""
        """why it has ended before its time"""
        self._process = _start(folder, mode, after, "", stdin=subprocess.PIPE)
        assert self._process.stdout is not None
        os.set_blocking(self._process.stdout.fileno(), False)
        self._heard = b""

    def hear(self) -> list[dict[str, Any]]:
        """What it has said since the last call."""
        assert self._process.stdout is not None
        ended = self._process.poll() is not None  # asked first: what it said before is in the pipe
        self._heard += self._process.stdout.read() or b""
        *lines, self._heard = self._heard.split(b"\n")
        news = [json.loads(line) for line in lines]
        self.error = self.error or next((n["error"] for n in news if "error" in n), "")
        if ended and self._process.returncode != 0:
            self.error = self.error or f"its process ended with status {self._process.returncode}"
        return news

    def wait(self, how: str) -> None:
        """Tell it how training came to its end, and give it FINISH seconds."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):  # it has ended already
            self._process.stdin.write(f"{how}\n".encode())
        try:
            self._process.wait(FINISH[how])
        except subprocess.TimeoutExpired:
            self.error = f"it had not got everything after {FINISH[how]:.0f} s"

    def close(self) -> None:
        """End it, if it still runs."""
        _stop(self._process)


def sync(folder: Path, how: str) -> str:
    """Send to W&B what its run lacks of a run's folder, in a process of its own; what there is to say about it.

    `how` the run has come to its end: `ended`, `stopped` to go on later, or `died`, so that its newest step may lack
    figures and is kept back.

    Raises:
        ConfigError: where the folder is not that of a run with figures.
        TrackingError: where not everything was sent.
    """
    for name in (".", "config.yaml", METRICS):
        if not (folder / name).exists():
            raise ConfigError(f"{folder}: {'no such folder' if name == '.' else f'no run: there is no {name}'}")
    mode = wandb_mode()
    if mode is None:
        raise TrackingError(f"{folder}: no key for W&B here: set WANDB_API_KEY, or run wandb login")
    if mode in ("offline", "disabled"):
        raise TrackingError(f"{folder}: WANDB_MODE={mode}, so nothing was sent")
    process = _start(folder, mode, -1, how, stdin=subprocess.DEVNULL)
    try:
        out, _ = process.communicate()
    except BaseException:
        _stop(process)
        raise
    said: dict[str, Any] = {}
    for line in out.splitlines():
        said |= json.loads(line)
    if process.returncode != 0:
        raise TrackingError(f"{folder}: {said.get('error', f'the process for W&B ended with {process.returncode}')}")
    sent, last = said["sent"], said["last"]
    text = f"{sent} step{'s' * (sent > 1)} sent, up to step {last}" if sent else "W&B has every step already"
    if said["kept"] is not None:
        text += f"; step {said['kept']} is kept back until the run goes on or ends"
    return f"{folder}: {text}: {said['url']}"


def wandb_mode() -> str | None:
    """`online` where there are credentials, None where there are none; WANDB_MODE has the last word."""
    if os.environ.get("WANDB_MODE"):
        return os.environ["WANDB_MODE"]
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return "online"
    server = urlsplit(os.environ.get("WANDB_BASE_URL") or _wandb_settings().get("base_url") or "https://api.wandb.ai")
    try:
        known = netrc.netrc(os.environ.get("NETRC") or os.path.expanduser("~/.netrc"))
    except (OSError, netrc.NetrcParseError):
        return None
    hosts = (server.netloc, server.hostname or "")
    return "online" if any(known.authenticators(host) for host in hosts) else None


class Steps:
    """The steps of a metrics.jsonl that still grows: all rows of a step as one, as W&B keeps them."""

    def __init__(self, path: Path) -> None:
        self._path, self._at = path, 0
        self.newest: int | None = None
        """the step that is kept back, as it may still lack figures"""
        self._figures: dict[str, Any] = {}

    def read(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Each step, with its figures, that a later one has followed since the last call."""
        if not self._path.is_file():
            return
        with self._path.open("rb") as file:
            file.seek(self._at)
            text = file.read()
        text = text[: text.rfind(b"\n") + 1]  # a line that is being written comes with the next call
        self._at += len(text)
        for line in text.splitlines():
            if (row := row_of(line)) is None:
                continue
            step = row.pop("step")
            if self.newest is not None and step > self.newest:
                yield from self.rest()
            self.newest = step
            self._figures |= row

    def rest(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """The step that was kept back, if any."""
        if self.newest is not None:
            yield self.newest, self._figures
        self.newest, self._figures = None, {}


def send(folder: Path, mode: str, after: int, how: str, tell: Callable[..., None]) -> dict[str, Any]:
    """Give W&B's run what it lacks of the steps after `after`.

    `how` training came to its end: `ended`, `stopped` to go on later, `died`; empty where `_word` is still to say it.
    Returns how many steps were sent, the last of them, and which one was kept back as it may lack figures.

    Raises:
        TrackingError: where another process sends the same run, or W&B has not kept what was sent.
        Exception: whatever W&B raises.
    """
    import wandb

    live: dict[str, Any] = {"x_stats_pid": os.getppid()}
    later: dict[str, Any] = {"x_disable_stats": True, "x_disable_machine_info": True}  # another machine, perhaps
    steps, sent, last = Steps(folder / METRICS), 0, -1
    with _alone(folder / WANDB_ID) as name:
        with _at_most(START, tell):
            run = _open(folder, name, mode, later if how else live)
            first = max(run.starting_step, after + 1)  # W&B takes no step twice
            tell(url=run.url)

        def put(step: int, figures: dict[str, Any], newest: bool) -> None:
            nonlocal sent, last
            if step >= first:
                images = {path.stem: wandb.Image(str(path)) for path in pictures_of(folder, step, newest)}
                run.log(figures | images, step=step)
                sent, last = sent + 1, step

        while True:
            end = how or _word()
            for step, figures in steps.read():
                with _at_most(START, tell):
                    put(step, figures, newest=False)
            if end:
                break
        with _at_most(SYNC if how else FINISH[end], tell):
            kept = steps.newest if end == "died" else None
            for step, figures in steps.rest() if kept is None else ():
                put(step, figures, newest=True)
            if end == "stopped":
                run.mark_preempting()
            status = 0 if end == "ended" else 1
            run.finish(exit_code=status)
            if mode == "online" and sent and (how or end == "ended"):
                # W&B's client ends in order also where the server refused every figure; the next start would see it.
                again = _open(folder, name, mode, later)
                held = again.starting_step - 1
                again.finish(exit_code=status)
                if held < last:
                    raise TrackingError(f"W&B was sent step {last}, but holds {held if held >= 0 else 'none'}")
    return {"sent": sent, "last": last, "kept": kept}


def _open(folder: Path, name: str, mode: str, settings: dict[str, Any]) -> Any:
    """W&B's run of a folder, new or gone on with."""
    import wandb

    text = (folder / "config.yaml").read_text(encoding="utf-8")
    config: Any = values.plain(values.interpolated(values.read(text)))
    settings = {"console": "off", **settings}
    if "WANDB_INIT_TIMEOUT" not in os.environ:
        settings["init_timeout"] = 0.75 * START
    run: Any = wandb.init(
        id=name,
        name=config["name"],
        project=config["log"]["project"],
        entity=config["log"]["entity"],
        tags=config["log"]["tags"],
        mode=mode,  # type: ignore[arg-type]
        resume="allow",
        settings=wandb.Settings(**{k: v for k, v in settings.items() if k in wandb.Settings.model_fields}),
    )
    run.config.update(flat(config), allow_val_change=True)
    return run


def _main(argv: Sequence[str]) -> None:
    """The process that sends: RUN MODE AFTER HOW COMMAND…, where HOW is empty while COMMAND trains."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):  # training says when it ends
        signal.signal(number, signal.SIG_IGN)
    folder, mode, after, how, *sys.argv = argv  # W&B notes the command
    voice = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what W&B prints is not for the pipe

    def tell(**news: object) -> None:
        with contextlib.suppress(OSError):  # nobody listens any more
            print(json_text(news), file=voice, flush=True)

    if how:
        threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    try:
        tell(**send(Path(folder), mode, int(after), how, tell))
    except Exception as error:
        name = type(error).__name__
        told = {"TrackingError": "", "CommError": "W&B cannot be reached, or refuses: "}.get(name, f"{name}: ")
        tell(error=told + " ".join(str(error).split()))
        _leave(1)
    import wandb

    with _at_most(START, tell):
        wandb.teardown()
    _leave(0)


def _word() -> str:
    """How training came to its end: what it says, `died` where its end of the pipe is closed, and nothing till then."""
    ready, _, _ = select.select([0], [], [], 1.0)
    return (os.read(0, 100).decode().strip() or "died") if ready else ""


@contextlib.contextmanager
def _at_most(seconds: float, tell: Callable[..., None]) -> Iterator[None]:
    """End this process where the block takes longer: W&B has time limits of its own, but not for everything."""

    def end() -> None:
        tell(error=f"W&B did not answer in {seconds:.0f} s")
        _leave(1)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _end_with(process: int) -> None:
    """End this process when the one that started it is no more."""
    while os.getppid() == process:
        time.sleep(1)
    _leave(1)


def _leave(status: int) -> NoReturn:
    """End this process and what it started, without the functions that W&B wants called at the exit: they may wait."""
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()
    os._exit(status)


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[str]:
    """The id of the run at W&B, the same after every restart, while no other process sends to it.

    Raises:
        TrackingError: where one still does after half a minute.
    """
    import fcntl

    with path.open("a+", encoding="utf-8") as file:
        until = time.monotonic() + 30
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > until:
                    raise TrackingError("another process is sending this run to W&B") from None
                time.sleep(0.5)
            except OSError:
                break  # a file system without locks
        file.seek(0)
        name = file.read().strip()
        if not name:
            name = secrets.token_hex(4)
            file.write(name)
            file.flush()
        yield name


def _start(folder: Path, mode: str, after: int, how: str, stdin: int) -> "subprocess.Popen[bytes]":
    """The process that sends, in a session of its own: the signals of training's are not for it."""
    return subprocess.Popen(
        [sys.executable, "-m", "sslcells.run.wandb_sync", str(folder.resolve()), mode, str(after), how, *sys.argv],
        stdin=stdin,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        bufsize=0,
        env=_environment(folder.resolve()),
        start_new_session=True,
    )


def _stop(process: "subprocess.Popen[bytes]") -> None:
    """Kill the process that sends, and W&B's own that it started."""
    with contextlib.suppress(psutil.NoSuchProcess):
        for child in psutil.Process(process.pid).children(recursive=True):
            child.kill()
    process.kill()
    with contextlib.suppress(subprocess.TimeoutExpired):  # it hangs in the file system
        process.wait(5)
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()


def _environment(folder: Path) -> dict[str, str]:
    """The sender's: what W&B keeps in the home goes to the run's folder where the home is not writable."""
    new = {k: v for k, v in os.environ.items() if k != "WANDB_SERVICE"}
    new.setdefault("WANDB_DIR", str(folder))
    new.setdefault("WANDB_PROGRAM", sys.argv[0])
    home = os.path.expanduser("~")
    try:
        with tempfile.TemporaryFile(dir=home):
            return new
    except OSError:
        own = folder / "wandb"
    if not os.path.isdir(home):
        new["HOME"] = str(own)
    new.setdefault("WANDB_CACHE_DIR", str(own / "cache"))
    new.setdefault("WANDB_DATA_DIR", str(own / "data"))
    if not _wandb_settings():  # where there are some, they are only read
        new.setdefault("WANDB_CONFIG_DIR", str(own / "config"))
    return new


def _wandb_settings() -> dict[str, str]:
    """What `wandb login` and the like wrote down, such as the server."""
    folder = os.environ.get("WANDB_CONFIG_DIR") or "~/.config/wandb"
    parser = configparser.ConfigParser()
    try:
        parser.read(os.path.join(os.path.expanduser(folder), "settings"), encoding="utf-8")
        return dict(parser["default"])
    except (configparser.Error, KeyError, ValueError):
        return {}


def later(folder: Path) -> str:
    """The command that sends a run's folder some other time."""
    return f"sslcells sync {shlex.quote(str(folder))}"


if __name__ == "__main__":
    _main(sys.argv[1:])
