"""The losses as their papers print them: float64, one process, double loops. Slow, and independent of the package."""

import math

import torch
from torch import Tensor


def unit(z: Tensor) -> Tensor:
    return z / z.norm(dim=1, keepdim=True)


def negative(i: int, j: int, source: list[int] | None, lab: list[int] | None) -> bool:
    """True if a row that is no positive counts as a negative: of another source, and of the same laboratory."""
    return (source is None or source[j] != source[i]) and (lab is None or lab[j] == lab[i] >= 0)


def contrastive(
    z: Tensor,
    positive: list[int],
    temperature: float,
    source: list[int] | None = None,
    lab: list[int] | None = None,
) -> Tensor:
    """SupCon's L_out, arXiv 2004.11362 eq. 2; with two views an image and its index as id it is NT-Xent."""
    z = unit(z)
    losses = []
    for i in range(len(z)):
        same = [j for j in range(len(z)) if j != i and positive[j] == positive[i] >= 0]
        counted = [j for j in range(len(z)) if j != i and (j in same or negative(i, j, source, lab))]
        if not same:
            continue
        logits = {j: z[i] @ z[j] / temperature for j in counted}
        total = torch.logsumexp(torch.stack(list(logits.values())), 0)
        losses.append(torch.stack([total - logits[p] for p in same]).mean())
    return torch.stack(losses).mean() if losses else z.sum() * 0


def batch_hard(
    z: Tensor,
    positive: list[int],
    margin: float,
    distance: str,
    soft: bool = False,
    source: list[int] | None = None,
    semi_hard: bool = False,
    rank: int = 1,
    lab: list[int] | None = None,
) -> Tensor:
    """arXiv 1703.07737 eq. 5, the mean over the valid anchors instead of the sum."""
    z = unit(z)
    losses = []
    for i in range(len(z)):
        same = [j for j in range(len(z)) if j != i and positive[j] == positive[i] >= 0]
        other = [
            j for j in range(len(z)) if j != i and not (positive[j] == positive[i] >= 0) and negative(i, j, source, lab)
        ]
        if not same or not other:
            continue
        far = max(same, key=lambda j: (apart(z[i], z[j], "sqeuclidean").item(), -j))
        if semi_hard:
            other = [j for j in other if z[i] @ z[j] < z[i] @ z[far]]
        if not other:
            continue
        near = sorted(other, key=lambda j: (apart(z[i], z[j], "sqeuclidean").item(), j))[:rank][-1]
        gap = apart(z[i], z[far], distance) - apart(z[i], z[near], distance)
        losses.append(torch.log1p(gap.exp()) if soft else (gap + margin).clamp_min(0))
    return torch.stack(losses).mean() if losses else z.sum() * 0


def apart(a: Tensor, b: Tensor, distance: str) -> Tensor:
    if distance == "cosine":
        return 1 - a @ b
    squared = ((a - b) ** 2).sum()
    return squared if distance == "sqeuclidean" or squared.item() == 0 else squared**0.5


def nt_xent(
    z0: Tensor, z1: Tensor, temperature: float, source: list[int] | None = None, lab: list[int] | None = None
) -> Tensor:
    images = list(range(len(z0)))
    return contrastive(torch.cat([z0, z1]), images * 2, temperature, source and source * 2, lab and lab * 2)


def pairwise(z0: Tensor, z1: Tensor, temperature: float, kind: str, prior: float = 0.0, beta: float = 0.0) -> Tensor:
    """DCL, arXiv 2110.06848 eq. 3; the debiased loss, 2007.00224 eq. 8; with hard negatives, 2010.04592 eq. 4."""
    z, count = unit(torch.cat([z0, z1])), 2 * len(z0)
    losses = []
    for i in range(count):
        p = (i + len(z0)) % count
        e = torch.stack([(z[i] @ z[j] / temperature).exp() for j in range(count) if j not in (i, p)])
        pos = (z[i] @ z[p] / temperature).exp()
        if kind == "dcl":
            losses.append(-(pos / e.sum()).log())
            continue
        n = len(e)
        weighted = (e * e**beta).sum() / (e**beta).mean()
        others = ((weighted - prior * n * pos) / (1 - prior)).clamp_min(n * math.exp(-1 / temperature))
        losses.append(-(pos / (pos + others)).log())
    return torch.stack(losses).mean()
