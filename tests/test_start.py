"""A training of many images begins soon, and says what the time went into."""

import json
import os
import re
import time

import pytest
from PIL import Image

from sslcells.config import load
from sslcells.evaluation import during_training
from sslcells.train import train


@pytest.fixture
def cells(tmp_path):
    for i in range(24):
        file = tmp_path / f"cells/{'ab'[i % 2]}/{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (10 * i, 90, 200)).save(file)
        os.utime(file, (10**9, 10**9))
    (tmp_path / "cells/notes.txt").write_text("x")
    return tmp_path / "cells"


def test_the_first_figures_are_of_few_images_and_the_log_says_where_the_time_went(cells, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(during_training, "LARGE", 12)
    monkeypatch.setattr(during_training, "START", 10)
    out, rows = {}, {}
    for name, most in (("one", "none"), ("two", "8")):
        given = [
            f"data.path={cells}",
            "data.kind=folder",
            "augment.size=16",
            "train.total_steps=1",
            "train.global_batch=8",
        ]
        given += ["train.workers=0", "evaluate.pictures=false", "evaluate.k=2", f"evaluate.max_images={most}"]
        began = time.monotonic()
        train(load(None, [*given, f"out={tmp_path}", f"name={name}"]))
        out[name] = capsys.readouterr().out
        said = re.search(r"first step after ([\d.]+) s", out[name])
        assert said is not None
        assert float(said[1]) <= time.monotonic() - began + 0.1  # not since this process began
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        rows[name] = [json.loads(line) for line in lines]
    first, last = rows["one"][0], rows["one"][-1]
    accuracy = [key for key in last if key.startswith("knn")]
    assert accuracy
    assert {f"start/{key}" for key in accuracy} <= first.keys()
    assert not any(key.startswith("start/") for key in last)
    assert {*accuracy} <= rows["two"][0].keys()  # few as they are, the same at every time
    assert "data: train " in out["one"]
    assert "1 × .txt" in out["one"]
    assert "start: first step after " in out["one"]
    assert "24 images opened to verify them" in out["one"]
    assert "0 images opened to verify them" in out["two"]
    for part in ("listing ", "verifying ", "building ", "figures before training ", "first step "):
        assert part in out["one"]
