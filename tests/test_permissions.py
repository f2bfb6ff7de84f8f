"""Who may read what is written: every file follows the umask, and what may not be read is said to be so."""

import os
import shutil
import stat
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest
from trained import make_cells, make_run

from sslcells.cli import main
from sslcells.config import load
from sslcells.delivery.embedding import embed_folder
from sslcells.delivery.export import export
from sslcells.evaluate import evaluate
from sslcells.train import train


@contextmanager
def umask(mask):
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


def modes(folder):
    """Of every file below a folder, and of the folders."""
    return {path.relative_to(folder): stat.S_IMODE(path.stat().st_mode) for path in folder.rglob("*")}


def assert_follows(folder, mask):
    found = modes(folder)
    wrong = {
        str(path): oct(mode)
        for path, mode in found.items()
        if mode != ((0o777 if (folder / path).is_dir() else 0o666) & ~mask)
    }
    assert not wrong
    return {path.name for path in found}


@pytest.mark.parametrize("mask", [0o002, 0o022, 0o027])
def test_an_encoder_follows_the_umask(tmp_path, mask):
    with umask(mask):
        run = make_run(tmp_path / "run")
        export(str(run), onnx=False, say=lambda line: None)
    assert {"encoder.safetensors", "encoder.json", "encoder.pt2", "load.py"} <= assert_follows(tmp_path, mask)


@pytest.mark.slow
@pytest.mark.parametrize("mask", [0o002, 0o027])
def test_everything_that_is_written_follows_the_umask(tmp_path, mask):
    small = [
        "data.size=32",
        "data.train=40",
        "data.val=0",
        "data.test=20",
        "train.global_batch=16",
        "train.total_steps=2",
    ]
    small += ["model.backbone=small_cnn", "model.args={width: 8}", "augment.size=32", "train.workers=0", "evaluate.k=5"]
    with umask(mask):
        run = train(load(None, [*small, f"out={tmp_path / 'runs'}", "log.tracker=tensorboard"]))
        evaluate(run)
        export(str(run), say=lambda line: None)
        embed_folder(str(run), str(make_cells(tmp_path / "cells", 6)), workers=0)
    names = assert_follows(tmp_path, mask)
    assert {"metrics.jsonl", "evaluation.json", "encoder.onnx", "model.safetensors", "embeddings.json"} <= names


@pytest.fixture
def shown():
    """A folder that others may look into, unlike pytest's own."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


@contextmanager
def somebody_else():
    """This process without root's power to read what it may not; others have none."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


@pytest.mark.parametrize("closed", ["encoder.safetensors", "encoder.json", "."])
@pytest.mark.parametrize("command", ["embed", "export", "evaluate", "search"])
def test_what_may_not_be_read_is_said_to_be_so(shown, capsys, command, closed):
    run, cells = make_run(shown / "run"), make_cells(shown / "cells", 2)
    before = modes(shown)
    (run / closed).chmod(0)
    words = {"embed": [str(run), str(cells), "--out", str(shown / "out"), "--cpu"], "search": [str(run), "x.png"]}
    with somebody_else():
        status = main(argv=[command, *words.get(command, [str(run)])])
    said = capsys.readouterr().err
    assert status == 2
    assert "no such" not in said.lower()
    if command != "search" or closed == ".":  # which opens the embeddings first
        assert "permission denied" in said
        assert str(run) in said
        assert len(said.splitlines()) == 1
    (run / closed).chmod(0o755)
    assert set(modes(shown)) >= set(before)


@pytest.mark.parametrize("words", ["kind=folder", "kind=medmnist"])
def test_data_that_may_not_be_read_is_said_to_be_so(shown, capsys, words):
    (shown / "private").mkdir()
    (shown / "private" / "set.npz").write_bytes(b"")
    (shown / "private").chmod(0)
    path = shown / "private" / ("set.npz" if "medmnist" in words else "cells")
    with somebody_else():
        status = main(argv=["train", "--check", f"data.{words}", f"data.path={path}", f"out={shown}"])
    assert status == 2
    assert f"{path}: permission denied" in capsys.readouterr().err


def test_a_configuration_that_may_not_be_read_is_said_to_be_so(shown, capsys):
    (shown / "private").mkdir(mode=0)
    with somebody_else():
        assert main(argv=["train", "--check", "--config", str(shown / "private" / "run.yaml")]) == 2
    assert "permission denied" in capsys.readouterr().err
