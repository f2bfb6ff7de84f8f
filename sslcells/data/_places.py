"""Finds the files that the paths of a table mean."""

import os
import posixpath
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from sslcells.config import ConfigError
from sslcells.data._names import respelt, tidy


class Place:
    """The files below a folder, found by paths that another system may have spelt.

    Each folder on the way is listed once, when a path needs it.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._real: dict[str, str | None] = {"": ""}

    def files(self, paths: Sequence[str]) -> list[str | None]:
        """For each path below the folder the file that it means, as the folder spells it; None if there is none.

        Raises:
            ConfigError: if a folder cannot be listed.
        """
        of_folder = defaultdict[str, list[int]](list)
        for i, path in enumerate(paths):
            of_folder[path.rpartition("/")[0]].append(i)
        found: list[str | None] = [None] * len(paths)
        for folder, rows in of_folder.items():
            real = self._folder(folder)
            if real is None:
                continue
            names = [paths[i].rpartition("/")[2] for i in rows]
            there = self._entries(real)
            spelt = respelt(names, there)
            for i, name in zip(rows, names, strict=True):
                actual = spelt.get(name, name)
                if actual in there:
                    found[i] = paths[i] if actual == name and real == folder else posixpath.join(real, actual)
        return found

    def _folder(self, folder: str) -> str | None:
        if folder not in self._real:
            if os.path.isdir(self._root / folder):
                self._real[folder] = folder
            else:
                above, _, name = folder.rpartition("/")
                real = self._folder(above)
                same = None if real is None else respelt([name], self._entries(real)).get(name)
                self._real[folder] = None if real is None or same is None else posixpath.join(real, same)
        return self._real[folder]

    def _entries(self, folder: str) -> set[str]:
        try:
            return {*os.listdir(self._root / folder)}
        except NotADirectoryError:
            return set()
        except OSError as error:
            raise ConfigError(f"{error.filename} cannot be listed: {error.strerror}") from None


def below(paths: Sequence[str], given: Path | None, beside: Path) -> tuple[Path, list[str]]:
    """The folder of the images, and the paths below it with forward slashes.

    The folder is the given one; without one the folder `beside` which the table lies, or what all paths share if they
    are absolute.

    Raises:
        ConfigError: if an absolute path does not lie below the folder.
    """
    tidied = [tidy(path) for path in paths]
    absolute = [path for path in tidied if path.startswith("/")]
    if not absolute:
        return given or beside, tidied
    root = given
    if root is None:
        shared = len(absolute) == len(tidied)
        root = Path(os.path.commonpath({posixpath.dirname(path) for path in absolute})) if shared else beside
    starts = {f"{str(place).rstrip('/')}/" for place in (root, Path(os.path.abspath(root)), root.resolve())}
    out = []
    for path in tidied:
        start = next((start for start in starts if path.startswith(start)), None)
        if path.startswith("/") and start is None:
            raise ConfigError(f"{path!r} does not lie below data.path={str(root)!r}; paths are relative to it")
        out.append(path if start is None else path[len(start) :])
    return root, out
