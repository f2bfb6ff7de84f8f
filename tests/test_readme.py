"""What the README shows runs as it stands, and the tree that CONTRIBUTING shows is there."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from trained import make_cells, make_run

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def test_the_losses_run_in_anyones_loop():
    code = next(c for c in re.findall(r"```python\n(.*?)```", README, re.S) if "sslcells.losses" in c)
    space = {}
    exec(code, space)
    assert space["encoder"].weight.grad.isfinite().all()
    assert len(code.strip().splitlines()) <= 10


def test_an_encoder_is_used_in_three_lines(tmp_path, monkeypatch):
    make_run(tmp_path / "runs" / "quickstart")
    make_cells(tmp_path / "path" / "to" / "cells", 5)
    monkeypatch.chdir(tmp_path)
    code = next(c for c in re.findall(r"```python\n(.*?)```", README, re.S) if "load_encoder" in c)
    assert len([line for line in code.splitlines() if line]) == 3
    space = {}
    exec(code, space)
    assert space["vectors"].shape == (5, 32)


def test_the_mistakes_read_as_printed():
    command, printed = re.findall(r"\$ python -m (sslcells\.train .*?)\n(.*?)```", README, re.S)[0]
    done = subprocess.run(
        [sys.executable, "-m", *command.split()], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.stderr == printed
    assert done.returncode == 2


@pytest.mark.parametrize("target", re.findall(r"\]\((?!http)([^)#]+)\)", README))
def test_links_lead_somewhere(target):
    assert (ROOT / target).exists()


def test_every_folder_and_file_of_the_tree_is_there():
    tree = CONTRIBUTING.split("## Where things are")[1].split("```")[1]
    for name in re.findall(r"^  ([\w./ ]+?)(?:  |$)", tree, re.M):
        for part in name.split():
            assert (ROOT / "sslcells" / part).exists(), part
