"""The process that sends to W&B; `sslcells.run.wandb_sync` starts it, explains why it exists, and reads its messages.

`python -m sslcells.run.wandb_sender RUN AFTER HOW COMMAND…`. HOW is empty while COMMAND trains; then a line on stdin
says how training came to its end. Each line on stdout is a message in JSON: `url`, `error`, or what was sent.
"""

import contextlib
import os
import secrets
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from filelock import Timeout

from sslcells import values
from sslcells.names import CONFIG
from sslcells.run.lock import one_at_a_time
from sslcells.run.metrics import METRICS, flat, pictures_of, row_of
from sslcells.run.wandb_sync import FINISH, TrackingError, kill_children
from sslcells.storage import json_text

WANDB_ID = "wandb_id.txt"

START = 60.0
"""Seconds within which W&B must answer."""
SYNC = 600.0
"""Seconds that the last figures may take when a person waits for them."""

Tell = Callable[..., None]


class Steps:
    """The steps of a metrics.jsonl that is still being written, the rows of a step merged."""

    def __init__(self, path: Path) -> None:
        self._path, self._offset = path, 0
        self._figures: dict[int, dict[str, Any]] = {}

    def read(self, ended: bool = False) -> Iterator[tuple[int, dict[str, Any]]]:
        """Each new step with its figures; the newest only when the run has `ended`, as more rows may follow."""
        with contextlib.suppress(FileNotFoundError), self._path.open("rb") as file:
            file.seek(self._offset)
            for line in file:
                if not line.endswith(b"\n"):  # still being written
                    break
                self._offset += len(line)
                if (row := row_of(line)) is not None:
                    self._figures.setdefault(row.pop("step"), {}).update(row)
        newest = self.newest
        for step in sorted(self._figures):
            if step != newest or ended:
                yield step, self._figures.pop(step)

    @property
    def newest(self) -> int | None:
        """The step that is kept back, if any."""
        return max(self._figures, default=None)


def send(folder: Path, after: int, how: str, tell: Tell) -> dict[str, Any]:
    """Send the steps that W&B's run lacks, until training ends; in W&B's offline mode those after `after`.

    Returns the number of steps sent, the last of them, and the step that was kept back.

    Raises:
        TrackingError: if there are no credentials, another process sends the same run, or W&B lacks a step that was
            sent.
        Exception: whatever W&B raises.
    """
    import wandb

    live: dict[str, Any] = {"x_stats_pid": os.getppid()}
    later: dict[str, Any] = {"x_disable_stats": True, "x_disable_machine_info": True}  # perhaps on another machine
    steps, sent, last = Steps(folder / METRICS), 0, -1
    with _only_sender(folder) as name:
        with _time_limit(START, tell):
            _log_in()
            run = _open(folder, name, later if how else live)
            first = max(run.starting_step, after + 1 if run.offline else 0)  # W&B takes no step twice
            tell(url=run.url)

        def put(ended: bool) -> None:
            nonlocal sent, last
            for step, figures in steps.read(ended):
                if step >= first:
                    images = {path.stem: wandb.Image(str(path)) for path in pictures_of(folder, step, newest=ended)}
                    run.log(figures | images, step=step)
                    sent, last = sent + 1, step

        end = how
        while not end:
            end = _how_training_ended()
            with _time_limit(START, tell):
                put(ended=False)
        with _time_limit(SYNC if how else FINISH[end], tell):
            put(ended=False)
            kept = steps.newest if end == "died" else None
            if kept is None:
                put(ended=True)
            if end == "stopped":
                run.mark_preempting()
            status = 0 if end == "ended" else 1
            run.finish(exit_code=status)
            if not run.offline and sent and (how or end == "ended"):
                # `finish` reports no error when the server refused every figure. A new start reads what W&B holds.
                again = _open(folder, name, later)
                held = again.starting_step - 1
                again.finish(exit_code=status)
                if held < last:
                    raise TrackingError(f"W&B was sent step {last}, but holds {held if held >= 0 else 'none'}")
    return {"sent": sent, "last": last, "kept": kept}


def _log_in() -> None:
    """Raise a TrackingError if W&B's client finds no credentials; in offline mode it needs none."""
    import wandb

    if wandb.setup().settings.mode == "offline":
        return
    with contextlib.suppress(wandb.errors.UsageError):
        if wandb.login(verify=False):
            return
    raise TrackingError("no key for W&B here: set WANDB_API_KEY, or run wandb login")


def _open(folder: Path, name: str, settings: dict[str, Any]) -> Any:
    """W&B's run of a folder, new or resumed."""
    import wandb

    text = (folder / CONFIG).read_text(encoding="utf-8")
    config: Any = values.plain(values.interpolated(values.read(text)))
    if "WANDB_INIT_TIMEOUT" not in os.environ:
        settings = {**settings, "init_timeout": 0.75 * START}
    known = {k: v for k, v in settings.items() if k in wandb.Settings.model_fields}
    run: Any = wandb.init(
        id=name,
        name=config["name"],
        project=config["log"]["project"],
        entity=config["log"]["entity"],
        tags=config["log"]["tags"],
        resume="allow",
        settings=wandb.Settings(console="off", **known),
    )
    run.config.update(flat(config), allow_val_change=True)
    return run


@contextlib.contextmanager
def _only_sender(folder: Path) -> Iterator[str]:
    """The id of the folder's run at W&B, the same after every restart, while no other process sends it.

    Raises:
        TrackingError: if another process still sends it after half a minute.
    """
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(one_at_a_time(folder / ".sending", seconds=30))
        except Timeout:
            raise TrackingError("another process is sending this run to W&B") from None
        path = folder / WANDB_ID
        if not path.exists() or not path.read_text(encoding="utf-8"):
            path.write_text(secrets.token_hex(4), encoding="utf-8")
        yield path.read_text(encoding="utf-8").strip()


def _how_training_ended() -> str:
    """A key of FINISH, `died` if training closed the pipe without sending one; empty if it still runs after 1 s."""
    ready, _, _ = select.select([0], [], [], 1.0)
    return (os.read(0, 100).decode().strip() or "died") if ready else ""


@contextlib.contextmanager
def _time_limit(seconds: float, tell: Tell) -> Iterator[None]:
    """End this process if the block takes longer: not every call of W&B has a time limit."""

    def end() -> None:
        tell(error=f"W&B did not answer in {seconds:.0f} s")
        _exit_now(1)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _end_with_parent(process: int) -> None:
    """End this process when its parent has ended."""
    while os.getppid() == process:
        time.sleep(1)
    _exit_now(1)


def _exit_now(status: int) -> NoReturn:
    """End this process and its children at once: W&B's exit functions may wait."""
    kill_children(os.getpid())
    os._exit(status)


def _main(argv: Sequence[str]) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):  # training says when it ends
        signal.signal(number, signal.SIG_IGN)
    folder, after, how, *sys.argv = argv  # W&B notes the command
    messages = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # W&B may print to stdout

    def tell(**message: object) -> None:
        with contextlib.suppress(OSError):  # the reader has ended
            print(json_text(message), file=messages, flush=True)

    if how:
        threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
    try:
        tell(**send(Path(folder), int(after), how, tell))
    except Exception as error:
        name = type(error).__name__
        prefix = {"TrackingError": "", "CommError": "W&B cannot be reached, or refuses: "}.get(name, f"{name}: ")
        tell(error=prefix + " ".join(str(error).split()))
        _exit_now(1)
    import wandb

    with _time_limit(START, tell):
        wandb.teardown()
    _exit_now(0)


if __name__ == "__main__":
    _main(sys.argv[1:])
