"""Trains as `python -m sslcells.train` does, and writes what every step took and used on this rank.

    python benchmarks/_steps.py FILE [section.key=value …]

On rank r it writes FILE.r: seconds and MiB from the start of the process to the first batch, then of every step. The
clock is read at the stations of a step; on CUDA it waits for the device there.
"""

import ctypes
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from typing import Any

import psutil
import torch
from _measure import limit_memory, peak_kib, reason, restart_peak
from torch.optim.optimizer import register_optimizer_step_post_hook

from sslcells import commandline, ranks
from sslcells.augment import Augment
from sslcells.config import load
from sslcells.run.meter import Meter
from sslcells.train import train

PARTS = ("read", "copy", "augment", "forward", "loss", "backward", "step", "rest")
"""Of a step. `read`: waiting for the batch. `copy`: to the device, and to the network's memory format. `backward` is
that of the loss too. `rest`: zeroing the gradients, a teacher, the figures."""
LAUNCH = Path(__file__).parents[1] / "launch" / "cpu2.yaml"


def measured(words: Sequence[str], folder: Path, world: int = 1, seconds: float = 600) -> list[dict[str, Any]] | str:
    """Train in processes of their own; what each rank wrote, or in words why there is nothing."""
    out, log = folder / "steps", folder / "steps.txt"
    launch = ["-m", "accelerate.commands.launch", "--config_file", str(LAUNCH), "--num_processes", str(world)]
    command = [sys.executable, *(launch if world > 1 else []), __file__, str(out), *words]
    with log.open("w", encoding="utf-8") as file:
        # As of a run itself, where sslcells is imported before torch.
        environment = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ}
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)
        limit_memory(process.pid)
        try:
            status = process.wait(seconds)
        except subprocess.TimeoutExpired:
            for one in [*psutil.Process(process.pid).children(recursive=True), process]:
                one.kill()
            process.wait()
            return f"stopped after {seconds:.0f} s"
    if status:
        return "the process was killed" if status < 0 else reason(log.read_text(encoding="utf-8") or str(status))
    return [json.loads(Path(f"{out}.{rank}").read_text(encoding="utf-8")) for rank in range(world)]


class Laps:
    """Seconds of each part of every step, and peak memory."""

    def __init__(self, cuda: bool) -> None:
        self._cuda = cuda
        self.start: dict[str, float] = {}
        self.steps: list[dict[str, float]] = []
        self._parts = dict.fromkeys(PARTS, 0.0)
        self._last, self._before = time.perf_counter(), 0.0

    def lap(self, part: str) -> None:
        """The time since the last lap went into this part."""
        if self._cuda:
            torch.cuda.synchronize()
        now = time.perf_counter()
        self._parts[part] += now - self._last
        self._last = now

    def arrived(self) -> None:
        """A batch is there; what was lapped since the last step, such as an evaluation, is of no step."""
        self.lap("read")
        if not self.start:
            self.start = {"seconds": time.time() - psutil.Process().create_time(), "mib": self._peak()}
        self._parts = dict.fromkeys(PARTS, 0.0) | {"read": self._parts["read"] if self.steps else 0.0}
        if self._cuda:
            torch.cuda.reset_peak_memory_stats()
        else:
            ctypes.CDLL(None).malloc_trim(0)
            restart_peak()
        self._before = self._peak()
        self._last = time.perf_counter()

    def finished(self) -> None:
        """A step ended."""
        self.lap("rest")
        used = self._peak() - self._before
        self.steps.append({**self._parts, "seconds": sum(self._parts.values()), "mib": used})

    def _peak(self) -> float:
        return torch.cuda.max_memory_allocated() / 2**20 if self._cuda else peak_kib() / 2**10


def around(
    owner: Any, name: str, before: Callable[[], None] | None = None, after: Callable[[], None] | None = None
) -> None:
    """Call `before` and `after`, if given, around every call of owner.name."""
    inner = getattr(owner, name)

    @wraps(inner)
    def outer(*args: Any, **kwargs: Any) -> Any:
        if before is not None:
            before()
        out = inner(*args, **kwargs)
        if after is not None:
            after()
        return out

    setattr(owner, name, outer)


def write(out: str, words: Sequence[str]) -> None:
    """Train with a clock at every station, and write what it showed."""
    run = load(None, words)
    laps = Laps(run.train.device != "cpu" and torch.cuda.is_available())
    around(Meter, "arrived", after=laps.arrived)
    around(Augment, "__call__", lambda: laps.lap("copy"), lambda: laps.lap("augment"))
    around(torch.autograd, "backward", lambda: laps.lap("loss"), lambda: laps.lap("backward"))
    around(Meter, "add", before=laps.finished)
    register_optimizer_step_post_hook(lambda *_: laps.lap("step"))
    stations = {"views": "copy", "rows": "forward"}
    train(run, lambda station, _: laps.lap(stations[station]) if station in stations else None)
    found = json.dumps({"start": laps.start, "steps": laps.steps})
    Path(f"{out}.{ranks.rank()}").write_text(found, encoding="utf-8")


if __name__ == "__main__":
    raise SystemExit(commandline.guarded(lambda: write(sys.argv[1], sys.argv[2:])))
