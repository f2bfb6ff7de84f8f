"""From images to features: the one path, shared by training's figures, `evaluate`, `embed` and `search`.

`encode_batches` runs the encoder on batches, one forward pass a batch. `encode` reads whole splits through it, sharded
over the ranks, and gathers the rows on every rank.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple, overload

import torch
from torch import Tensor, nn

from sslcells import ranks
from sslcells.data import DataError, ImageSet
from sslcells.data.loader import InOrder, Readable, read_readable, with_workers
from sslcells.data.sampler import permutation
from sslcells.models import eval_mode

Prepare = Callable[[Tensor, Tensor], Tensor]
"""Pixels (B, C, H, W) uint8 on the device and image ids (B,) on the CPU → what the encoder takes."""


class Features(NamedTuple):
    """Features of N images, in the order of the indices that `encode` was given; on the CPU."""

    z: Tensor
    """(N, F) float32"""
    labels: Tensor
    """(N,) int64 class; -1 where unknown"""
    sources: Tensor
    """(N,) int64"""
    names: Sequence[str]
    """what a person calls each image"""
    of_pixels: tuple[Tensor, ...] = ()
    """(N, ...) each: what the `of_pixels` of `encode` computed"""


class NotFinite(DataError):
    """The features of some images are NaN or infinite."""


def check_finite(z: Tensor, images: str = "images", encoder: str = "the encoder") -> None:
    """Raise NotFinite if rows (N, F) hold NaN or an infinity: figures computed from them would be wrong."""
    if broken := int((~z.isfinite().all(1)).sum()):
        raise NotFinite(f"{encoder} gives no finite features for {broken} of {len(z)} {images}")


def spread(count: int, most: int | None) -> list[int]:
    """At most `most` of the indices 0 … count − 1, a fixed random choice; all of them if `most` is None.

    Random, not every n-th: in a split whose classes alternate, every n-th would miss classes.
    """
    if most is None or count <= most:
        return list(range(count))
    return sorted(permutation(count, 0, 0)[:most].tolist())


def drawn(labels: Tensor, most: int | None) -> list[int]:
    """At most `most` of the images with these labels (N,), each class by its share, and one at least; sorted indices.

    Images without a label, below 0, only fill what the others leave. A fixed choice, and a smaller one is part of a
    larger one; all indices if `most` is None.
    """
    if most is None or len(labels) <= most:
        return list(range(len(labels)))
    order = permutation(len(labels), 0, 0)
    order = order[labels[order].argsort(stable=True)]  # by class, at random inside a class
    _, sizes = torch.unique(labels, return_counts=True)
    first = (sizes.cumsum(0) - sizes).repeat_interleave(sizes)
    place = torch.arange(len(labels)) - first  # 0 … size − 1 inside each class
    # The image that brings its class to a share; the first image of a class comes before all others.
    share = (place + 0.5) / sizes.repeat_interleave(sizes) - (place == 0).double()
    share += 2 * (labels[order] < 0)
    return sorted(order[share.argsort(stable=True)[:most]].tolist())


@torch.no_grad()
def encode_batches(
    batches: Iterable[Readable],
    network: Callable[[Readable], Tensor],
    progress: Callable[[int], None] = lambda images: None,
) -> Iterator[tuple[Readable, Tensor | None]]:
    """Each batch with the features (B, F) float32 of its B readable images, on the device; None if B is 0.

    One forward pass per batch, without gradients. After each batch `progress` is called with its number of images,
    unreadable ones included.
    """
    for batch in batches:
        z = network(batch).float() if batch.image else None
        progress(batch.size)
        yield batch, z


def encode(
    images: ImageSet,
    encoder: nn.Module,
    prepare: Prepare,
    device: torch.device,
    batch: int,
    workers: int,
    indices: Sequence[int] | None = None,
    of_pixels: Callable[[Tensor], tuple[Tensor, ...]] = lambda pixels: (),
    what: str = "images",
    progress: Callable[[int], None] = lambda images: None,
    everywhere: bool = True,
) -> Features:
    """Features of the images with these indices, of all where None; every rank calls this and gets all rows.

    With `everywhere` False only rank 0 gets them, and the others no rows of `z` and `of_pixels`: then a rank holds no
    more than those that it encoded.

    The encoder is in eval mode. Each image is read once, by one rank. `of_pixels` computes more from the pixels
    (B, C, H, W) uint8 of each batch: (B, ...) each. `what` names the images in the error. `progress` is called on each
    rank with how many images it has encoded since the last call.

    Raises:
        DataError: on every rank, if an image cannot be read.
        NotFinite: on every rank, if features are NaN or infinite.
    """
    index = list(range(len(images))) if indices is None else list(indices)

    def network(read: Readable) -> Tensor:
        ids = torch.tensor(read.image, dtype=torch.int64)
        out: Tensor = encoder(prepare(_of_one_size(read).to(device, non_blocking=True), ids))
        return out

    def local(mine: Sequence[int]) -> list[tuple[Tensor, ...]]:
        ahead = read_readable(images, InOrder(mine, batch), workers, pin_memory=device.type == "cuda")
        with with_workers(ahead) as batches:
            return [
                (z.cpu(), *of_pixels(_of_one_size(read)))
                for read, z in encode_batches(_all_readable(batches), network, progress)
                if z is not None
            ]

    with eval_mode(encoder):
        columns = sharded(index, local, batch, device, everywhere)
    z, *more = columns or [torch.zeros(0, 0)]
    ranks.from_main(lambda: check_finite(z, what))
    return Features(z, images.labels[index], images.sources[index], Names(images, index), tuple(more))


class Names(Sequence[str]):
    """The names of the images with these indices, made when they are read."""

    def __init__(self, images: ImageSet, index: Sequence[int]) -> None:
        self._images, self._index = images, index

    def __len__(self) -> int:
        return len(self._index)

    @overload
    def __getitem__(self, row: int) -> str: ...
    @overload
    def __getitem__(self, row: slice) -> "Names": ...
    def __getitem__(self, row: int | slice) -> "str | Names":
        if isinstance(row, slice):
            return Names(self._images, self._index[row])
        return self._images.name(self._index[row])


def _of_one_size(read: Readable) -> Tensor:
    assert isinstance(read.pixels, Tensor), "ImageSet.pixels gives every image the same size"
    return read.pixels


def _all_readable(batches: Iterable[Readable]) -> Iterator[Readable]:
    """The batches.

    Raises:
        DataError: naming the first image that could not be read.
    """
    for batch in batches:
        if batch.unreadable:
            raise DataError(batch.unreadable[0][1])
        yield batch


def sharded(
    index: Sequence[int],
    local: Callable[[Sequence[int]], list[tuple[Tensor, ...]]],
    batch: int,
    device: torch.device,
    everywhere: bool = True,
) -> list[Tensor]:
    """What `local` makes of images, or of other rows, (N, ...) each, in their order, on the CPU of every rank.

    `local` gets this rank's indices and returns a tuple of columns for each block of `batch` of them. The ranks take
    the blocks in turn, and the blocks are the same on any number of ranks: how a convolution or a product rounds may
    depend on the batch, and figures must not. With `everywhere` False all ranks but 0 get no rows.
    """
    world, blocks = ranks.world(), -(-len(index) // batch)
    mine = [i for b in range(ranks.rank(), blocks, world) for i in index[b * batch : (b + 1) * batch]]
    columns = ranks.together(lambda: [torch.cat(column).cpu() for column in zip(*local(mine), strict=True)])
    if not blocks or world == 1:
        return columns
    # A rank without a block learns the shapes from rank 0, which always has one.
    kinds = ranks.from_main(lambda: [(c.shape[1:], c.dtype) for c in columns])
    own = columns or [torch.zeros(0, *shape, dtype=dtype) for shape, dtype in kinds]
    keep = everywhere or ranks.rank() == 0
    return [_joined(column, batch, len(index), device, keep) for column in own]


_PIECE = 2**26
"""bytes of a rank that are gathered at a time"""


def _joined(own: Tensor, batch: int, count: int, device: torch.device, keep: bool) -> Tensor:
    """The rows of all ranks, of which each has every world-th block of `batch`, in order: (count, ...) on the CPU.

    Gathered in pieces on the device; no rows where `keep` is False.
    """
    world, blocks = ranks.world(), -(-count // batch)
    turns, of_block = -(-blocks // world), batch * own.element_size() * math.prod(own.shape[1:])
    at_once = max(1, _PIECE // max(1, of_block))
    out = own.new_empty(count if keep else 0, *own.shape[1:])
    for first in range(0, turns, at_once):
        some = min(at_once, turns - first)
        part = own[first * batch : (first + some) * batch]
        padded = torch.zeros(some * batch, *own.shape[1:], dtype=own.dtype, device=device)
        padded[: len(part)] = part
        gathered = ranks.gather(padded).view(world, some, batch, *own.shape[1:])
        if keep:  # rank r's i-th block is block i·world + r
            rows = gathered.transpose(0, 1).flatten(0, 2)[: count - first * world * batch]
            out[first * world * batch :][: len(rows)] = rows.cpu()
    return out
