"""Chooses the images of each global batch, as a function of seed and step, so that a run can resume at any step."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Sampler as IndexSampler

from sslcells.config import ConfigError, Sampler
from sslcells.data import ImageSet, Pick


class Sampling(ABC):
    """The global batches of a run, the same for any number of ranks."""

    repeats: bool = False
    """True if a global batch may show an image more than once"""

    @abstractmethod
    def batch(self, step: int) -> Tensor:
        """(G,) int64: the images of a step's global batch; rank r of W takes the r-th part."""

    @abstractmethod
    def describe(self) -> str:
        """A description with numbers, for `--check`."""


def build(config: Sampler, images: ImageSet, global_batch: int, seed: int) -> Sampling:
    """The sampling of a train split that `config` asks for.

    Raises:
        ConfigError: if the images or the size of the global batch do not allow it.
    """
    if config.kind == "shuffle":
        return Shuffle(len(images), global_batch, seed, config.block)
    if config.kind == "sources":
        return Groups(images.sources, "source", config.per_source, global_batch, seed)
    if config.kind == "labs":
        return _of_labs(config, images, global_batch, seed)
    if not images.labelled:
        raise ConfigError(f"sampler.kind={config.kind} needs labels, train has none; use sampler.kind=shuffle")
    if config.kind == "balanced":
        return Balanced(images.labels, images.classes, global_batch, seed)
    return Groups(images.labels, "class", config.per_class, global_batch, seed)


def _of_labs(config: Sampler, images: ImageSet, global_batch: int, seed: int) -> Sampling:
    count = 0 if images.labs is None else len(images.labs[images.labs > 0].unique())  # type: ignore[no-untyped-call]
    if images.labs is None or count < 2:
        raise ConfigError(
            f"sampler.kind=labs needs images of two laboratories; train has {count}: give them by a table's column "
            f"(data.site_column), data.lab_pattern or data.lab_folder, or use sampler.kind=shuffle"
        )
    if config.labs == "natural":
        return NaturalParts(images.labs, images.lab_names, global_batch, seed)
    return Balanced(images.labs - 1, images.lab_names, global_batch, seed, "laboratory", "laboratories")


class Shuffle(Sampling):
    """Each epoch is a permutation of the images; its last images are dropped if they do not fill a batch.

    With `block`, the epoch is a permutation of blocks of images that follow each other; `together` blocks at a time are
    mixed image by image, and a batch has images of so many, or of twice as many.
    """

    def __init__(self, images: int, global_batch: int, seed: int, block: int | None = None) -> None:
        self._images, self._global_batch, self._seed, self._block = images, global_batch, seed, block
        self.together = max(_TOGETHER, -(-2 * global_batch // block)) if block is not None else 0
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.int64)

    def batch(self, step: int) -> Tensor:
        """The next G images of the epoch's permutation."""
        epoch, at = divmod(step, self._images // self._global_batch)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, self._permuted(epoch)
        return self._order[at * self._global_batch : (at + 1) * self._global_batch]

    def _permuted(self, epoch: int) -> Tensor:
        if self._block is None:
            return permutation(self._images, self._seed, epoch)
        turn = permutation(-(-self._images // self._block), self._seed, epoch, 1).argsort()  # of each block
        group = (turn // self.together).repeat_interleave(self._block)[: self._images]
        return (group * self._images + permutation(self._images, self._seed, epoch)).argsort()

    def describe(self) -> str:
        """How many images an epoch leaves out, and what is mixed."""
        text = f"every image once per epoch, except {self._images % self._global_batch} that do not fill a batch"
        return text + (f"; {self.together} blocks of {self._block} images are mixed" if self._block is not None else "")


_TOGETHER = 16
"""blocks that are mixed at least"""


class NaturalParts(Sampling):
    """Like Shuffle, but each laboratory's images are spread evenly over the epoch, in random order.

    So every run of images, a global batch or the part of a rank, has of each laboratory its share of the images, to
    one image or two. Images of an unknown laboratory count as one.
    """

    def __init__(self, labs: Tensor, names: tuple[str, ...], global_batch: int, seed: int) -> None:
        self._labs, self._names, self._global_batch, self._seed = labs, names, global_batch, seed
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.int64)

    def batch(self, step: int) -> Tensor:
        """The next G images of the epoch's order."""
        epoch, at = divmod(step, len(self._labs) // self._global_batch)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, self._spread(epoch)
        return self._order[at * self._global_batch : (at + 1) * self._global_batch]

    def _spread(self, epoch: int) -> Tensor:
        """The images by their place in the epoch, 0 to 1: the i-th of a laboratory's n has (i + start) / n."""
        turn = permutation(len(self._labs), self._seed, epoch)
        place = torch.empty(len(turn), dtype=torch.float64)
        starts = torch.rand(len(self._names) + 1, generator=_generator(self._seed, epoch, 1), dtype=torch.float64)
        for lab, start in enumerate(starts):
            mine = turn[self._labs[turn] == lab]
            place[mine] = (torch.arange(len(mine)) + start) / max(1, len(mine))
        return turn[place[turn].argsort(stable=True)]

    def describe(self) -> str:
        """The images of each laboratory in a global batch."""
        count: list[int] = torch.bincount(self._labs, minlength=len(self._names) + 1).tolist()
        share = self._global_batch / len(self._labs)
        each = [
            f"{share * n:.3g} of {name}" for name, n in zip(["no laboratory", *self._names], count, strict=True) if n
        ]
        left = len(self._labs) % self._global_batch
        return (
            f"every image once per epoch, except {left} that do not fill a batch; in a global batch about "
            f"{', '.join(each[:_SHOWN])}{', …' * (len(each) > _SHOWN)}"
        )


_SHOWN = 12
"""laboratories in a description"""


class Balanced(Sampling):
    """All classes (or laboratories) equally often: G // K or one more of each in a global batch, as many of each in K.

    An image is repeated only after all others of its class; each round through a class has a new order.
    """

    def __init__(
        self,
        labels: Tensor,
        classes: tuple[str, ...],
        global_batch: int,
        seed: int,
        what: str = "class",
        plural: str = "classes",
    ) -> None:
        self._members = _Members(labels, what)
        self._global_batch, self._names, self._plural = global_batch, classes, plural
        count = len(self._members)
        share = -(-global_batch // count)
        self.repeats = min(self._members.sizes) < share
        self._rounds = [_Rounds(size, share, False, seed, c) for c, size in enumerate(self._members.sizes)]

    def batch(self, step: int) -> Tensor:
        """Positions step·G … (step+1)·G−1 of an endless sequence in which the classes take turns."""
        count, first = len(self._members), step * self._global_batch
        out = torch.empty(self._global_batch, dtype=torch.int64)
        for c, rounds in enumerate(self._rounds):
            positions = slice((c - first) % count, None, count)
            many = len(out[positions])
            out[positions] = self._members.of(c)[rounds.take((first + positions.start) // count, many)]
        return out

    def describe(self) -> str:
        """The number of images per class, and how often images of the smallest and the largest class are seen."""
        sizes, count = self._members.sizes, len(self._members)
        share = self._global_batch / count
        each = f"{self._global_batch // count}"
        each += f" or {self._global_batch // count + 1}" if self._global_batch % count else ""
        often = sum(sizes) / count
        extremes = [
            f"an image of {self._names[self._members.ids[c]]!r} ({sizes[c]} images) {often / sizes[c]:.3g} times"
            for c in (sizes.index(min(sizes)), sizes.index(max(sizes)))
        ]
        repeats = sum(size < share for size in sizes)
        return (
            f"{each} images of each of {count} {self._plural} in a global batch; "
            f"an epoch shows {' and '.join(extremes)}"
            + (f"; {self._plural} with too few images, repeated within a batch: {repeats}" if repeats else "")
            + self._members.left_out()
        )


class Groups(Sampling):
    """G / k different groups (classes or sources) in a global batch, and k different images of each; all equally often.

    A batch has the first image of every group, then the second of every group, and so on: then the part of each rank,
    and each micro-batch, has many groups.
    """

    def __init__(self, ids: Tensor, what: Literal["class", "source"], each: int, global_batch: int, seed: int) -> None:
        self._members = _Members(ids)
        self._what, self._each, self._groups = what, each, global_batch // each
        _check(self._members, what, each, global_batch)
        self._turns = _Rounds(len(self._members), self._groups, True, seed)
        self._rounds: dict[int, _Rounds] = {}
        self._seed = seed

    def batch(self, step: int) -> Tensor:
        """Turns step·P … (step+1)·P−1 of the groups, P = G / k; in each turn a group shows its next k images."""
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
        """The numbers of groups and of images per group."""
        sizes, plural = self._members.sizes, "classes" if self._what == "class" else "sources"
        return (
            f"{self._groups} of {len(sizes)} {plural} in a global batch, {self._each} different images of each; "
            f"every {self._what} equally often, although they have {min(sizes)} to {max(sizes)} images"
            + self._members.left_out()
        )


_LARGE = 256
"""a group with more images keeps its order between turns; the order of a smaller one is cheap to compute again"""


def _check(members: "_Members", what: Literal["class", "source"], each: int, global_batch: int) -> None:
    """Raise a ConfigError unless there are G / k groups, each with at least k images."""
    key, plural = ("per_class", "classes") if what == "class" else ("per_source", "sources")
    setting, sizes = f"sampler.{key}={each}", members.sizes
    if global_batch % each:
        divisors = [k for k in range(1, global_batch + 1) if global_batch % k == 0]
        closest = min(divisors, key=lambda k: abs(k - each))
        raise ConfigError(f"{setting} does not divide train.global_batch={global_batch}; {closest} does")
    if global_batch // each > len(sizes):
        raise ConfigError(
            f"{setting} with train.global_batch={global_batch} needs {global_batch // each} {plural} in a batch; the "
            f"train split has {len(sizes)}: train.global_batch may be at most {len(sizes) * each}"
        )
    if min(sizes) < each:
        small = sum(size < each for size in sizes)
        raise ConfigError(
            f"{setting}: {small} of {len(sizes)} {plural} have fewer images; the smallest has {min(sizes)}"
        )


class _Members:
    """The images of each class, source or laboratory, without those of which it is unknown (-1)."""

    def __init__(self, ids: Tensor, what: str = "class") -> None:
        self._what = what
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
        """The end of a description: the images that are never drawn."""
        return f"; {self._unknown} images without a {self._what} are not drawn" if self._unknown else ""


class _Rounds:
    """An endless sequence of rounds; each round has the numbers 0..n-1 once, in random order.

    At most `most` numbers are taken at a time. They are all different if n ≥ most, even if they come from two rounds:

    - With n ≥ 3 · (most − 1), the last numbers of a round are moved away from the start of the next round.
    - With fewer, all rounds have the same order. If every take is of exactly `most` numbers (`even`), a new order
      begins whenever a round and a take begin together.
    """

    def __init__(self, n: int, most: int, even: bool, *seed: int) -> None:
        self._n, self._end, self._seed = n, most - 1, seed
        self._moves = n >= 3 * self._end
        self._rounds_alike = most // math.gcd(n, most) if even else None
        self._last = -1, torch.empty(0, dtype=torch.int64)

    def take(self, first: int, count: int) -> Tensor:
        """(count,) int64: positions first … first+count−1 of the sequence."""
        parts = [torch.empty(0, dtype=torch.int64)]
        while count > 0:
            number, at = divmod(first, self._n)
            parts.append(self._round(number)[at : at + count])
            first, count = first + len(parts[-1]), count - len(parts[-1])
        return torch.cat(parts)

    def _round(self, number: int) -> Tensor:
        if not self._moves:
            number -= number % self._rounds_alike if self._rounds_alike else number
        if self._last[0] != number:
            order = permutation(self._n, *self._seed, number)
            if self._moves and self._end and number:
                previous_end = permutation(self._n, *self._seed, number - 1)[-self._end :]
                start, end = order[: -self._end], order[-self._end :]
                recent = torch.isin(start, previous_end)
                order = torch.cat([start[~recent], start[recent], end])
            self._last = number, order
        return self._last[1]


class Steps(IndexSampler[list[Pick]]):
    """One rank's part of the global batches of steps start..stop-1, each image with its occurrence in the global batch.

    So the occurrence is the same for any number of ranks.
    """

    def __init__(self, sampling: Sampling, rank: int, world: int, start: int, stop: int) -> None:
        self._sampling, self._rank, self._world = sampling, rank, world
        self._start, self._stop = start, stop

    def __iter__(self) -> Iterator[list[Pick]]:
        for step in range(self._start, self._stop):
            batch = self._sampling.batch(step)
            picks = torch.stack([batch, occurrences(batch)], 1)
            yield [Pick(*row) for row in picks.chunk(self._world)[self._rank].tolist()]

    def __len__(self) -> int:
        return self._stop - self._start


def occurrences(ids: Tensor) -> Tensor:
    """For each id the number of equal ids before it: (G,) int64 → (G,) int64."""
    ordered, order = ids.sort(stable=True)
    position = torch.arange(len(ids))
    first = torch.ones_like(ids, dtype=torch.bool)
    first[1:] = ordered[1:] != ordered[:-1]
    begins = torch.where(first, position, 0).cummax(0).values
    return torch.empty_like(ids).scatter_(0, order, position - begins)


def permutation(count: int, *seed: int) -> Tensor:
    """(count,) int64: the numbers 0..count-1 in a random order, which the seed decides."""
    return torch.randperm(count, generator=_generator(*seed))


def _generator(*seed: int) -> torch.Generator:
    mixed = 0
    for number in seed:
        mixed = (mixed * 1_000_003 + number) % 2**63
    return torch.Generator().manual_seed(mixed)
