"""Images are decoded once to see whether they can be, whatever process asks."""

import gc
import multiprocessing
import os
import re
import signal
import time
from pathlib import Path

import pytest
from PIL import Image

from sslcells.config import ConfigError
from sslcells.data import DataError, _verified, folder, open_split
from sslcells.data._decode import Decoder


@pytest.fixture
def cells(tmp_path: Path) -> Path:
    for i in range(6):
        written(tmp_path / f"cells/{'ab'[i % 2]}/{i}.png", i)
    return tmp_path / "cells"


def written(file: Path, grey: int, ago: float = 3600.0) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (9, 8), grey).save(file)
    long_ago = file.stat().st_mtime - ago
    os.utime(file, (long_ago, long_ago))


@pytest.fixture
def seen(monkeypatch) -> list[str]:
    """The files whose header is read, or that are decoded."""
    seen: list[str] = []
    header = Decoder.header

    def watched(self, file, whole=False):
        seen.append(Path(file).name)
        return header(self, file, whole)

    monkeypatch.setattr(Decoder, "header", watched)
    return seen


def opened(path: Path, **fields) -> folder.FolderImages:
    images = open_split(folder.Config(path=str(path), **fields), "train")
    assert isinstance(images, folder.FolderImages)
    return images


def memory(cells: Path) -> list[Path]:
    return sorted((cells / ".sslcells").glob("*"))


def test_the_second_time_no_image_is_opened(cells, seen):
    first = opened(cells)
    assert sorted(seen) == [f"{i}.png" for i in range(6)]
    seen.clear()
    second = opened(cells)
    assert not seen
    assert (first.found.looked, second.found.looked) == (6, 0)
    assert second.found.sizes == first.found.sizes == [((8, 9), 6, "a/0.png")] * 3
    assert len(memory(cells)) == 1


def test_what_changed_is_looked_at_again(cells, seen):
    opened(cells)
    seen.clear()
    written(cells / "a/2.png", 77, ago=1800)  # of another time
    before = (cells / "b/3.png").stat()
    Image.new("RGB", (9, 8)).save(cells / "b/3.png")  # of another size
    os.utime(cells / "b/3.png", ns=(before.st_atime_ns, before.st_mtime_ns))
    written(cells / "b/9.png", 9)  # new
    (cells / "a/0.png").unlink()
    assert len(opened(cells)) == 6
    assert sorted(seen) == ["2.png", "3.png", "9.png"]
    seen.clear()
    opened(cells)
    assert not seen


def test_a_file_that_breaks_is_found_out(cells):
    opened(cells)
    (cells / "a/2.png").write_bytes((cells / "a/2.png").read_bytes()[:45])
    with pytest.raises(ConfigError, match=r"1 of 6 images are broken.*\n.*a/2.png"):
        opened(cells)
    assert len(opened(cells, on_error="skip")) == 5
    assert len(opened(cells, on_error="skip")) == 5


def test_a_file_of_this_very_moment_is_not_remembered(cells, seen):
    written(cells / "a/new.png", 5, ago=0)
    opened(cells)
    seen.clear()
    opened(cells)
    assert seen == ["new.png"]


def test_another_way_to_read_looks_again(cells, seen, monkeypatch):
    opened(cells)
    for fields in ({"channels": 1}, {"size": 4}, {"size": 4, "fit": "pad"}, {"verify": "header"}):
        seen.clear()
        opened(cells, **fields)
        assert len(seen) == 6, fields
        seen.clear()
        opened(cells)  # and the first is still known
        assert not seen
    monkeypatch.setattr(_verified, "READER", 10**6)
    opened(cells)
    assert len(seen) == 6


def test_the_memory_of_a_moved_folder_goes_with_it(cells, seen, tmp_path):
    opened(cells)
    seen.clear()
    opened(cells.rename(tmp_path / "scratch"))
    assert not seen


@pytest.mark.parametrize("damage", [lambda b: b"", lambda b: b[:200], lambda b: b[:99] + b"\0" * 99 + b[198:]])
def test_a_damaged_memory_is_ignored(cells, seen, damage, caplog):
    opened(cells)
    (file,) = memory(cells)
    file.write_bytes(damage(file.read_bytes()))
    seen.clear()
    assert len(opened(cells)) == 6
    assert len(seen) == 6
    assert "is damaged" in caplog.text
    seen.clear()
    opened(cells)
    assert not seen


def test_a_folder_that_cannot_be_written_is_remembered_in_the_cache(cells, seen, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    plain = _verified.write_atomically

    def read_only(target, write):
        if target.is_relative_to(cells):
            raise PermissionError(13, "Permission denied")
        plain(target, write)

    monkeypatch.setattr(_verified, "write_atomically", read_only)
    opened(cells)
    seen.clear()
    opened(cells)
    assert not seen
    assert not memory(cells)
    monkeypatch.setattr(
        _verified, "write_atomically", lambda *a: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    )
    written(cells / "b/9.png", 9)
    assert len(opened(cells)) == 7  # nowhere to write: looked at, and not remembered


def test_names_that_are_no_text(cells, seen):
    os.rename(os.fsencode(cells / "a/0.png"), os.fsencode(cells / "a") + b"/\xff\xfe.png")
    opened(cells)
    seen.clear()
    assert len(opened(cells)) == 6
    assert not seen


def _open(path: Path) -> int:
    return len(opened(path))


def test_many_processes_at_once(cells, seen):
    with multiprocessing.get_context("fork").Pool(4) as pool:
        assert pool.map(_open, [cells] * 12) == [6] * 12
    assert len(memory(cells)) == 1  # nothing half written is left
    seen.clear()
    opened(cells)
    assert not seen


def test_old_memories_are_forgotten(cells, monkeypatch):
    monkeypatch.setattr(_verified, "_KEPT", 2)
    for size in (3, 4, 5, 6):
        opened(cells, size=size)
    assert len(memory(cells)) == 2


def test_processes_find_what_threads_find(tmp_path, monkeypatch):
    for i in range(200):
        written(tmp_path / f"cells/{'ab'[i % 2]}/{i:03d}.png", i % 256)
    for i in (0, 77, 199):
        (tmp_path / f"cells/{'ab'[i % 2]}/{i:03d}.png").write_bytes(b"no image")
    found = []
    for few in (10**9, 0):
        monkeypatch.setattr(_verified, "_FEW", few)
        monkeypatch.setattr(_verified.launcher, "cores", lambda: 2)
        decoder = Decoder(channels=1, size=(8, 8), fit="crop", intensity="percentile")
        names = [f"{'ab'[i % 2]}/{i:03d}.png" for i in range(200)]
        blocks = list(_verified._headers(tmp_path / "cells", names, decoder, True))
        found.append([header for block in blocks for header in block])
    assert found[0] == found[1]
    assert [i for i, header in enumerate(found[1]) if header == "not an image"] == [0, 77, 199]


def test_a_process_that_dies_is_told(cells, monkeypatch):
    monkeypatch.setattr(_verified, "_FEW", 0)
    monkeypatch.setattr(_verified.launcher, "cores", lambda: 2)

    def killed(*args):
        time.sleep(0.5)  # the parent has written what it asks
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(Decoder, "header", killed)
    with pytest.raises(DataError, match="a process that reads images died") as error:
        opened(cells)
    assert error.value.__context__ is not None  # keeps the traceback, which does not keep torch's iterator
    assert not [x for x in gc.get_objects() if type(x).__name__ == "_MultiProcessingDataLoaderIter"]


def test_how_long_the_first_look_takes_is_told_and_told_again(cells, monkeypatch, caplog):
    monkeypatch.setattr(_verified, "_BLOCK", 2)
    for name in ("_TELL", "_AGAIN"):
        monkeypatch.setattr(_verified, name, -1.0)
    opened(cells)
    said = [record.getMessage() for record in caplog.records]
    assert [re.search(r"looked at (\d) of 6 images, once: about \d+ s more", line)[1] for line in said] == [
        "2",
        "4",
        "6",
    ]
