"""Progress bars: on rank 0, in a terminal, for the images of all ranks; plain lines elsewhere."""

import io
import re

import pytest
from rich.console import Console

from sslcells import ranks
from sslcells.run import progress
from sslcells.run.progress import bars, columns_on
from sslcells.run.tracking import figures_line


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


def test_plain_lines_where_there_is_no_terminal(monkeypatch):
    monkeypatch.setattr(progress, "LINE", 0.0)
    console = Console(file=io.StringIO(), force_terminal=False, width=20)
    with bars(console) as bar:
        advance = bar("images of val", 40)
        advance(16)
        advance(24)
    first, last = console.file.getvalue().splitlines()
    said = r"\d\d:\d\d:\d\d  16 of 40 images of val  [\d,.]+ images/s  00:00:00 left"
    assert re.fullmatch(said, first)
    assert "40 of 40" in last


def test_beside_a_bar_stand_its_figures_or_its_speed():
    console = Console(file=io.StringIO(), force_terminal=True, width=140, no_color=True)
    with columns_on(console) as display:
        figures = figures_line({"loss": 4.2071, "lr": 1e-3, "images_per_second": 1530.4, "knn/top1": 0.8754})
        display.add_task("training", total=100, completed=50, figures=figures)
        other = display.add_task("images of train", total=40)
        display.update(other, completed=10)
        display.update(other, completed=40)
    said = console.file.getvalue()
    assert "loss 4.207  1,530 images/s  kNN 87.5%" in said
    assert re.search(r"40/40 .*[\d,]+ images/s", said)
