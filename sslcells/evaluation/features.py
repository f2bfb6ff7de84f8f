"""Features of whole splits: eval mode, float32, no augmentation, by index, shared out over the ranks."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from sslcells import distributed
from sslcells.data import ImageSet
from sslcells.data.loader import InOrder, permutation, read


def spread(count: int, most: int | None) -> list[int]:
    """At most `most` indices of `count`, drawn once for all; all where `most` is None.

    Drawn, not every n-th: in a split whose classes take turns that would leave classes out.
    """
    if most is None or count <= most:
        return list(range(count))
    return sorted(permutation(count, 0, 0)[:most].tolist())


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

    `prepare` turns pixels (B, C, H, W) uint8 and image ids (B,) into what the encoder takes. Each image is encoded
    once, by one rank; nothing counts twice.
    """
    world, part = distributed.world(), -(-len(indices) // distributed.world())
    mine = list(indices[distributed.rank() :: world])
    training = encoder.training
    encoder.eval()
    rows = [
        encoder(prepare(b.pixels.to(device, non_blocking=True), b.image)).float()
        for b in read(images, InOrder(mine, batch), workers, pin_memory=device.type == "cuda")
    ]
    encoder.train(training)
    width = rows[0].shape[1] if rows else 0
    width = max(distributed.all_ranks(width))
    padded = torch.zeros(part, width, device=device)
    padded[: len(mine)] = torch.cat(rows) if rows else padded[:0]
    gathered = distributed.gather(padded).view(world, part, width)  # rank r's i-th row is image i·world + r
    return gathered.transpose(0, 1).flatten(0, 1)[: len(indices)].cpu()
