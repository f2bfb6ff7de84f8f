"""Finds the splits of a folder by the names of its sub-folders."""

import posixpath
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from sslcells.config import ConfigError, nearest
from sslcells.data._names import some
from sslcells.data._scan import is_image, listed, subfolders
from sslcells.storage import is_folder

_NAMES = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation"),
    "test": ("test", "testing"),
}
_FILLERS = {"set", "split", "subset", "data", "dataset", "image", "images", "imgs", "folder", "files"}
"""words that change nothing in the name of a split: train_set, images-train, TestData"""
_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|\d+|[^\W\d_]+")
_JOINED = re.compile(r"(.+?)(set|data|images)")
_SHOWN = 10  # names in one message
_DEEP = 3  # levels below the folder at which splits are looked for


def split_of(name: str) -> str | None:
    """The split that a value in a table of this name means; None if it means none."""
    return next((split for split, names in _NAMES.items() if name.casefold() in names), None)


def split_named(folder: str) -> str | None:
    """The split that a folder of this name holds: train, Training, train_set, TestImages, …; None if none."""
    words = {*_words(folder)} - _FILLERS
    return split_of(words.pop()) if len(words) == 1 else None


def _resembles(folder: str) -> str | None:
    """The split that a part of the folder's name means, as in my_train; None if there is none."""
    return next((split for word in _words(folder) if (split := split_of(word)) is not None), None)


def _words(name: str) -> list[str]:
    found = []
    for word in (word.casefold() for word in _WORD.findall(name)):
        joined = _JOINED.fullmatch(word)
        found.append(joined[1] if joined is not None and split_of(joined[1]) else word)
    return found


def class_below(folders: Sequence[str], lab_above: bool = False) -> str | None:
    """The class in the folders on an image's path: the first, or the one below a split's folder; None if none.

    With `lab_above` that one is the laboratory, and the next one the class.
    """
    below = split_depth(folders) + lab_above
    return folders[below] if len(folders) > below else None


def split_depth(folders: Sequence[str]) -> int:
    """How many of the folders on an image's path lead to its split; 0 if none is called like a split."""
    return next((i + 1 for i, folder in enumerate(folders[:_DEEP]) if split_named(folder)), 0)


def find_splits(root: Path, given: Mapping[str, str | None]) -> dict[str, str]:
    """Split → sub-folder, as `given` or found by name; "" is the whole folder.

    A folder whose only content is one folder is looked into: images/train is found.

    Raises:
        ConfigError: if a given folder is missing, a name is ambiguous, train is missing, or two splits overlap.
    """
    present = subfolders(root)
    named = {split: _given(root, split, name, present) for split, name in given.items() if name is not None}
    found = named | _by_name(root, present, [split for split in given if split not in named])
    if not found:
        found = _further_down(root, present)
    if found and "train" not in found:
        raise ConfigError(
            f"{root} holds {', '.join(found.values())} but no folder called train; name it with data.train= "
            f"(there are: {some(present, _SHOWN)}); data.train=. takes the whole folder as train"
        )
    _apart(root, found)
    return found or {"train": ""}


def _by_name(root: Path, present: Sequence[str], splits: Sequence[str]) -> dict[str, str]:
    found = {}
    for split in splits:
        exact = [folder for folder in present if folder.casefold() in _NAMES[split]]
        matches = exact or [folder for folder in present if split_named(folder) == split]
        if len(matches) > 1:
            raise ConfigError(f"{root} holds {' and '.join(matches)}: set data.{split}= to one of them")
        if matches:
            found[split] = matches[0]
    return found


def _further_down(root: Path, present: Sequence[str]) -> dict[str, str]:
    """The splits in a folder that is alone in a folder, or alone in one that is; empty if there are none."""
    way, here = "", root
    for _ in range(_DEEP):
        if len(present) != 1 or any(is_image(name) for name in listed(here)):
            return {}
        way, here = posixpath.join(way, present[0]), here / present[0]
        present = subfolders(here)
        if "train" in (found := _by_name(here, present, list(_NAMES))):
            return {split: posixpath.join(way, folder) for split, folder in found.items()}
    return {}


def _given(root: Path, split: str, name: str, present: Sequence[str]) -> str:
    if not is_folder(root / name):
        folded = {folder.casefold(): folder for folder in present}
        same = folded.get(name.casefold())
        near = f" (did you mean {same}?)" if same else nearest(name, present)
        there = some(present, _SHOWN) or "none"
        raise ConfigError(f"data.{split}={name!r}: {root} has no such sub-folder{near}; there are: {there}")
    folder = posixpath.normpath(Path(name).as_posix())
    return "" if folder == "." else folder


def _apart(root: Path, folders: Mapping[str, str]) -> None:
    """Raise a ConfigError if splits share images, as results would be too good."""
    real = {split: (root / folder).resolve() for split, folder in folders.items()}
    for outer, outside in real.items():
        for inner, inside in real.items():
            if outer != inner and inside.is_relative_to(outside):
                raise ConfigError(
                    f"the {inner} split, {root / folders[inner]}, lies in the {outer} split, "
                    f"{root / folders[outer]}: they would share images"
                )


def refuse_hidden(root: Path, split: str, folder: str, names: Iterable[str]) -> None:
    """Raise a ConfigError if images of a split lie in folders further down that are called like splits.

    They would be trained on, test images too, and `test` would be a class. `folder` is the split's, "" the whole
    folder; `names` are its images, relative to `root`.
    """
    start = len(folder) + 1 if folder else 0
    ways = sorted({name[start:].rpartition("/")[0] for name in names})
    hidden = dict[str, str]()  # folder called like a split → that split
    for way in ways:
        folders = way.split("/")
        for depth, name in enumerate(folders):
            if found := split_named(name):
                hidden["/".join(([folder] if folder else []) + folders[: depth + 1])] = found
                break
    if not folder and not hidden:
        top = {way.split("/")[0] for way in ways}
        hidden = {name: found for name in sorted(top) if (found := _resembles(name)) is not None}
        if "train" not in hidden.values():
            return
    if hidden:
        raise ConfigError(_explained(root, split, folder, hidden))


def _explained(root: Path, split: str, folder: str, hidden: Mapping[str, str]) -> str:
    """What to do about folders called like splits."""
    first = {found: way for way, found in reversed(list(hidden.items()))}
    parents = {posixpath.dirname(way) for way in first.values()}
    if "train" in first and len(first) > 1 and len(parents) == 1:
        what = " ".join(
            f"data.{found}={way}" for found, way in sorted(first.items(), key=lambda x: [*_NAMES].index(x[0]))
        )
    else:
        what = "data.kind=table with a column of splits, or data.exclude= to leave some out"
    whole = f"data.{split}={folder or '.'}"
    return (
        f"{root / folder}: images lie in folders called like splits, {some([*hidden], 4)}, and all would be {split}. "
        f"Say which is which: {what}; or {whole} if all of them are {split}"
    )
