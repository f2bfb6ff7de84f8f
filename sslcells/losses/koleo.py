"""KoLeo: rows spread over the sphere, each away from its nearest neighbour in the global batch."""

from typing import final

import torch
from torch import Tensor, nn

from sslcells import ranks
from sslcells.losses import engine
from sslcells.losses._rows import gather_rows, sound, unit
from sslcells.losses.gather import gather_with_grad


@final
class KoLeoLoss(nn.Module):
    """−mean log of the distance of unit rows to their nearest other row, arXiv 2304.07193, section 4.

    The nearest row is that of the global batch where torch.distributed is initialised. The value is the same on every
    rank, and DDP's mean of gradients is the gradient of one process. Memory O(R·D): no matrix of distances is kept.
    A distance d counts as √(d² + epsilon²): equal rows have a finite loss and gradient. A single row has loss 0.

    After each call `stats` holds `nearest`, the mean distance, detached.

    Example:
        >>> z = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]])
        >>> print(f"{KoLeoLoss()(z):.3f}")  # each is √2 away from another
        -0.347
    """

    def __init__(self, *, epsilon: float = 1e-4) -> None:
        super().__init__()
        if epsilon <= 0:
            raise ValueError(f"epsilon={epsilon} must be above 0")
        self.epsilon = epsilon
        self.stats: dict[str, Tensor] = {}

    def forward(self, z: Tensor) -> Tensor:
        """(B, D) rows of any norm, as many on every rank → a scalar.

        Raises:
            ValueError: if z is not (B, D); on every rank, if the ranks have different numbers of rows, or none.
        """
        with torch.autocast(z.device.type, enabled=False):
            own = unit(z)
            refs, offset, count = gather_rows(own)
            each = torch.arange(len(refs), dtype=torch.int32, device=refs.device)
            near = ranks.gather(engine.hardest(refs, offset, count, each, None, "exact")[1])  # (R,); -1 for none
            rows, other = gather_with_grad(own), near >= 0
            squares = (rows - rows[near.clamp_min(0)]).square().sum(1)  # (R,)
            logs = (squares + self.epsilon**2).log() / 2
            loss = -torch.where(other, logs, 0.0).sum() / other.sum().clamp_min(1) * sound(refs)
        self.stats = {"nearest": squares.detach().sqrt().mean()}
        return loss
