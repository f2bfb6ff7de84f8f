"""`sslcells sources`: which images of a folder show one place of a slide, where no name says so.

Turned, mirrored, shifted and cropped copies of a photograph keep its colours and its details. Neighbours by colour are
candidates; SIFT features (Lowe 2004, doi 10.1023/B:VISI.0000029664.99615.94) of both, matched in RootSIFT's distance
and checked by RANSAC for one rotation, scale and shift that maps them, decide; pairs that pass make groups. Then the
groups are compared with one another, whatever their colours: one place may have been photographed twice.
"""

import csv
import io
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
from torch.nn import functional as F

from sslcells import launcher
from sslcells.config import ConfigError, extra
from sslcells.data import DataError, Decoder, Unreadable, read_table
from sslcells.data.folder import list_images
from sslcells.evaluation.sheets import Image, pair_sheet
from sslcells.storage import write_atomically
from sslcells.values import place

TABLE, PICTURE = "sources.csv", "sources.png"
_SIDE = 320
"""Pixels of the longer side that features are looked for in."""
_FEATURES = 300
_RATIO, _REACH = 0.8, 6.0
"""Lowe's ratio test; pixels that a mapped feature may lie off."""
_SCALES = 0.5, 2.0
_IN_VAIN, _BETWEEN = 5, 3
"""Pairs of two groups that fail before no other pair of them is tried: of neighbours by colour, and of all groups."""
_BLIND = 2
"""Times as many details that images of two groups must share: they are many pairs, and few of them show one place."""
_BLOCK = 512
_SHOWN = 6
"""Pairs of each kind on the picture."""

Floats = NDArray[np.float32]


class Details(NamedTuple):
    """Local features of an image as it is, and of its mirror image."""

    place: tuple[Floats, Floats]
    """(n, 2) x and y each, in pixels of the image brought to 320 px"""
    what: tuple[NDArray[np.uint8], NDArray[np.uint8]]
    """(n, 128) each"""


class Pair(NamedTuple):
    """Two images that were compared, by their places in the list."""

    one: int
    other: int
    inliers: int


class Sources(NamedTuple):
    """What was found."""

    paths: list[str]
    group: list[int]
    """of each image: the place of its group's first image"""
    best: list[int]
    """of each image: most inliers in a pair that passed; 0 where none did"""
    unreadable: list[tuple[str, str]]
    passed: list[Pair]
    failed: list[Pair]


def sources(
    folder: str,
    out: str | None = None,
    known: str | None = None,
    inliers: int = 12,
    neighbours: int = 20,
    between: int = 100_000,
    say: Callable[[str], None] = print,
) -> Sources:
    """Group a folder's images by photograph; write sources.csv (path, source, inliers) and sources.png into `out`.

    A group is named by its first image. `between` is how many pairs of groups are compared with one another at the end,
    nearest by colour first: 3 pairs of images each. `known` names a CSV with columns path and source, against which
    pairs of images of one source are counted: precision and recall.

    Raises:
        ConfigError: where the folder holds no images, the extra `sources` is not installed, or `known` is no such CSV.
        DataError: where not one image could be read.
    """
    for option, value, least in (("--inliers", inliers, 4), ("--neighbours", neighbours, 1), ("--between", between, 0)):
        if value < least:
            raise ConfigError(f"{option} {value} should be at least {least}")
    root = place(folder)
    names = list_images(root)
    table = read_table(place(known), "path", "source") if known else None
    found = group([root / name for name in names], names, inliers, neighbours, between, say)
    if not found.paths:
        path, why = found.unreadable[0]
        raise DataError(f"none of the {len(names)} images below {root} could be read, such as {path}: {why}")
    target = place(out or ".")
    try:
        target.mkdir(parents=True, exist_ok=True)
        write_atomically(target / TABLE, lambda opened: opened.write(_csv(found).encode("utf-8", "surrogateescape")))
        _picture(found, root, target / PICTURE)
    except OSError as error:
        raise ConfigError(f"--out {target}: cannot be written: {error}") from None
    for path, why in found.unreadable:
        say(f"{path}: {why}; left out")
    sizes = Counter(found.group)
    alone = sum(size == 1 for size in sizes.values())
    say(f"{len(found.paths):,} images of {len(sizes):,} sources, {alone:,} of them with one image alone")
    say(f"{target / TABLE}: give it as data.sources={target / TABLE}; {PICTURE} shows the pairs nearest to the limit")
    if table is not None:
        say(agreement(found, table))
    return found


def group(
    files: Sequence[Path],
    names: Sequence[str],
    inliers: int,
    neighbours: int,
    between: int,
    say: Callable[[str], None],
) -> Sources:
    """Groups of images that share at least `inliers` details, each compared with `neighbours` nearest by colour.

    Then `between` pairs of these groups are compared, and must share twice as many.
    """
    cv2 = extra("cv2", "sources", "finding the sources of images")
    cv2.setNumThreads(1)
    decoder = Decoder(channels=3, size=None, fit="crop", intensity="percentile")
    threads = launcher.cores()

    def look(file: Path) -> tuple[Floats, Details] | str:
        try:
            return _look(cv2, decoder(str(file)).permute(1, 2, 0).numpy())
        except Unreadable as error:
            return str(error)

    with ThreadPoolExecutor(threads) as pool, threadpool_limits(1, user_api="blas"):  # each thread makes products
        looks = list(pool.map(look, files))
        unreadable = [(name, seen) for name, seen in zip(names, looks, strict=True) if isinstance(seen, str)]
        kept = [(name, seen) for name, seen in zip(names, looks, strict=True) if not isinstance(seen, str)]
        say(f"{len(kept):,} images read; comparing")
        details = [detail for _, (_, detail) in kept]
        colours = np.stack([colour for _, (colour, _) in kept]) if kept else np.zeros((0, 1), np.float32)
        joining = Joining(cv2, details, pool, 4 * threads)
        tensor = torch.from_numpy(colours)
        joining.run(_candidates(tensor, neighbours), inliers, _IN_VAIN)
        groups = joining.groups()
        among, nearest = len(groups) * (len(groups) - 1) // 2, _nearest_groups(tensor, groups, between)
        say(f"{len(groups):,} groups; comparing {len(nearest):,} of {among:,} pairs of groups")
        joining.run(_pairs_between(tensor, groups, nearest), _BLIND * inliers, _BETWEEN)
    return Sources(
        [name for name, _ in kept], joining.of_each(), joining.best, unreadable, joining.passed, joining.failed
    )


def _look(cv2: Any, pixels: Image) -> tuple[Floats, Details]:
    """(320,) square roots of shares of lightness and of hue: they do not change when an image is turned; details."""
    lab = cv2.cvtColor(pixels, cv2.COLOR_RGB2LAB)
    light = cv2.calcHist([lab], [0], None, [64], [0, 256]).ravel()
    hue = cv2.calcHist([lab], [1, 2], None, [16, 16], [90, 180, 90, 180]).ravel()
    colour = np.sqrt(np.concatenate([light, hue]) / (2 * light.sum())).astype(np.float32)
    grey = cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)
    scale = _SIDE / max(grey.shape)
    grey = cv2.resize(grey, None, fx=scale, fy=scale, interpolation=cv2.INTER_CUBIC if scale > 1 else cv2.INTER_AREA)
    sift = cv2.SIFT_create(nfeatures=_FEATURES, contrastThreshold=0.02)
    places, whats = [], []
    for seen in (grey, np.ascontiguousarray(grey[:, ::-1])):
        points, what = sift.detectAndCompute(seen, None)
        places.append(np.array([p.pt for p in points], np.float32).reshape(-1, 2))
        whats.append(np.zeros((0, 128), np.uint8) if what is None else what.astype(np.uint8))
    return colour, Details((places[0], places[1]), (whats[0], whats[1]))


class Joining:
    """Images on their way into groups, by comparing pairs of them; pairs of one group are not compared again."""

    def __init__(self, cv2: Any, details: Sequence[Details], pool: ThreadPoolExecutor, ahead: int) -> None:
        self._cv2, self._details, self._pool, self._ahead = cv2, details, pool, ahead
        self._parent = list(range(len(details)))
        self.best = [0] * len(details)
        """as in Sources, and so the two that follow"""
        self.passed: list[Pair] = []
        self.failed: list[Pair] = []

    def run(self, candidates: Iterator[tuple[int, int]], inliers: int, patience: int) -> None:
        """Join candidates that share so many details; of two groups no more when `patience` of theirs have not."""
        vain: Counter[tuple[int, int]] = Counter()
        while True:
            batch: list[tuple[int, int]] = []
            for pair in candidates:
                both = self._both(*pair)
                if both[0] != both[1] and vain[both] < patience:
                    batch.append(pair)
                if len(batch) == self._ahead:
                    break
            if not batch:
                return
            for compared in self._pool.map(self._compare, batch):
                both = self._both(compared.one, compared.other)
                if compared.inliers >= inliers:
                    self._parent[both[1]] = both[0]
                    self.passed.append(compared)
                    for i in (compared.one, compared.other):
                        self.best[i] = max(self.best[i], compared.inliers)
                else:
                    self.failed.append(compared)
                    vain[both] += 1

    def of_each(self) -> list[int]:
        """Of each image the first of its group."""
        return [self._first(i) for i in range(len(self._parent))]

    def groups(self) -> list[list[int]]:
        """The images of each group."""
        members: dict[int, list[int]] = {}
        for i, first in enumerate(self.of_each()):
            members.setdefault(first, []).append(i)
        return list(members.values())

    def _first(self, i: int) -> int:
        parent = self._parent
        while parent[i] != i:
            parent[i] = i = parent[parent[i]]
        return i

    def _both(self, i: int, j: int) -> tuple[int, int]:
        a, b = self._first(i), self._first(j)
        return min(a, b), max(a, b)

    def _compare(self, pair: tuple[int, int]) -> Pair:
        return Pair(*pair, shared(self._cv2, self._details[pair[0]], self._details[pair[1]]))


def _candidates(colours: Tensor, neighbours: int) -> Iterator[tuple[int, int]]:
    """Pairs of images that are neighbours by colour, nearest neighbours of all first; each pair once."""
    seen: set[tuple[int, int]] = set()
    for column in _neighbours(colours, neighbours).T.tolist():
        for i, j in enumerate(column):
            pair = (min(i, j), max(i, j))
            if pair not in seen:
                seen.add(pair)
                yield pair


def _nearest_groups(colours: Tensor, groups: Sequence[Sequence[int]], most: int) -> list[tuple[int, int]]:
    """At most so many pairs of groups, by the cosine of their mean colours, nearest neighbours of all first."""
    mean = torch.stack([colours[members].mean(0) for members in groups]) if groups else colours
    each = -(-2 * most // max(1, len(groups)))  # neighbours of a group: every pair is met up to twice
    return list(islice(_candidates(F.normalize(mean, dim=1), each), most))


def _pairs_between(
    colours: Tensor, groups: Sequence[Sequence[int]], pairs: Sequence[tuple[int, int]]
) -> Iterator[tuple[int, int]]:
    """Of each pair of groups the images that are nearest by colour, each image in one pair."""
    for a, b in pairs:
        cosine = colours[groups[a]] @ colours[groups[b]].T
        for _ in range(min(_BETWEEN, *cosine.shape)):
            i, j = divmod(int(cosine.argmax()), cosine.shape[1])
            cosine[i] = cosine[:, j] = -1
            yield groups[a][i], groups[b][j]


def _neighbours(rows: Tensor, count: int) -> Tensor:
    """(N, F) of length 1 → (N, up to `count`): the rows with the largest cosine to each."""
    near = []
    for start in range(0, len(rows), _BLOCK):
        cosine = rows[start : start + _BLOCK] @ rows.T
        at = torch.arange(len(cosine))
        cosine[at, start + at] = -1
        near.append(cosine.topk(min(count, len(rows) - 1)).indices)
    return torch.cat(near) if near else torch.zeros(0, 0, dtype=torch.int64)


def shared(cv2: Any, one: Details, other: Details) -> int:
    """Details of `one` that one rotation, scale and shift maps onto `other`, as it is or mirrored."""
    best = 0
    place, what = one.place[0], _root(one.what[0])
    for flip in (0, 1):
        if min(len(what), len(other.what[flip])) < 4:
            continue
        cosine = what @ _root(other.what[flip]).T
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


def _root(what: NDArray[np.uint8]) -> Floats:
    """RootSIFT (Arandjelović and Zisserman, CVPR 2012, section 3): square roots of shares, rows of norm 1."""
    x = what.astype(np.float32)
    rooted: Floats = np.sqrt(x / np.maximum(x.sum(1, keepdims=True), 1e-9))
    return rooted


def agreement(found: Sources, table: Mapping[str, str]) -> str:
    """Precision and recall of pairs of images of one source, among the images that a table knows."""
    both = [(g, table[path]) for path, g in zip(found.paths, found.group, strict=True) if path in table]
    if not both:
        return "none of these images is in the table of known sources: are its paths those below the folder?"

    def pairs(keys: Sequence[Any]) -> int:
        return sum(n * (n - 1) // 2 for n in Counter(keys).values())

    hits, said, true = pairs(both), pairs([g for g, _ in both]), pairs([s for _, s in both])
    precision, recall = (f"{hits / n:.4f}" if n else "–" for n in (said, true))
    return (
        f"of {len(both):,} images with a known source: precision {precision} of {said:,} pairs found, "
        f"recall {recall} of {true:,} pairs known"
    )


def _csv(found: Sources) -> str:
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["path", "source", "inliers"])
    for path, g, best in zip(found.paths, found.group, found.best, strict=True):
        rows.writerow([path, found.paths[g], best])
    return text.getvalue()


def _picture(found: Sources, root: Path, out: Path) -> None:
    """The pairs that passed with the fewest shared details, and those that failed with the most."""
    weakest = sorted(found.passed, key=lambda pair: pair.inliers)[:_SHOWN]
    strongest = sorted(found.failed, key=lambda pair: -pair.inliers)[:_SHOWN]
    if not weakest and not strongest:
        return
    decoder = Decoder(channels=3, size=None, fit="crop", intensity="percentile")

    def pixels(i: int) -> Image:
        return decoder(str(root / found.paths[i])).permute(1, 2, 0).numpy()

    pair_sheet(pixels, {"one photograph": weakest, "two photographs": strongest}, out)
