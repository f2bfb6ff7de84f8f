"""Images are read in order; a process that dies, or never begins, is no hang."""

import multiprocessing
import os
import pickle
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from sslcells.config import load
from sslcells.data import Batch, DataError, ImageSet, _forked, open_splits, synthetic
from sslcells.data.loader import InOrder, _bytes, ahead, read, read_in_parts, with_workers


class Numbers(ImageSet):
    channels = 1
    classes = ("even", "odd")

    def __init__(self, broken=()):
        self.labels = torch.arange(20) % 2
        self.sources = torch.arange(20) // 2
        self.broken = broken

    def pixels(self, index):
        if index in self.broken:
            raise DataError(f"image {index} is broken")
        return torch.full((1, 2, 2), index, dtype=torch.uint8)

    def name(self, index):
        return str(index)


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_come_in_order_with_their_ids(workers):
    batches = list(read(Numbers(), InOrder(range(19, 0, -2), 4), workers, pin_memory=False))
    assert torch.cat([b.image for b in batches]).tolist() == list(range(19, 0, -2))
    for b in batches:
        assert torch.equal(b.pixels[:, 0, 0, 0].long(), b.image)
        assert torch.equal(b.label, b.image % 2)
        assert torch.equal(b.source, b.image // 2)
    assert len(batches[-1].image) == 2


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_image_is_named(workers):
    with pytest.raises(DataError, match=r"^image 7 is broken$"):
        list(read(Numbers(broken={7}), InOrder(range(20), 4), workers, pin_memory=False))


def test_the_death_of_a_process_that_reads_is_told_in_the_middle_of_anything():
    died = pytest.raises(DataError, match=r"^a process that reads images died, .*: DataLoader worker")
    others = set(multiprocessing.active_children())  # the pool of ranks
    with died, with_workers(read(Numbers(), InOrder(range(20), 4), 1, pin_memory=False)) as batches:
        next(batches)
        for process in set(multiprocessing.active_children()) - others:
            process.kill()
        time.sleep(30)  # no batch is asked for: the signal of the death ends it


@pytest.fixture
def stuck(monkeypatch, tmp_path):
    """As many of the next forks wait for ever in the new process as `stuck(count)` says, before Python is ready."""
    forks = tmp_path / "forks"
    fork = os.fork

    def some_stuck():
        allowed = len(forks.read_bytes())
        if allowed:
            forks.write_bytes(bytes(allowed - 1))
        pid = fork()
        if pid == 0 and allowed:
            while True:
                signal.pause()
        return pid

    monkeypatch.setattr(os, "fork", some_stuck)
    monkeypatch.setattr(_forked, "PATIENCE", 0.1)
    return lambda count: forks.write_bytes(bytes(count))


def test_a_process_that_does_not_begin_is_made_anew(stuck):
    others = set(multiprocessing.active_children())
    stuck(3)
    batches = list(read(Numbers(), InOrder(range(20), 4), 2, pin_memory=False))
    assert torch.cat([b.image for b in batches]).tolist() == list(range(20))
    assert set(multiprocessing.active_children()) <= others


def test_processes_that_never_begin_are_an_error(stuck, monkeypatch):
    others = set(multiprocessing.active_children())
    monkeypatch.setattr(_forked, "PATIENCE", 0.02)
    stuck(100)
    error = r"^a process that reads images did not begin in 6 tries, the last of 0.64 s; train.workers=0 reads"
    with pytest.raises(DataError, match=error):
        list(read(Numbers(), InOrder(range(20), 4), 1, pin_memory=False))
    assert set(multiprocessing.active_children()) <= others


@pytest.mark.parametrize("workers", [0, 1])
def test_errors_of_the_block_pass_and_the_processes_end_with_it(workers):
    others = set(multiprocessing.active_children())  # the pool of ranks
    reading = with_workers(read(Numbers(), InOrder(range(20), 4), workers, pin_memory=False))
    with pytest.raises(RuntimeError, match=r"^something else$"), reading as batches:  # noqa: PT012
        next(batches)
        raise RuntimeError("something else")
    assert set(multiprocessing.active_children()) <= others


def test_synthetic_splits():
    run = load(None, ["data.train=20", "data.val=0", "data.test=10", "data.size=32", "data.classes=4"])
    splits = open_splits(run.data)
    assert list(splits) == ["train", "test"]
    train, test = splits["train"], splits["test"]
    assert train.pixels(3).shape == (3, 32, 32)
    assert torch.equal(train.pixels(3), open_splits(run.data)["train"].pixels(3))
    assert not torch.equal(train.pixels(3), test.pixels(3))
    assert len(set(train.sources.tolist()) | set(test.sources.tolist())) == 30
    assert train.labels.bincount().tolist() == [5, 5, 5, 5]
    assert test.classes == ("neutrophil", "eosinophil", "basophil", "lymphocyte")


def test_a_synthetic_image_is_drawn_once_for_all_processes(monkeypatch):
    monkeypatch.setattr(synthetic, "KEPT", 15 * (3 * 16**2 + 1))
    train = synthetic.open_splits(synthetic.Config(size=16, train=20))["train"]
    (batch,) = read(train, InOrder(range(20), 20), 1, pin_memory=False)
    copied = pickle.loads(pickle.dumps(train))
    assert torch.equal(copied.pixels(3), batch.pixels[3])
    monkeypatch.setattr(synthetic, "draw_smear", None)
    for index in range(15):
        assert torch.equal(train.pixels(index), batch.pixels[index])
    for images, index in [(train, 15), (copied, 4)]:
        with pytest.raises(TypeError, match="not callable"):
            images.pixels(index)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_batch_in_parts_is_the_same_batch(workers):
    whole = list(read(Numbers(), InOrder(range(19, -1, -1), 10), 0, pin_memory=False))
    parted = list(read_in_parts(Numbers(), InOrder(range(19, -1, -1), 10), 5, workers, pin_memory=False))
    assert [[len(part.image) for part in parts] for parts in parted] == [[2] * 5] * 2
    for batch, parts in zip(whole, parted, strict=True):
        for a, b in zip(batch, zip(*parts, strict=True), strict=True):
            assert torch.equal(a, torch.cat(b))
        ids = Batch.ids(parts)
        assert all(torch.equal(a, b) for a, b in zip(ids[1:], batch[1:], strict=True))
        assert ids.pixels.shape == (0, 1, 2, 2)


def test_what_is_read_ahead_is_bounded_by_bytes():
    gib = 2**30
    assert ahead(256 * 3 * 64 * 64, workers=4) == 4
    image = 3 * 224 * 224
    for batch, parts, workers in [(65_536, 1, 1), (65_536, 256, 8), (65_536, 16, 4), (4096, 1, 8), (512, 4, 8)]:
        part = batch // parts * image
        read_ahead = workers * part * ahead(part, workers, parts)
        assert read_ahead <= max(gib, batch * image, workers * part)
        assert read_ahead >= min(gib, batch * image, 4 * workers * batch * image) / 2


def test_the_bytes_of_a_batch_are_those_of_its_images():
    assert _bytes(Numbers(), InOrder(range(20), 4)) == 4 * 4
    assert _bytes(Numbers(broken={0}), InOrder(range(20), 4)) == 0
    assert _bytes(Numbers(), InOrder([], 4)) == 0


SMALL_SHM = 4
"""MiB of /dev/shm, mounted only for the process; Docker gives 64."""


def in_small_shm(*command):
    """Output and exit status of a command with a small /dev/shm; it must end by itself."""
    mount = f"mount -t tmpfs -o size={SMALL_SHM}m tmpfs /dev/shm"
    alone = ["unshare", "--mount", "sh", "-c"]
    if shutil.which("unshare") is None or subprocess.run([*alone, mount], capture_output=True).returncode:
        pytest.skip("a /dev/shm of its own needs unshare and root")
    line = f"{mount} && exec {shlex.join([sys.executable, *command])}"
    return subprocess.run([*alone, line], capture_output=True, text=True, timeout=120)


READ = """
import sys
sys.path[:0] = {path!r}
import torch
from sslcells.data.loader import InOrder, with_workers, read, read_readable
from test_loader import Numbers

class Large(Numbers):
    def pixels(self, index):
        return torch.zeros(1, 1024, 1024 + {readable} * index, dtype=torch.uint8)

how = read_readable if {readable} else read
with with_workers(how(Large(), InOrder(range(20), 5), 1, pin_memory=False)) as batches:
    print(len(list(batches)))
"""


@pytest.mark.parametrize("readable", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_too_little_shared_memory_is_an_error_and_no_hang(readable):
    code = READ.format(path=[str(Path(__file__).parent)], readable=readable)
    said = in_small_shm("-c", code).stderr.splitlines()[-1]
    assert re.search(r"DataError: .* no room in shared memory for 5(\.\d+)? MiB: /dev/shm has 4 MiB, [\d.]+ of", said)
    assert "train.workers=0" in said


@pytest.mark.slow
def test_a_run_with_too_little_shared_memory_says_so_and_ends(tmp_path):
    small = ["data.size=256", "data.train=32", "data.val=0", "data.test=0", "augment.size=32", f"out={tmp_path}"]
    small += [
        "evaluate.holdout=0",
        "train.global_batch=32",
        "model.backbone=small_cnn",
        "train.workers=1",
        "train.device=cpu",
    ]
    ended = in_small_shm("-m", "sslcells", "train", *small)
    assert ended.returncode == 1
    (line,) = ended.stderr.splitlines()
    assert line.startswith("sslcells: a process that reads images found no room in shared memory")
    assert "/dev/shm has 4 MiB" in line
    assert "train.workers" in line
