"""What a run's folder says of its starts: version, commit, command."""

import subprocess
import sys

import pytest
from test_train import tiny

from sslcells import __version__, provenance
from sslcells.data import open_splits
from sslcells.run import checkpoint, starts
from sslcells.run.folder import claimed


def test_every_start_that_weights_come_from_is_a_line(tmp_path, monkeypatch):
    run = tiny(tmp_path)
    for word in ("failed", "first", "second"):
        if word == "second":
            monkeypatch.setattr(checkpoint, "newest", lambda folder: folder / "step_00000001")
        monkeypatch.setattr(sys, "argv", ["/opt/bin/sslcells", "train", f"name={word} one"])
        with claimed(run, open_splits(run.data)["train"]):
            pass
    assert len((run.folder / starts.FILE).read_text(encoding="utf-8").splitlines()) == 2
    start = starts.first(run.folder)
    assert (start["sslcells"], start["command"]) == (__version__, "sslcells train 'name=first one'")


@pytest.mark.parametrize("text", [None, "", "no JSON", "[]"])
def test_a_start_that_cannot_be_read_is_not_known(tmp_path, text):
    if text is not None:
        (tmp_path / starts.FILE).write_text(text)
    assert starts.first(tmp_path) == {}


def test_modules_are_named_as_they_are_started():
    train = provenance._PACKAGE / "train.py"
    assert provenance.command([str(train), "a=1"]) == "python -m sslcells.train a=1"
    assert provenance.command([str(train.with_name("__main__.py")), "runs"]) == "python -m sslcells runs"
    assert provenance.command(["/somewhere/train.py"]) == "train.py"


def test_a_commit_says_whether_files_were_changed(tmp_path):
    assert provenance.commit(tmp_path) is None
    git = ["git", "-C", str(tmp_path), "-c", "user.name=x", "-c", "user.email=x@x"]
    (tmp_path / "a").write_text("a")
    for words in (["init", "-q"], ["add", "a"], ["commit", "-qm", "a"]):
        subprocess.run([*git, *words], check=True)
    commit = provenance.commit(tmp_path)
    assert len(commit) == 12
    (tmp_path / "a").write_text("b")
    assert provenance.commit(tmp_path) == commit + "+"
