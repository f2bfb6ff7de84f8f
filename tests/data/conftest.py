"""Fixtures of the tests of data sets."""

import pytest

from sslcells.data import Decoder


@pytest.fixture
def decoded(monkeypatch):
    """Names of the files that this process decodes, but for those that a device does."""
    seen = []
    whole = Decoder.__call__
    monkeypatch.setattr(Decoder, "__call__", lambda self, file, *um: seen.append(file) or whole(self, file, *um))
    return seen
