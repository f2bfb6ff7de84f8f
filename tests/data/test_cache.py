"""Decoded images that are kept in memory: the same pixels, within the budget, shared by processes and ranks."""

import gc
import os
import pickle
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from gloo import on_ranks
from safetensors.torch import load_file
from test_pack import TINY
from test_train import signalled_in, untimed
from trained import make_cells

from sslcells import ranks
from sslcells.config import ConfigError, load
from sslcells.data import _cache, folder, open_splits
from sslcells.data.describe import brief, describe
from sslcells.data.loader import InOrder, read
from sslcells.run.interrupt import Stopped
from sslcells.train import train

ROW = 3 * 20 * 20


@pytest.fixture(scope="module")
def cells(tmp_path_factory):
    made = tmp_path_factory.mktemp("cells")
    make_cells(made / "train", 40, classes=("a", "b"))
    make_cells(made / "val", 6, classes=("b",))
    return made


def config(cells, **fields):
    return folder.Config(path=str(cells), size=20, verify="header", **fields)


def opened(cells, **fields):
    return open_splits(config(cells, cache="ram", **fields))


def batches(images, workers=0):
    order = InOrder([*torch.randperm(40, generator=torch.Generator().manual_seed(3)).tolist(), 5, 5, 7], 9)
    return list(read(images, order, workers, pin_memory=False))


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_those_without_a_cache(cells, workers):
    images = opened(cells)["train"]
    expected = batches(open_splits(config(cells))["train"])
    for _ in range(2):
        for a, b in zip(batches(images, workers), expected, strict=True):
            assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_each_image_is_decoded_once_by_all_processes_together(cells, decoded):
    images = opened(cells)["train"]
    batches(images, workers=2)
    decoded.clear()
    batches(images)
    again = pickle.loads(pickle.dumps(images))
    batches(again)
    assert not decoded
    del again
    assert torch.equal(images.pixels(3), images._images.pixels(3))


def test_no_more_than_the_budget_is_kept(cells, decoded):
    room = 10 * (ROW + 1) + 2 * _cache.mmap.PAGESIZE
    splits = opened(cells, cache_gib=room / _cache.GIB)
    expected = batches(open_splits(config(cells))["train"])
    batches(splits["train"])
    decoded.clear()
    for a, b in zip(batches(splits["train"]), expected, strict=True):
        assert torch.equal(a.pixels, b.pixels)
    assert len({*decoded}) == 30
    assert splits["val"]._memory.count == 0
    splits["val"].pixels(0)
    assert "10 of 40 are kept in memory once decoded, 1.12e-05 GiB" in brief(splits)
    assert "cache: 0 of 6 are kept in memory once decoded" in describe(splits)


def test_memory_ends_with_the_images(cells):
    def memories():
        files = Path("/proc/self/fd").iterdir()
        return {file for file in files if file.is_symlink() and "memfd:sslcells-" in os.readlink(file)}

    gc.collect()
    before = memories()
    splits = opened(cells)
    splits["train"].pixels(0)
    assert memories() > before
    del splits
    gc.collect()
    assert memories() == before


def test_more_than_is_free_is_refused(cells, monkeypatch):
    monkeypatch.setattr(_cache, "free_memory", lambda: 40_000)
    with pytest.raises(
        ConfigError, match=r"^data.cache_gib=4: the images would take 6\.\d+e-05 GiB, and 3.73e-05 GiB of"
    ):
        opened(cells)


def test_free_memory_is_that_of_the_cgroup(tmp_path):
    (tmp_path / "own").write_text("0::/job/step\n")
    (tmp_path / "job" / "step").mkdir(parents=True)
    (tmp_path / "job" / "memory.max").write_text("5000\n")
    (tmp_path / "job" / "memory.current").write_text("3000\n")
    (tmp_path / "job" / "memory.stat").write_text("anon 1000\nactive_file 300\ninactive_file 200\n")
    (tmp_path / "job" / "step" / "memory.max").write_text("max\n")
    assert _cache.free_memory(tmp_path, tmp_path / "own") == 2500
    assert _cache.free_memory(tmp_path, tmp_path / "none") > 10**6


def share(cells, apart):
    with patch.object(_cache, "_is_there", lambda file, name: False) if apart else nullcontext():
        splits = opened(cells)
    train = splits["train"]
    first = batches(train) if ranks.rank() == 0 else []
    ranks.barrier()
    kept = int(train._memory.kept(torch.arange(40).numpy()).sum())
    same = batches(train) if ranks.rank() else first
    ranks.barrier()
    return kept, train._memory.count, brief(splits), [b.pixels for b in same]


@pytest.mark.parametrize("apart", [False, True])
def test_ranks_of_a_machine_share_one_memory_or_have_parts_of_the_budget(cells, apart):
    (kept, count, said, a), (kept_there, count_there, _, b) = on_ranks(2, share, cells, apart)
    assert (kept, kept_there) == ((40, 0) if apart else (40, 40))
    assert count == count_there == 40
    assert ("a part for each of 2 ranks" if apart else "2 ranks share it") in said
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def ending(run):
    made = train(run)
    return untimed(made), load_file(made / "encoder.safetensors")


def test_a_run_goes_on_with_a_cache_to_the_same_end(cells, tmp_path):
    words = [*TINY, "data.kind=folder", f"data.path={cells}", "data.size=20", "data.verify=header"]
    rows, weights = ending(load(None, [*words, f"out={tmp_path}", "name=plain", "train.workers=0"]))
    with pytest.raises(Stopped):
        train(load(None, [*words, f"out={tmp_path}", "train.workers=0"]), signalled_in(2, 10))
    again, same = ending(load(None, [*words, f"out={tmp_path}", "train.workers=1", "data.cache=ram"]))
    assert again == rows
    assert all(torch.equal(weights[key], same[key]) for key in weights)
