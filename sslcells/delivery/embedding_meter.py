"""Progress of `sslcells embed`, as rank 0 sees all ranks."""

import time
from collections.abc import Sequence

from rich.console import Console
from rich.progress import Progress

from sslcells import ranks
from sslcells.delivery.shards import Embeddings
from sslcells.run.progress import LINE, columns_on, line


class Meter:
    """Progress of all ranks as rank 0 sees it: the shards that exist, and its own unfinished one."""

    def __init__(self, embeddings: Embeddings, missing: Sequence[int], console: Console) -> None:
        self._embeddings, self._console = embeddings, console
        self._todo = sum(len(embeddings.members(number)) for number in missing)
        self._before = embeddings.count - self._todo
        self._seen = self._others = 0
        self._progress: Progress | None = None

    def __enter__(self) -> "Meter":
        self._began = self._looked = time.monotonic()
        console, already = self._console, f", {self._before} of them already" if self._before else ""
        of = f"{ranks.world()} rank{'s' * (ranks.world() > 1)}"
        console.print(
            f"{self._embeddings.root}: {self._embeddings.count} images{already}; {of}",
            markup=False,
            soft_wrap=True,
        )
        if console.is_terminal and not console.quiet:
            self._progress = columns_on(console)
            self._task = self._progress.add_task("images", total=self._embeddings.count, completed=self._before)
            self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._progress is not None:
            self._progress.stop()
        if self._seen and error[0] is None:
            self._line()

    def add(self, images: int) -> None:
        """This rank has processed so many more images."""
        self._seen += images
        now = time.monotonic()
        if self._console.quiet or now - self._looked < (1.0 if self._progress is not None else LINE):
            return
        self._looked = now
        if self._progress is not None:
            rate = f"{self._rate():,.0f} images/s"
            self._progress.update(self._task, completed=self._before + self._done(), figures=rate)
        else:
            self._line()

    def _done(self) -> int:
        """Images processed by all ranks since this start, as far as rank 0 can see."""
        there = sum(len(self._embeddings.members(number)) for number in self._embeddings.written())
        return max(self._seen, there - self._before)

    def _rate(self) -> float:
        return self._done() / max(1e-6, time.monotonic() - self._began)

    def _line(self) -> None:
        done, speed = self._done(), self._rate()
        said = line(self._before + done, self._embeddings.count, speed, (self._todo - done) / max(speed, 1e-6))
        self._console.print(said, markup=False, soft_wrap=True)
