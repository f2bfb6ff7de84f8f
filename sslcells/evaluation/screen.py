"""Which cosines may exceed a floor: found in bfloat16, by a bound on its error, for float32 to decide."""

import math

import torch
from torch import Tensor

from sslcells.losses import unit

GROUP = 64
"""Rows of a tile of which only the nearest is looked at, unless it may be near enough."""
_CLOSE = 256
"""If more than one in so many cosines may exceed the floor, a product in float32 is quicker."""
PAIRS = 8192
"""Pairs of rows whose cosines are computed at a time: 32 MiB for rows of 512."""


class UnitRows:
    """Some rows with norm 1, (n, F) float32; those that are not finite are marked."""

    def __init__(self, rows: Tensor) -> None:
        self.z = unit(rows).float()
        self.bad = (~self.z.isfinite().all(1)).nonzero()[:, 0]
        if len(self.bad):
            self.z[self.bad] = 0
        self._half: tuple[Tensor, float] | None = None

    def half(self) -> tuple[Tensor, float]:
        """The rows in bfloat16, and the largest norm of what rounding took from a row."""
        if self._half is None:
            half = self.z.bfloat16()
            self._half = half, float((self.z - half.float()).norm(dim=1).max())
        return self._half

    def cosines(self, others: "UnitRows") -> Tensor:
        """Cosines with other rows, −inf for rows that are not finite, as a diverged encoder's: they are near none."""
        return self._unless_bad(self.z @ others.z.T, others)

    def rough_cosines(self, others: "UnitRows") -> tuple[Tensor, float]:
        """Cosines in bfloat16, and by how much they and those of `cosines` differ at most.

        With q = q' + a and r = r' + b, rounded rows and what rounding took, |q·r − q'·r'| ≤ |a||r| + |q'||b|. The
        products are summed in float32, and the sum is rounded to 8 bits.
        """
        (query, lost), (bank, also_lost) = self.half(), others.half()
        error = 1.01 * (lost + also_lost + 2**-9) + query.shape[1] * 2**-22
        return self._unless_bad(query @ bank.T, others), error

    def _unless_bad(self, cosine: Tensor, others: "UnitRows") -> Tensor:
        """The cosines (m, n), −inf for marked rows of either side."""
        if len(self.bad):
            cosine[self.bad] = -math.inf
        if len(others.bad):
            cosine[:, others.bad] = -math.inf
        return cosine


def may_exceed(cosine: Tensor, floor: Tensor) -> tuple[Tensor, Tensor] | None:
    """Row and column, (p,) int64 each, of the cosines (m, n) above the floor (m,), by row and then by column.

    None where there are so many that looking at each is slower than a product in float32, or where groups of columns do
    not fill n.
    """
    m, n = cosine.shape
    if n % GROUP:
        return None
    groups = cosine.view(m, -1, GROUP)
    row, group = (groups.amax(2) > floor[:, None]).nonzero().unbind(1)
    if len(row) > m * n // _CLOSE:
        return None
    hit, within = (groups[row, group] > floor[row, None]).nonzero().unbind(1)
    return (row[hit], group[hit] * GROUP + within) if len(hit) <= m * n // _CLOSE else None


def one_by_one(a: Tensor, b: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """The products a[rows] · b[columns], (p,): equal pairs of rows give equal digits, wherever they stand."""
    parts = (slice(start, start + PAIRS) for start in range(0, len(rows), PAIRS))
    return torch.cat([a.new_empty(0), *((a[rows[part]] * b[columns[part]]).sum(1) for part in parts)])
