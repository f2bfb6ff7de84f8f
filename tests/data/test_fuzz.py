"""Damaged and odd files: each is read or named with a reason; no traceback, no hang, no memory above a bound."""

import json
import subprocess
import sys
from pathlib import Path

import odd_files
import pytest

from sslcells.data import folder, open_split

MOST = 2560
"""MiB that reading may take beyond what the process takes anyway: a few times the 512 MiB of one image"""


def child(where: Path) -> list[dict]:
    """What became of each file, read in a process of its own, which is ended where one file takes too long."""
    done = subprocess.run([sys.executable, odd_files.__file__, str(where)], capture_output=True, text=True, check=False)
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    last = rows[-1]["name"] if rows else "none"
    assert done.returncode == 0, f"it ended with {done.returncode} after {last}: {done.stderr[-2000:]}"
    assert "Traceback" not in done.stderr
    return rows


def told(rows: list[dict], count: int) -> None:
    assert len(rows) == count
    outcome = {row["name"]: row["outcome"] for row in rows}
    assert not [name for name, each in outcome.items() if "without a reason" in each]
    assert all("read" in each for name, each in outcome.items() if name.startswith("sound"))
    assert max(row["MiB"] for row in rows) < MOST, max(rows, key=lambda row: row["MiB"])


def test_a_few_damaged_files_are_read_or_named(tmp_path):
    odd_files.write(tmp_path / "odd", 120, seed=1, large=False)
    told(child(tmp_path / "odd"), 120)


@pytest.mark.slow
def test_two_thousand_damaged_files_are_read_or_named(tmp_path):
    odd_files.write(tmp_path / "odd", 2000, seed=0)
    told(child(tmp_path / "odd"), 2000)


@pytest.mark.slow
def test_a_folder_of_damaged_files_is_opened_and_each_that_is_left_out_is_named(tmp_path):
    made = odd_files.write(tmp_path / "odd", 400, seed=2, large=False)
    images = open_split(folder.Config(path=str(tmp_path / "odd"), size=16, on_error="skip"), "train")
    assert isinstance(images, folder.FolderImages)
    parts = sum(count for kind, (count, _) in images.found.ignored.items() if "sets" in kind)
    assert len(images) + len(images.skipped) + parts == made
    assert all(images.skipped.values())
    for i in range(len(images)):
        assert images.pixels(i).shape == (3, 16, 16)
