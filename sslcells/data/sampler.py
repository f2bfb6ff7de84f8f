"""Which images make up the global batch of a step: a function of (seed, step), so that any step can be gone to."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Sampler as IndexSampler

from sslcells import ranks
from sslcells.config import ConfigError, Sampler
from sslcells.data import Batch, ImageSet, Pick


class Sampling(ABC):
    """The global batches of a run, the same for any number of ranks."""

    repeats: bool = False
    """whether an image may come more than once in a global batch"""

    @abstractmethod
    def batch(self, step: int) -> Tensor:
        """(G,) int64: the images of the global batch of a step; rank r of W takes the r-th part."""

    @abstractmethod
    def describe(self) -> str:
        """What it does, in numbers, for `--check`."""


def build(config: Sampler, images: ImageSet, global_batch: int, seed: int) -> Sampling:
    """The sampling that `config` describes, of the images of a train split.

    Raises:
        ConfigError: where the images, or the size of the global batch, do not allow it.
    """
    if config.kind == "shuffle":
        return Shuffle(len(images), global_batch, seed)
    if config.kind == "sources":
        return Groups(images.sources, "source", config.per_source, global_batch, seed)
    if not images.labelled:
        raise ConfigError(f"sampler.kind={config.kind} needs labels; the train split has none: sampler.kind=shuffle")
    if config.kind == "balanced":
        return Balanced(images.labels, images.classes, global_batch, seed)
    return Groups(images.labels, "class", config.per_class, global_batch, seed)


class Shuffle(Sampling):
    """Every epoch is a permutation of the images; the rest of an epoch that fills no batch is dropped."""

    def __init__(self, images: int, global_batch: int, seed: int) -> None:
        self._images, self._global_batch, self._seed = images, global_batch, seed
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.int64)

    def batch(self, step: int) -> Tensor:
        """The next G images of the epoch's permutation."""
        epoch, at = divmod(step, self._images // self._global_batch)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, permutation(self._images, self._seed, epoch)
        return self._order[at * self._global_batch : (at + 1) * self._global_batch]

    def describe(self) -> str:
        """How many images an epoch leaves out."""
        return f"every image once an epoch, but for {self._images % self._global_batch} that fill no global batch"


class Balanced(Sampling):
    """Every class equally often: each has G // K or one more images in a global batch, and over K batches the same.

    A class is gone through image by image, in a new order each round, before one of its images comes again.
    """

    def __init__(self, labels: Tensor, classes: tuple[str, ...], global_batch: int, seed: int) -> None:
        self._members = _Members(labels)
        self._global_batch, self._names = global_batch, classes
        count = len(self._members)
        share = -(-global_batch // count)
        self.repeats = min(self._members.sizes) < share
        self._rounds = [_Rounds(size, share, False, seed, c) for c, size in enumerate(self._members.sizes)]

    def batch(self, step: int) -> Tensor:
        """The places step·G … (step+1)·G−1 of an endless row in which the classes take turns."""
        count, first = len(self._members), step * self._global_batch
        out = torch.empty(self._global_batch, dtype=torch.int64)
        for c, rounds in enumerate(self._rounds):
            places = slice((c - first) % count, None, count)
            many = len(out[places])
            out[places] = self._members.of(c)[rounds.take((first + places.start) // count, many)]
        return out

    def describe(self) -> str:
        """The share of a class in the batch, and how often the images of its extremes are seen."""
        sizes, count = self._members.sizes, len(self._members)
        share = self._global_batch / count
        each = f"{self._global_batch // count}" + (" or one more" if self._global_batch % count else "")
        often = sum(sizes) / count
        extremes = [
            f"an image of {self._names[self._members.ids[c]]!r} ({sizes[c]} images) {often / sizes[c]:.3g} times"
            for c in (sizes.index(min(sizes)), sizes.index(max(sizes)))
        ]
        repeats = sum(size < share for size in sizes)
        return (
            f"{each} of each of {count} classes in a global batch; an epoch shows {' and '.join(extremes)}"
            + (f"; classes with fewer images, which a batch shows more than once: {repeats}" if repeats else "")
            + self._members.left_out()
        )


class Groups(Sampling):
    """G / k different classes, or sources, in a global batch and k different images of each; all equally often.

    The first image of every group comes before the second of any, so that a rank's part, and a micro-batch, hold many.
    """

    def __init__(self, ids: Tensor, what: Literal["class", "source"], each: int, global_batch: int, seed: int) -> None:
        self._members = _Members(ids)
        self._what, self._each, self._groups = what, each, global_batch // each
        _check(self._members, what, each, global_batch)
        self._turns = _Rounds(len(self._members), self._groups, True, seed)
        self._rounds: dict[int, _Rounds] = {}
        self._seed = seed

    def batch(self, step: int) -> Tensor:
        """Turns step·P … (step+1)·P−1 of the groups; a group's t-th turn shows its next k images."""
        first = step * self._groups
        chosen = self._turns.take(first, self._groups).tolist()
        rows = []
        for turn, group in enumerate(chosen, first):
            size = self._members.sizes[group]
            rounds = self._rounds.get(group) or _Rounds(size, self._each, True, self._seed, group)
            if size > _LARGE:
                self._rounds[group] = rounds
            rows.append(self._members.of(group)[rounds.take(turn // len(self._members) * self._each, self._each)])
        return torch.stack(rows, 1).flatten()

    def describe(self) -> str:
        """P × K."""
        sizes, plural = self._members.sizes, "classes" if self._what == "class" else "sources"
        return (
            f"{self._groups} of {len(sizes)} {plural} in a global batch, {self._each} different images of each; "
            f"every {self._what} equally often, whether it has {min(sizes)} images or {max(sizes)}"
            + self._members.left_out()
        )


_LARGE = 256
"""images of a group whose order is kept between its turns; a smaller one's is cheaper to make again"""


def _check(members: "_Members", what: Literal["class", "source"], each: int, global_batch: int) -> None:
    """Raise a ConfigError unless G / k groups of at least k images can be had."""
    key, plural = ("per_class", "classes") if what == "class" else ("per_source", "sources")
    said, sizes = f"sampler.{key}={each}", members.sizes
    if global_batch % each:
        near = [k for k in range(1, global_batch + 1) if global_batch % k == 0]
        right = min(near, key=lambda k: abs(k - each))
        raise ConfigError(f"{said} does not divide train.global_batch={global_batch}; {right} does")
    if global_batch // each > len(sizes):
        raise ConfigError(
            f"{said} with train.global_batch={global_batch} takes {global_batch // each} {plural} a batch; the train "
            f"split has {len(sizes)}: train.global_batch={len(sizes) * each} is the largest"
        )
    if min(sizes) < each:
        small = sum(size < each for size in sizes)
        raise ConfigError(
            f"{said} is more than the images of {small} of {len(sizes)} {plural}; the smallest has {min(sizes)}"
        )


class _Members:
    """The images of each class or source; an unknown one (-1) is left out."""

    def __init__(self, ids: Tensor) -> None:
        known = ids >= 0
        self._order = torch.where(known, ids, torch.iinfo(torch.int64).max).argsort(stable=True)[: int(known.sum())]
        values, counts = np.unique(ids[self._order].numpy(), return_counts=True)
        self.ids: list[int] = values.tolist()
        self.sizes: list[int] = counts.tolist()
        self._ends: list[int] = counts.cumsum().tolist()
        self._unknown = len(ids) - len(self._order)

    def __len__(self) -> int:
        return len(self.sizes)

    def of(self, group: int) -> Tensor:
        """(n,) int64: the images of a group."""
        return self._order[self._ends[group] - self.sizes[group] : self._ends[group]]

    def left_out(self) -> str:
        """The end of a description."""
        return f"; {self._unknown} images of no known class are not drawn" if self._unknown else ""


class _Rounds:
    """An endless row of the numbers 0..n-1, each once a round.

    Taken at most `most` at a time, the row never gives a number twice at once, where n ≥ most. A round that began with
    what ended the last one would: with n ≥ 3 · (most − 1) numbers those are put off to the middle of the round. With
    fewer the order stays; where all takings are `even`, of just `most`, until a round begins where a taking does.
    """

    def __init__(self, n: int, most: int, even: bool, *seed: int) -> None:
        self._n, self._seam, self._seed = n, most - 1, seed
        self._late = n >= 3 * self._seam
        self._together = most // math.gcd(n, most) if even else None
        self._last = -1, torch.empty(0, dtype=torch.int64)

    def take(self, first: int, count: int) -> Tensor:
        """(count,) int64: places first … first+count−1 of the row."""
        parts = [torch.empty(0, dtype=torch.int64)]
        while count > 0:
            number, at = divmod(first, self._n)
            parts.append(self._round(number)[at : at + count])
            first, count = first + len(parts[-1]), count - len(parts[-1])
        return torch.cat(parts)

    def _round(self, number: int) -> Tensor:
        if not self._late:
            number -= number % self._together if self._together else number
        if self._last[0] != number:
            order = permutation(self._n, *self._seed, number)
            if self._late and self._seam and number:
                ended = permutation(self._n, *self._seed, number - 1)[-self._seam :]
                head, rest = order[: -self._seam], order[-self._seam :]
                late = torch.isin(head, ended)
                order = torch.cat([head[~late], head[late], rest])
            self._last = number, order
        return self._last[1]


class Steps(IndexSampler[list[Pick]]):
    """One rank's part of the global batches of steps start..stop-1, each image with its occurrence in its batch.

    The occurrence is counted over the global batch, so that it is the same for any number of ranks.
    """

    def __init__(self, sampling: Sampling, rank: int, world: int, start: int, stop: int) -> None:
        self._sampling, self._rank, self._world = sampling, rank, world
        self._start, self._stop = start, stop

    def __iter__(self) -> Iterator[list[Pick]]:
        for step in range(self._start, self._stop):
            batch = self._sampling.batch(step)
            whole = torch.stack([batch, occurrences(batch)], 1)
            yield [Pick(*row) for row in whole.chunk(self._world)[self._rank].tolist()]

    def __len__(self) -> int:
        return self._stop - self._start


def occurrences(ids: Tensor) -> Tensor:
    """How many equal ids stand before each: (G,) int64 → (G,) int64."""
    ordered, order = ids.sort(stable=True)
    place = torch.arange(len(ids))
    first = torch.ones_like(ids, dtype=torch.bool)
    first[1:] = ordered[1:] != ordered[:-1]
    begins = torch.where(first, place, 0).cummax(0).values
    return torch.empty_like(ids).scatter_(0, order, place - begins)


def permutation(count: int, *seed: int) -> Tensor:
    """(count,) int64: 0..count-1 in an order that the numbers of the seed decide."""
    mixed = 0
    for number in seed:
        mixed = (mixed * 1_000_003 + number) % 2**63
    return torch.randperm(count, generator=torch.Generator().manual_seed(mixed))


def composition(batch: Batch, device: torch.device) -> dict[str, float]:
    """How many of an anchor's negatives, the other images of the global batch, are of its own kind: means over anchors.

    `batch/same_source`: of its source. `batch/same_label`: of its class, among the images whose class is known; left
    out where none is. Every rank takes part.
    """
    label, source = ranks.gather(torch.stack([batch.label, batch.source], 1).to(device)).cpu().unbind(1)
    out = {"batch/same_source": _share(source)}
    if bool((label >= 0).any()):
        out["batch/same_label"] = _share(label[label >= 0])
    return out


def _share(ids: Tensor) -> float:
    """Mean over i of the share of j ≠ i with equal ids: (G,) → a number."""
    count = np.unique(ids.numpy(), return_counts=True)[1]
    return float((count * (count - 1)).sum() / max(1, len(ids) * (len(ids) - 1)))
