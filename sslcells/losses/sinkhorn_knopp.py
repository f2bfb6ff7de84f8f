"""Sinkhorn–Knopp over the global batch: assign rows to prototypes so that all prototypes are used equally."""

import torch
from torch import Tensor

from sslcells import ranks


@torch.no_grad()
def sinkhorn(scores: Tensor, temperature: float = 0.05, iterations: int = 3) -> Tensor:
    """Soft assignments of the rows of all ranks, arXiv 2006.09882, eq. 3 to 5: (B, K) scores → (B, K).

    exp(scores / temperature) is scaled in turn until all columns have the same sum over the global batch and each row
    the sum 1; the last turn is the rows'. The sums are in float64, over all ranks, which may bring different numbers of
    rows, also none. The result carries no gradient. It is NaN throughout if a score is NaN or +inf.

    Args:
        scores: (B, K) of this rank, such as cosines with the prototypes.
        temperature: ε in the paper; smaller ones give harder assignments.
        iterations: how often columns and rows are scaled.

    Raises:
        ValueError: if scores are not (B, K), temperature is not above 0, or iterations not at least 1.

    Example:
        >>> scores = torch.tensor([[1.0, 0.9], [0.9, 0.6]])  # both rows are nearer to the first prototype
        >>> [[round(x, 2) for x in row] for row in sinkhorn(scores, iterations=30).tolist()]  # one each
        [[0.12, 0.88], [0.88, 0.12]]
    """
    if scores.ndim != 2 or not scores.shape[1]:
        raise ValueError(f"scores must be (B, K), of one prototype at least; they are {tuple(scores.shape)}")
    if temperature <= 0 or iterations < 1:
        raise ValueError(f"temperature={temperature} must be above 0, and iterations={iterations} at least 1")
    logits = scores.detach().double() / temperature
    top = logits.amax(1, keepdim=True)  # (B, 1)
    own = torch.cat([top.flatten(), top.new_full((1,), -torch.inf)]).amax()  # where a rank has no rows too
    kernel = (logits - top).exp()  # (B, K)
    of_row = (top - ranks.gather(own[None]).amax()).exp()  # (B, 1)
    for _ in range(iterations):
        mass = ranks.total(kernel.T @ of_row)  # (K, 1), over all ranks
        of_column = torch.where(mass == 0, 0.0, 1 / mass)
        of_row = 1 / (kernel @ of_column)
    poison = 0 * mass.sum()  # NaN of any rank, which `where` and a row of its own would hide
    out: Tensor = kernel * of_row * of_column.T + poison
    return out.to(scores.dtype if scores.dtype == torch.float64 else torch.float32)
