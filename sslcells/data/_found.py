"""How a split was read: files, sizes, and what was left out."""

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from sslcells.data._decode import Header, Size


@dataclass(frozen=True)
class Found:
    """How a split was read from files."""

    where: str
    """the folder or file, and why it was chosen"""
    ignored: Mapping[str, tuple[int, str]] = field(default_factory=dict)
    """kind of file that is not an image → number of files, and an example"""
    broken: Mapping[str, str] = field(default_factory=dict)
    """path → reason, for images that were left out"""
    sizes: Sequence[tuple[Size, int, str]] = ()
    """(H, W) in the files, number of files, and an example, for the smallest, the largest and the most common size"""
    kinds: Mapping[str, tuple[int, str]] = field(default_factory=dict)
    """format, colours and bits → number of files, and an example"""
    paged: tuple[int, str, int] | None = None
    """number of files with further pages or frames, which are not read; an example, and its number of pages"""
    headers: int = 0
    """number of files whose size, kind and pages are known"""
    looked: int = 0
    """number of files opened to verify them; the others were verified before"""
    cache: str = ""
    """which images are kept in memory; empty if none are"""
    columns: Sequence[str] = ()
    """lines that say how the columns of a table were understood"""
    notes: Sequence[str] = ()
    """what else a person should know, also in the log"""
    scales: Sequence[str] = ()
    """lines that say how large a pixel is, and what says so"""
    seconds: Mapping[str, float] = field(default_factory=dict)
    """step of opening → seconds"""

    def with_headers(self, names: Sequence[str], headers: Sequence[Header]) -> "Found":
        """A copy with the sizes, kinds and pages from these headers."""
        if not headers:
            return self
        sizes = Counter(header.size for header in headers)
        first: dict[Size, str] = {}
        kinds: dict[str, tuple[int, str]] = {}
        paged: tuple[int, str, int] | None = None
        for name, header in zip(names, headers, strict=True):
            first.setdefault(header.size, name)
            count, example = kinds.get(header.kind, (0, name))
            kinds[header.kind] = count + 1, example
            if header.pages > 1:
                paged = (paged[0] + 1, *paged[1:]) if paged else (1, name, header.pages)
        area = sorted(sizes, key=lambda size: (size[0] * size[1], size))
        shown = [area[0], area[-1], sizes.most_common(1)[0][0]]
        return replace(
            self,
            sizes=[(size, sizes[size], first[size]) for size in shown],
            kinds=kinds,
            paged=paged,
            headers=len(headers),
        )


class Clock:
    """Measures the seconds of named steps."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._began = time.perf_counter()

    def lap(self, name: str) -> None:
        """Add the time since the last lap to the step `name`."""
        now = time.perf_counter()
        self.laps[name] = self.laps.get(name, 0.0) + now - self._began
        self._began = now
