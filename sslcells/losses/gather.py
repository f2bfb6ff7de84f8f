"""The rows of the global batch on every rank, for a loss that every rank computes on all of them."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sslcells import ranks
from sslcells.losses._rows import same_rows


def gather_with_grad(z: Tensor, views: int = 1) -> Tensor:
    """The rows that one process would have: (V·B, D), view-major, on every rank → (V·B·world, D), view-major.

    For a loss that every rank computes on all rows, with the same value on each. Backward returns this rank's part of
    the gradient × world, without a collective, so that DDP's mean over ranks is the gradient of the global batch. The
    loss's own parameters already have that gradient on every rank, and the mean does not change it.

    Raises:
        ValueError: on every rank, if the ranks have different numbers of rows, none, or not as many of each view.

    Example:
        >>> z = torch.eye(2, requires_grad=True)
        >>> gather_with_grad(z).tolist()  # one process: its own rows
        [[1.0, 0.0], [0.0, 1.0]]
    """
    same_rows(z)
    if z.ndim != 2 or views < 1 or len(z) % views:
        raise ValueError(f"rows must be (V·B, D) of views={views}; they are {tuple(z.shape)}")
    rows: Tensor = _Gather.apply(z, views)
    return rows


def gather_ids(ids: Tensor, views: int = 1) -> Tensor:
    """(B,) ids of this rank's images → (V·B·world,) ids of the rows of `gather_with_grad`."""
    return ranks.gather(ids).repeat(views)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, views: int) -> Tensor:
        ctx.views = views
        by_rank = ranks.gather(z).view(ranks.world(), views, -1, z.shape[1])
        return by_rank.transpose(0, 1).reshape(-1, z.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        world = ranks.world()
        by_rank = grad.view(ctx.views, world, -1, grad.shape[1])
        return by_rank[:, ranks.rank()].flatten(0, 1) * world, None
