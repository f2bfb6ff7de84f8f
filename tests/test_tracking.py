"""Where figures go: metrics.jsonl that never repeats a step, and trackers that training never waits for."""

import json
from pathlib import Path

import pytest
from test_train import tiny

from sslcells import tracking
from sslcells.train import train


@pytest.fixture(autouse=True)
def no_credentials(monkeypatch, tmp_path):
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / ".netrc"))


def test_wandb_is_offline_without_credentials(monkeypatch, tmp_path):
    assert tracking.wandb_mode() == "offline"
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    assert tracking.wandb_mode() == "online"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert tracking.wandb_mode() == "disabled"


@pytest.mark.parametrize(("host", "mode"), [("api.wandb.ai", "online"), ("other.example", "offline")])
def test_wandb_credentials_in_netrc(tmp_path, host, mode):
    (tmp_path / ".netrc").write_text(f"machine {host} login user password secret\n")
    (tmp_path / ".netrc").chmod(0o600)
    assert tracking.wandb_mode() == mode


def test_what_came_after_the_checkpoint_is_forgotten(tmp_path):
    path = tmp_path / "metrics.jsonl"
    rows = [json.dumps({"step": s}) for s in (0, 10, 20, 30)]
    path.write_text("\n".join(rows) + '\n{"step": 4')
    tracking._forget_after(path, 20)
    assert [r["step"] for r in tracking.read_metrics(tmp_path)] == [0, 10, 20]
    tracking._forget_after(path, 0)
    assert tracking.read_metrics(tmp_path) == []


def test_tensorboard_writes_events(tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    folder = train(tiny(tmp_path, "log.tracker=tensorboard", "train.steps=2"))
    assert list(folder.rglob("events.out.tfevents.*"))


def test_a_failing_tracker_does_not_stop_training(tmp_path, monkeypatch, capsys):
    def fail(self, *args, **kwargs):
        raise OSError("no space left")

    monkeypatch.setattr("accelerate.Accelerator.init_trackers", fail)
    folder = train(tiny(tmp_path, "log.tracker=tensorboard", "train.steps=2"))
    assert (folder / "encoder.json").exists()
    assert capsys.readouterr().out.count("no space left") == 1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_wandb_offline_keeps_one_run(tmp_path):
    folder = train(tiny(tmp_path, "log.tracker=wandb", "train.steps=4"))
    name = (folder / "wandb_id.txt").read_text()
    assert list(Path(folder / "wandb").glob(f"offline-run-*-{name}/run-{name}.wandb"))
