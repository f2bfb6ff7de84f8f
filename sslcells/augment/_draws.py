"""Random numbers that are a function of (seed, step, image, view): the same on any rank, in any batch, at any replay.

If a global batch repeats an image, the occurrence also counts, or the copies would be identical.

The numbers are hashes of a counter, not states of a generator. So an augmentation does not depend on the rank, the
number of ranks, the micro-batches, or where a run was interrupted.
"""

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_AGAIN = 0x80000000
"""keeps keys of occurrences distinct from keys of views"""


def _mix(x: Tensor) -> Tensor:
    """A permutation of 32-bit numbers, held in int64, in which each bit of x flips half of the result's bits.

    The multipliers are below 2³¹, so no product overflows int64 on any device (Wellons' `lowbias32`, 2018, with the
    constants of TheIronBorn).
    """
    x = ((x ^ (x >> 16)) * 0x21F0AAAD) & _MASK
    x = ((x ^ (x >> 15)) * 0x735A2D97) & _MASK
    return x ^ (x >> 15)


class Draws:
    """A stream of independent random numbers for each of N = V·B views; each call takes the next number of all."""

    def __init__(
        self, seed: int, step: int, image: Tensor, views: int, first: int = 0, occurrence: Tensor | None = None
    ) -> None:
        """Start the streams of `views` views, from `first` on, of the images with ids `image` (B,), view-major.

        occurrence (B,) int64 counts how often the image came before in the same step; 0, the default, leaves the key
        unchanged.
        """
        image = image.cpu()
        low, high = image & _MASK, (image >> 32) & _MASK
        key = torch.zeros_like(image)
        for part in (seed & _MASK, seed >> 32, step, low, high):
            key = _mix(key ^ part)
        if occurrence is not None:
            again = occurrence.cpu()
            key = torch.where(again > 0, _mix(key ^ (_AGAIN | again)), key)
        self._key = torch.cat([_mix(key ^ (view + 1)) for view in range(first, first + views)])
        self._column = 0

    def __len__(self) -> int:
        return len(self._key)

    def uniform(self, low: float = 0.0, high: float = 1.0) -> Tensor:
        """(N,) float32 in [low, high)."""
        self._column += 1
        bits = _mix(_mix(self._key) ^ self._column)
        return low + (high - low) * (bits >> 8).float() / 2**24

    def normal(self) -> Tensor:
        """(N,) float32, mean 0 and variance 1."""
        radius = (-2 * (1 - self.uniform()).log()).sqrt()
        return radius * (2 * torch.pi * self.uniform()).cos()

    def chance(self, probability: float) -> Tensor:
        """(N,) bool, true with this probability."""
        return self.uniform() < probability

    def order(self, count: int) -> Tensor:
        """(N, count) int64: a permutation of 0..count-1 in each row."""
        return torch.stack([self.uniform() for _ in range(count)], 1).argsort(1)
