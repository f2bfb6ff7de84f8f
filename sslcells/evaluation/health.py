"""Label-free figures of rows, which tell rows that use their dimensions from collapsed ones.

Everything is computed on unit rows, in float64, on the CPU (MPS has no float64). Large sets are
sampled, with a fixed seed, so that the cost is bounded and two calls agree.
"""

import math

import torch
from torch import Tensor

from sslcells import losses

_SPECTRUM_ROWS = 25_600
"""Largest sample, as in the RankMe paper."""
_PAIR_ROWS = 4_096
"""Largest sample for uniformity, which uses every pair: 8.4 million."""
_CHUNK = 1_024


def _sample(z: Tensor, most: int) -> Tensor:
    """At most `most` rows of z (N, D) as float64 on the CPU; the same choice for equal N."""
    if len(z) > most:
        # At random: every n-th row would miss whole classes where plates or slides are listed in turn.
        z = z[torch.randperm(len(z), generator=torch.Generator().manual_seed(0))[:most].to(z.device)]
    return z.detach().cpu().double()


def _unit(z: Tensor, most: int) -> Tensor:
    """At most `most` rows of z (N, D), of norm 1."""
    return losses.unit(_sample(z, most))


def effective_rank(z: Tensor) -> float:
    """RankMe, arXiv 2210.02885 section 3: exp of the entropy of z's (N, D) singular values divided by their sum.

    1 for rows on one line, min(N, D) for rows that use every dimension equally. As in the paper the matrix is
    not centred, so rows with a large common mean have a low rank. Unlike the paper there is no ε = 1e-7
    (0·log 0 is 0), and rows are unit rows, as the losses and the neighbours see them. NaN for rows with NaN,
    and for none.
    """
    unit = _unit(z, _SPECTRUM_ROWS)
    gram = unit.T @ unit
    if not len(z) or not gram.isfinite().all():  # eigvalsh would raise, and end the run
        return math.nan
    # The eigenvalues are the squared singular values; rounding leaves tiny negative ones.
    singular = torch.linalg.eigvalsh(gram).clamp_min(0).sqrt()
    share = singular / singular.sum().clamp_min(torch.finfo(torch.float64).tiny)
    return float(torch.special.entr(share).sum().exp())


def row_std(z: Tensor) -> float:
    """√D times the standard deviation over the unit rows of z (N, D), mean over dimensions.

    1 for rows spread over the sphere, 0 where all are the same (arXiv 2011.10566 section 4.1); NaN for none.
    """
    if not len(z):
        return math.nan
    return losses.row_std(_sample(z, _SPECTRUM_ROWS)).item()


def alignment(z0: Tensor, z1: Tensor) -> float:
    """Mean squared distance between z0 and z1 (N, D), two views of each image, as unit rows: 0 is best, 4 worst.

    ArXiv 2005.10242 section 4.1.1 with α = 2. NaN for none.

    Raises:
        ValueError: for views of two shapes.
    """
    if z0.shape != z1.shape:
        raise ValueError(f"z0 and z1 must both be (N, D); they are {tuple(z0.shape)} and {tuple(z1.shape)}")
    return (_unit(z0, _SPECTRUM_ROWS) - _unit(z1, _SPECTRUM_ROWS)).square().sum(1).mean().item()


def uniformity(z: Tensor) -> float:
    """Log of the mean Gaussian potential exp(−2·|a − b|²) over the pairs of unit rows of z (N, D); NaN for N < 2.

    ArXiv 2005.10242 section 4.1.2 with t = 2: 0 where all rows are the same, about −4 for rows spread over the
    sphere in many dimensions.
    """
    unit = _unit(z, _PAIR_ROWS)
    if len(unit) < 2:
        return math.nan
    square = unit.square().sum(1)  # (N,): 1, or 0 for a zero row
    total = 0.0
    for start in range(0, len(unit), _CHUNK):
        part = slice(start, start + _CHUNK)
        distance = square[part, None] + square - 2 * unit[part] @ unit.T
        total += distance.mul(-2).exp().sum().item()
    # Each row's pair with itself has potential 1.
    return math.log((total - len(unit)) / (len(unit) * (len(unit) - 1)))


def health(z: Tensor, z0: Tensor | None = None, z1: Tensor | None = None) -> dict[str, float]:
    """All figures of z (N, D), and the alignment of two views z0, z1 (B, D) where both are given."""
    figures = {"effective_rank": effective_rank(z), "row_std": row_std(z), "uniformity": uniformity(z)}
    if z0 is not None and z1 is not None:
        figures["alignment"] = alignment(z0, z1)
    return figures
