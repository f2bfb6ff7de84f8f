"""The loss of methods that assign views to prototypes: each view predicts what the others are assigned."""

import torch
from torch import Tensor


def across_views(target: Tensor, predicted: Tensor) -> Tensor:
    """The mean cross-entropy, (), of all pairs of different views.

    `target` (T, B, K) has the assignments of the first T views, each row of sum 1; `predicted` (V, B, K) the
    log-probabilities of all V.
    """
    cross = -torch.einsum("tbk,sbk->ts", target, predicted) / predicted.shape[1]  # (T, V)
    others = 1 - torch.eye(*cross.shape, dtype=cross.dtype, device=cross.device)
    return (cross * others).sum() / others.sum()
