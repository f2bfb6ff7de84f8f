"""µm per pixel of the images of a split: what the table, their files and the configuration say."""

from collections import Counter
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from sslcells.config import ConfigError
from sslcells.data._columns import Table
from sslcells.data._decode import Header
from sslcells.data._files import Files
from sslcells.data._names import some

Floats = NDArray[np.float64]
_SHOWN = 5


class Scales:
    """µm per pixel of images: by the table, else by their files, else as the configuration says.

    Args:
        names: the images.
        headers: of each, None where it was not read.
        given: (N,) what the table says, NaN where it says nothing; None without a table.
    """

    def __init__(
        self, config: Files, names: Sequence[str], headers: Sequence[Header | None], given: Floats | None = None
    ) -> None:
        self._target, self._names, self._headers = config.um_per_pixel, names, headers
        self.um = np.full(len(names), np.nan) if given is None else given.copy()
        """(N,) µm per pixel, NaN where it is not known"""
        self._from = Counter({"the table": len(names) - int(np.isnan(self.um).sum())})
        self._without: list[int] = []
        self._unread = 0
        for i in np.flatnonzero(np.isnan(self.um)).tolist():
            header = headers[i]
            if header is not None and header.um_per_pixel:
                self.um[i] = header.um_per_pixel
                self._from[header.scale_from] += 1
            elif config.um_per_pixel_default is not None:
                self.um[i] = config.um_per_pixel_default
                self._from["data.um_per_pixel_default"] += 1
            elif header is None:
                self._unread += 1
            else:
                self._without.append(i)

    def check(self, where: object) -> None:
        """Raise a ConfigError that names the images without a scale, if all are to be brought to one."""
        if self._target is None or not self._without:
            return
        shown = [f"  {self._names[i]}: {self._why(i)}" for i in self._without[:_SHOWN]]
        more = ["  …"] if len(self._without) > _SHOWN else []
        title = (
            f"{where}: data.um_per_pixel={self._target:g}, and {len(self._without):,} of {len(self._names):,} images "
            f"do not say how large their pixels are:"
        )
        advice = (
            "give it in a column um_per_pixel of a table (data.kind=table), or, if it is the same for all of them, as "
            "data.um_per_pixel_default="
        )
        raise ConfigError("\n".join([title, *shown, *more, advice]))

    def lines(self) -> list[str]:
        """How many images have a scale, from where, and which, for a person."""
        known = self.um[~np.isnan(self.um)]
        if not len(known):
            return ["scale: unknown"] if self._without else []
        said = ", ".join(f"{n:,} from {origin}" for origin, n in self._from.most_common() if n)
        each = np.unique(known)
        span = f"{each[0]:g}" if len(each) == 1 else f"{each[0]:g} to {each[-1]:g}"
        brought = f", brought to {self._target:g}" if self._target is not None else ""
        if self._target is None and each[-1] > 1.01 * each[0]:
            brought = "; they are NOT brought to one scale: set data.um_per_pixel"
        text = f"scale: {len(known):,} of {len(self.um):,} images have one ({said}): {span} µm per pixel{brought}"
        if self._without:
            text += f"; {len(self._without):,} without one: {some([self._names[i] for i in self._without], _SHOWN)}"
        if self._unread:
            text += f"; {self._unread:,} not looked at, as data.verify=none"
        return [text]

    def _why(self, index: int) -> str:
        header = self._headers[index]
        assert header is not None
        return header.scale_from or "nothing says it"


def unknown(config: Files, names: Sequence[str], given: Floats | None = None) -> set[str]:
    """The images whose files must be asked for their scale."""
    if config.um_per_pixel is None:
        return set()
    return set(names) if given is None else {names[i] for i in np.flatnonzero(np.isnan(given)).tolist()}


def stated_scales(
    table: Table, um_column: str | None, times_column: str | None, at_1x: float | None, number: NDArray[np.int64]
) -> Floats:
    """(N,) µm per pixel of each row by these columns, NaN where they do not say it; `number` is each row's in the file.

    A magnification says it where the rule is given: µm per pixel at a magnification of 1.

    Raises:
        ConfigError: if a number is not above 0, or there is a rule and no column of magnifications.
    """
    um = np.full(table.columns.num_rows, np.nan)
    if um_column is not None:
        um = _positive(table, um_column, table.numbers(um_column), number)
    if at_1x is None:
        return um
    if times_column is None:
        raise ConfigError(f"data.um_per_pixel_at_1x={at_1x:g}: {table.file} has no column called magnification")
    times = _positive(table, times_column, _times(table, times_column), number)
    return np.where(np.isnan(um), at_1x / times, um)


def magnifications(table: Table, column: str | None, at_1x: float | None) -> list[str]:
    """Which magnifications a table has, if µm per pixel is not taken from them."""
    if column is None or at_1x is not None:
        return []
    times = _times(table, column)
    each = some([f"{value:g}" for value in np.unique(times[~np.isnan(times)])], 8) or "unknown"
    return [f"magnification: {each}; data.um_per_pixel_at_1x says what that is in µm per pixel"]


def _positive(table: Table, column: str, numbers: Floats, number: NDArray[np.int64]) -> Floats:
    wrong = np.flatnonzero((numbers <= 0) | np.isinf(numbers))
    if len(wrong):
        row = table.row(int(number[wrong[0]]))
        raise ConfigError(f"{table.file}: {row} has {column}={numbers[wrong[0]]:g}; it must be above 0")
    return numbers


def _times(table: Table, column: str) -> Floats:
    """Magnifications, such as 20, 20x or 20×."""
    text = pc.replace_substring_regex(table.text(column), "[xX×]$", "")
    return table._replace(columns=pa.table({column: text})).numbers(column)
