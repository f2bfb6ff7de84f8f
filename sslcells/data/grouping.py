"""Divides rows into parts that share no group (donor, slide, photograph), of the asked sizes and mixtures of classes.

scikit-learn's StratifiedGroupKFold makes folds of one size: 70, 10 and 20 % would need ten, which fewer than ten donors
cannot fill. Here the largest groups are given out first, each to the part that it brings nearest to its share; then
groups move as long as that comes nearer.
"""

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

Ints = NDArray[np.int64]
_MOVED = 2000
"""groups, the largest, that may move afterwards"""
_ROUNDS = 50
"""times that each of them may move at most"""


def groups_of(keys: Sequence[Sequence[str | None]]) -> Ints:
    """(N,) int64 group of each row: rows that agree in any of the keys are one group; None agrees with nothing."""
    rows = len(keys[0])
    group = np.arange(rows)
    for key in keys:
        first: dict[str, int] = {}
        same = np.array([i if name is None else first.setdefault(name, i) for i, name in enumerate(key)], np.int64)
        edges = coo_matrix(
            (np.ones(2 * rows), (np.tile(np.arange(rows), 2), np.concatenate([same, group]))), (rows,) * 2
        )
        _, component = connected_components(edges, directed=False)
        _, lowest = np.unique(component, return_index=True)
        group = lowest[component]
    return np.unique(group, return_inverse=True)[1]


def divide(group: Ints, kind: Ints, names: Sequence[str], shares: Sequence[float], seed: int = 0) -> Ints:
    """(N,) int64 part of each row: no group is in two parts, and each part has about its share of each class.

    `kind` is the class of each row, −1 where unknown; `names` has a name for each group, which with the seed decides
    between equal ones, whatever the order of the rows. Each part gets a group if there are as many as parts.
    """
    share = np.asarray(shares, np.float64) / sum(shares)
    turn = [hashlib.blake2b(f"{seed} {name}".encode("utf-8", "surrogateescape")).digest() for name in names]
    parts = _Parts(group, kind, share)
    order = sorted(range(len(names)), key=lambda g: (-parts.sizes[g], turn[g]))
    for left, g in zip(range(len(order), 0, -1), order, strict=True):
        far = parts.cost(g)
        empty = parts.members == 0
        if left <= empty.sum():
            far[~empty] = np.inf
        parts.put(g, int(far.argmin()))
    for _ in range(_ROUNDS):
        before = parts.of.copy()
        for g in order[:_MOVED]:
            now = int(parts.of[g])
            if parts.members[now] > 1:
                parts.take(g)
                far = parts.cost(g)
                best = int(far.argmin())
                parts.put(g, best if far[best] < far[now] - 1e-9 else now)
        if (before == parts.of).all():
            break
    return parts.of[group]


class _Parts:
    """Which group is in which part, and what the parts then have of each class."""

    def __init__(self, group: Ints, kind: Ints, share: NDArray[np.float64]) -> None:
        known = kind >= 0
        kinds = int(kind.max(initial=-1)) + 1
        self.sizes = np.bincount(group)
        self.of = np.full(len(self.sizes), -1)
        """part of each group; −1 for none yet"""
        self.members = np.zeros(len(share), np.int64)
        """groups in each part"""
        self._share = share
        pair, self._count = np.unique(group[known] * max(1, kinds) + kind[known], return_counts=True)
        of_group, self._kind = np.divmod(pair, max(1, kinds))
        self._start = np.searchsorted(of_group, np.arange(len(self.sizes) + 1))
        # A line for each class, and the last one for all rows: how many there are, and how many each part has.
        self._total = np.append(np.bincount(kind[known], minlength=kinds), len(group)).astype(np.float64)
        self._have = np.zeros((kinds + 1, len(share)))

    def cost(self, group: int) -> NDArray[np.float64]:
        """(P,) how much further from their shares all parts are if the group goes to one: Pearson's χ², per class."""
        lines, rows = self._lines(group)
        have = self._have[lines]
        after = have + np.eye(len(self._share))[:, None, :] * rows[:, None]  # (P, lines, P)
        return self._far(after, lines) - self._far(have, lines)

    def put(self, group: int, part: int) -> None:
        """Add a group to a part."""
        lines, rows = self._lines(group)
        self._have[lines, part] += rows
        self.members[part] += 1
        self.of[group] = part

    def take(self, group: int) -> None:
        """Take a group out of its part."""
        lines, rows = self._lines(group)
        self._have[lines, self.of[group]] -= rows
        self.members[self.of[group]] -= 1

    def _lines(self, group: int) -> tuple[Ints, NDArray[np.float64]]:
        within = slice(self._start[group], self._start[group + 1])
        lines = np.append(self._kind[within], len(self._total) - 1)
        return lines, np.append(self._count[within], self.sizes[group]).astype(np.float64)

    def _far(self, have: NDArray[np.float64], lines: Ints) -> NDArray[np.float64]:
        of = have / self._total[lines][:, None]
        far: NDArray[np.float64] = ((of - self._share) ** 2 / self._share).sum((-2, -1))
        return far
