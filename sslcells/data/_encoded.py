"""Images that lie encoded (JPEG, PNG, TIFF, …) in larger files: in the shards of WebDataset, in Parquet."""

import fnmatch
import os
import re
import tempfile
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from sslcells.config import ConfigError
from sslcells.data import SPLITS, DataError, ImageSet
from sslcells.data._decode import Decoder, Header, Unreadable
from sslcells.data._decode.on_device import plain
from sslcells.data._files import Files
from sslcells.data._names import check_classes, some
from sslcells.data._packed import Packed
from sslcells.data._sources import source_ids
from sslcells.data._splits import split_of
from sslcells.data.folder import nearest_folder
from sslcells.storage import is_file, is_folder, patiently
from sslcells.values import place


class Config(Files):
    """Fields of data sets whose images lie in larger files, which are not verified at the start."""

    verify: Literal["none"] = "none"
    """Images are decoded when they are read; the files are too large to be verified at each start."""
    on_error: Literal["stop"] = "stop"
    """An image that cannot be read stops the run, and is named."""
    z: Literal["middle", "max"] = "middle"
    """Of planes that a file calls Z or T: the `middle` one, or their maximum (`max`)."""
    path: str = Field(min_length=1)
    """Folder with the files, at any depth, or one of them."""
    train: str | None = None
    """Pattern for the names of the training files, such as train-*; none: those with train or training in their path,
    or all if no path has the name of a split."""
    val: str | None = None
    """Pattern for the validation files; none: those with val, valid or validation in their path."""
    test: str | None = None
    """Pattern for the test files; none: those with test or testing in their path."""
    class_names: tuple[str, ...] = ()
    """Names of the classes 0, 1, …, where labels are numbers; none: the names that the files have, or the numbers."""


class Encoded(ImageSet):
    """One split of such a data set."""

    whole_files = True

    def __init__(self, names: Sequence[str], decoder: Decoder) -> None:
        self._names, self._decoder = Packed(names), decoder
        self._size = decoder.size
        self.channels = decoder.channels

    @abstractmethod
    def encoded(self, index: int) -> bytes:
        """The bytes of image `index`, as they would be in a file of its own.

        Raises:
            OSError, EOFError, ValueError: if they cannot be read.
        """

    def pixels(self, index: int) -> Tensor:
        """Image `index`: (C, H, W) uint8.

        Raises:
            DataError: if it cannot be read, or no size is given and the first image has another; the message names it.
        """
        pixels: Tensor = self._with_file(index, self._decoder)
        height, width = pixels.shape[1:]
        if self._size is None:
            self._size = (height, width) if index == 0 else tuple(self.pixels(0).shape[1:])  # type: ignore[assignment]
        if (height, width) != self._size and self._decoder.size is None:
            first = "×".join(map(str, self._size or ()))
            raise DataError(f"{self.name(index)} is {height}×{width}, the first image {first}; set data.size=")
        return pixels

    def plain_jpeg(self, index: int) -> bytes | None:
        """The bytes of image `index`, if a device can decode them; None if not, or if they cannot be read."""
        try:
            return plain(self.encoded(index))
        except (OSError, EOFError, ValueError):  # `pixels` raises it again, in words
            return None

    def values(self, index: int) -> NDArray[Any]:
        """The raw values of image `index`."""
        values: NDArray[Any] = self._with_file(index, self._decoder.values)
        return values

    def header(self, index: int) -> Header | None:
        """The header of image `index`; None if it cannot be read."""
        try:
            header: Header = self._with_file(index, self._decoder.header)
        except DataError:
            return None
        return header

    def name(self, index: int) -> str:
        """The name of the file, and of the image in it."""
        return self._names[index]

    def _with_file(self, index: int, use: Any) -> Any:
        """What `use` makes of the path of a file with the image."""
        name = self.name(index)
        try:
            return in_file(patiently(lambda: self.encoded(index), name), use)
        except OSError as error:
            raise DataError(f"{name}: {error.strerror or error}") from None
        except (Unreadable, EOFError, ValueError) as error:
            raise DataError(f"{name}: {error}") from None


def in_file(data: bytes, use: Any) -> Any:
    """What `use` makes of the path of a file with these bytes: in memory where the system has such files."""
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("image")
        try:
            left = memoryview(data)
            while left:
                left = left[os.write(descriptor, left) :]
            return use(f"/proc/self/fd/{descriptor}")
        finally:
            os.close(descriptor)
    with tempfile.NamedTemporaryFile() as file:
        file.write(data)
        file.flush()
        return use(file.name)


def find_files(config: Config, ending: str) -> tuple[Path, dict[str, list[str]], list[str]]:
    """The folder of the files of this ending, those of each split sorted by path, and those of none.

    Raises:
        ConfigError: if there is no such folder or file, no file is there, a pattern fits none, or two fit one.
    """
    path, root = config.path, place(config.path)
    if is_file(root) and root.name.lower().endswith(ending):
        return root.parent, {"train": [root.name]}, []
    if not is_folder(root):
        what = f"is no {ending} file" if root.exists() else f"no such folder{nearest_folder(root)}"
        raise ConfigError(f"data.path={path!r}: {what}")
    names = sorted(
        os.path.relpath(os.path.join(folder, name), root)
        for folder, below, files in os.walk(root, followlinks=True)
        for name in files
        if name.lower().endswith(ending)
        and not any(part.startswith(".") for part in Path(folder, name).relative_to(root).parts)
    )
    if not names:
        raise ConfigError(f"data.path={path!r}: no {ending} file in it, at any depth")
    named = {name: next((s for word in _words(name) if (s := split_of(word))), None) for name in names}
    splits: dict[str, list[str]] = {}
    for split in SPLITS:
        pattern = getattr(config, split)
        chosen = [n for n in names if (named[n] == split if pattern is None else _fits(n, pattern))]
        if pattern is not None and not chosen:
            raise ConfigError(f"data.{split}={pattern!r} fits none of the files in {root}: {some(names)}")
        for other, theirs in splits.items():
            if both := set(chosen) & set(theirs):
                raise ConfigError(f"data.{other} and data.{split} both take {min(both)}")
        splits[split] = chosen
    if not any(splits.values()):
        splits["train"] = names
    used = {name for chosen in splits.values() for name in chosen}
    return root, {split: chosen for split, chosen in splits.items() if chosen}, [n for n in names if n not in used]


def _fits(name: str, pattern: str) -> bool:
    return fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(os.path.basename(name), pattern)


def _words(name: str) -> list[str]:
    return re.findall(r"[a-z]+", name.casefold())


def label_numbers(
    by_split: Mapping[str, Sequence[str | None]], given: Sequence[str], known: Sequence[str], where: str
) -> tuple[tuple[str, ...], dict[str, Tensor]]:
    """Classes, and of each split (N,) int64 class of each text; −1 where there is none.

    Numbers are places in `given`, the names from the configuration, or in `known`, those from the files. A number means
    the same class in each split.

    Raises:
        ConfigError: if a number has no name.
    """
    texts = [text for of in by_split.values() for text in of]
    distinct = sorted({text for text in texts if text is not None})
    names = tuple(given or known)
    if distinct and all(text.isdecimal() for text in distinct):
        most = max(map(int, distinct))
        if names and most >= len(names):
            raise ConfigError(f"{where}: a label is {most}, and there are names for 0 to {len(names) - 1}")
        if most >= 10_000 + len(texts):
            raise ConfigError(f"{where}: a label is {most}; classes are numbered 0, 1, …")
        names = names or tuple(str(k) for k in range(most + 1))
        numbers = [-1 if text is None else int(text) for text in texts]
    else:
        if given and (unknown := [text for text in distinct if text not in given]):
            raise ConfigError(f"{where}: data.class_names does not have {some(unknown)}")
        names = tuple(given or distinct)
        at = {name: k for k, name in enumerate(names)}
        numbers = [-1 if text is None else at[text] for text in texts]
    check_classes(names, where)
    left = iter(numbers)
    return names, {split: torch.tensor([*islice(left, len(of))], dtype=torch.int64) for split, of in by_split.items()}


def sources_of(names: Sequence[str], sources: Sequence[str | None] | None) -> tuple[Tensor, Tensor | None]:
    """(N,) int64 sources, and (N,) bool whether known; None if the data set has none."""
    if sources is None:
        return source_ids(names, [None] * len(names)), None
    known = torch.from_numpy(np.array([source is not None for source in sources], bool))
    return source_ids(names, sources), known
