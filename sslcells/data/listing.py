"""The list of a run's train images, kept in its folder: it resumes only with the same images, wherever they are."""

import gzip
import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sslcells.config import ConfigError
from sslcells.data import ImageSet
from sslcells.storage import is_file, json_text, write_atomically

FILE = "trained_on.json.gz"
"""In a run's folder: names, labels and sources of the images that it trains on, and the names of the classes."""
PATHS = {"data.path", "data.root", "data.sources", "data.table", "data.verify", "data.on_error"}
PATHS |= {"data.cache", "data.cache_gib"}
"""Keys that may change when a run resumes: paths, checks and the cache; the images and sources are compared."""


def record(folder: Path, images: ImageSet) -> None:
    """Write the list of a run's train images into its folder."""
    content = gzip.compress(json_text(_content(images)).encode(), compresslevel=1, mtime=0)
    write_atomically(folder / FILE, lambda file: file.write(content))


def recorded(folder: Path) -> bool:
    """True if the folder has the list; earlier versions did not write it."""
    return is_file(folder / FILE)


def differences(folder: Path, images: ImageSet) -> list[str]:
    """How the images of train differ from the recorded ones, in words; empty if they are the same.

    Raises:
        ConfigError: if the list cannot be read.
    """
    try:
        return _differences(_read(folder), json.loads(json_text(_content(images))))
    except (OSError, EOFError, ValueError, KeyError, zlib.error) as error:
        raise ConfigError(f"{folder / FILE} cannot be read: {error}; choose another name=") from None


def warning(name: str, folder: Path | None, images: ImageSet, what: str) -> list[str]:
    """A sentence if the run that made an encoder was trained on some of these images, by their names; else none.

    `name` is the encoder's, `folder` its run's, None where it is not of a run; `what` names the images.

    Raises:
        ConfigError: if the run's list cannot be read.
    """
    if folder is None or not recorded(folder):
        return []
    try:
        names = set(_read(folder)["names"])
    except (OSError, EOFError, ValueError, KeyError, zlib.error) as error:
        raise ConfigError(f"{folder / FILE} cannot be read: {error}") from None
    seen = sum(images.name(i) in names for i in range(len(images)))
    said = f"warning: {name} was trained on {seen:,} of the {len(images):,} images of {what}: figures are too high"
    return [said] if seen else []


def _read(folder: Path) -> Any:
    return json.loads(gzip.decompress((folder / FILE).read_bytes()))


def _content(images: ImageSet) -> dict[str, Any]:
    labels = images.labels if images.targets is None else images.targets
    return {
        "classes": list(images.classes),
        "names": [images.name(i) for i in range(len(images))],
        "labels": labels.tolist(),
        "sources": images.sources.tolist(),
    }


def _differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    if before == now:
        return []
    then, names = before["names"], now["names"]
    if set(then) != set(names) or len(then) != len(names):
        counts = f"it was trained on {len(then)} images and would resume with {len(names)}"
        new, gone = _without(names, then), _without(then, names)
        return [
            "; ".join([counts, *_some(new, "new, such as"), *_some(gone, "no longer there, such as")]),
        ]
    if then != names:
        first = next(i for i, pair in enumerate(zip(then, names, strict=True)) if pair[0] != pair[1])
        return [f"its images are in another order: image {first} was {then[first]}, now {names[first]}"]
    if before["classes"] != now["classes"]:
        return [f"its classes were {', '.join(before['classes'])}; now {', '.join(now['classes'])}"]
    out = []
    for what, key in (("label", "labels"), ("source", "sources")):
        other = [name for name, a, b in zip(names, before[key], now[key], strict=True) if a != b]
        out += _some(other, f"of {len(names)} images have another {what}, such as")
    return out


def _without(these: Sequence[str], those: Sequence[str]) -> list[str]:
    known = set(those)
    return [name for name in these if name not in known]


def _some(names: Sequence[str], what: str) -> list[str]:
    return [f"{len(names)} {what} {names[0]}"] if names else []
