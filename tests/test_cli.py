"""The command line."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image
from wandb_standin import handmade, no_credentials, server  # noqa: F401 (fixtures; the second is for every test)

from sslcells import shipped
from sslcells.checks import Check
from sslcells.cli import main
from sslcells.config import load
from sslcells.data import DataError
from sslcells.delivery import DeliveryError
from sslcells.errors import ConfigError, TrainingError, UserError
from sslcells.ranks import Lost
from sslcells.run.checkpoint import CheckpointError
from sslcells.run.interrupt import Stopped
from sslcells.run.tracking import LogError
from sslcells.run.wandb_sync import TrackingError

SMALL = ["data.train=40", "data.val=10", "data.test=0", "data.size=32", "augment.size=32", "train.global_batch=8"]


def test_check_prints_a_tree_that_reads_back_and_what_follows(capsys, tmp_path):
    assert main("train", ["--check", *SMALL, "train.total_epochs=3"]) == 0
    out = capsys.readouterr().out
    tree, consequences = out.split("\n\n")
    (tmp_path / "config.yaml").write_text(tree)
    assert load(str(tmp_path / "config.yaml")) == load(None, [*SMALL, "train.total_epochs=3"])
    assert "negatives per anchor: 14, of 16 rows" in consequences
    assert "sampler: shuffle: every image once per epoch, except 0 that do not fill a batch" in consequences
    assert "steps: 15, 5 an epoch, warm-up 5" in consequences
    assert "memory of the loss" in consequences


def test_changes_may_stand_on_both_sides_of_an_option(capsys, tmp_path):
    (tmp_path / "a.yaml").write_text("optim: {lr: 0.5}\n")
    arguments = [*SMALL, "optim.lr=0.25", "--config", str(tmp_path / "a.yaml"), "name=after", "optim.lr=0.125"]
    assert main("train", ["--check", *arguments]) == 0
    out = capsys.readouterr().out
    assert "name: after" in out
    assert "lr: 0.125" in out
    for wrong in (["train", "name=x", "--chek", "name=y"], ["export", "run", "another"]):
        with pytest.raises(SystemExit) as status:
            main(None, wrong)
        assert status.value.code == 2
        assert f"unrecognized arguments: {wrong[2]}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("model.encoder=nowhere", "nowhere holds no encoder.json"),
        ("model.encoder=~/nowhere", "home/nowhere holds no encoder.json"),
        ("model.args={features_only: true}", "features_only=True cannot be"),
        ("model={backbone: vit_tiny_patch16_224, args: {depth: 1}}", "model.args={depth: 1, img_size: 32} would do"),
        ("log.tracker=tensorboard", "log.tracker=tensorboard needs tensorboard: pip install 'sslcells[tensorboard]'"),
        ("log.tracker=wandb", "log.tracker=wandb needs wandb: pip install wandb"),
    ],
)
def test_check_refuses_what_training_would(change, words, capsys, monkeypatch, tmp_path):
    for module in ("tensorboard", "tensorboardX", "wandb"):
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for arguments in (["--check"], [f"out={tmp_path}"]):
        assert main("train", [*arguments, *SMALL, change]) == 2
        assert words in capsys.readouterr().err
    assert not list(tmp_path.rglob("metrics.jsonl"))


PATHS = [
    ["evaluate", "~/nothing"],
    ["export", "~/nothing"],
    ["embed", "~/nothing", "~/images"],
    ["search", "~/nothing", "~/image.png"],
    ["sources", "~/nothing"],
    ["sync", "~/nothing"],
    ["train", "--config", "~/nothing.yaml"],
    ["compare", "--config", "~/nothing.yaml"],
    ["train", "data.kind=folder", "data.path=~/nothing", "--check"],
    ["train", "data.kind=medmnist", "data.path=~/nothing", "--check"],
    ["train", "data.kind=medmnist", "data.set=bloodmnist", "data.root=~/nothing", "--check"],
    ["train", "data.kind=torchvision", "data.root=~/nothing", "--check"],
    ["train", "data.kind=folder", "data.path=~", "data.sources=~/nothing", "--check"],
]


@pytest.mark.parametrize("argv", PATHS, ids=" ".join)
def test_a_tilde_is_the_home_folder_in_every_path(argv, tmp_path, monkeypatch, capsys):
    """What is not there is looked for there; nothing called ~ appears here."""
    home, here = tmp_path / "my_home", tmp_path / "here"
    home.mkdir()
    here.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(here)
    Image.new("RGB", (32, 32)).save(home / "cell.png")
    looked = []
    real = os.path.expanduser
    monkeypatch.setattr(os.path, "expanduser", lambda path: looked.append(str(path)) or real(path))
    with contextlib.suppress(SystemExit):
        assert main(None, argv) == 2
    said = capsys.readouterr().err
    wanted = next(word for word in reversed(argv) if "~/" in word).rpartition("=")[2]
    assert wanted in looked or f"{home}/nothing" in said, said
    assert not list(here.iterdir())


def test_a_tilde_in_what_is_written(tmp_path, monkeypatch, capsys):
    home, here = tmp_path / "my_home", tmp_path / "here"
    here.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(here)
    assert load(None, ["out=~/runs"]).folder == home / "runs" / "quickstart"
    assert load(None, ["out=~nobody-here/runs"]).folder == Path("~nobody-here/runs/quickstart")
    assert main(None, ["init", "~/mine"]) == 0
    assert (home / "mine" / "slurm").is_dir()
    assert not list(here.iterdir())


def test_paths_are_read_in_one_place():
    package = Path(shipped.__file__).parent
    named = {file.name for file in package.rglob("*.py") if ".expanduser(" in file.read_text(encoding="utf-8")}
    assert named == {"values.py"}


def test_check_says_what_micro_batches_change(capsys):
    assert main("train", ["--check", *SMALL, "train.micro_batch=4"]) == 0
    assert "BatchNorm" in capsys.readouterr().out


def test_check_counts_the_ranks_of_the_launch(capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert main("train", ["--check", *SMALL]) == 2
    assert "train.global_batch=8 does not divide over 3 ranks" in capsys.readouterr().err


def test_debug_shows_every_station(capsys):
    assert main("train", ["--debug", *SMALL, "model.backbone=small_cnn", "train.total_steps=1"]) == 0
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


LIGHT = """
import sys
from sslcells.cli import _COMMANDS, main
helps = [[name, "--help"] for name in _COMMANDS]
wrong = [["trian"], ["train", "--chek"], ["train", "--config", "nothing"], ["recipes", "x"]]
wrong += [["compare", "train.total_steps"]]
for argv in [["--help"], ["--version"], *helps, *wrong, ["recipes"], ["recipes", "folder"], ["init", sys.argv[1]]]:
    try:
        status = main(None, argv)
    except SystemExit as ended:
        status = ended.code
    assert status == (2 if argv in wrong else 0), argv
    heavy = {"torch", "accelerate", "numpy", "timm", "omegaconf", "rich"} & set(sys.modules)
    assert not heavy, (argv, heavy)
"""


def test_what_needs_no_torch_does_not_import_it(tmp_path):
    command = [sys.executable, "-c", LIGHT, str(tmp_path / "mine")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_every_error_for_the_user_is_known_by_its_base():
    """So the command line tells it without importing its module."""
    errors = CheckpointError, DataError, DeliveryError, LogError, Lost, Stopped, TrackingError, TrainingError
    assert all(issubclass(error, UserError) and error.status == 1 for error in errors)
    assert (ConfigError.status, Stopped(signal.SIGTERM, "").status, Stopped(signal.SIGUSR1, "").status) == (2, 143, 0)
    assert [error for error in errors if error.one_ranks] == [DataError, Lost]


def test_an_unknown_command(capsys):
    with pytest.raises(SystemExit) as status:
        main(None, ["trian"])
    assert status.value.code == 2
    assert "trian" in capsys.readouterr().err


@pytest.fixture
def doctor(monkeypatch):
    """The doctor without what takes long: two ranks and a training."""
    from sslcells import doctor

    monkeypatch.setattr(doctor, "two_ranks", lambda: Check("two ranks", True, "met"))
    monkeypatch.setattr(doctor, "speed", lambda: [Check("decoding", None, "slow", "buy [more]")])
    return doctor


def test_doctor(doctor, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    assert main("doctor", []) == 0
    out = capsys.readouterr().out
    assert re.search(r"decoding +│ look +│ slow +│ buy \[more\]", out)
    assert re.search(r"gradient of NT-Xent +│ pass", out)
    assert "FAIL" not in out
    monkeypatch.setattr(doctor.gradients, "gradients", lambda *_: [Check("gradient of X", False, "off", "report")])
    with pytest.raises(SystemExit) as ended:
        main("selfcheck", [])  # its former name
    assert ended.value.code == 1
    assert re.search(r"gradient of X +│ FAIL +│ off +│ report", capsys.readouterr().out)


def synced(*folders):
    with pytest.raises(SystemExit) as status:
        main(None, ["sync", *map(str, folders)])
    return status.value.code


@pytest.mark.slow
def test_sync_sends_several_runs_and_says_what_is_wrong_with_others(tmp_path, server, capsys):  # noqa: F811
    """A run that is in use is sent but for its newest step; one that is no run does not stop the others."""
    one, two = handmade(tmp_path / "one", 0, 5), handmade(tmp_path / "two", 0, 5, 10)
    (one / "encoder.json").touch()
    (two / "lock.json").touch()
    assert main(None, ["sync", str(one)]) == 0
    assert f"{one}: 2 steps sent, up to step 5" in capsys.readouterr().out
    assert server.steps() == [0, 5]
    (tmp_path / "empty").mkdir()
    assert synced(tmp_path / "none", tmp_path / "empty", two) == 2
    told = capsys.readouterr()
    assert f"{tmp_path / 'none'}: no such folder" in told.err
    assert f"{tmp_path / 'empty'}: no run: there is no config.yaml" in told.err
    assert "2 steps sent, up to step 5; step 10 is kept back" in told.out
    (two / "metrics.jsonl").unlink()
    assert synced(two) == 2
    assert "there is no metrics.jsonl" in capsys.readouterr().err


def test_sync_without_a_key(tmp_path, capsys):
    assert synced(handmade(tmp_path / "run", 0)) == 1
    assert "no key for W&B here: set WANDB_API_KEY" in capsys.readouterr().err


def test_sync_asked_to_stay_offline(tmp_path, capsys, server, monkeypatch):  # noqa: F811
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert synced(handmade(tmp_path / "run", 0)) == 1
    assert "WANDB_MODE=offline" in capsys.readouterr().err


@pytest.mark.slow
def test_sync_without_a_network(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    began = time.monotonic()
    assert synced(handmade(tmp_path / "run", 0)) == 1
    assert time.monotonic() - began < 75
    told = capsys.readouterr().err
    assert "W&B cannot be reached, or refuses" in told
    assert "connection refused" in told


@pytest.mark.parametrize(
    ("before", "said", "policy"),
    [("", None, "PASSIVE"), ("", "ACTIVE", "ACTIVE"), ("import sys; sys.modules['torch'] = sys; ", None, "None")],
)
def test_threads_that_wait_sleep_unless_the_user_says_otherwise(before, said, policy):
    """With torch's threads there already, the setting would only be a claim."""
    environment = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"}
    environment |= {"OMP_WAIT_POLICY": said} if said else {}
    code = f"{before}import sslcells, os; print(os.environ.get('OMP_WAIT_POLICY'))"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == policy
