"""Laboratories of the images of a folder: from a pattern in their paths, or from the folders above or below a class."""

import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from sslcells.config import ConfigError
from sslcells.data._decode import ZARR
from sslcells.data._names import check_classes, some
from sslcells.data._patterns import Patterns
from sslcells.data._scan import walk

LabFolder = Literal["none", "above", "below"]
"""Where the folder of the laboratory is, seen from that of the class."""


def class_in(path: str, lab_folder: LabFolder) -> str | None:
    """The class in an image's path relative to its split; None if it has none."""
    return _part(path, int(lab_folder == "above"))


def _part(path: str, place: int) -> str | None:
    """The folder at this place of a path; None if the path has none there."""
    folders = [*takewhile(lambda folder: not folder.lower().endswith(ZARR), path.split("/")[:-1])]
    return folders[place] if place < len(folders) else None


def lab_in(path: str, prefix: str, pattern: str | None, lab_folder: LabFolder) -> str | None:
    """The laboratory in an image's path, which is relative to its split; `prefix` leads there from data.path."""
    if pattern is not None:
        return next(labs_in([prefix + path], pattern))
    return _part(path, int(lab_folder == "below"))


def labs_in(paths: Iterable[str | None], pattern: str) -> Iterator[str | None]:
    """The laboratory that a pattern finds in each path; None where it finds none."""
    for path in paths:
        found = re.search(pattern, path) if path is not None else None
        yield found[1] or None if found is not None else None


def no_lab(how: str, example: str, root: Path) -> str:
    """What is said where no image gets a laboratory."""
    return f"{how} gives no image a laboratory: {example!r} (below {root}) has none"


def lab_names(
    root: Path, folders: Iterable[str], pattern: str | None, lab_folder: LabFolder, patterns: Patterns
) -> tuple[str, ...]:
    """The laboratories of all splits, sorted, so that a number means the same one in each.

    Raises:
        ConfigError: if no image has one, or two differ only in letter case.
    """
    found, example = set[str](), ""
    for folder in folders:
        prefix = f"{folder}/" if folder else ""
        for name in walk(root / folder, prefix, patterns):
            example = prefix + name
            if (lab := lab_in(name, prefix, pattern, lab_folder)) is not None:
                found.add(lab)
    if not found:
        how = f"data.lab_pattern={pattern!r}" if pattern is not None else f"data.lab_folder={lab_folder}"
        raise ConfigError(no_lab(how, example, root))
    check_classes(sorted(found), str(root), "laboratories")
    return tuple(sorted(found))


def check_above(labs: Sequence[str], classes: Sequence[str], root: Path) -> None:
    """Raise a ConfigError unless the folders of the laboratories hold those of the classes: `lab_folder` is above.

    A folder of one laboratory has its classes where others have laboratories: its images would have no label.
    """
    mixed = sorted({*labs} & {*classes})
    if classes and not mixed:
        return
    why = "but they are classes elsewhere in it" if mixed else "and no folder in them is a class: no image has a label"
    raise ConfigError(
        f"data.lab_folder=above takes {some(mixed or labs)} (below {root}) for laboratories, {why}. If they are "
        f"the classes of one laboratory, use data.lab_folder=none; if laboratories hold images without a class, "
        f"data.labels=none"
    )


def labs_of(
    paths: Sequence[str], start: int, names: Sequence[str], pattern: str | None, lab_folder: LabFolder
) -> Tensor:
    """(N,) int64: 1 + the place in `names` of each image's laboratory, 0 where it has none.

    The paths are relative to data.path; at `start` the path below the split begins.
    """
    number = {name: i for i, name in enumerate(names, 1)}
    labs = (number.get(lab_in(path[start:], path[:start], pattern, lab_folder) or "", 0) for path in paths)
    return torch.from_numpy(np.fromiter(labs, np.int64, len(paths)))
