"""Checkpoints: damaged ones are skipped, old ones removed, and reading one runs no code."""

import errno
import json
import pickle
import threading
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from sslcells.run import checkpoint


def network(value=0.0):
    net = nn.Linear(3, 2)
    nn.init.constant_(net.weight, value)
    return net


def saved(folder, *steps, keep=3):
    for step in steps:
        states = {"number": step, "tensor": torch.ones(2)}
        path = checkpoint.write(folder, step, checkpoint.files(step, network(step), states), keep)
    return path


def test_what_is_saved_is_loaded(tmp_path):
    path, net = saved(tmp_path, 7), network()
    step, states = checkpoint.load(path, net)
    assert step == 7
    assert states["number"] == 7
    assert (net.weight == 7).all()


def test_the_newest_are_kept(tmp_path):
    saved(tmp_path, 1, 2, 3, 10, 100, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_00000010", "step_00000100"]
    assert checkpoint.newest(tmp_path).name == "step_00000100"


def test_none_is_none(tmp_path):
    assert checkpoint.newest(tmp_path / "nothing") is None


def truncate(path):
    path.write_bytes(path.read_bytes()[:-10])


def alter(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "state.json"])
@pytest.mark.parametrize("damage", [truncate, alter, lambda path: path.unlink()], ids=["truncated", "altered", "gone"])
def test_a_damaged_one_is_named_and_the_one_before_is_used(tmp_path, caplog, name, damage):
    saved(tmp_path, 1, 2)
    damage(tmp_path / "step_00000002" / name)
    if name == "state.json" and damage is alter:
        (tmp_path / "step_00000002" / name).write_text(json.dumps({"step": 2, "sha256": {}}))
    assert checkpoint.newest(tmp_path).name == "step_00000001"
    assert "step_00000002" in caplog.text


def test_an_unfinished_one_is_not_seen(tmp_path):
    saved(tmp_path, 1)
    (tmp_path / "step_00000001").rename(tmp_path / ".step_00000002.partial")
    assert checkpoint.newest(tmp_path) is None
    saved(tmp_path, 2)
    assert [p.name for p in tmp_path.iterdir()] == ["step_00000002"]


class Exploit:
    def __reduce__(self):
        return exec, ("raise SystemExit('code was executed')",)


def test_reading_executes_nothing(tmp_path):
    path = saved(tmp_path, 1)
    torch.save({"x": Exploit()}, path / "optimizer.pt")
    with pytest.raises(pickle.UnpicklingError):
        checkpoint.load(path, network())


def test_the_writer_writes_beside_the_training(tmp_path, monkeypatch):
    """The weights at the time of `save` are written, even if training changes them meanwhile; one at a time."""
    begun, go_on, said, write = threading.Event(), threading.Event(), [], checkpoint.write

    def slowly(*arguments):
        begun.set()
        assert go_on.wait(10)
        return write(*arguments)

    monkeypatch.setattr(checkpoint, "write", slowly)
    net = network(1.0)
    with checkpoint.Writer(tmp_path, 3, said.append) as writer:
        writer.save(1, net, {})
        assert begun.wait(10)
        nn.init.constant_(net.weight, 2.0)
        assert checkpoint.newest(tmp_path) is None
        go_on.set()
        writer.save(2, net, {})
    one, two = network(), network()
    checkpoint.load(tmp_path / "step_00000001", one)
    checkpoint.load(tmp_path / "step_00000002", two)
    assert (one.weight == 1).all()
    assert (two.weight == 2).all()
    assert [line.split(":")[0] for line in said] == ["checkpoint step_00000001", "checkpoint step_00000002"]
    assert "; training waited" in said[0]


def full(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_is_said_and_leaves_the_one_before(tmp_path, monkeypatch):
    with checkpoint.Writer(tmp_path, 3, print) as writer:
        writer.save(1, network(), {})
        writer.wait()
        with monkeypatch.context() as patch:
            patch.setattr(Path, "write_bytes", full)
            writer.save(2, network(), {})
            with pytest.raises(checkpoint.CheckpointError, match=r"step 2 .*No space.* resume from .*step_00000001"):
                writer.wait()
        with pytest.raises(checkpoint.CheckpointError):
            writer.check()
    assert [p.name for p in tmp_path.iterdir()] == ["step_00000001"]


def test_a_folder_that_comes_back_is_waited_for(tmp_path):
    run = tmp_path / "run"
    with checkpoint.Writer(run / "checkpoints", 3, print) as writer:
        writer.save(1, network(), {})  # no folder yet, and none is made in its place
        time.sleep(0.3)
        assert not run.exists()
        run.mkdir()
        writer.wait()
    assert checkpoint.newest(run / "checkpoints").name == "step_00000001"
