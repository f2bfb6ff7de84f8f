"""Time from the start of a process to its first training step, on folders of many small files.

    python benchmarks/start.py                                # 10,000, 50,000 and 200,000 files
    python benchmarks/start.py --files 10000 --keep /scratch  # keeps the folders for the next call

Two processes train on each folder: the first when no image is verified yet, the second when the results are stored. A
line of the run's log gives the time of each part.
"""

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from _measure import append, markdown, section
from PIL import Image

from sslcells.data._smear import draw_smear

_CLASSES = 8
_PARTS = re.compile(r"start: first step after ([\d.]+) s: (.*)")


def _write(folder: Path, first: int, count: int) -> None:
    """Files first … first+count−1: one drawing for each block, brightened, so that they are soon made, yet differ."""
    drawn = Image.fromarray(draw_smear(0, first, first % 5, 64))
    for i in range(first, first + count):
        file = folder / f"class_{i % _CLASSES}" / f"{i:07d}.jpg"
        drawn.point([min(255, v + i % 16) for v in range(256)] * 3).save(file, quality=88)


def _folder(beside: Path, files: int) -> Path:
    """So many JPEG files of 64×64 px in eight classes."""
    folder = beside / f"files_{files}"
    if folder.is_dir():
        return folder
    partial = beside / f".files_{files}"
    shutil.rmtree(partial, ignore_errors=True)
    for c in range(_CLASSES):
        (partial / f"class_{c}").mkdir(parents=True)
    with ProcessPoolExecutor() as pool:
        block = 1000
        list(
            pool.map(_write, *zip(*[(partial, i, min(block, files - i)) for i in range(0, files, block)], strict=True))
        )
    time.sleep(2.5)  # files of this very moment are not remembered
    return partial.rename(folder)


def _train(folder: Path, out: Path) -> tuple[float, str]:
    """Seconds to the first step, and what they went into, as the log says."""
    config = str(Path(__file__).parents[1] / "configs" / "folder.yaml")
    small = ["model.backbone=test_resnet", "augment.size=48", "data.size=64", "train.workers=1", "train.device=cpu"]
    command = [sys.executable, "-m", "sslcells.train", "--config", config, f"data.path={folder}", *small]
    shutil.rmtree(out, ignore_errors=True)
    with subprocess.Popen(
        [*command, f"out={out}", "name=start"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as training:
        assert training.stdout is not None
        said = []
        for line in training.stdout:
            said.append(line)
            if found := _PARTS.search(line):
                training.kill()  # the rest of the training is not what is measured
                return float(found[1]), found[2]
    raise SystemExit(f"{' '.join(command)}\n{''.join(said)}")


def main() -> None:
    """Print a table: seconds to the first step, cold and remembered."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, nargs="+", default=[10_000, 50_000, 200_000])
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="for the folders of files; removed otherwise")
    parser.add_argument("--out", type=Path, metavar="FILE", help="append the table to this file")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        beside = args.keep or Path(temporary)
        rows, notes = [], []
        for files in args.files:
            folder = _folder(beside, files)
            shutil.rmtree(folder / ".sslcells", ignore_errors=True)
            for state in ("cold", "remembered"):
                seconds, went = _train(folder, Path(temporary) / "runs")
                rows.append([f"{files:,}", state, f"{seconds:.1f}"])
                notes.append(f"- {files:,} files, {state}: {went}")
        parts = [markdown(["files", "images verified", "first step after, s"], rows), *notes]
        text = section("Start", "cpu", "JPEG of 64×64 px, test_resnet, global batch 256, one worker.", parts)
        print(text)
        if args.out:
            append(text, args.out)


if __name__ == "__main__":
    main()
