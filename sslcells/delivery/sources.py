"""`sslcells sources`: find the sources of a folder's images, and write them as a table and a picture."""

import csv
import io
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from sslcells.config import ConfigError
from sslcells.data import DataError, Decoder, read_table
from sslcells.data._patterns import given
from sslcells.data.find_sources import Sources, agreement, find_sources
from sslcells.data.folder import list_images
from sslcells.evaluation.sheets import Image, pair_sheet
from sslcells.storage import write_atomically
from sslcells.values import place

TABLE, PICTURE = "sources.csv", "sources.png"
_SHOWN = 6
"""Pairs of each kind on the picture."""
_DECODER = Decoder(channels=3, size=None, fit="crop", intensity="percentile")


def sources(
    folder: str,
    out: str | None = None,
    known: str | None = None,
    inliers: int = 12,
    neighbours: int = 20,
    between: int = 100_000,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    say: Callable[[str], None] = print,
) -> Sources:
    """Group a folder's images by source, and write sources.csv (path, source, inliers) and sources.png into `out`.

    A group is named after its first image. At the end `between` pairs of groups are compared, nearest by colour first,
    with 3 pairs of images each. `known` is a CSV file with columns path and source; the pairs found are compared with
    its pairs: precision and recall. `include` and `exclude` are patterns for the images' paths below the folder.

    Raises:
        ConfigError: if the folder holds no images, the extra `sources` is not installed, or `known` is no such CSV.
        DataError: if not one image could be read.
    """
    for option, value, least in (("--inliers", inliers, 4), ("--neighbours", neighbours, 1), ("--between", between, 0)):
        if value < least:
            raise ConfigError(f"{option} {value} should be at least {least}")
    root = place(folder)
    names = list_images(root, _DECODER, given(include, exclude))
    table = read_table(place(known), key="--known") if known else None
    found = find_sources([root / name for name in names], names, inliers, neighbours, between, say)
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


def _csv(found: Sources) -> str:
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["path", "source", "inliers"])
    for path, g, best in zip(found.paths, found.group, found.best, strict=True):
        rows.writerow([path, found.paths[g], best])
    return text.getvalue()


def _picture(found: Sources, root: Path, out: Path) -> None:
    """Draw the pairs that passed with the fewest shared details, and those that failed with the most."""
    weakest = sorted(found.passed, key=lambda pair: pair.inliers)[:_SHOWN]
    strongest = sorted(found.failed, key=lambda pair: -pair.inliers)[:_SHOWN]
    if not weakest and not strongest:
        return

    def pixels(i: int) -> Image:
        return _DECODER(str(root / found.paths[i])).permute(1, 2, 0).numpy()

    pair_sheet(pixels, {"one photograph": weakest, "two photographs": strongest}, out)
