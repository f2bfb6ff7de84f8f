"""What a data set knows of how it was read."""

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from sslcells.data._decode import Header, Size


@dataclass(frozen=True)
class Found:
    """How a split was read: where from, and what was left out of it."""

    where: str
    """the folder or file, and why this one"""
    ignored: Mapping[str, tuple[int, str]] = field(default_factory=dict)
    """kind of file → how many there were that are no images, and the path of one"""
    broken: Mapping[str, str] = field(default_factory=dict)
    """path → reason, of the images that were left out"""
    sizes: Sequence[tuple[Size, int, str]] = ()
    """(H, W) of the files as they are, how many, and one: the smallest, the largest and the most common size"""
    kinds: Mapping[str, tuple[int, str]] = field(default_factory=dict)
    """format, colours and bits → how many files, and one"""
    paged: tuple[int, str, int] | None = None
    """how many files have further pages or frames, which are not read; one of them, and its number of pages"""
    headers: int = 0
    """of how many files sizes, kinds and pages are known"""
    looked: int = 0
    """how many files were opened to verify them; the others were remembered"""
    seconds: Mapping[str, float] = field(default_factory=dict)
    """what the time of opening went into"""

    def with_headers(self, names: Sequence[str], headers: Sequence[Header]) -> "Found":
        """This, and what the headers of files with these names say."""
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
    """Seconds from one lap to the next."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._began = time.perf_counter()

    def lap(self, name: str) -> None:
        """What passed since the last was this."""
        now = time.perf_counter()
        self.laps[name] = self.laps.get(name, 0.0) + now - self._began
        self._began = now
