"""The pictures of `sslcells evaluate`, with their captions."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from sslcells.evaluation.clustering import clusters
from sslcells.evaluation.encode import spread
from sslcells.evaluation.figures import ClassScores
from sslcells.evaluation.hover_map import hover_map
from sslcells.evaluation.leaks import SplitFeatures
from sslcells.evaluation.neighbour_rows import NEAREST, neighbour_rows
from sslcells.evaluation.pictures import Map, coloured_map, confusion, similarity_histogram, tsne_map, umap_map
from sslcells.evaluation.sheets import Image, neighbour_sheet
from sslcells.losses import unit

Live = Callable[[Map, Tensor, Sequence[str]], str]
"""HTML of a map, from it, the group of each row (N,) int64, and the groups' names."""

PAIRS = 20_000
"""Random pairs in the histogram of similarities."""
_SHOWN = 2_000
"""Images searched for the neighbours on the sheet."""


class Picture(NamedTuple):
    """A picture and what it shows."""

    title: str
    path: Path
    caption: str
    live: str = ""
    """HTML that takes the picture's place on a page where scripts run"""


class Drawn(NamedTuple):
    """As a Picture; the path is None if the data does not allow it."""

    title: str
    path: Path | None
    caption: str
    live: str = ""


def draw(
    features: SplitFeatures,
    split: str,
    classes: Sequence[str],
    predictions: Sequence[ClassScores],
    pixels: Callable[[int], Image],
    views: tuple[Tensor, Tensor],
    folder: Path,
    seed: int,
    umap: bool = False,
) -> list[Picture]:
    """Draw all pictures of a split that its data allows into `folder`.

    `pixels` gives row i's image as (H, W, C) uint8; `views` are features (n, F) of two augmented views of images of
    train; `predictions` are for the rows with known labels, in order.
    """
    known = features.labels >= 0
    drawn: list[Drawn] = []
    for number, answer in enumerate(predictions):
        caption = "Share of each true class (rows) predicted as each class (columns), and the number of images."
        path = confusion(
            features.labels[known], answer.predicted, classes, folder / f"confusion_{number}.png", answer.name
        )
        drawn.append(Drawn(f"Confusion: {answer.name}", path, caption))
    last = predictions[-1] if predictions and classes else None
    predicted = None if last is None else (last.name.partition(",")[0], _of_all(known, last.predicted))

    def live(place: Map, groups: Tensor, names: Sequence[str]) -> str:
        return hover_map(place, groups, names, features.names, predicted, pixels)

    drawn += _maps(features, split, classes, folder, seed, umap, live)
    few = torch.tensor(spread(len(features.z), _SHOWN))
    shown = features.z[few], features.labels[few], classes, features.sources[few]

    def shown_pixels(i: int) -> Image:
        return pixels(int(few[i]))

    sheet = neighbour_sheet(shown_pixels, *shown, folder / "evaluated_neighbours.png", columns=NEAREST, seed=seed)
    rows = neighbour_rows(shown_pixels, *shown, [features.names[i] for i in few.tolist()], seed) if classes else ""
    caption = (
        f"Nearest among {len(few):,} images of {split} by cosine (below each), images of the query's source left out."
    )
    caption += " ✓ and green: the query's class; ✗ and red: another."
    drawn.append(Drawn("Nearest neighbours", sheet, caption, rows))
    histogram = similarity_histogram(_pairs(features, views, seed), folder / "similarities.png")
    drawn.append(
        Drawn("Positives against negatives", histogram, "Random pairs; the further apart the two kinds, the better.")
    )
    return [Picture(one.title, one.path, one.caption, one.live) for one in drawn if one.path is not None]


def _of_all(known: Tensor, predicted: Tensor) -> Tensor:
    """Predictions (N,) of all rows; −1 of rows that are not known, a mask (N,)."""
    every = torch.full((len(known),), -1)
    every[known] = predicted.cpu()
    return every


def _maps(
    features: SplitFeatures, split: str, classes: Sequence[str], folder: Path, seed: int, umap: bool, live: Live
) -> list[Drawn]:
    out: list[Drawn] = []
    for place in (tsne_map(features.z, seed), umap_map(features.z, seed) if umap else None):
        if place is not None:
            out += _maps_of(place, features, split, classes, folder, seed, None if out else live)
    return out


def _maps_of(
    place: Map,
    features: SplitFeatures,
    split: str,
    classes: Sequence[str],
    folder: Path,
    seed: int,
    live: Live | None,
) -> list[Drawn]:
    name, prefix = place.name, place.name.replace("-", "").lower()
    caption = f"{name} keeps near images near; distances between groups and their sizes mean nothing."
    out: list[Drawn] = []
    if classes:
        path = coloured_map(
            place, features.labels, classes, folder / f"{prefix}_class.png", f"Classes of the {split} split"
        )
        shown = live(place, features.labels, classes) if live else ""
        out.append(Drawn(f"{name} map by class", path, caption, shown))
    numbers, group = torch.unique(features.sources, return_inverse=True)
    if len(numbers) < len(features.sources):
        first = {g: i for i, g in reversed(list(enumerate(group.tolist())))}
        names = [features.names[first[g]].rpartition("/")[2] for g in range(len(numbers))]
        title = f"Sources of the {split} split, named by an image"
        path = coloured_map(place, group, names, folder / f"{prefix}_source.png", title, "other sources")
        said = f"{caption} If sources lie apart, features show more than the cells."
        out.append(Drawn(f"{name} map by source", path, said))
    count = max(2, len(set(features.labels[features.labels >= 0].tolist()))) if classes else 8
    cluster = clusters(features.z, count, seed)
    names = [f"cluster {c + 1}" for c in range(count)]
    path = coloured_map(place, cluster, names, folder / f"{prefix}_cluster.png", f"k-means of the {split} split")
    said = f"{caption} {count} clusters, computed from the features, not from the map."
    shown = live(place, cluster, names) if live and not classes else ""
    out.append(Drawn(f"{name} map by cluster", path, said, shown))
    return out


def _pairs(features: SplitFeatures, views: tuple[Tensor, Tensor], seed: int) -> dict[str, Tensor]:
    """Cosines of random pairs: same class from different sources, and different classes; without labels, two views."""
    generator = torch.Generator().manual_seed(seed)
    one, other = torch.randint(len(features.z), (2, 50 * PAIRS), generator=generator)
    apart = features.sources[one] != features.sources[other]
    both = apart & (features.labels[one] >= 0) & (features.labels[other] >= 0)
    same = features.labels[one] == features.labels[other]
    rows = unit(features.z)

    def cosines(chosen: Tensor) -> Tensor:
        index = chosen.nonzero()[:PAIRS, 0]
        return (rows[one[index]] * rows[other[index]]).sum(1)

    if both.any():
        return {"the same class, different sources": cosines(both & same), "different classes": cosines(both & ~same)}
    first, second = (unit(v) for v in views)
    return {"two views of an image": (first * second).sum(1), "different images": cosines(apart)}
