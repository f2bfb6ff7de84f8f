"""Storage that is away for a while."""

import errno

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


def test_patience_ends(monkeypatch):
    monkeypatch.setattr(storage, "PATIENCE", 0.5)
    with pytest.raises(OSError, match="away"):
        patiently(failing(100, errno.EIO), "a file")
