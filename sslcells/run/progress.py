"""Progress bars in a terminal."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from sslcells import ranks

Bars = Callable[[str, int], Callable[[int], None]]
"""What a bar counts, and how many images all ranks have of it → a function to call with each number of new images."""


def columns_on(console: Console) -> Progress:
    """A display with the columns that every command shows: what, bar, how many of how many, time left."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console)


def no_bars(what: str, images: int) -> Callable[[int], None]:
    """Show nothing."""
    return lambda new: None


@contextmanager
def bars(console: Console) -> Iterator[Bars]:
    """A bar for each pass over images inside the block; none if the console is quiet or not a terminal.

    The ranks share a pass equally, and rank 0 never has fewer images than another. So each of its images counts for
    all ranks, up to the total.
    """
    if console.quiet or not console.is_terminal:
        yield no_bars
        return
    with columns_on(console) as display:

        def add(what: str, images: int) -> Callable[[int], None]:
            task, seen = display.add_task(what, total=images), 0

            def advance(new: int) -> None:
                nonlocal seen
                seen += new * ranks.world()
                display.update(task, completed=min(images, seen))

            return advance

        yield add
