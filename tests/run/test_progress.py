"""Progress bars: on rank 0, in a terminal, for the images of all ranks."""

import io

import pytest
from rich.console import Console

from sslcells import ranks
from sslcells.run.progress import bars


@pytest.mark.parametrize(
    ("terminal", "quiet", "shown"), [(True, False, True), (True, True, False), (False, False, False)]
)
def test_only_on_rank_0_and_in_a_terminal(terminal, quiet, shown):
    console = Console(file=io.StringIO(), force_terminal=terminal, quiet=quiet, width=80)
    with bars(console) as bar:
        advance = bar("images of train", 40)
        advance(16)
        advance(24)
    assert ("images of train" in console.file.getvalue()) == shown
    assert ("40/40" in console.file.getvalue()) == shown


def test_an_image_of_rank_0_counts_for_every_rank_up_to_the_total(monkeypatch):
    monkeypatch.setattr(ranks, "world", lambda: 3)
    console = Console(file=io.StringIO(), force_terminal=True, width=80)
    with bars(console) as bar:
        advance = bar("images", 50)
        advance(10)
    assert "30/50" in console.file.getvalue()
    with bars(console) as bar:
        advance = bar("images", 50)
        advance(10)
        advance(10)
    assert "50/50" in console.file.getvalue()
