"""Holds out a part of train if the data set has no val split: the figures measure it, and it is never trained on."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sslcells.config import ConfigError, Evaluate
from sslcells.data import ImageSet
from sslcells.data.sampler import permutation
from sslcells.data.subset import Subset
from sslcells.storage import is_file, json_text, write_atomically

FILE = "held_out.json"
"""In a run's folder: the names of the images that it held out."""


def hold_out(splits: Mapping[str, ImageSet], part: float) -> dict[str, ImageSet]:
    """The splits, with this part of train moved to a new val, if there is no val and train has labels.

    Unchanged if no class of train has more than one source.
    """
    train = splits["train"]
    if "val" in splits or part == 0 or not _has_labels(train):
        return dict(splits)
    return _split_off(splits, choose(train, part))


def choose(images: ImageSet, part: float, seed: int = 0) -> Tensor:
    """(N,) bool: the images to hold out, about this part of each class (at least one image), always in whole sources.

    Each class draws sources at random until it has its part; a source that exceeds the part of any class is skipped. If
    no source fits, the class gives its smallest one, unless some class would lose more than half of its images. So
    a class with large sources may give more or less than its part. A class with a single source gives nothing. Images
    without a class follow their source. The result depends only on labels, sources and seed: runs that are compared
    hold out the same images.
    """
    _, source = (x.numpy() for x in torch.unique(images.sources, return_inverse=True))
    image, kind = _classes_of(images)
    sizes = np.bincount(kind)  # images of each class
    pairs, counts = np.unique(source[image] * len(sizes) + kind, return_counts=True)
    of_source, of_kind = np.divmod(pairs, len(sizes))
    start = np.searchsorted(of_source, np.arange(source.max() + 2))  # source s has the pairs start[s] … start[s+1]−1
    turn = np.empty(source.max() + 1, np.int64)
    turn[permutation(len(turn), seed).numpy()] = np.arange(len(turn))
    several_sources = np.bincount(of_kind, minlength=len(sizes)) > 1
    wanted = np.where(several_sources, np.maximum(1, np.round(part * sizes)), 0).astype(np.int64)
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


def summary(splits: Mapping[str, ImageSet], part: float) -> str:
    """A line for the log: the images that the figures during training measure, and why these."""
    train, val = splits["train"], splits.get("val")
    if not _has_labels(train):
        what = "only those that need no labels, and nothing is held out, as train has no labels"
    elif val is not None and _has_labels(val):
        what = f"on {val.about or f'the val split, {len(val)} images'}"
    else:
        if val is not None:
            why = "val has no labels"
        else:
            why = f"evaluate.holdout={part:g} holds nothing out" if part == 0 else "no class has a second source"
        what = f"on train itself, leave-one-out, and none of a classifier, as {why}"
    return f"figures during training: {what}"


def limits(splits: Mapping[str, ImageSet], evaluate: Evaluate) -> str:
    """Of how many images the figures during training are, for the line of `summary`; empty if of all."""
    train, val = splits["train"], splits.get("val")
    parts = []
    for what, images, most in (
        ("measured on", val or train, evaluate.queries),
        ("compared with", train, evaluate.bank),
    ):
        shown = min(len(images), *(n for n in (most, evaluate.max_images) if n is not None), len(images))
        if shown < len(images):
            parts.append(f"{what} {shown:,} of the {len(images):,} images of {'train' if images is train else 'val'}")
    return f"; {', '.join(parts)} (evaluate.queries, evaluate.bank)" if parts else ""


def record(folder: Path, splits: Mapping[str, ImageSet], resumes: bool) -> None:
    """Write the names of the held-out images into the run's folder, for later evaluation; one rank calls it.

    Raises:
        ConfigError: if a resumed run held out other images before; it would train on images that it was measured on.
    """
    val = splits.get("val")
    names = [val.name(i) for i in range(len(val))] if val is not None and val.about else []
    before = held_out_by(folder)
    if resumes and before != names:
        raise ConfigError(
            f"the run in {folder} held out {len(before)} images of train; now it would hold out {len(names)}, not the "
            f"same ones: evaluate.holdout, labels or sources changed; choose another name="
        )
    if not resumes:
        write_atomically(folder / FILE, lambda opened: opened.write(json_text(names).encode()))


def held_out_by(folder: Path) -> list[str]:
    """The names of the images that a run held out; empty if its folder has no such list."""
    file = folder / FILE
    names: list[str] = json.loads(file.read_bytes()) if is_file(file) else []
    return names


def overlap_warning(splits: Mapping[str, ImageSet], encoder: Path) -> str:
    """A warning if the run that made the encoder trained on images that are held out here; otherwise empty.

    That happens if it held out others of the same images, because of other sources or another evaluate.holdout.
    """
    val, theirs = splits.get("val"), set(held_out_by(encoder))
    if val is None or not val.about:
        return ""
    ours = {val.name(i) for i in range(len(val))}
    train = splits["train"]
    if ours <= theirs or not theirs & (ours | {train.name(i) for i in range(len(train))}):
        return ""
    return (
        f"warning: model.encoder={encoder} was trained on {len(ours - theirs)} of the {len(ours)} images held out "
        f"here, as its run held out others: the figures during training are too high"
    )


def hold_out_named(splits: Mapping[str, ImageSet], names: list[str]) -> dict[str, ImageSet]:
    """The splits, with the images of train that a run held out, given by name, as val, if there is no val."""
    train, names_held = splits["train"], set(names)
    if "val" in splits or not names_held:
        return dict(splits)
    return _split_off(splits, torch.tensor([train.name(i) in names_held for i in range(len(train))]))


def _split_off(splits: Mapping[str, ImageSet], held: Tensor) -> dict[str, ImageSet]:
    train = splits["train"]
    if not held.any():
        return dict(splits)
    sources, of = (len(s.unique()) for s in (train.sources[held], train.sources))  # type: ignore[no-untyped-call]
    known = f"{sources} of {of} sources" if of < len(train) else "sources unknown"
    about = f"{int(held.sum())} of {len(train)} images of train ({known}), held out as there is no val split"
    val = Subset(train, held.nonzero()[:, 0], about)
    val.found = None  # train already tells how the files were read
    rest = {"train": Subset(train, (~held).nonzero()[:, 0]), "val": val}
    return rest | {name: images for name, images in splits.items() if name != "train"}


def _has_labels(images: ImageSet) -> bool:
    return images.labelled or images.targets is not None


def _classes_of(images: ImageSet) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Image and class of each known label; if images may have several labels, having none is a class too."""
    if images.targets is None:
        known = (images.labels >= 0).nonzero()[:, 0]
        return known.numpy(), images.labels[known].numpy()
    targets = torch.cat([images.targets, (images.targets.sum(1, keepdim=True) == 0).to(torch.uint8)], 1)
    image, kind = targets.nonzero().unbind(1)
    return image.numpy(), kind.numpy()
