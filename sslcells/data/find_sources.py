"""Finds images of a folder that show the same place of a slide, if file names do not tell.

Copies of a photograph that are turned, mirrored, shifted or cropped keep its colours and its details. Nearest
neighbours by colour are candidates. SIFT features (Lowe 2004, doi 10.1023/B:VISI.0000029664.99615.94) of both images
decide: they are matched by RootSIFT's distance, and RANSAC looks for one rotation, scale and shift that maps the
matches. Pairs that pass form groups. Then the groups are compared with one another, whatever their colours, as one
place may have been photographed twice.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits
from torch import Tensor

from sslcells import launcher
from sslcells.config import extra
from sslcells.data import Decoder, Unreadable, look_up_sources
from sslcells.data._names import some
from sslcells.losses import unit

_SIDE = 320
"""The longer side of an image, in pixels, when its features are computed."""
_FEATURES = 300
_RATIO, _REACH = 0.8, 6.0
"""Threshold of Lowe's ratio test; largest distance of a mapped feature from its match, in pixels."""
_SCALES = 0.5, 2.0
"""Smallest and largest scale between two images of one source."""
_FAILS, _FAILS_BETWEEN = 5, 3
"""Failed pairs after which two groups are not compared further: by colour neighbours, and between all groups."""
_STRICTER = 2
"""Factor on `inliers` between groups: there are many pairs of groups, and few of them show one place."""
_BLOCK = 512
"""Rows whose cosines are in memory at a time."""

Floats = NDArray[np.float32]


class Details(NamedTuple):
    """SIFT features of an image and of its mirror image."""

    place: tuple[Floats, Floats]
    """(n, 2) each: x and y in pixels of the image resized to 320 px"""
    descriptor: tuple[NDArray[np.uint8], NDArray[np.uint8]]
    """(n, 128) each"""


class Pair(NamedTuple):
    """Two images that were compared, by their indices."""

    one: int
    other: int
    inliers: int


class Sources(NamedTuple):
    """Images grouped by source."""

    paths: list[str]
    group: list[int]
    """for each image the index of the first image of its group"""
    best: list[int]
    """for each image the most inliers in a pair that passed; 0 if none did"""
    unreadable: list[tuple[str, str]]
    passed: list[Pair]
    failed: list[Pair]


def find_sources(
    files: Sequence[Path],
    names: Sequence[str],
    inliers: int,
    neighbours: int,
    between: int,
    say: Callable[[str], None],
) -> Sources:
    """Group images that share at least `inliers` details; each is compared with its `neighbours` nearest by colour.

    Then `between` pairs of these groups are compared, which must share twice as many.

    Raises:
        ConfigError: if the extra `sources` is not installed.
    """
    cv2 = extra("cv2", "sources", "finding the sources of images")
    cv2.setNumThreads(1)
    decoder = Decoder(channels=3, size=None, fit="crop", intensity="percentile")
    threads = launcher.cores()

    def read(file: Path) -> tuple[Floats, Details] | str:
        try:
            return _colour_and_details(cv2, decoder(str(file)).permute(1, 2, 0).numpy())
        except Unreadable as error:
            return str(error)

    with ThreadPoolExecutor(threads) as pool, threadpool_limits(1, user_api="blas"):  # the pool uses all cores
        results = list(pool.map(read, files))
        unreadable = [(name, seen) for name, seen in zip(names, results, strict=True) if isinstance(seen, str)]
        kept = [(name, seen) for name, seen in zip(names, results, strict=True) if not isinstance(seen, str)]
        say(f"{len(kept):,} images read; comparing")
        details = [detail for _, (_, detail) in kept]
        colours = np.stack([colour for _, (colour, _) in kept]) if kept else np.zeros((0, 1), np.float32)
        joined = Groups(cv2, details, pool, 4 * threads)
        tensor = torch.from_numpy(colours)
        joined.run(_candidates(tensor, neighbours), inliers, _FAILS)
        groups = joined.groups()
        among, nearest = len(groups) * (len(groups) - 1) // 2, _nearest_groups(tensor, groups, between)
        say(f"{len(groups):,} groups; comparing {len(nearest):,} of {among:,} pairs of groups")
        joined.run(_pairs_between(tensor, groups, nearest), _STRICTER * inliers, _FAILS_BETWEEN)
    return Sources(
        [name for name, _ in kept], joined.group_of_each(), joined.best, unreadable, joined.passed, joined.failed
    )


def _colour_and_details(cv2: Any, pixels: NDArray[np.uint8]) -> tuple[Floats, Details]:
    """Colours (320,), square roots of the shares of lightness and hue, the same after rotation; and the details."""
    lab = cv2.cvtColor(pixels, cv2.COLOR_RGB2LAB)
    light = cv2.calcHist([lab], [0], None, [64], [0, 256]).ravel()
    hue = cv2.calcHist([lab], [1, 2], None, [16, 16], [90, 180, 90, 180]).ravel()
    colour = np.sqrt(np.concatenate([light, hue]) / (2 * light.sum())).astype(np.float32)
    grey = cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)
    scale = _SIDE / max(grey.shape)
    grey = cv2.resize(grey, None, fx=scale, fy=scale, interpolation=cv2.INTER_CUBIC if scale > 1 else cv2.INTER_AREA)
    sift = cv2.SIFT_create(nfeatures=_FEATURES, contrastThreshold=0.02)
    places, descriptors = [], []
    for view in (grey, np.ascontiguousarray(grey[:, ::-1])):
        points, found = sift.detectAndCompute(view, None)
        places.append(np.array([p.pt for p in points], np.float32).reshape(-1, 2))
        descriptors.append(np.zeros((0, 128), np.uint8) if found is None else found.astype(np.uint8))
    return colour, Details((places[0], places[1]), (descriptors[0], descriptors[1]))


class Groups:
    """Groups of images that grow by comparing pairs; two images of one group are not compared again."""

    def __init__(self, cv2: Any, details: Sequence[Details], pool: ThreadPoolExecutor, ahead: int) -> None:
        self._cv2, self._details, self._pool, self._ahead = cv2, details, pool, ahead
        self._parent = list(range(len(details)))
        self.best = [0] * len(details)
        """as in Sources, like `passed` and `failed`"""
        self.passed: list[Pair] = []
        self.failed: list[Pair] = []

    def run(self, candidates: Iterator[tuple[int, int]], inliers: int, patience: int) -> None:
        """Join candidates that share at least `inliers` details; skip two groups after `patience` failed pairs."""
        fails: Counter[tuple[int, int]] = Counter()
        while True:
            batch: list[tuple[int, int]] = []
            for pair in candidates:
                groups = self._groups_of(*pair)
                if groups[0] != groups[1] and fails[groups] < patience:
                    batch.append(pair)
                if len(batch) == self._ahead:
                    break
            if not batch:
                return
            for compared in self._pool.map(self._compare, batch):
                groups = self._groups_of(compared.one, compared.other)
                if compared.inliers >= inliers:
                    self._parent[groups[1]] = groups[0]
                    self.passed.append(compared)
                    for i in (compared.one, compared.other):
                        self.best[i] = max(self.best[i], compared.inliers)
                else:
                    self.failed.append(compared)
                    fails[groups] += 1

    def group_of_each(self) -> list[int]:
        """For each image the first image of its group."""
        return [self._first(i) for i in range(len(self._parent))]

    def groups(self) -> list[list[int]]:
        """The images of each group."""
        members: dict[int, list[int]] = {}
        for i, first in enumerate(self.group_of_each()):
            members.setdefault(first, []).append(i)
        return list(members.values())

    def _first(self, i: int) -> int:
        parent = self._parent
        while parent[i] != i:
            parent[i] = i = parent[parent[i]]
        return i

    def _groups_of(self, i: int, j: int) -> tuple[int, int]:
        a, b = self._first(i), self._first(j)
        return min(a, b), max(a, b)

    def _compare(self, pair: tuple[int, int]) -> Pair:
        return Pair(*pair, shared(self._cv2, self._details[pair[0]], self._details[pair[1]]))


def _candidates(colours: Tensor, neighbours: int) -> Iterator[tuple[int, int]]:
    """Pairs of neighbours by colour, each pair once: all images' nearest neighbours first, then the second nearest."""
    seen: set[tuple[int, int]] = set()
    for column in _nearest_by_colour(colours, neighbours).T.tolist():
        for i, j in enumerate(column):
            pair = (min(i, j), max(i, j))
            if pair not in seen:
                seen.add(pair)
                yield pair


def _nearest_groups(colours: Tensor, groups: Sequence[Sequence[int]], most: int) -> list[tuple[int, int]]:
    """At most `most` pairs of groups, nearest by the cosine of their mean colours, in the order of `_candidates`."""
    mean = torch.stack([colours[members].mean(0) for members in groups]) if groups else colours
    each = -(-2 * most // max(1, len(groups)))  # neighbours of a group: a pair may appear twice, once for each group
    return list(islice(_candidates(unit(mean), each), most))


def _pairs_between(
    colours: Tensor, groups: Sequence[Sequence[int]], pairs: Sequence[tuple[int, int]]
) -> Iterator[tuple[int, int]]:
    """For each pair of groups the images that are nearest by colour, each image in one pair."""
    for a, b in pairs:
        cosine = colours[groups[a]] @ colours[groups[b]].T
        for _ in range(min(_FAILS_BETWEEN, *cosine.shape)):
            i, j = divmod(int(cosine.argmax()), cosine.shape[1])
            cosine[i] = cosine[:, j] = -1
            yield groups[a][i], groups[b][j]


def _nearest_by_colour(rows: Tensor, count: int) -> Tensor:
    """Unit rows (N, F) → (N, ≤ count) int64: for each row the others with the largest cosine."""
    near = []
    for start in range(0, len(rows), _BLOCK):
        cosine = rows[start : start + _BLOCK] @ rows.T
        at = torch.arange(len(cosine))
        cosine[at, start + at] = -1
        near.append(cosine.topk(min(count, len(rows) - 1)).indices)
    return torch.cat(near) if near else torch.zeros(0, 0, dtype=torch.int64)


def shared(cv2: Any, one: Details, other: Details) -> int:
    """Number of details of `one` that one rotation, scale and shift maps onto `other`, as it is or mirrored."""
    best = 0
    place, mine = one.place[0], _root_sift(one.descriptor[0])
    for flip in (0, 1):
        if min(len(mine), len(other.descriptor[flip])) < 4:
            continue
        cosine = mine @ _root_sift(other.descriptor[flip]).T
        nearest = cosine.argmax(1)
        rows = np.arange(len(cosine))
        first = cosine[rows, nearest]
        cosine[rows, nearest] = -1
        clear = (1 - first) < _RATIO**2 * (1 - cosine.max(1))  # of unit vectors |a − b|² = 2 − 2 cos
        if clear.sum() < 4:
            continue
        moved, inside = cv2.estimateAffinePartial2D(
            place[clear], other.place[flip][nearest[clear]], method=cv2.RANSAC, ransacReprojThreshold=_REACH
        )
        if moved is None or not _SCALES[0] < np.hypot(moved[0, 0], moved[1, 0]) < _SCALES[1]:
            continue
        best = max(best, len(np.unique(place[clear][inside.ravel() > 0].round(), axis=0)))
    return best


def _root_sift(descriptor: NDArray[np.uint8]) -> Floats:
    """RootSIFT (Arandjelović and Zisserman, CVPR 2012, section 3): square roots of shares, rows of norm 1."""
    x = descriptor.astype(np.float32)
    rooted: Floats = np.sqrt(x / np.maximum(x.sum(1, keepdims=True), 1e-9))
    return rooted


def agreement(found: Sources, table: Mapping[str, str]) -> str:
    """Precision and recall of pairs of one source, among the images in a table of path → known source.

    It says how many images are in the table, and which are not.
    """
    known = look_up_sources(found.paths, dict(table), None)
    both = [(g, source) for source, g in zip(known, found.group, strict=True) if source is not None]
    without = [path for path, source in zip(found.paths, known, strict=True) if source is None]
    if not both:
        return "none of these images is in the table of known sources; its paths must be relative to the folder"

    def pairs(keys: Sequence[Any]) -> int:
        return sum(n * (n - 1) // 2 for n in Counter(keys).values())

    hits, claimed, true = pairs(both), pairs([g for g, _ in both]), pairs([s for _, s in both])
    precision, recall = (f"{hits / n:.4f}" if n else "–" for n in (claimed, true))
    left_out = f" ({len(without):,} of {len(known):,} have none: {some(without)})" if without else ""
    return (
        f"of {len(both):,} images with a known source{left_out}: precision {precision} of {claimed:,} pairs found, "
        f"recall {recall} of {true:,} pairs known"
    )
