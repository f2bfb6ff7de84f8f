"""The command line."""

import pytest

from sslcells.cli import main
from sslcells.config import load

SMALL = ["data.train=40", "data.val=0", "data.test=10", "data.size=32", "augment.size=32", "train.global_batch=8"]


def test_check_prints_a_tree_that_reads_back_and_what_follows(capsys, tmp_path):
    assert main("train", ["--check", *SMALL, "train.epochs=3"]) == 0
    out = capsys.readouterr().out
    tree, consequences = out.split("\n\n")
    (tmp_path / "config.yaml").write_text(tree)
    assert load(str(tmp_path / "config.yaml")) == load(None, [*SMALL, "train.epochs=3"])
    assert "negatives per anchor: 14, of 16 rows" in consequences
    assert "steps: 15, 5 an epoch, warm-up 5" in consequences
    assert "memory of the loss" in consequences


def test_check_says_what_micro_batches_change(capsys):
    assert main("train", ["--check", *SMALL, "train.micro_batch=4"]) == 0
    assert "BatchNorm" in capsys.readouterr().out


def test_check_counts_the_ranks_of_the_launch(capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert main("train", ["--check", *SMALL]) == 2
    assert "train.global_batch=8 does not divide over 3 ranks" in capsys.readouterr().err


def test_debug_shows_every_station(capsys):
    assert main("train", ["--debug", *SMALL, "model.backbone=small_cnn", "train.steps=1"]) == 0
    out = capsys.readouterr().out
    for station, shape in (
        ("pixels", "(8, 3, 32, 32)"),
        ("views", "(16, 3, 32, 32)"),
        ("rows", "(16, 128)"),
        ("loss", "()"),
    ):
        assert any(station in line and shape in line for line in out.splitlines()), station


def test_debug_is_for_one_process(capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main("train", ["--debug", *SMALL]) == 2
    assert "2 were launched" in capsys.readouterr().err


@pytest.mark.parametrize("argv", [["--help"], ["train", "--help"], ["--version"]])
def test_help(argv, capsys):
    with pytest.raises(SystemExit) as status:
        main(None, argv)
    assert status.value.code == 0
    assert capsys.readouterr().out


def test_an_unknown_command(capsys):
    with pytest.raises(SystemExit) as status:
        main(None, ["trian"])
    assert status.value.code == 2
    assert "trian" in capsys.readouterr().err


def test_selfcheck(capsys):
    assert main("selfcheck", []) == 0
    out = capsys.readouterr().out
    assert "gradient of NT-Xent" in out
    assert "FAIL" not in out
