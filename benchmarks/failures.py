"""Real failures in runs of two ranks: how each run ends, and whether it resumes exactly.

  python benchmarks/failures.py --kills 20 --out benchmarks/RESULTS.md
  python benchmarks/failures.py --only "a rank dies" "the disk is full" --kills 0

Each failure happens in the middle of a training on image files. The message and the exit status are recorded, the
cause is removed, and the same command is run again. The final weights and metrics.jsonl are compared with those of an
undisturbed run. Then a run of one process is killed with SIGKILL many times: half of the times at a random moment, the
other half while a checkpoint is being written.
"""

import argparse
import contextlib
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import psutil
from _measure import markdown, section, show
from PIL import Image
from safetensors.torch import load_file, save_file

from sslcells.config import load
from sslcells.data import open_splits
from sslcells.run.metrics import read_metrics

ROOT = Path(__file__).resolve().parents[1]
TIMES = {"images_per_second", "data_wait", "memory_gib"}
EVERY = 10
OVERRIDES = [
    "data.kind=folder",
    "data.size=32",
    "augment.size=32",
    "model.backbone=small_cnn",
    "method.hidden=512",
    "train.global_batch=16",
    "train.workers=1",
    f"checkpoint.every_steps={EVERY}",
    "log.every_steps=1",
    "log.tracker=none",
    "evaluate.every_epochs=1000",
    "evaluate.k=1",
]
STEPS = 120


class Run:
    """A run in a folder of its own, its processes and what they print."""

    def __init__(self, out: Path, images: Path, ranks: int, *changes: str, name: str = "run") -> None:
        self.out, self.folder, self.images, self.ranks = out, out / name, images, ranks
        self._arguments = [
            *OVERRIDES,
            f"train.total_steps={STEPS}",
            f"data.path={images}",
            f"out={out}",
            f"name={name}",
        ]
        self._arguments += changes
        self._log = out.parent / f"{out.name}-{name}.log"

    def start(self, *changes: str) -> None:
        """Start it, or start it again."""
        launch = ["-m", "accelerate.commands.launch", "--config_file", str(ROOT / "launch" / "cpu2.yaml")]
        command = [sys.executable, *(launch if self.ranks == 2 else []), "-m", "sslcells.train"]
        with self._log.open("ab") as log:
            self._from = log.tell()
            self.process = subprocess.Popen(
                [*command, *self._arguments, *changes],
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
                start_new_session=True,
            )

    def text(self) -> str:
        """What the last start printed."""
        return self._log.read_bytes()[self._from :].decode(errors="replace")

    def wait(self, seconds: float = 300) -> int:
        """Its exit status; a run that does not end is killed, and an error."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            raise RuntimeError(f"did not end within {seconds:.0f} s:\n{self.text()[-2000:]}") from None

    def until(self, true: Callable[[], bool], seconds: float = 180) -> None:
        """Return when it is true; an error where the run ends before."""
        end = time.monotonic() + seconds
        while not true():
            if self.process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"the run ended, or stood still, too early:\n{self.text()[-2000:]}")
            time.sleep(0.005)

    def step(self) -> int:
        """The last one in metrics.jsonl."""
        with contextlib.suppress(OSError, ValueError, IndexError, KeyError):
            return int(read_metrics(self.folder)[-1]["step"])
        return -1

    def newest(self) -> int:
        """Step of the newest checkpoint, 0 without one."""
        names = [path.name for path in (self.folder / "checkpoints").glob("step_*")]
        return max((int(name.removeprefix("step_")) for name in names), default=0)

    def rank(self, number: int) -> psutil.Process:
        """The process of a rank."""
        for process in psutil.Process(self.process.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if process.environ().get("RANK") == str(number) and "sslcells.train" in process.cmdline():
                    return process
        raise RuntimeError(f"no process of rank {number}")

    def kill(self) -> None:
        """SIGKILL to every process of the run; the launcher's ranks have sessions of their own."""
        with contextlib.suppress(psutil.NoSuchProcess):
            launcher = psutil.Process(self.process.pid)
            for process in [launcher, *launcher.children(recursive=True)]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
        self.process.wait()


class Ended(NamedTuple):
    """How a start ended."""

    status: int
    seconds: float
    """from the injection on"""
    said: str
    """the line that tells the user"""


Case = Callable[[Run], Iterator[tuple[Run, str]]]
"""Strikes a run in its training, yields which run will say what (a pattern, or nothing), and then mends the cause."""

CASES: dict[str, Case] = {}


def case(name: str) -> Callable[[Case], Case]:
    """Register an injection under the name of its failure."""

    def register(function: Case) -> Case:
        CASES[name] = function
        return function

    return register


VANISHED = r"^sslcells: rank 0: rank 1 of 2 disappeared without an error message"


@case("a rank dies (SIGKILL)")
def rank_dies(run: Run) -> Iterator[tuple[Run, str]]:
    """The kernel, or an administrator, kills a rank."""
    run.rank(1).kill()
    yield run, VANISHED


@case("a rank hangs (SIGSTOP; train.timeout_minutes=0.4)")
def rank_hangs(run: Run) -> Iterator[tuple[Run, str]]:
    """A rank stands still."""
    stopped = run.rank(1)
    stopped.suspend()
    yield run, VANISHED
    with contextlib.suppress(psutil.NoSuchProcess):
        stopped.kill()


@case("a process that reads images dies (SIGKILL)")
def reader_dies(run: Run) -> Iterator[tuple[Run, str]]:
    """The kernel kills a data loader worker."""
    run.rank(1).children()[0].kill()
    yield run, r"^sslcells: rank 1: a process that reads images died"


@case("an image is corrupt")
def image_corrupt(run: Run) -> Iterator[tuple[Run, str]]:
    """Half of an image file is gone."""
    file = sorted((run.images / "train").rglob("*.png"))[3]
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    yield run, rf"^sslcells: rank [01]: {file}: "
    file.write_bytes(whole)


@contextlib.contextmanager
def away(folder: Path) -> Iterator[None]:
    """The folder is not there."""
    elsewhere = folder.rename(folder.with_suffix(".away"))
    try:
        yield
    finally:
        elsewhere.rename(folder)


@case("the image folder is away for 5 s")
def images_away(run: Run) -> Iterator[tuple[Run, str]]:
    """The images come back."""
    with away(run.images):
        time.sleep(5)
    yield run, r"png: No such file or directory; retrying"


@case("the run folder is away for 5 s")
def run_away(run: Run) -> Iterator[tuple[Run, str]]:
    """The run's folder comes back."""
    with away(run.folder):
        time.sleep(5)
    yield run, r"metrics.jsonl: No such file or directory; retrying"


@case("the image folder stays away")
def images_gone(run: Run) -> Iterator[tuple[Run, str]]:
    """The images do not come back before patience ends."""
    with away(run.images):
        yield run, r"^sslcells: rank [01]: .*png: No such file or directory"


@case("the disk is full")
def disk_full(run: Run) -> Iterator[tuple[Run, str]]:
    """The run's folder is on a file system of its own, small and then full but for what one line of figures needs."""
    ballast, free = run.out / "ballast", os.statvfs(run.out)
    ballast.write_bytes(bytes(max(0, free.f_bavail * free.f_frsize - 256 * 1024)))
    yield run, r"^sslcells: rank 0: the checkpoint of step .* No space left"
    ballast.unlink()


@case("a loss that is no number")
def not_a_number(run: Run) -> Iterator[tuple[Run, str]]:
    """A weight that a fault of the memory made huge, in the newest checkpoint, with the digest to match.

    It is finite: a checkpoint that is not would be refused, and the one before it taken.
    """
    run.kill()
    path = run.folder / "checkpoints" / f"step_{run.newest():08d}"
    kept = path.with_name("kept")
    shutil.copytree(path, kept)
    weights = load_file(path / "model.safetensors")
    next(value for value in weights.values() if value.is_floating_point()).view(-1)[0] = 3e38
    save_file(weights, path / "model.safetensors")
    state = json.loads((path / "state.json").read_text())
    state["sha256"]["model.safetensors"] = hashlib.sha256((path / "model.safetensors").read_bytes()).hexdigest()
    (path / "state.json").write_text(json.dumps(state))
    run.start()
    yield run, r"^sslcells: the loss became nan at step \d+ on ranks 0, 1"
    shutil.rmtree(path)
    kept.rename(path)


@case("two jobs on one folder")
def two_jobs(run: Run) -> Iterator[tuple[Run, str]]:
    """The same command is given twice."""
    other = Run(run.out, run.images, run.ranks)
    other.start()
    yield other, r"^sslcells: .* is in use by process \d+ on "
    if run.wait() != 0:
        raise RuntimeError(f"the first job did not end well:\n{run.text()[-2000:]}")


@case("the time ends in the middle of a checkpoint (SIGTERM, then SIGKILL)")
def time_ends(run: Run) -> Iterator[tuple[Run, str]]:
    """SLURM waits no longer, and a checkpoint is half written."""
    run.until(lambda: any((run.folder / "checkpoints").glob(".step_*")))
    os.killpg(run.process.pid, signal.SIGTERM)
    run.kill()
    yield run, ""


@case("SIGUSR1, and a second one")
def asked_to_stop(run: Run) -> Iterator[tuple[Run, str]]:
    """The time limit is near."""
    for _ in range(2):
        for number in range(2):
            with contextlib.suppress(psutil.Error, RuntimeError):
                run.rank(number).send_signal(signal.SIGUSR1)
    yield run, r"^sslcells: .*stopped by SIGUSR1 after step \d+"


class Setting:
    """Images, a folder for runs, and the run that nothing happens to."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.images = folder, folder / "images"
        splits = open_splits(load(None, ["data.size=32", "data.train=64", "data.val=16", "data.test=0"]).data)
        for name, images in splits.items():
            for i in range(len(images)):
                path = self.images / name / images.classes[images.labels[i]] / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(images.pixels(i).permute(1, 2, 0).numpy()).save(path)
        self._alone: dict[int, Run] = {}

    def alone(self, ranks: int) -> Run:
        """A run that nothing happened to."""
        if ranks not in self._alone:
            run = Run(self.folder / f"alone-{ranks}", self.images, ranks)
            run.start()
            if run.wait() != 0:
                raise RuntimeError(run.text())
            self._alone[ranks] = run
        return self._alone[ranks]

    def equal(self, run: Run) -> bool:
        """True if a run ended with the weights and metrics of the undisturbed run, to the last bit."""
        alone = self.alone(run.ranks).folder
        weights = [(folder / "encoder.safetensors").read_bytes() for folder in (alone, run.folder)]
        return weights[0] == weights[1] and untimed(alone) == untimed(run.folder)


def untimed(folder: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl without the times."""
    return [{k: v for k, v in row.items() if k not in TIMES} for row in read_metrics(folder)]


@contextlib.contextmanager
def small_disk(folder: Path, mib: int) -> Iterator[None]:
    """A file system of so many MiB at `folder`; needs root."""
    folder.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={mib}m", "tmpfs", str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def ended(began: float, run: Run, pattern: str) -> Ended:
    """Wait for the end of a run and find the line of its output that matches the pattern, if one is given."""
    status = run.wait()
    said = next((line for line in run.text().splitlines() if re.search(pattern, line)), "") if pattern else "nothing"
    if not said:
        raise RuntimeError(f"no line of the output matches {pattern!r}:\n{run.text()[-3000:]}")
    return Ended(status, time.monotonic() - began, said.strip())


def strike(setting: Setting, name: str) -> tuple[Ended, bool]:
    """Start a run, inject a failure, remove its cause and start again; returns how it ended and if it was exact."""
    with contextlib.ExitStack() as stack:
        out = setting.folder / re.sub(r"\W+", "-", name)
        shutil.rmtree(out, ignore_errors=True)
        if name == "the disk is full":
            stack.enter_context(small_disk(out, 24))
        run = Run(out, setting.images, 2)
        run.start(*re.findall(r"train\.timeout_minutes=[\d.]+", name))
        stack.callback(run.kill)
        run.until(lambda: run.step() > 25 and run.newest() >= 20)
        began, injected = time.monotonic(), CASES[name](run)
        result = ended(began, *next(injected))
        for _ in injected:  # continue the generator, which removes the cause
            raise AssertionError(f"{name} strikes once")
        if run.process.returncode != 0 or "SIGUSR1" in name:
            run.start()
            if run.wait() != 0:
                raise RuntimeError(f"{name}: it did not resume:\n{run.text()[-3000:]}")
        return result, setting.equal(run)


class Kills(NamedTuple):
    """The outcome of a run that was killed many times."""

    random: int
    inside: int
    """while a checkpoint was being written"""
    most_lost: int
    """steps"""
    not_resumed: int
    equal: bool


def kills(setting: Setting, count: int, seed: int) -> Kills:
    """Kill a run of one process `count` times, then let it end."""
    draw, lost, inside, refused, made = random.Random(seed), 0, 0, 0, 0
    run = Run(setting.folder / f"kills-{seed}", setting.images, 1)
    begun = run.folder / "checkpoints"
    while made < count and (newest := run.newest()) < STEPS - EVERY:
        run.start()
        run.until(lambda: re.search(r": (resuming after step \d+|\d+ steps)$", run.text(), re.MULTILINE) is not None)
        refused += newest > 0 and f"resuming after step {newest}\n" not in run.text()
        if made % 2:
            run.until(lambda: run.newest() > 0 and any(begun.glob(".step_*.partial")))
            inside += 1
        else:
            time.sleep(draw.uniform(0, 1.5))
        run.kill()
        made += 1
        lost = max(lost, run.step() - run.newest())
    run.start()
    refused += run.wait() != 0
    return Kills(made - inside, inside, lost, refused, setting.equal(run))


def main() -> None:
    """Inject the chosen failures, print the tables and append them to a file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", nargs="*", choices=CASES, default=list(CASES), metavar="FAILURE", help="; ".join(CASES)
    )
    parser.add_argument("--repeats", type=int, default=2, help="how often each failure is injected")
    parser.add_argument("--kills", type=int, default=20, help="how many SIGKILLs in all, over several runs")
    parser.add_argument("--out", type=Path, metavar="FILE", help="also append the section to this file")
    args = parser.parse_args()
    rows: list[list[str]] = []
    killed: list[Kills] = []
    with tempfile.TemporaryDirectory() as folder:
        setting = Setting(Path(folder))
        for name in args.only:
            try:
                results = [strike(setting, name) for _ in range(args.repeats)]
            except RuntimeError as error:
                print(f"{name}: {error}", file=sys.stderr, flush=True)
                rows.append([name, f"not as expected: {str(error).splitlines()[0]}", "", "", "no"])
                continue
            status = ", ".join(sorted({str(result.status) for result, _ in results}))
            seconds = max(result.seconds for result, _ in results)
            said = results[0][0].said.replace(folder, "…").replace("|", "\\|")
            exact = sum(equal for _, equal in results)
            rows.append([name, said, f"{status}", f"{seconds:.1f}", f"{exact} of {len(results)}"])
            print(rows[-1], file=sys.stderr, flush=True)
        while sum(k.random + k.inside for k in killed) < args.kills:
            left = args.kills - sum(k.random + k.inside for k in killed)
            killed.append(kills(setting, left, seed=len(killed)))
            print(killed[-1], file=sys.stderr, flush=True)
    columns = ["failure", "what the run says", "exit status", "seconds to its end", "then resumes to the exact end"]
    parts = [markdown(columns, rows)] if rows else []
    if killed:
        columns = ["run", "kills at random", "kills inside a checkpoint", "most steps lost", "not resumed", "exact end"]
        parts.append(
            markdown(
                columns, [[str(i + 1), *map(str, k[:4]), "yes" if k.equal else "no"] for i, k in enumerate(killed)]
            )
        )
    notes = (
        f"Runs of {STEPS} steps with a checkpoint every {EVERY}; exact: the weights to the last bit, and every line of "
        f"metrics.jsonl but for the times. Two ranks on gloo for the failures, one process for the kills."
    )
    text = section("Failures", "cpu", notes, parts)
    show(text, args.out)


if __name__ == "__main__":
    main()
