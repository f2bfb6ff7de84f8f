"""Seconds and memory that opening a table takes: `python benchmarks/table.py [ROWS]` (1,000,000 by default).

It makes as many hard links to one small image in 100 folders, lists them in a CSV and in a Parquet file with label,
split, donor, slide and site, and opens all splits in a process of its own, with data.verify=none and a given size.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
from PIL import Image

_OPEN = """
import resource, sys, time
from sslcells.data import open_splits, table
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
began = time.perf_counter()
splits = open_splits(table.Config(table=sys.argv[1], size=32, verify="none"))
seconds = time.perf_counter() - began
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
rows = sum(map(len, splits.values()))
laps = {}
for images in splits.values():
    for what, lap in images.found.seconds.items():
        laps[what] = laps.get(what, 0) + lap
print(f"{sys.argv[1].rpartition('/')[2]}: {rows:,} rows in {seconds:.1f} s, peak {peak:,.0f} MiB "
      f"({before:,.0f} before); " + ", ".join(f"{what} {lap:.1f}" for what, lap in laps.items()))
"""


def main(rows: int) -> None:
    """Make the images and the tables, and open them."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        first = []
        names = [f"plate_{i % 100:02}/cell_{i:07}.png" for i in range(rows)]
        for place in range(min(100, rows)):
            (root / f"plate_{place:02}").mkdir()
            first.append(root / f"plate_{place:02}" / "first.png")
            Image.new("RGB", (32, 32)).save(first[-1])
        for i, name in enumerate(names):
            os.link(first[i % 100], root / name)
        number = np.arange(rows)
        parts = np.array(["train", "train", "train", "val", "test"])
        columns = {
            "path": names,
            "label": np.char.add("class ", (number % 12).astype(str)),
            "split": parts[number % 5],
            "donor": np.char.add("donor ", (number // 500).astype(str)),
            "slide": np.char.add("slide ", (number // 100).astype(str)),
            "site": np.char.add("site ", (number % 3).astype(str)),
        }
        table = pa.table(columns)
        pyarrow.csv.write_csv(table, root / "cells.csv")
        pq.write_table(table, root / "cells.parquet")
        del table, columns, names
        for name in ("cells.csv", "cells.parquet"):
            subprocess.run([sys.executable, "-c", _OPEN, str(root / name)], check=True)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000)
