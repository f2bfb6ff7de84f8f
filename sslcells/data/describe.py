"""Describes a data set in words, for `--check` and for the first lines of the training log.

The description should reveal the mistakes in a folder: an unintended split, a class with two images, images without a
source, files that are not images, mixed sizes or number types.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from sslcells.data import ImageSet
from sslcells.data._found import Found
from sslcells.data._names import some

_CLASSES = 60
"""number of classes to list; of more classes, the largest and the smallest"""
_NAMED = 5
"""images that are named of those without a label, a source or a site"""
_SAMPLE = 16
"""images per split whose values are read"""
_HEADERS = 256
"""files per split whose headers are read, unless the split was verified"""


def describe(splits: Mapping[str, ImageSet]) -> str:
    """Some lines about each split; only a sample of a large split is opened.

    Raises:
        DataError: if an image of the sample cannot be read.
    """
    return "\n".join(["what was read:", *(line for name, images in splits.items() for line in _split(name, images))])


def brief(splits: Mapping[str, ImageSet]) -> str:
    """One line: how many images, classes, sources and sites, which images lack one, and what was left out."""
    out = []
    for name, images in splits.items():
        parts = [f"{name} {len(images):,}", *_known(images)]
        if images.found is not None:
            ignored = {kind: n for kind, (n, _) in images.found.ignored.items()}
            ignored |= {"broken": len(images.found.broken)} if images.found.broken else {}
            parts += [images.found.cache] if images.found.cache else []
            if ignored:
                parts.append("left out " + ", ".join(f"{n:,} × {kind}" for kind, n in ignored.items()))
            parts += images.found.notes
        out.append(", ".join(parts))
    where = next((images.found.where for images in splits.values() if images.found is not None), "")
    return f"data: {'; '.join(out)}" + f" ({where.partition(',')[0]})" * bool(where)


def _known(images: ImageSet) -> list[str]:
    """How many classes, sources and sites there are, and which images lack one."""
    if images.targets is not None:
        none = images.targets.sum(1) == 0
        labels = f"several labels per image{_lacking(images, none, 'any')}"
    elif images.classes:
        labels = f"{_plural(len(images.classes), 'class', 'classes')}{_lacking(images, images.labels < 0)}"
    else:
        labels = "no labels"
    sources, sites = "sources unknown", "sites unknown"
    if images.sourced is not None:
        known = _plural(_distinct(images.sources[images.sourced]), "source")
        sources = f"{known}{_lacking(images, ~images.sourced)}"
    if images.labs is not None:
        sites = f"{_plural(_distinct(images.labs[images.labs > 0]), 'site')}{_lacking(images, images.labs == 0)}"
    return [labels, sources, sites]


def _split(name: str, images: ImageSet) -> list[str]:
    found = images.found
    channels, height, width = images.pixels(0).shape
    read = f"read as: {_plural(channels, 'channel')} of {height}×{width} px"
    columns = found.columns if found is not None else []
    more = [*found.scales, *found.notes] if found is not None else []
    known = [_labels(images), _sources(images), _sites(images), *more]
    cache = f"cache: {found.cache}" if found is not None and found.cache else ""
    lines = [*columns, *known, *_files(images, found), _values(images), read, cache, *_left_out(found)]
    where = f" of {found.where}" if found is not None else f", such as {images.name(0)}"
    return [f"  {name}: {_plural(len(images), 'image')}{where}", *(f"    {line}" for line in lines if line)]


def _labels(images: ImageSet) -> str:
    if images.targets is not None:
        per_class: list[int] = images.targets.sum(0).tolist()
        none = images.targets.sum(1) == 0
        counts = ", ".join(f"{k} {n:,}" for k, n in enumerate(per_class))
        without = f"{_plural(int(none.sum()), 'image')} without any{_named(images, none)}"
        return f"labels: several per image, {len(per_class)} classes: {counts}; {without}"
    if not images.classes:
        return "labels: none, no image has one"
    known = images.labels[images.labels >= 0]
    of_class: list[int] = torch.bincount(known, minlength=len(images.classes)).tolist()
    unknown = len(images) - len(known)
    without = (
        f"; {_plural(unknown, 'image')} without one{_named(images, images.labels < 0)}" if unknown else "; all have one"
    )
    named = [f"{name} {n:,}" for name, n in zip(images.classes, of_class, strict=True)]
    if len(named) > _CLASSES:
        order = sorted(range(len(named)), key=lambda c: -of_class[c])
        half = _CLASSES // 2
        named = [named[c] for c in order[:half]] + ["…"] + [named[c] for c in order[-half:]]
    return f"{_plural(len(images.classes), 'class', 'classes')}: {', '.join(named)}{without}"


def _sources(images: ImageSet) -> str:
    if images.sourced is None:
        shared = len(images) - _distinct(images.sources)
        return f"sources: {_distinct(images.sources):,}" if shared else "sources: unknown, each image counts as its own"
    known = int(images.sourced.sum())
    of = _plural(_distinct(images.sources[images.sourced]), "source")
    text = f"sources: {_plural(known, 'image')} of {of}{_such_as(images, images.sourced)}"
    unknown = len(images) - known
    return text + (f"; {unknown:,} without one{_named(images, ~images.sourced)}" if unknown else "; all have one")


def _sites(images: ImageSet) -> str:
    if images.labs is None:
        return "sites: unknown"
    count: list[int] = torch.bincount(images.labs, minlength=len(images.lab_names) + 1).tolist()
    each = [f"{name} {n:,}" for name, n in zip(images.lab_names, count[1:], strict=True) if n]
    text = f"{_plural(len(each), 'site')}{':' * bool(each)} {some(each, _CLASSES)}".rstrip()
    return text + (f"; {count[0]:,} without one{_named(images, images.labs == 0)}" if count[0] else "; all have one")


def _such_as(images: ImageSet, which: Tensor) -> str:
    indices = which.nonzero()
    return f", such as {images.name(int(indices[0]))}" if len(indices) else ""


def _named(images: ImageSet, which: Tensor) -> str:
    """The first of these images by name."""
    places = which.nonzero()[:, 0]
    return ": " + some([images.name(int(i)) for i in places[: _NAMED + 1]], _NAMED) if len(places) else ""


def _lacking(images: ImageSet, which: Tensor, what: str = "") -> str:
    """How many images lack something, and which; nothing if none does."""
    count, without = int(which.sum()), f"without {what}".strip()
    return f" ({count:,} of {_plural(len(images), 'image')} {without}{_named(images, which)})" if count else ""


def _files(images: ImageSet, found: Found | None) -> list[str]:
    """Sizes, kinds and pages of all files if they were verified, otherwise of a sample."""
    if found is None:
        return []
    of = "all"
    if not found.headers:
        names, headers = [], []
        for i in _spread(len(images), _HEADERS):
            header = images.header(i)
            if header is not None:
                names.append(images.name(i))
                headers.append(header)
        found = found.with_headers(names, headers)
        of = f"{found.headers:,} of them"
    if not found.headers:
        return []
    kinds = sorted(found.kinds.items(), key=lambda item: -item[1][0])
    many = len(kinds) > 1
    lines = [
        f"files ({of} read): "
        + ", ".join(f"{kind} {n:,}" + f" (such as {example})" * many for kind, (n, example) in kinds[:8])
        + f", … {len(kinds) - 8} more kinds" * (len(kinds) > 8)
    ]
    smallest, largest, common = found.sizes
    if smallest[0] == largest[0]:
        lines.append(f"sizes: {_size(common[0])} px each (height × width)")
    else:
        lines.append(
            f"sizes (height × width): {_size(smallest[0])} ({smallest[2]}) to {_size(largest[0])} ({largest[2]}); "
            f"most common {_size(common[0])}, {common[1]:,} times"
        )
    if found.paged is not None:
        count, example, pages = found.paged
        lines.append(
            f"several pages or frames, only the first is used: {_plural(count, 'file')}, such as {example} with {pages}"
        )
    return lines


def _values(images: ImageSet) -> str:
    """Number types and ranges of a sample, before any conversion."""
    types: dict[str, int] = {}
    low, high, constant = np.inf, -np.inf, 0
    undefined = 0
    chosen = _spread(len(images), _SAMPLE)
    for i in chosen:
        values = images.values(i)
        types[str(values.dtype)] = types.get(str(values.dtype), 0) + 1
        finite = values[np.isfinite(values)] if values.dtype.kind == "f" else values
        undefined += int(finite.size < values.size)
        if finite.size:
            low, high = min(low, float(finite.min())), max(high, float(finite.max()))
            constant += int(finite.min() == finite.max())
    named = ", ".join(types) if len(types) == 1 else ", ".join(f"{kind} {n}" for kind, n in types.items())
    text = f"values ({len(chosen)} images read): {named}, {low:g} to {high:g}"
    text += f"; {_plural(constant, 'image')} with only one value" if constant else ""
    return text + (f"; {_plural(undefined, 'image')} with NaN or infinite values" if undefined else "")


def _left_out(found: Found | None) -> list[str]:
    if found is None:
        return []
    lines = []
    if found.ignored:
        kinds = sorted(found.ignored.items(), key=lambda item: -item[1][0])
        lines.append("left out: " + "; ".join(f"{kind}: {n:,}, such as {example}" for kind, (n, example) in kinds))
    if found.broken:
        some = [f"{name}: {reason}" for name, reason in [*found.broken.items()][:3]]
        more = ["…"] * (len(found.broken) > len(some))
        lines.append(f"broken, left out: {_plural(len(found.broken), 'image')}: {'; '.join([*some, *more])}")
    return lines


def _spread(count: int, most: int) -> Sequence[int]:
    """At most `most` of the indices 0..count−1, evenly spaced, including the first and the last."""
    return range(count) if count <= most else [i * (count - 1) // (most - 1) for i in range(most)]


def _size(size: tuple[int, int]) -> str:
    return f"{size[0]}×{size[1]}"


def _distinct(ids: Tensor) -> int:
    return len(np.unique(ids.numpy()))


def _plural(count: int, one: str, many: str | None = None) -> str:
    return f"{count:,} {one if count == 1 else many or one + 's'}"
