"""Many strings in one bytes object."""

import os
from collections.abc import Sequence
from itertools import accumulate

import numpy as np


class Packed:
    """Strings in one bytes object: cheap to send to workers, and forked workers do not copy it."""

    def __init__(self, strings: Sequence[str]) -> None:
        encoded = [os.fsencode(s) for s in strings]
        self._bytes = b"".join(encoded)
        self._ends = np.fromiter(accumulate(map(len, encoded), initial=0), np.int64, len(encoded) + 1)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> str:
        return os.fsdecode(self._bytes[self._ends[index] : self._ends[index + 1]])
