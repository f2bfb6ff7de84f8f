"""Features of whole splits: eval mode, float32, no augmentation, by index, shared out over the ranks."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from sslcells import ranks
from sslcells.data import Batch, DataError, ImageSet
from sslcells.data.loader import InOrder, attended, read
from sslcells.data.sampler import permutation


def spread(count: int, most: int | None) -> list[int]:
    """At most `most` indices of `count`, drawn once for all; all where `most` is None.

    Drawn, not every n-th: in a split whose classes take turns that would leave classes out.
    """
    if most is None or count <= most:
        return list(range(count))
    return sorted(permutation(count, 0, 0)[:most].tolist())


def collect(
    images: ImageSet,
    indices: Sequence[int],
    compute: Callable[[Batch], Sequence[Tensor]],
    device: torch.device,
    batch: int,
    workers: int,
) -> list[Tensor]:
    """What `compute` makes of the images with these indices, in their order, on every rank: (N, ...) each, on the CPU.

    Each image is read once, by one rank; nothing counts twice. The ranks take blocks of `batch` images in turn, the
    same blocks on any number of ranks: what a convolution rounds may depend on the batch, and figures must not.

    Raises:
        DataError: on every rank, where an image cannot be read.
    """
    world, blocks = ranks.world(), -(-len(indices) // batch)
    mine = [i for b in range(ranks.rank(), blocks, world) for i in indices[b * batch : (b + 1) * batch]]

    def local() -> list[Tensor]:
        with attended(read(images, InOrder(mine, batch), workers, pin_memory=device.type == "cuda")) as batches:
            parts = [compute(b) for b in batches]
        return [torch.cat(column).to(device) for column in zip(*parts, strict=True)]

    columns = ranks.together(local)
    if not blocks:
        return []
    # A rank without a block learns from the first, which always has one, what to bring.
    kinds = ranks.from_main(lambda: [(c.shape[1:], c.dtype) for c in columns])
    rows, out = -(-blocks // world) * batch, []
    for place, (shape, dtype) in enumerate(kinds):
        padded = torch.zeros(rows, *shape, dtype=dtype, device=device)
        if mine:
            padded[: len(mine)] = columns[place]
        gathered = ranks.gather(padded).view(world, rows // batch, batch, *shape)
        # rank r's i-th block is block i·world + r
        out.append(gathered.transpose(0, 1).flatten(0, 2)[: len(indices)].cpu())
    return out


@torch.no_grad()
def features(
    encoder: nn.Module,
    images: ImageSet,
    indices: Sequence[int],
    prepare: Callable[[Tensor, Tensor], Tensor],
    device: torch.device,
    batch: int,
    workers: int,
) -> Tensor:
    """Features of the images with these indices, in their order, on every rank: (N, F) float32 on the CPU.

    `prepare` turns pixels (B, C, H, W) uint8 and image ids (B,) into what the encoder takes.

    Raises:
        NotFinite: on every rank, where features are NaN or infinite.
    """
    training = encoder.training
    encoder.eval()

    def encode(b: Batch) -> list[Tensor]:
        return [encoder(prepare(b.pixels.to(device, non_blocking=True), b.image)).float()]

    try:
        columns = collect(images, indices, encode, device, batch, workers)
    finally:
        encoder.train(training)
    z = columns[0] if columns else torch.zeros(0, 0)
    check_finite(z)
    return z


class NotFinite(DataError):
    """What a network makes of images is NaN or infinite."""


def check_finite(z: Tensor, what: str = "images") -> None:
    """Raise NotFinite where rows (N, F) hold NaN or an infinity: figures of them would lie, or be NaN themselves."""
    if broken := int((~z.isfinite().all(1)).sum()):
        raise NotFinite(f"the encoder gives no finite features for {broken} of {len(z)} {what}")
