"""Storage that is away for a while."""

import errno
import json
import math
import time
from pathlib import Path

import pytest

from sslcells import storage
from sslcells.storage import patiently


def failing(times, number):
    left = iter(range(times))

    def call():
        if next(left, None) is not None:
            raise OSError(number, "away")
        return "here"

    return call


def test_what_comes_back_is_waited_for(caplog):
    assert patiently(failing(3, errno.ENOENT), "images/1.png") == "here"
    assert caplog.text.count("images/1.png: away") == 1


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, None])
def test_what_waiting_does_not_mend_is_raised_at_once(number):
    calls = failing(1, number)
    with pytest.raises(OSError, match="away"):
        patiently(calls, "a file")
    assert calls() == "here"


def test_patience_ends_and_the_next_call_is_tried_once(monkeypatch):
    monkeypatch.setattr(storage, "PATIENCE", 0.5)
    monkeypatch.setattr(storage, "_away_since", None)
    with pytest.raises(OSError, match="away"):
        patiently(failing(100, errno.EIO), "a file")
    began = time.monotonic()
    for _ in range(20):
        with pytest.raises(OSError, match="away"):
            patiently(failing(100, errno.EIO), "another file")
    assert time.monotonic() - began < 0.4
    assert patiently(failing(0, errno.EIO), "a file") == "here"
    assert patiently(failing(2, errno.EIO), "a file") == "here"  # patient anew


def test_json_holds_no_nan():
    """What is not a number in JSON becomes null, at any depth; every other value comes back as it was."""
    value = {"a": math.nan, "b": [1.5, -math.inf, (math.inf, "é\udcff")], "c": {"d": True, "e": None, "f": 3}}
    text = storage.json_text(value)
    strict = json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} in {text}"))
    assert strict == {"a": None, "b": [1.5, None, [None, "é\udcff"]], "c": {"d": True, "e": None, "f": 3}}
    text.encode()


def test_no_file_is_written_as_json_but_through_one_writer():
    """A rule of the tree: json.dumps writes bare NaN."""
    package = Path(storage.__file__).parent
    others = [p.name for p in package.rglob("*.py") if "json.dump" in p.read_text(encoding="utf-8")]
    kept = ["_columns.py", "encoder.py", "listed.py"]  # digests of JSON, and nested values of a table as text
    assert sorted(others) == [*kept, "storage.py"]
