"""How far a command is: bars in a terminal, plain lines elsewhere."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from sslcells import ranks

Bars = Callable[[str, int], Callable[[int], None]]
"""What a bar counts, and how many images all ranks have of it → a function to call with each number of new images."""
LINE = 15.0
"""Seconds between two plain lines."""


class _Figures(ProgressColumn):
    """The figures of a task, or else how many images a second it makes."""

    def render(self, task: Task) -> Text:
        known = task.fields.get("figures")
        speed = task.finished_speed or task.speed
        return Text(known if known is not None else f"{speed:,.0f} images/s" if speed else "")


def columns_on(console: Console) -> Progress:
    """A display with the columns that every command shows: what, bar, how many of how many, figures, time left."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _Figures(), TimeRemainingColumn()
    return Progress(*columns, console=console)


def line(done: int, total: int, speed: float, left: float, what: str = "images") -> str:
    """`12:00:00  300 of 1000 images  52.1 images/s  00:00:13 left`; `left` in seconds."""
    remaining = time.strftime("%H:%M:%S", time.gmtime(left))
    return f"{time.strftime('%H:%M:%S')}  {done} of {total} {what}  {speed:,.1f} images/s  {remaining} left"


def no_bars(what: str, images: int) -> Callable[[int], None]:
    """Show nothing."""
    return lambda new: None


@contextmanager
def bars(console: Console) -> Iterator[Bars]:
    """A bar for each pass over images inside the block, or in no terminal a line every LINE s; none if it is quiet.

    The ranks share a pass equally, and rank 0 never has fewer images than another. So each of its images counts for
    all ranks, up to the total.
    """
    if console.quiet:
        yield no_bars
    elif not console.is_terminal:
        yield lambda what, images: _lines(console, what, images)
    else:
        with columns_on(console) as display:

            def add(what: str, images: int) -> Callable[[int], None]:
                task, seen = display.add_task(what, total=images), 0

                def advance(new: int) -> None:
                    nonlocal seen
                    seen += new * ranks.world()
                    display.update(task, completed=min(images, seen))

                return advance

            yield add


def _lines(console: Console, what: str, images: int) -> Callable[[int], None]:
    began = told = time.monotonic()
    seen = 0

    def advance(new: int) -> None:
        nonlocal seen, told
        seen = min(images, seen + new * ranks.world())
        now = time.monotonic()
        if now - told >= LINE:
            told, speed = now, seen / (now - began)
            left = (images - seen) / max(speed, 1e-6)
            console.print(line(seen, images, speed, left, what), markup=False, soft_wrap=True)

    return advance
