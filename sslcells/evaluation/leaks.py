"""What would make figures too high: shared images, near duplicates or shared sources between splits, and shortcuts.

Computed before any figure, and reported beside it.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from sslcells.evaluation.encode import spread
from sslcells.evaluation.knn import Neighbours, knn_accuracy, knn_scores, neighbours
from sslcells.losses import unit

BINS = 16
"""Bins in the histogram of each channel."""
SHORTCUT_K = 5
COPIES = 512
"""Images of train that are copied, to measure how near copies lie."""
_RECALL = 0.95
"""Share of those copies that the threshold should find."""
_STRANGERS = 0.001
"""Share of train that may lie above the threshold to an image that is surely a different one."""
_FLATTERS = 0.1
"""Difference in accuracy between a random split and the query split that gives a warning."""
_EXAMPLES = 5


class SplitFeatures(NamedTuple):
    """Features of a split's N images, and what leaks are searched for in."""

    digest: Tensor
    """(N, 2) int64: hash of the pixels' bytes"""
    histogram: Tensor
    """(N, C·BINS) float32"""
    z: Tensor
    """(N, F) float32 features"""
    labels: Tensor
    """(N,) int64"""
    sources: Tensor
    """(N,) int64"""
    names: Sequence[str]
    """what a person calls each image"""
    labs: Tensor | None = None
    """(N,) int64 laboratory; 0 where unknown; None if the data set does not say"""

    def at(self, index: Sequence[int]) -> "SplitFeatures":
        """Those of the images with these indices, in ascending order."""
        if len(index) == len(self.z):
            return self
        labs = None if self.labs is None else self.labs[index]
        columns = (self.digest, self.histogram, self.z, self.labels, self.sources)
        digest, histogram, z, labels, sources = (x[index] for x in columns)
        return SplitFeatures(digest, histogram, z, labels, sources, [self.names[i] for i in index], labs)


def digests(pixels: Tensor) -> Tensor:
    """Hashes of the bytes of images (B, C, H, W) uint8 on the CPU: (B, 2) int64, equal only for equal images."""
    hashes = b"".join(hashlib.blake2b(image.numpy().tobytes(), digest_size=16).digest() for image in pixels)
    return torch.frombuffer(bytearray(hashes), dtype=torch.int64).view(-1, 2)


def histograms(pixels: Tensor) -> Tensor:
    """Histogram of each channel in BINS bins, as shares, of images (B, C, H, W) uint8: (B, C·BINS) float32."""
    images, channels = pixels.shape[:2]
    bins = (pixels.long() * BINS >> 8).flatten(2)  # (B, C, H·W)
    counts = torch.zeros(images, channels, BINS).scatter_add_(2, bins, torch.ones(bins.shape))
    return (counts / bins.shape[2]).flatten(1)


def copies(pixels: Tensor, image: Tensor) -> Tensor:
    """Copy each image (B, C, H, W) uint8 as people do: mirrored or rotated, cropped by 5 % and 5 % brighter."""
    side = tuple(pixels.shape[-2:])
    cut = [max(1, round(s * 0.025)) for s in side]
    x = pixels[..., cut[0] : side[0] - cut[0], cut[1] : side[1] - cut[1]].float()
    x = F.interpolate(x, side, mode="bilinear", align_corners=False)
    turned = []
    for one, number in zip(x, image.tolist(), strict=True):
        flips = [dim for bit, dim in ((1, -1), (2, -2)) if (number % 3 + 1) & bit]
        flipped = one.flip(flips)
        turned.append(flipped.transpose(-1, -2) if side[0] == side[1] and number % 2 else flipped)
    return (torch.stack(turned) * 1.05).clamp(0, 255).byte()


def leaks(
    by_split: Mapping[str, SplitFeatures],
    query_split: str,
    classes: Sequence[str],
    near: tuple[Tensor, Tensor] | None,
    seed: int,
    most: int | None = None,
    search: Neighbours = neighbours,
) -> dict[str, Any]:
    """Search for leaks; the result goes into evaluation.json.

    `findings` are sentences; one with `warning` makes figures too high.
    `near` are features (n, F) of images of train and of copies of them, which show how near a copy lies. Equal images
    and sources are searched among all; neighbours of `most` images of a split, drawn at random, or of all where None.
    """
    known = any(_distinct(features.sources) < len(features.sources) for features in by_split.values()) or any(
        torch.isin(by_split[a].sources, by_split[b].sources).any() for a, b in combinations(by_split, 2)
    )
    parts = {
        "images": _images(by_split, classes, known),
        "exact duplicates": _duplicates(by_split),
        "sources": _sources(by_split, known),
        "near duplicates": _near(by_split, near, known, most, search),
        "shortcut": _shortcut(by_split, query_split, len(classes), known, seed, most, search),
    }
    findings = [finding for part in parts.values() for finding in part.pop("findings")]
    return {"sources known": known, "findings": findings, **parts}


def _finding(text: str, warning: bool = False) -> dict[str, Any]:
    return {"text": text, "warning": warning}


def _images(by_split: Mapping[str, SplitFeatures], classes: Sequence[str], known: bool) -> dict[str, Any]:
    out: dict[str, Any] = {"findings": []}
    for split, features in by_split.items():
        sources = _distinct(features.sources) if known else None
        by_class = {}
        for c, name in enumerate(classes):
            of = features.labels == c
            by_class[name] = {"images": int(of.sum()), "sources": _distinct(features.sources[of]) if known else None}
        out[split] = {"images": len(features.labels), "sources": sources, "classes": by_class}
        counts = [
            f"{name} {n['images']:,}" + (f" of {n['sources']:,}" if known else "") for name, n in by_class.items()
        ]
        text = f"{split}: {_plural(len(features.labels), 'image')}" + (f" of {_plural(sources or 0, 'source')}" * known)
        out["findings"].append(_finding(f"{text}{': ' * bool(counts)}{', '.join(counts)}"))
        absent = [name for name, n in by_class.items() if not n["images"]]
        if absent and len(absent) < len(by_class):
            out["findings"].append(_finding(f"{split} shows no {', no '.join(absent)}", warning=True))
    return out


def _duplicates(by_split: Mapping[str, SplitFeatures]) -> dict[str, Any]:
    out: dict[str, Any] = {"findings": []}
    keys = {split: [tuple(d) for d in features.digest.tolist()] for split, features in by_split.items()}
    first = {split: _first(k) for split, k in keys.items()}
    for a, b in combinations(by_split, 2):
        twice = [(first[a][key], i) for i, key in enumerate(keys[b]) if key in first[a]]
        out[f"{a} and {b}"] = _pairs(by_split[a], by_split[b], twice)
        text = f"{_plural(len(twice), 'image')} of {b} {'is' if len(twice) == 1 else 'are'} in {a} too, byte for byte"
        out["findings"].append(_finding(_such_as(text, out[f"{a} and {b}"]["examples"]), warning=bool(twice)))
    for split, features in by_split.items():
        again = [(first[split][key], i) for i, key in enumerate(keys[split]) if first[split][key] != i]
        out[split] = _pairs(features, features, again)
        if again:
            unlike = sum(int(features.labels[i] != features.labels[j]) for i, j in again)
            comes = "comes" if len(again) == 1 else "come"
            text = f"inside {split}, {_plural(len(again), 'image')} {comes} a second time, byte for byte"
            text += f", {unlike} of them with another label" * bool(unlike)
            out["findings"].append(_finding(_such_as(text, out[split]["examples"]), warning=bool(unlike)))
    return out


def _first(keys: Sequence[tuple[int, ...]]) -> dict[tuple[int, ...], int]:
    first: dict[tuple[int, ...], int] = {}
    for i, key in enumerate(keys):
        first.setdefault(key, i)
    return first


def _pairs(one: SplitFeatures, other: SplitFeatures, pairs: Sequence[tuple[int, int]]) -> dict[str, Any]:
    return {"count": len(pairs), "examples": [[one.names[i], other.names[j]] for i, j in pairs[:_EXAMPLES]]}


def _such_as(text: str, examples: Sequence[Sequence[str]]) -> str:
    return f"{text}, such as {' and '.join(examples[0])}" if examples else text


def _plural(count: int, what: str) -> str:
    return f"{count:,} {what}{'s' * (count != 1)}"


def _sources(by_split: Mapping[str, SplitFeatures], known: bool) -> dict[str, Any]:
    out: dict[str, Any] = {"findings": []}
    if not known:
        text = "sources are unknown: splits may share some without notice, and each image counts as its own"
        return out | {"findings": [_finding(text)]}
    for a, b in combinations(by_split, 2):
        one, other = by_split[a], by_split[b]
        shared = torch.tensor(sorted({*one.sources.tolist()} & {*other.sources.tolist()}), dtype=torch.int64)
        mine, theirs = torch.isin(one.sources, shared), torch.isin(other.sources, shared)
        example = [
            [features.names[int((features.sources == s).nonzero()[0])] for features in (one, other)] for s in shared[:1]
        ]
        images = {a: int(mine.sum()), b: int(theirs.sum())}
        out[f"{a} and {b}"] = {"count": len(shared), "images": images, "examples": example}
        text = f"{_plural(len(shared), 'source')} in both {a} and {b}"
        text += f" ({_plural(images[a], 'image')} and {images[b]:,})" * bool(len(shared))
        out["findings"].append(_finding(_such_as(text, example), warning=len(shared) > 0))
    return out


def _near(
    by_split: Mapping[str, SplitFeatures],
    pair: tuple[Tensor, Tensor] | None,
    known: bool,
    most: int | None,
    search: Neighbours,
) -> dict[str, Any]:
    """Find pairs that are as similar as copies, and more similar than strangers.

    Similarity is the cosine of features minus train's mean; without that all cosines are high. Strangers are the
    nearest image of another source for each image of train, or of another class if sources are unknown.
    """
    train = by_split["train"]
    kind = "source" if known else "class"
    apart = train.sources if known else train.labels
    usable = apart >= 0
    if pair is None or len(pair[0]) < 2 or len(set(apart[usable].tolist())) < 2:
        return {
            "findings": [
                _finding("near duplicates were not searched: without sources or classes no images are known to differ")
            ]
        }
    mean = train.z.mean(0)
    original, copy = (unit(z - mean) for z in pair)
    copied = (original * copy).sum(1)
    rows, ids = (train.z, apart) if usable.all() else (train.z[usable], apart[usable])
    few = spread(len(rows), most)
    strange = search(rows[few], rows, 1, ids[few], ids, mean)[0][:, 0]
    threshold = max(torch.quantile(copied, 1 - _RECALL).item(), _upper(strange, _STRANGERS))
    recall = (copied >= threshold).float().mean().item()
    out: dict[str, Any] = {"cosine": threshold, "copies found": recall, "findings": []}
    for split, features in by_split.items():
        if split == "train":
            continue
        whole, features = len(features.z), features.at(spread(len(features.z), most))
        cosine, index = (x[:, 0] for x in search(features.z, train.z, 1, None, None, mean))
        found = cosine >= threshold
        images, sources = int(found.sum()), _distinct(features.sources[found])
        expected = max(_STRANGERS, 1 / len(strange)) * len(features.z)  # by chance alone
        order = cosine.argsort(descending=True, stable=True)[: min(images, _EXAMPLES)].tolist()
        examples = [[train.names[int(index[i])], features.names[i]] for i in order]
        out[f"train and {split}"] = {"images": images, "sources": sources if known else None, "examples": examples}
        above = images > expected + 3 * expected**0.5
        out[f"train and {split}"] |= {"of": len(features.z), "more than by chance": above}
        text = f"{images:,} of {_plural(len(features.z), 'image')} of {split}"
        text += f" (drawn from its {whole:,}: evaluate.queries)" * (whole > len(features.z))
        text += f" (from {sources:,} of {_plural(_distinct(features.sources), 'source')})" * known
        text += f" lie nearer to one of train than {1 - _STRANGERS:.1%} of train lie to any of another {kind}"
        out["findings"].append(_finding(_such_as(text, examples), warning=above))
    if recall < 0.5 and len(by_split) > 1:
        text = (
            f"this finds only {recall:.0%} of copies that are turned and cropped by 5 %: the features do not match them"
        )
        text += "; `sslcells sources` compares the details of the images themselves"
        out["findings"].append(_finding(text, warning=True))
    return out


def _upper(values: Tensor, share: float) -> float:
    """The value that only `share` of the values (n,) exceed."""
    return float(values.sort(descending=True).values[int(share * len(values))].nextafter(torch.tensor(torch.inf)))


def _distinct(numbers: Tensor) -> int:
    return len(set(numbers.tolist()))


def _shortcut(
    by_split: Mapping[str, SplitFeatures],
    query_split: str,
    classes: int,
    known: bool,
    seed: int,
    most: int | None,
    search: Neighbours,
) -> dict[str, Any]:
    """Accuracy of nearest neighbours by colour histogram, without an encoder: on the query split and a random one."""
    train = by_split["train"]
    held = torch.zeros(len(train.labels), dtype=torch.bool)
    order = torch.randperm(len(train.labels), generator=torch.Generator().manual_seed(seed))
    held[order[: len(order) // 5]] = True
    out: dict[str, Any] = {"k": SHORTCUT_K, "bins": BINS, "findings": []}
    if classes < 2 or not (train.labels[~held] >= 0).any():
        return out

    def accuracy(query: SplitFeatures, chosen: Tensor, bank: Tensor, apart: bool) -> dict[str, float]:
        chosen = chosen.nonzero()[:, 0]
        chosen = chosen[spread(len(chosen), most)]
        own, theirs = (query.sources[chosen], train.sources[bank]) if apart else (None, None)
        scores = knn_scores(
            query.histogram[chosen],
            train.histogram[bank],
            train.labels[bank],
            classes,
            SHORTCUT_K,
            None,
            own,
            theirs,
            search,
        )
        return knn_accuracy(scores, query.labels[chosen])

    out["random split of train"] = accuracy(train, held, ~held, apart=False)
    if known:
        out["random split of train, own source left out"] = accuracy(train, held, ~held, apart=True)
    if query_split != "train":
        features = by_split[query_split]
        out[query_split] = accuracy(
            features, torch.ones(len(features.labels), dtype=torch.bool), ~held | held, apart=False
        )
    reached = [(name, figure) for name, figure in out.items() if isinstance(figure, dict) and figure]
    shown = [f"{f['top1']:.1%} (balanced {f['balanced']:.1%}) on {_article(name)}" for name, f in reached]
    out["findings"].append(_finding(f"colour alone ({SHORTCUT_K}-NN of histograms) reaches {', '.join(shown)}"))
    honest = min((f["top1"] for name, f in reached[1:]), default=math.nan)
    chance = 1.5 / max(1, int(held.sum())) ** 0.5  # three standard errors of a share, at most
    if reached and reached[0][1]["top1"] - honest > max(_FLATTERS, chance):
        text = "a random split of train is worthless: it has several images of a source, which colour alone recognises"
        out["findings"].append(_finding(text, warning=True))
    return out


def _article(name: str) -> str:
    return f"a {name}" if name.startswith("random") else name
