"""A part of train that is held out, where the data set has no val split: asked while training, and never trained on."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sslcells.config import ConfigError
from sslcells.data import ImageSet
from sslcells.data.sampler import permutation
from sslcells.data.subset import Subset
from sslcells.storage import is_file, json_text, write_atomically

FILE = "held_out.json"
"""In a run's folder: the names of the images that it held out."""


def hold_out(splits: Mapping[str, ImageSet], part: float) -> dict[str, ImageSet]:
    """The splits, with this part of train as val, which train then lacks, where there is no val and train has labels.

    All the same where no class of train has images of a second source.
    """
    train = splits["train"]
    if "val" in splits or part == 0 or not _has_labels(train):
        return dict(splits)
    return _apart(splits, chosen(train, part))


def chosen(images: ImageSet, part: float, seed: int = 0) -> Tensor:
    """(N,) bool: which images to hold out: of each class this part, at least one, and all images of a source or none.

    Sources are drawn as long as no class exceeds its part. A class of which none fits gives its smallest source, if no
    class loses more than half to it; one that has a single source gives none. So a class may be held out by less or
    more than its part, where its sources are large. Images without a class stay or go with their source. A function of
    labels, sources and seed, whatever else decides a run: the runs that are compared are asked the same images.
    """
    _, source = (x.numpy() for x in torch.unique(images.sources, return_inverse=True))
    image, kind = _classes_of(images)
    sizes = np.bincount(kind)  # images of each class
    pairs, counts = np.unique(source[image] * len(sizes) + kind, return_counts=True)
    of_source, of_kind = np.divmod(pairs, len(sizes))
    start = np.searchsorted(of_source, np.arange(source.max() + 2))  # source s has the pairs start[s] … start[s+1]−1
    turn = np.empty(source.max() + 1, np.int64)
    turn[permutation(len(turn), seed).numpy()] = np.arange(len(turn))
    several = np.bincount(of_kind, minlength=len(sizes)) > 1
    wanted = np.where(several, np.maximum(1, np.round(part * sizes)), 0).astype(np.int64)
    held, taken = np.zeros_like(sizes), np.zeros(len(turn), bool)

    def take(s: int, most: NDArray[np.int64]) -> None:
        kinds, count = of_kind[start[s] : start[s + 1]], counts[start[s] : start[s + 1]]
        if not taken[s] and (held[kinds] + count <= most[kinds]).all():
            held[kinds] += count
            taken[s] = True

    for c in np.argsort(wanted, kind="stable"):  # rare classes first: they have the least choice
        mine = np.flatnonzero(of_kind == c)
        for s in of_source[mine[np.argsort(turn[of_source[mine]])]]:
            if held[c] >= wanted[c]:
                break
            take(int(s), wanted)
        for s in of_source[mine[np.lexsort((turn[of_source[mine]], counts[mine]))]]:
            if held[c] or not wanted[c]:
                break
            take(int(s), sizes // 2)
    return torch.from_numpy(taken[source])


def says(splits: Mapping[str, ImageSet], part: float) -> str:
    """Of which images the figures during training are, and why: a line for a person."""
    train, val = splits["train"], splits.get("val")
    if not _has_labels(train):
        what = "health alone, and nothing is held out, as train has no labels"
    elif val is not None and _has_labels(val):
        what = val.about or f"of the val split, {len(val)} images"
    else:
        if val is not None:
            why = "val has no labels"
        else:
            why = f"evaluate.holdout={part:g} holds nothing out" if part == 0 else "no class has a second source"
        what = f"of train in itself, leave-one-out, of a classifier none: {why}"
    return f"figures while it trains: {what}"


def note(folder: Path, splits: Mapping[str, ImageSet], goes_on: bool) -> None:
    """Write down in the run's folder what it holds out, for whoever evaluates it; for one rank to call.

    Raises:
        ConfigError: where a run goes on that held out other images: it would train on what it was asked before.
    """
    val = splits.get("val")
    names = [val.name(i) for i in range(len(val))] if val is not None and val.about else []
    before = held_out_by(folder)
    if goes_on and before != names:
        raise ConfigError(
            f"{folder} holds a run that held out {len(before)} images of train; now {len(names)} would be, and they "
            f"are not the same ones: evaluate.holdout, labels or sources changed; choose another name="
        )
    if not goes_on:
        write_atomically(folder / FILE, lambda opened: opened.write(json_text(names).encode()))


def held_out_by(folder: Path) -> list[str]:
    """The names of the images that a run held out; none where its folder does not say."""
    file = folder / FILE
    names: list[str] = json.loads(file.read_bytes()) if is_file(file) else []
    return names


def seen_before(splits: Mapping[str, ImageSet], encoder: Path) -> str:
    """A warning where the run that the encoder comes from trained on images that are held out here; else nothing.

    It is one where that run held out others of the same images: with other sources, or another evaluate.holdout.
    """
    val, theirs = splits.get("val"), set(held_out_by(encoder))
    if val is None or not val.about:
        return ""
    ours = {val.name(i) for i in range(len(val))}
    train = splits["train"]
    if ours <= theirs or not theirs & (ours | {train.name(i) for i in range(len(train))}):
        return ""
    return (
        f"warning: {len(ours - theirs)} of the {len(ours)} images held out were trained on by the run of model.encoder="
        f"{encoder}, which held out others: the figures while it trains flatter"
    )


def as_trained(splits: Mapping[str, ImageSet], names: list[str]) -> dict[str, ImageSet]:
    """The splits, with the images of train that a run held out, by their names, as val, where there is no val."""
    train, names_held = splits["train"], set(names)
    if "val" in splits or not names_held:
        return dict(splits)
    return _apart(splits, torch.tensor([train.name(i) in names_held for i in range(len(train))]))


def _apart(splits: Mapping[str, ImageSet], held: Tensor) -> dict[str, ImageSet]:
    train = splits["train"]
    if not held.any():
        return dict(splits)
    sources, of = (len(s.unique()) for s in (train.sources[held], train.sources))  # type: ignore[no-untyped-call]
    known = f"{sources} of {of} sources" if of < len(train) else "each its own source as far as is known"
    about = f"of {int(held.sum())} of {len(train)} images of train ({known}), held out as there is no val split"
    val = Subset(train, held.nonzero()[:, 0], about)
    val.found = None  # how train was read is said of train
    rest = {"train": Subset(train, (~held).nonzero()[:, 0]), "val": val}
    return rest | {name: images for name, images in splits.items() if name != "train"}


def _has_labels(images: ImageSet) -> bool:
    return images.labelled or images.targets is not None


def _classes_of(images: ImageSet) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Image and class of each label that is known; where an image may have several, having none is a class too."""
    if images.targets is None:
        known = (images.labels >= 0).nonzero()[:, 0]
        return known.numpy(), images.labels[known].numpy()
    targets = torch.cat([images.targets, (images.targets.sum(1, keepdim=True) == 0).to(torch.uint8)], 1)
    image, kind = targets.nonzero().unbind(1)
    return image.numpy(), kind.numpy()
