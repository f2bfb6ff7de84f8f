"""Which rows are each other's positives, over the references of all ranks, without an (A, R) matrix."""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Positives(Protocol):
    """Which rows are each other's positives: a symmetric relation over the references."""

    def mean(self, x: Tensor, own: slice) -> Tensor:
        """Mean of x over the positives of this rank's rows: (R, D) → (A, D); 0 for a row without positives."""
        ...

    def known(self) -> Tensor:
        """(R,) bool: which references have a positive."""
        ...

    def groups(self) -> Tensor | None:
        """(R,) int32 codes, equal for positives; None where every row has a single positive."""
        ...


class Pairs(NamedTuple):
    """Every row has one positive, its partner."""

    partner: Tensor
    """(R,) int64 global index"""

    def mean(self, x: Tensor, own: slice) -> Tensor:
        """The partner's x."""
        return x[self.partner[own]]

    def known(self) -> Tensor:
        """Every row."""
        return torch.ones_like(self.partner, dtype=torch.bool)

    def groups(self) -> None:
        """There are none."""


class Groups(NamedTuple):
    """Rows of equal code are each other's positives."""

    code: Tensor
    """(R,) int32"""

    def mean(self, x: Tensor, own: slice) -> Tensor:
        """Mean over the group without the row itself, from the group's sum."""
        code = self.code.long()
        total = torch.zeros_like(x).index_add_(0, code, x)
        others = (self._size()[code[own]] - 1).to(x.dtype)[:, None]
        return torch.where(others > 0, (total[code[own]] - x[own]) / others.clamp_min(1), 0.0)

    def known(self) -> Tensor:
        """Rows whose group has another row."""
        return self._size()[self.code.long()] > 1

    def groups(self) -> Tensor:
        """The codes."""
        return self.code

    def _size(self) -> Tensor:
        code = self.code.long()
        return torch.zeros_like(code).scatter_add_(0, code, torch.ones_like(code))
