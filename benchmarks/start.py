"""Time from the start of a process to its first training step, on folders of many small files.

    python benchmarks/start.py                                # 10,000, 50,000 and 200,000 files
    python benchmarks/start.py --files 10000 --keep /scratch  # keeps the folders for the next call
    python benchmarks/start.py --files 72084 --size 96 --to-end

Two processes train on each folder: the first when no image is verified yet, the second when the results are stored. A
line of the run's log gives the time of each part. With `--to-end` they train two steps and end as every run does, with
figures and pictures.
"""

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from threading import Thread

import psutil
from _measure import markdown, section, show
from PIL import Image

from sslcells.data._smear import draw_smear

_CLASSES = 8
_PARTS = re.compile(r"start: first step after ([\d.]+) s: (.*)")


def _write(folder: Path, first: int, count: int, size: int) -> None:
    """Files first … first+count−1: one drawing for each block, brightened, so that they are soon made, yet differ."""
    drawn = Image.fromarray(draw_smear(0, first, first % 5, size))
    for i in range(first, first + count):
        file = folder / f"class_{i % _CLASSES}" / f"{i:07d}.jpg"
        drawn.point([min(255, v + i % 16) for v in range(256)] * 3).save(file, quality=88)


def _folder(beside: Path, files: int, size: int) -> Path:
    """So many JPEG files of size×size px in eight classes."""
    folder = beside / f"files_{files}_{size}"
    if folder.is_dir():
        return folder
    partial = beside / f".files_{files}_{size}"
    shutil.rmtree(partial, ignore_errors=True)
    for c in range(_CLASSES):
        (partial / f"class_{c}").mkdir(parents=True)
    with ProcessPoolExecutor() as pool:
        block = 1000
        blocks = [(partial, i, min(block, files - i), size) for i in range(0, files, block)]
        list(pool.map(_write, *zip(*blocks, strict=True)))
    time.sleep(2.5)  # files of this very moment are not remembered
    return partial.rename(folder)


class _Peak(Thread):
    """Watches the memory of a process and its children, shared pages counted once, until it ends."""

    gib = 0.0

    def __init__(self, process: int) -> None:
        super().__init__(daemon=True)
        self._process = psutil.Process(process)

    def run(self) -> None:
        while self._process.is_running() and self._process.status() != psutil.STATUS_ZOMBIE:
            used = 0
            for one in [self._process, *self._process.children(recursive=True)]:
                try:
                    used += one.memory_full_info().pss
                except psutil.Error:  # it has just ended
                    continue
            self.gib = max(self.gib, used / 2**30)
            time.sleep(0.5)


def _train(folder: Path, out: Path, size: int, to_end: bool) -> tuple[list[str], str]:
    """Seconds to the first step; with `to_end` those after it and in all, and the peak in GiB; what they went into."""
    config = str(Path(__file__).parents[1] / "configs" / "folder.yaml")
    small = ["model.backbone=test_resnet", "augment.size=48", f"data.size={size}", "train.workers=1"]
    short = ["train.total_steps=2", "optim.warmup_epochs=0"] if to_end else []
    command = [sys.executable, "-m", "sslcells.train", "--config", config, f"data.path={folder}", *small, *short]
    shutil.rmtree(out, ignore_errors=True)
    began = time.perf_counter()
    with subprocess.Popen(
        [*command, "train.device=cpu", f"out={out}", "name=start"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as training:
        assert training.stdout is not None
        peak = _Peak(training.pid)
        peak.start()
        said, first, parts = list[str](), 0.0, ""
        for line in training.stdout:
            said.append(line)
            if found := _PARTS.search(line):
                first, parts = time.perf_counter() - began, found[2]
                if not to_end:
                    training.kill()  # the rest of the training is not what is measured
                    return [found[1]], parts
        training.wait()
    if training.returncode or not parts:
        raise SystemExit(f"{' '.join(command)}\n{''.join(said)}")
    whole = time.perf_counter() - began
    return [f"{first:.1f}", f"{whole - first:.1f}", f"{whole:.1f}", f"{peak.gib:.2f}"], parts


def main(argv: Sequence[str] | None = None) -> None:
    """Print a table: seconds to the first step, cold and remembered, and with --to-end until the end."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, nargs="+", default=[10_000, 50_000, 200_000])
    parser.add_argument("--size", type=int, default=64, metavar="PX", help="height and width of the images (64)")
    parser.add_argument("--to-end", action="store_true", help="train two steps, and measure the end and the memory too")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="for the folders of files; removed otherwise")
    parser.add_argument("--out", type=Path, metavar="FILE", help="append the table to this file")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as temporary:
        beside = args.keep or Path(temporary)
        rows, notes = [], []
        for files in args.files:
            folder = _folder(beside, files, args.size)
            shutil.rmtree(folder / ".sslcells", ignore_errors=True)
            for state in ("cold", "remembered"):
                figures, went = _train(folder, Path(temporary) / "runs", args.size, args.to_end)
                rows.append([f"{files:,}", state, *figures])
                notes.append(f"- {files:,} files, {state}: {went}")
        columns = ["files", "images verified", "first step after, s"]
        columns += ["from there to the end, s", "in all, s", "peak memory, GiB"] if args.to_end else []
        about = f"JPEG of {args.size}×{args.size} px, test_resnet, global batch 256, one worker."
        about += " Two steps; memory of all processes, shared pages counted once." if args.to_end else ""
        text = section("Start", "cpu", about, [markdown(columns, rows), *notes])
        show(text, args.out)


if __name__ == "__main__":
    main()
