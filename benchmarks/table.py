"""Seconds and memory that it takes to open all splits of a table of images.

    python benchmarks/table.py                              # 100,000 and 1,000,000 rows
    python benchmarks/table.py --rows 10000 --out benchmarks/RESULTS.md

The rows are hard links to one small image in each of 100 folders, listed in a CSV and in a Parquet file with label,
split, donor, slide and site. Each file is opened by a process of its own, with data.verify=none and a given size.
"""

import argparse
import os
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
from _measure import in_fresh_process, markdown, peak_mib, section, show
from PIL import Image

_FOLDERS = 100


def _write(root: Path, rows: int) -> None:
    """The images, and the two tables that list them."""
    for folder in range(min(_FOLDERS, rows)):
        (root / f"plate_{folder:02}").mkdir()
        Image.new("RGB", (32, 32)).save(root / f"plate_{folder:02}" / "first.png")
    names = [f"plate_{i % _FOLDERS:02}/cell_{i:07}.png" for i in range(rows)]
    for name in names:
        os.link(root / name.partition("/")[0] / "first.png", root / name)
    number = np.arange(rows)
    table = pa.table(
        {
            "path": names,
            "label": np.char.add("class ", (number % 12).astype(str)),
            "split": np.array(["train", "train", "train", "val", "test"])[number % 5],
            "donor": np.char.add("donor ", (number // 500).astype(str)),
            "slide": np.char.add("slide ", (number // 100).astype(str)),
            "site": np.char.add("site ", (number % 3).astype(str)),
        }
    )
    pyarrow.csv.write_csv(table, root / "cells.csv")
    pq.write_table(table, root / "cells.parquet")


def _open(file: str) -> list[str]:
    """Rows, seconds, peak MiB above those before, and what the seconds went into."""
    from sslcells.data import ImageSet, open_splits, table

    splits: dict[str, ImageSet] = {}
    began = time.perf_counter()
    peak = peak_mib(lambda: splits.update(open_splits(table.Config(table=file, size=32, verify="none"))), "cpu")
    took, laps = time.perf_counter() - began, dict[str, float]()
    for images in splits.values():
        assert images.found is not None
        for step, seconds in images.found.seconds.items():
            laps[step] = laps.get(step, 0.0) + seconds
    rows = sum(map(len, splits.values()))
    return [f"{rows:,}", f"{took:.1f}", f"{peak:,.0f}", *[f"{step} {lap:.1f}" for step, lap in laps.items()]]


def main() -> None:
    """Print a table: seconds and memory for each number of rows and kind of file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--out", type=Path, metavar="FILE", help="append the table to this file")
    args = parser.parse_args()
    lines = []
    for rows in args.rows:
        with tempfile.TemporaryDirectory() as folder:
            _write(Path(folder), rows)
            for name in ("cells.csv", "cells.parquet"):
                opened = in_fresh_process(_open, f"{folder}/{name}")
                if isinstance(opened, str):
                    raise SystemExit(f"{rows:,} rows, {name}: {opened}")
                lines.append([opened[0], name, *opened[1:3], ", ".join(opened[3:])])
    columns = ["rows", "file", "seconds", "peak MiB above those before", "seconds of each step"]
    text = section("Opening a table", "cpu", "data.verify=none, data.size=32.", [markdown(columns, lines)])
    show(text, args.out)


if __name__ == "__main__":
    main()
