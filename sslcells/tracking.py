"""Where figures go: the console and metrics.jsonl; from there to W&B, and to TensorBoard through Accelerate.

metrics.jsonl and plots/ are the truth. W&B has a process of its own, `python -m sslcells.tracking`, which reads them
and sends the steps that W&B's run does not hold yet. So training never waits for the network, keeps its signals, and
goes on whatever becomes of W&B; and `sslcells sync` does later what could not be done before.
"""

import configparser
import contextlib
import json
import logging
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
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn
from urllib.parse import urlsplit

import numpy as np
import psutil
from numpy.typing import NDArray
from omegaconf import OmegaConf
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from sslcells.config import ConfigError, Run
from sslcells.storage import patiently

if TYPE_CHECKING:  # the process that sends to W&B has no use for torch
    from accelerate import Accelerator

logger = logging.getLogger(__name__)

METRICS = "metrics.jsonl"
WANDB_ID = "wandb_id.txt"

START = 60.0
"""Seconds until W&B must have answered."""
FINISH = {"ended": 60.0, "stopped": 15.0, "died": 15.0}
"""Seconds that the last figures may take, by how training came to its end; a scheduler gives a stopped one no more."""
SYNC = 600.0
"""Seconds that the last figures may take where a person waits for them."""


class LogError(OSError):
    """The run's own file of figures cannot be written; the message says why."""


class TrackingError(Exception):
    """W&B has not got everything; the message says why."""


class Log:
    """One place for every figure; only rank 0 writes."""

    def __init__(self, run: Run, steps: int, start: int, accelerator: "Accelerator") -> None:
        self._main, self._steps, self._accelerator = accelerator.is_main_process, steps, accelerator
        self._console = Console(highlight=False, quiet=not self._main)
        self._progress: Progress | None = None
        self._tensorboard, self._step = False, start
        self._sender: Sender | None = None
        if not self._main:
            return
        self._folder, self._path = run.folder, run.folder / METRICS
        _forget_after(self._path, start)
        if self._console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._progress = Progress(*columns, console=self._console)
            self._task = self._progress.add_task("training", total=steps, completed=start)
            self._progress.start()
        if run.log.tracker == "tensorboard":
            config = _flat(run.model_dump(mode="json"))
            self._tensorboard = True
            self._track(lambda: accelerator.init_trackers(run.log.project, config))
        elif run.log.tracker == "wandb":
            self._sender = self._start_wandb(start)

    def say(self, text: str) -> None:
        """A line for whoever watches."""
        self._console.print(text, markup=False, soft_wrap=True)

    def _write(self, line: str) -> None:
        def append() -> None:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(line)

        try:
            patiently(append, str(self._path))
        except OSError as error:
            raise LogError(f"{self._path} cannot be written: {error.strerror}") from error

    def advance(self, step: int) -> None:
        """Move the progress bar to `step` finished steps."""
        if self._progress is not None:
            self._progress.update(self._task, completed=step)

    def metrics(self, step: int, epoch: float, values: Mapping[str, float]) -> None:
        """One line of metrics.jsonl and of the console, at `step` finished steps.

        Raises:
            LogError: where the line cannot be written; a run without its figures is worth nothing.
        """
        if not self._main:
            return
        self._step = step
        row = {"step": step, "epoch": round(epoch, 4), **values}
        self._write(json.dumps(row) + "\n")
        shown = "  ".join(f"{k} {v:.4g}" for k, v in values.items())
        self.say(f"{time.strftime('%H:%M:%S')}  step {step}/{self._steps}  epoch {epoch:.2f}  {shown}")
        self._track(lambda: self._accelerator.log(dict(values), step=step))
        self._hear()

    def pictures(self, step: int, paths: Mapping[str, Path]) -> None:
        """Hand pictures to the tracker; they are files of the run's folder already."""
        if not self._main:
            return
        with contextlib.suppress(OSError):  # a picture whose step is not known goes with the last one
            _note_steps(paths, step)
        if self._tensorboard:
            stacks = {name: _pixels(path)[None] for name, path in paths.items()}
            for tracker in self._accelerator.trackers:
                self._track(lambda t=tracker: t.log_images(stacks, step=step, dataformats="NHWC"))  # type: ignore[misc]

    def close(self) -> None:
        """Finish the bar and the tracker, which has FINISH seconds."""
        if self._progress is not None:
            self._progress.stop()
        for tracker in self._accelerator.trackers:  # not end_training: that ends the process group too
            self._track(tracker.finish)
        if self._sender is not None:
            self._sender.wait("ended" if self._step == self._steps else "stopped")
            self._hear()
        if self._sender is not None:
            self._sender.close()

    def _start_wandb(self, start: int) -> "Sender | None":
        mode = wandb_mode()
        if mode == "disabled":
            return None
        if mode is None:
            self.say(f"W&B: no key here (WANDB_API_KEY, or wandb login); later: {_later(self._folder)}")
            return None
        try:
            # What came before the checkpoint is in the files that W&B's offline mode left then.
            return Sender(self._folder, mode, after=start if start and mode != "online" else -1)
        except OSError as error:
            self.say(f"W&B: {error}; later: {_later(self._folder)}")
            return None

    def _hear(self) -> None:
        """Say what the sender has to say; training goes on whatever that is."""
        if self._sender is None:
            return
        for news in self._sender.hear():
            if "url" in news:
                self.say(f"W&B: {news['url'] or f'offline; later: {_later(self._folder)}'}")
        if self._sender.error:
            self.say(
                f"W&B is left alone from here on: {self._sender.error}. Every figure is in {self._path}; those that "
                f"W&B takes of the machine are lost; later: {_later(self._folder)}"
            )
            self._sender.close()
            self._sender = None

    def _track(self, call: Callable[[], object]) -> None:
        """Call the tracker; training goes on whatever becomes of it."""
        if not self._tensorboard:
            return
        try:
            call()
        except Exception as error:
            self._tensorboard = False
            self.say(
                f"the tracker failed and is left alone from here on ({type(error).__name__}: {error}); "
                f"every figure is in {METRICS}"
            )


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


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics.jsonl."""
    lines = (folder / METRICS).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


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
            if (row := _row(line)) is None:
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
                images = {path.stem: wandb.Image(str(path)) for path in _pictures(folder, step, newest)}
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

    config: Any = OmegaConf.to_container(OmegaConf.load(folder / "config.yaml"), resolve=True)
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
    run.config.update(_flat(config), allow_val_change=True)
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
            print(json.dumps(news), file=voice, flush=True)

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
        [sys.executable, "-m", "sslcells.tracking", str(folder.resolve()), mode, str(after), how, *sys.argv],
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


def _later(folder: Path) -> str:
    return f"sslcells sync {shlex.quote(str(folder))}"


def _pixels(path: Path) -> NDArray[np.uint8]:
    """A picture's (H, W, 3)."""
    with Image.open(path) as picture:
        return np.array(picture.convert("RGB"))


def _note_steps(paths: Mapping[str, Path], step: int) -> None:
    """Write down beside the pictures which step they show."""
    for path in paths.values():
        notes = path.parent / "steps.json"
        notes.write_text(json.dumps(_noted(notes) | {path.name: step}), encoding="utf-8")


def _noted(path: Path) -> dict[str, int]:
    try:
        notes: dict[str, int] = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return notes


def _pictures(folder: Path, step: int, newest: bool) -> list[Path]:
    """The pictures that show a step; those of which it is not known go with the newest."""
    notes = _noted(folder / "plots" / "steps.json")
    paths = sorted((folder / "plots").glob("*.png"))
    return [path for path in paths if notes.get(path.name, step if newest else None) == step]


def _row(line: bytes) -> dict[str, Any] | None:
    """A line of metrics.jsonl, None where it was cut off."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None


def _forget_after(path: Path, step: int) -> None:
    """Drop what was written after the checkpoint that the run goes on from, and a last line that was cut off."""
    if not path.is_file():
        return
    rows = ((line, _row(line)) for line in path.read_bytes().splitlines())
    kept = [line + b"\n" for line, row in rows if row is not None and row["step"] <= step and step > 0]
    partial = path.with_suffix(".partial")
    partial.write_bytes(b"".join(kept))
    partial.replace(path)


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} → {"a.b": 1}, of values that every tracker takes."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value if isinstance(value, int | float | str | bool) else str(value)
    return flat


if __name__ == "__main__":
    _main(sys.argv[1:])
