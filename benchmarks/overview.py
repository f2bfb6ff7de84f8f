"""How long `sslcells runs` and the page of `sslcells board` take for many runs.

    python benchmarks/overview.py                       # 1,000 runs of 300 lines
    python benchmarks/overview.py --runs 100 1000 --lines 300 3000

Each command is a process of its own, timed from its start to its end; the files were just written, so no disk is waited
for. The settings are those of a recipe as training writes them; a line has the figures of SimCLR.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from _measure import markdown, section, show

from sslcells.config import dump, load


def _write(folder: Path, lines: int, config: str) -> None:
    """A finished run with so many lines, a figure of val in every tenth."""
    (folder / "plots").mkdir(parents=True)
    (folder / "config.yaml").write_text(config, encoding="utf-8")
    (folder / "encoder.json").write_text("{}", encoding="utf-8")
    keys = "gradient_norm", "positive_cosine", "reference_cosine", "top1", "data_wait", "memory_gib", "lr"
    rows = []
    for number in range(lines):
        row = {"step": 10 * number, "epoch": round(number / 5, 4), "loss": 6.241863584518432 / (1 + number)}
        row |= {"images_per_second": 201.98185409475042, **dict.fromkeys(keys, 0.0236308087928761)}
        rows.append(row)
        if number % 10 == 0:
            rows.append({"step": 10 * number, "epoch": row["epoch"], "knn/top1": 0.5 + number / lines / 3})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _seconds(command: Sequence[str], repeats: int) -> str:
    """The fastest of several calls, with the slowest behind it."""
    taken = []
    for _ in range(repeats):
        began = time.perf_counter()
        subprocess.run([sys.executable, "-m", "sslcells", *command], check=True, stdout=subprocess.DEVNULL)
        taken.append(time.perf_counter() - began)
    return f"{min(taken):.2f} to {max(taken):.2f}"


def main() -> None:
    """Print the table, and append it to --out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, nargs="+", default=[1000])
    parser.add_argument("--lines", type=int, nargs="+", default=[300])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    config, table = dump(load("simclr_pbc28", ["data.path=x"])), []
    for runs in args.runs:
        for lines in args.lines:
            with tempfile.TemporaryDirectory() as folder:
                for number in range(runs):
                    _write(Path(folder, "runs", f"run_{number}"), lines, config)
                listed = _seconds(["runs", f"{folder}/runs"], args.repeats)
                page = _seconds(["board", f"{folder}/runs", "--out", f"{folder}/board.html"], args.repeats)
                size = Path(folder, "board.html").stat().st_size / 2**20
            table.append([f"{runs:,}", f"{lines:,}", listed, page, f"{size:.2f}"])
    columns = ["runs", "lines each", "`runs`, s", "`board --out`, s", "page, MiB"]
    text = section("Many runs at a glance", "cpu", "Fastest and slowest call.", [markdown(columns, table)])
    show(text, args.out)


if __name__ == "__main__":
    main()
