"""The fields that `sslcells cells` has cut: a command that was killed goes on with those that are left."""

import hashlib
import json
import os
import shutil
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sslcells.config import ConfigError
from sslcells.data._decode import metadata_file
from sslcells.data._masks import Cells
from sslcells.delivery.cell_table import Cut
from sslcells.storage import json_text, write_atomically

FOLDER = ".cut"
"""In the folder of the cells, until the table is written: a file for each field that is cut, and what was asked for."""
_REQUEST = "request.json"
_UNREADABLE = (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile)


class Done:
    """What is done in a folder of cells. Fields of which a file changed are cut again."""

    def __init__(self, target: Path, asked: Mapping[str, Any]) -> None:
        """Go on with what was asked for before, or begin.

        Raises:
            ConfigError: if something else was asked for.
            OSError: if the folder cannot be written.
        """
        self._folder = target / FOLDER
        request, text = self._folder / _REQUEST, json_text(asked, indent=1)
        try:
            before = json.loads(request.read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):  # a request that was damaged says nothing
            before = None
        self.resumed = before is not None
        """True if it was begun before"""
        if before is None or not any(self._folder.glob("*.npz")):  # nothing that another request would spoil
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder.mkdir(parents=True)
            write_atomically(request, lambda file: file.write(text.encode()))
            return
        now = json.loads(text)
        differs = [f"{key} {before.get(key)}, now {now[key]}" for key in now if before.get(key) != now[key]]
        if differs:
            raise ConfigError(
                f"--out {target} holds cells that were begun in another way: {'; '.join(differs)}; choose another "
                f"--out, or remove it"
            )

    def cut(self, images: Path, field: str, mask: str, um: float | None) -> Cut | None:
        """The cells of a field that are in the folder `images` already; None if the field is to be cut.

        `um` is the µm per pixel that the table says.
        """
        try:
            with self._file(images).open("rb") as opened, np.load(opened) as arrays:
                about = json.loads(str(arrays["about"]))
                cells = Cells(*(arrays[name] for name in Cells._fields))
            if about.pop("of") != _made_of(field, mask, um):
                return None
            if not all(os.path.getsize(images / f"{number}.tif") for number in cells.label.tolist()):
                return None
            return Cut(cells, **about)
        except _UNREADABLE:
            return None

    def keep(self, images: Path, field: str, mask: str, um: float | None, cut: Cut) -> None:
        """Remember that a field is cut.

        Raises:
            OSError: if that cannot be written.
        """
        about = cut._asdict()
        cells: Cells = about.pop("cells")
        text = json_text({**about, "of": _made_of(field, mask, um)})
        write_atomically(self._file(images), lambda file: np.savez(file, about=np.array(text), **cells._asdict()))

    def forget(self) -> None:
        """Remove all of it: the table says what was done."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _file(self, images: Path) -> Path:
        name = os.path.relpath(images, self._folder)
        return self._folder / f"{hashlib.blake2b(os.fsencode(name), digest_size=16).hexdigest()}.npz"


def _made_of(field: str, mask: str, um: float | None) -> list[Any]:
    """What tells if a field is still the same: its files, their sizes and times of change, and its scale."""
    files = [os.path.realpath(file) for file in (field, mask)]
    stats = [os.stat((metadata_file(file) if os.path.isdir(file) else None) or file) for file in files]
    names = [file.encode("utf-8", "backslashreplace").decode() for file in files]
    return [*names, *([stat.st_size, stat.st_mtime_ns] for stat in stats), um]
