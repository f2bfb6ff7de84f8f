"""Speed and memory of training for several global batches, in one pass or in micro-batches.

  python benchmarks/large_batch.py --batches 256 1024 4096 --micro-batches none 128 --out benchmarks/RESULTS.md

Each row is a run of `python -m sslcells.train` on synthetic cells of 32 px, in a temporary folder. The speed is that of
the fastest step. The memory is the peak of CUDA's memory, or on a CPU of the whole process with its libraries. Further
overrides go first: `python benchmarks/large_batch.py train.precision=bf16 --batches 256`.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from _measure import limit_memory, markdown, reason, section, show

from sslcells.run.metrics import read_metrics

RATIOS = ["speed ÷ plain", "memory ÷ plain", "memory ÷ a batch of one micro-batch"]
COLUMNS = ["global batch", "micro-batch", "images/s", "peak MiB", *RATIOS]
OVERRIDES = [
    "name=benchmark",
    "data.kind=synthetic",
    "data.size=32",
    "data.test=64",
    "augment.size=32",
    "model.backbone=resnet18",
    "model.stem=small",
    "train.workers=1",
    "log.every_steps=1",
    "log.tracker=none",
    "evaluate.max_images=64",
]


class Result(NamedTuple):
    """What was measured of one run."""

    speed: float
    """images a second"""
    mib: float


def measure(batch: int, micro_batch: int | None, steps: int, device: str, overrides: Sequence[str]) -> Result | str:
    """Speed and peak memory of so many steps, or in words why there is none."""
    changes = [f"train.global_batch={batch}", f"data.train={batch}", f"train.total_steps={steps}"]
    changes += [] if micro_batch is None else [f"train.micro_batch={micro_batch}"]
    changes += [f"train.device={'cpu' if device == 'cpu' else 'auto'}", *overrides]
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log.txt"
        command = [sys.executable, "-m", "sslcells.train", *OVERRIDES, *changes, f"out={folder}"]
        with log.open("w", encoding="utf-8") as file:
            process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
        if device == "cpu":
            limit_memory(process.pid)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode < 0:
            return "the process was killed"
        if process.returncode > 0:
            return reason(log.read_text(encoding="utf-8"))
        rows = [row for row in read_metrics(Path(folder) / "benchmark") if "images_per_second" in row]
    mib = rows[-1]["memory_gib"] * 2**10 if device == "cuda" else usage.ru_maxrss / 2**10
    return Result(max(row["images_per_second"] for row in rows), mib)


def table(results: dict[tuple[int, int | None], Result | str]) -> str:
    """The results, with ratios to the plain step of the same global batch, and of a batch of one micro-batch."""
    rows = []
    for (batch, micro_batch), result in results.items():
        cells = [f"{batch:,}", "none" if micro_batch is None else f"{micro_batch:,}"]
        if isinstance(result, str):
            rows.append([*cells, result, "", "", "", ""])
            continue
        plain, part = results.get((batch, None)), results.get((micro_batch or batch, None))
        ratios = [*_ratios(result, plain), _ratios(result, part)[1]]
        rows.append([*cells, f"{result.speed:.1f}", f"{result.mib:,.0f}", *ratios])
    return markdown(COLUMNS, rows)


def _ratios(result: Result, to: Result | str | None) -> tuple[str, str]:
    """Speed and memory beside those of another run, empty where that one has none."""
    if not isinstance(to, Result):
        return "", ""
    return f"{result.speed / to.speed:.2f}", f"{result.mib / to.mib:.2f}"


def micro_batch(text: str) -> int | None:
    """A number of images, or `none` for the plain step."""
    return None if text == "none" else int(text)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="changes to the configuration")
    parser.add_argument("--batches", type=int, nargs="+", default=[256, 512, 1024, 2048], metavar="IMAGES")
    sizes = "images of a pass; `none` is the plain step; those not below the global batch are left out"
    parser.add_argument("--micro-batches", type=micro_batch, nargs="+", default=[None, 128], metavar="M", help=sizes)
    parser.add_argument("--steps", type=int, default=2, help="optimizer steps of each run; the first is a slow one")
    here = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=here)
    parser.add_argument("--out", type=Path, metavar="FILE", help="also append the section to this file")
    return parser.parse_args()


def main() -> None:
    """Measure, print, and write the section."""
    args = arguments()
    results: dict[tuple[int, int | None], Result | str] = {}
    for batch in sorted(args.batches):
        for micro in args.micro_batches:
            if micro is None or micro < batch:
                results[batch, micro] = measure(batch, micro, args.steps, args.device, args.overrides)
                print(
                    f"{batch:,} in passes of {micro or batch:,}: {results[batch, micro]}", file=sys.stderr, flush=True
                )
    overrides = " ".join([*OVERRIDES, *args.overrides])
    text = section(
        "Large batches", args.device, f"Two views an image on {args.device}; `{overrides}`.", [table(results)]
    )
    show(text, args.out)


if __name__ == "__main__":
    main()
