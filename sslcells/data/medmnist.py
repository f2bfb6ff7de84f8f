"""MedMNIST's .npz files, its own sets and any other in their layout: {train,val,test}_{images,labels}."""

import importlib
import os
import tempfile
import zipfile
import zlib
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, field_validator, model_validator

from sslcells.config import ConfigError, Section, nearest
from sslcells.data import SPLITS, ImageSet
from sslcells.data._array import ArrayImages
from sslcells.data.subset import Subset
from sslcells.storage import is_file
from sslcells.values import place

_SETS = (
    "pathmnist",
    "chestmnist",
    "dermamnist",
    "octmnist",
    "pneumoniamnist",
    "retinamnist",
    "breastmnist",
    "bloodmnist",
    "tissuemnist",
    "organamnist",
    "organcmnist",
    "organsmnist",
)


class Config(Section):
    """A .npz file in MedMNIST's layout, named by `path`, or one of MedMNIST's own sets, named by `set`."""

    kind: Literal["medmnist"] = "medmnist"
    """One .npz file with train, val and test as arrays."""
    path: str | None = None
    """The .npz file; or give `set`."""
    set: str | None = None
    """One of MedMNIST's 2D sets, such as bloodmnist; or give `path`."""
    resolution: Literal[28, 64, 128, 224] = 28
    """Height and width in pixels of the images of `set`."""
    root: str = "~/.medmnist"
    """Folder that has the file of `set`, or to which it is downloaded."""
    download: bool = False
    """Download `set` if it is missing; needs the medmnist package."""
    class_names: tuple[str, ...] = ()
    """Names of the classes 0, 1, …; empty: MedMNIST's names if it knows the set, else the numbers."""
    long_tail: float | None = Field(None, gt=1)
    """Make train long-tailed: the most common class has this many times the images of the rarest, with the others
    exponentially in between, arXiv 1901.05555 section 5. none keeps all; val and test are not changed."""

    @field_validator("set")
    @classmethod
    def _known(cls, name: str | None) -> str | None:
        if name is None or name in _SETS:
            return name
        if name.endswith("3d"):
            raise ValueError("is a set of volumes; only the 2D sets can be read")
        raise ValueError(f"is not one of MedMNIST's sets{nearest(name, _SETS)}; choose from: {', '.join(_SETS)}")

    @model_validator(mode="after")
    def _one_of_path_and_set(self) -> Self:
        if (self.path is None) == (self.set is None):
            raise ValueError("give either path, a .npz file, or set, the name of one of MedMNIST's")
        return self


def open_splits(config: Config, wanted: Sequence[str] = SPLITS) -> dict[str, ImageSet]:
    """Those of the wanted splits that the file has images or labels for, in memory; train always.

    A set with several labels per image, such as chestmnist, has `targets` and counts as unlabelled.

    Raises:
        ConfigError: if the file is missing, or is not in MedMNIST's layout.
    """
    file = _file(config)
    try:
        with np.load(file, allow_pickle=False) as arrays:
            there = [s for s in SPLITS if s == "train" or {f"{s}_images", f"{s}_labels"} & {*arrays.files}]
            return {split: _read(config, file, arrays, split) for split in wanted if split in there}
    except (zipfile.BadZipFile, zlib.error, ValueError, EOFError, OSError) as error:
        raise ConfigError(f"{file} cannot be read: {error}") from None


def _read(config: Config, file: Path, arrays: Any, split: str) -> ImageSet:
    there = [s for s in SPLITS if s == split or {f"{s}_images", f"{s}_labels"} & {*arrays.files}]
    images = _images(file, arrays, f"{split}_images")
    _alike(file, {s: _shape(file, arrays, f"{s}_images") for s in there})
    labels = {s: _labels(file, arrays, f"{s}_labels") for s in there}
    for s in there:
        if len(labels[s]) != (count := _shape(file, arrays, f"{s}_images")[0]):
            raise ConfigError(f"{file}: {s} has {count} images but {len(labels[s])} labels")
    widths = {s: given.shape[1] for s, given in labels.items()}
    if len({*widths.values()}) > 1:
        each = ", ".join(f"{s}_labels {width}" for s, width in widths.items())
        raise ConfigError(f"{file}: the splits have different numbers of labels an image: {each}")
    origin, where = f"{file.name} {split}_images", f"{file}, {split}_images"
    if widths[split] > 1:
        if config.long_tail:
            raise ConfigError(f"data.long_tail={config.long_tail}: {file} has several labels an image, not one class")
        for s, given in labels.items():
            _check_range(file, f"{s}_labels", given, 0, 1, "of several labels an image each is 0 or 1")
        return ArrayImages(images, np.full(len(images), -1), (), split, origin, labels[split], where=where)
    # More classes than images must be a mistake, and their names could fill the memory.
    most = max(_CLASSES, sum(map(len, labels.values())))
    for s, given in labels.items():
        _check_range(file, f"{s}_labels", given, -1, most - 1, "classes are numbered 0, 1, …; −1 is unknown")
    names = _class_names(config, file, 1 + max(int(given.max(initial=-1)) for given in labels.values()))
    label = labels[split][:, 0]
    whole = ArrayImages(images, label, names, split, origin, where=where)
    if config.long_tail and split == "train":
        return Subset(whole, torch.from_numpy(long_tail(label, config.long_tail)))
    return whole


_CLASSES = 10_000
"""number of classes that is always allowed, however few the images"""


def _alike(file: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """Raise a ConfigError unless the images of all splits have one size and number of channels."""
    if len({shape[1:] if len(shape) == 4 else (*shape[1:], 1) for shape in shapes.values()}) > 1:
        each = ", ".join(f"{split}_images {shape}" for split, shape in shapes.items())
        raise ConfigError(f"{file}: the images of the splits have different sizes or channels: {each}")


def _check_range(file: Path, key: str, labels: NDArray[np.int64], low: int, high: int, rule: str) -> None:
    wrong = np.argwhere((labels < low) | (labels > high))
    if len(wrong):
        row, column = wrong[0].tolist()
        place = f"{key}[{row}, {column}]" if labels.shape[1] > 1 else f"{key}[{row}]"
        raise ConfigError(f"{file}: {place} is {labels[row, column]} ({len(wrong)} such labels); {rule}")


def long_tail(labels: NDArray[np.int64], factor: float) -> NDArray[np.int64]:
    """Indices of the images that a long tail keeps, in order: (N,) classes → (n,) indices.

    The c-th of K classes, most common first, keeps its first n_max · factor^(−c / (K − 1)) images, rounded, but at
    least one, and no more than it has.
    """
    classes, counts = np.unique(labels, return_counts=True)
    order = np.argsort(-counts, kind="stable")
    kept = [
        np.flatnonzero(labels == classes[c])[: max(1, round(counts.max() * factor ** (-i / max(1, len(classes) - 1))))]
        for i, c in enumerate(order)
    ]
    return np.sort(np.concatenate(kept))


def _file(config: Config) -> Path:
    """The .npz file, downloaded if it is missing and `download` allows it."""
    if config.set is not None:
        suffix = "" if config.resolution == 28 else f"_{config.resolution}"
        file = place(config.root) / f"{config.set}{suffix}.npz"
        if not file.is_file() and config.download:
            _download(config.set, config.resolution, file)
        if not is_file(file):
            raise ConfigError(f"data.set={config.set!r}: there is no {file}; data.download=true fetches it")
    else:
        assert config.path is not None
        file = place(config.path)
        if not is_file(file):
            near = nearest(file.name, sorted(path.name for path in file.parent.glob("*.npz")))
            what = f"no such file{near}"
            if file.exists():
                what = f"is {'a folder' if file.is_dir() else 'no file but a pipe or device'}, not a .npz file"
            raise ConfigError(f"data.path={config.path!r}: {what}")
    file.open("rb").close()  # raises without permission, where zipfile would say "not an archive"
    if not zipfile.is_zipfile(file):
        raise ConfigError(f"{file} is not a .npz archive")
    return file


def _download(name: str, resolution: int, file: Path) -> None:
    """Download a set with the medmnist package; `file` appears complete or not at all."""
    try:
        package = importlib.import_module("medmnist")
    except ImportError:
        raise ConfigError("data.download=true needs the medmnist package: pip install 'sslcells[medmnist]'") from None
    info = package.INFO[name]
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=file.parent) as folder:
            getattr(package, info["python_class"])("val", download=True, root=folder, size=resolution)
            os.replace(Path(folder) / file.name, file)
    except (RuntimeError, OSError) as error:  # medmnist replaces the cause with its own RuntimeError
        url = info.get("url" if resolution == 28 else f"url_{resolution}")
        raise ConfigError(
            f"data.set={name!r} cannot be downloaded: {error.__context__ or error}; put {url} at {file} by hand"
        ) from None


def _images(file: Path, arrays: Any, key: str) -> NDArray[np.uint8]:
    """The images as (N, H, W, C)."""
    images: NDArray[np.uint8] = _array(file, arrays, key)
    if images.ndim == 3:
        images = images[..., None]
    if images.ndim != 4 or images.shape[-1] not in (1, 3):
        volumes = "; volumes cannot be read" if images.ndim > 3 else ""
        raise ConfigError(
            f"{file}: {key} has the shape {images.shape}, not (images, height, width) or with 3 colours last{volumes}"
        )
    if images.dtype != np.uint8:
        raise ConfigError(f"{file}: {key} is {images.dtype}, not uint8")
    if not images.size:
        raise ConfigError(f"{file}: {key} is empty: its shape is {images.shape}")
    return images


def _labels(file: Path, arrays: Any, key: str) -> NDArray[np.int64]:
    """The labels as (N, labels per image)."""
    labels = _array(file, arrays, key)
    if labels.dtype.kind not in "iub" or labels.ndim not in (1, 2) or labels.shape[1:] == (0,):
        raise ConfigError(f"{file}: {key} is {labels.dtype} of shape {labels.shape}, not whole numbers of (images, 1)")
    if labels.dtype == np.uint64 and labels.size and labels.max() > np.iinfo(np.int64).max:
        raise ConfigError(f"{file}: {key} holds {labels.max()}; classes are numbered 0, 1, …")
    return labels.astype(np.int64).reshape(len(labels), labels.shape[1] if labels.ndim == 2 else 1)


def _shape(file: Path, arrays: Any, key: str) -> tuple[int, ...]:
    """The shape of an array, read from its header without loading the values."""
    if key not in arrays.files:
        raise ConfigError(f"{file} has no {key}{nearest(key, arrays.files)}; it has: {', '.join(arrays.files)}")
    with arrays.zip.open(f"{key}.npy") as member:
        version = np.lib.format.read_magic(member)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, kind = read(member)
    if kind.hasobject:
        raise ConfigError(f"{file}: {key} holds Python objects, not numbers; they are not read, as they could run code")
    return tuple(shape) or (0,)


def _array(file: Path, arrays: Any, key: str) -> NDArray[Any]:
    _shape(file, arrays, key)
    array: NDArray[Any] = arrays[key]
    return array


def _class_names(config: Config, file: Path, count: int) -> tuple[str, ...]:
    if config.class_names:
        if len(config.class_names) < count:
            raise ConfigError(
                f"data.class_names has {len(config.class_names)} names; the labels of {file} go up to {count - 1}"
            )
        return config.class_names
    names = _published_names(config.set or file.stem.partition("_")[0])
    return tuple(names) if len(names) >= count else tuple(map(str, range(count)))


def _published_names(name: str) -> Sequence[str]:
    """The class names of a MedMNIST set, if the medmnist package is installed; else empty."""
    with suppress(ImportError):
        info: dict[str, Any] = importlib.import_module("medmnist").INFO
        return list(info.get(name, {"label": {}})["label"].values())
    return []
