"""Functions that the benchmarks share: fresh processes, peak memory, and tables under headings."""

import ctypes
import datetime
import multiprocessing
import os
import platform
import resource
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import psutil
import torch

from sslcells.provenance import commit

T = TypeVar("T")
OUT_OF_MEMORY = "out of memory"


@contextmanager
def fresh_process() -> Iterator[Callable[..., Any]]:
    """A new interpreter: calls functions of importable modules there; gives their results, or why one failed."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:

        def call(function: Callable[..., T], *args: object) -> T | str:
            try:
                return pool.submit(function, *args).result()
            except ImportError as error:
                return f"{error.name or error} is not installed"
            except BrokenProcessPool:
                return "the process was killed"
            except (MemoryError, RuntimeError) as error:
                return reason(str(error) or OUT_OF_MEMORY)

        yield call


def in_fresh_process(function: Callable[..., T], *args: object) -> T | str:
    """Call `function` of an importable module in a new interpreter; returns its result, or why it failed."""
    with fresh_process() as call:
        result: T | str = call(function, *args)
    return result


def reason(message: str) -> str:
    """The text of an exception, shortened to a few words."""
    if "out of memory" in message or "can't allocate memory" in message or "bad_alloc" in message:
        return OUT_OF_MEMORY
    return f"failed: {message.strip().splitlines()[-1].strip()[:100]}"


def limit_memory(pid: int) -> None:
    """Limit this process to the memory that is free now, so that it fails alone and the machine keeps running."""
    most = psutil.Process(pid).memory_info().data + int(0.95 * psutil.virtual_memory().available)
    resource.prlimit(pid, resource.RLIMIT_DATA, (most, most))


def peak_mib(step: Callable[[], None], device: str) -> float:
    """Peak memory of a call of `step` in MiB, above the memory in use before.

    On a CPU this is resident memory as Linux counts it: run the step on little data before, so that its code is there.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    ctypes.CDLL(None).malloc_trim(0)
    restart_peak()
    before = peak_kib()
    step()
    return (peak_kib() - before) / 2**10


def restart_peak() -> None:
    """Make the peak of this process's resident memory what it uses now."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # man 5 proc


def peak_kib() -> int:
    """Peak of this process's resident memory since `restart_peak`, or the start."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))


def seconds(step: Callable[[], object], device: str, repeats: int) -> list[float]:
    """Seconds per call, measured over at least this many calls and one second; call it once before."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    taken: list[float] = []
    while len(taken) < repeats or sum(taken) < 1:
        wait()
        began = time.perf_counter()
        step()
        wait()
        taken.append(time.perf_counter() - began)
    return taken


def product_rate(device: str, repeats: int, dtype: torch.dtype | None = None) -> float:
    """Operations a second of one large matrix product: float32 on a CPU, bfloat16 on CUDA, if not told otherwise."""
    size, usual = (16384, torch.bfloat16) if device == "cuda" else (2048, torch.float32)
    dtype = dtype or usual
    a, b = torch.randn(2, size, size, device=device, dtype=dtype)
    out = a @ b
    return 2 * size**3 / min(seconds(lambda: torch.mm(a, b, out=out), device, repeats))


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first two columns are aligned left, figures right."""
    rules = [":--" if k < 2 else "--:" for k in range(len(columns))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (columns, rules, *rows))


def section(title: str, device: str, notes: str, parts: Sequence[str]) -> str:
    """A section of RESULTS.md: date, commit, machine and command, then notes and tables."""
    command = f"python benchmarks/{Path(sys.argv[0]).name} {shlex.join(sys.argv[1:])}".strip()
    heading = f"## {title}, {datetime.date.today().isoformat()}, commit {commit() or 'unknown'}"
    return "\n\n".join([heading, f"{_machine(device)}.", f"    {command}", notes, *parts]) + "\n"


def show(text: str, out: Path | None) -> None:
    """Print a section, and add it at the end of a file if one is given, which is created if needed."""
    print(text)
    if out is not None:
        with out.open("a", encoding="utf-8") as file:
            file.write(f"\n{text}" if file.tell() else text)


def draw(panels: dict[str, dict[str, list[tuple[int, float, float]]]], out: Path) -> None:
    """Seconds and MiB against N: a row of two panels for each title, a line of (N, seconds, MiB) for each name."""
    from matplotlib.figure import Figure  # here, as the processes that are measured import this file

    from sslcells.evaluation.pictures import MARKERS, OKABE_ITO, save

    figure = Figure(figsize=(11, 4.4 * len(panels)), layout="constrained")
    colors = OKABE_ITO[:6] + OKABE_ITO[7:]  # without yellow, which is pale on white
    units = "seconds, forward + backward", "extra peak memory, MiB"
    axes = figure.subplots(len(panels), 2, squeeze=False)
    for (title, lines), pair in zip(panels.items(), axes, strict=True):
        ticks = sorted({n for points in lines.values() for n, _, _ in points})
        for y, (ax, unit) in enumerate(zip(pair, units, strict=True)):
            for k, (name, points) in enumerate(lines.items()):
                look = {"color": colors[k], "marker": MARKERS[k % len(MARKERS)], "lw": 1.5 if k else 3}
                if points:
                    ax.plot([p[0] for p in points], [p[1 + y] for p in points], label=name, **look)
            ax.set_xscale("log", base=2)
            ax.set_yscale("log")
            ax.set_xticks(ticks, [f"{n:,}" for n in ticks], rotation=30)
            ax.set(title=title, xlabel="N, rows", ylabel=unit)
            ax.grid(alpha=0.3)
        pair[0].legend(frameon=False, fontsize="small")
    save(figure, out)


def _machine(device: str) -> str:
    info = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    model = next((line.split(":")[1].strip() for line in info if line.startswith("model name")), platform.machine())
    cores, memory = len(os.sched_getaffinity(0)), psutil.virtual_memory().total / 2**30
    accelerator = f"{torch.cuda.get_device_name()}, " if device == "cuda" else ""
    versions = f"Python {platform.python_version()}, torch {torch.__version__} with {torch.get_num_threads()} threads"
    return f"{accelerator}{model}, {cores} cores, {memory:.0f} GiB; {versions}"
