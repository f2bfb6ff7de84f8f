"""A folder of image files: sub-folders may be splits, and below them classes."""

import os
from collections.abc import Iterator, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BeforeValidator, Field, field_validator, model_validator
from torch import Tensor

from sslcells.config import ConfigError, nearest
from sslcells.data import SPLITS, DataError, ImageSet
from sslcells.data._decode import ZARR, Decoder, Header, Unreadable
from sslcells.data._decode.on_device import read_plain
from sslcells.data._files import Files, one_group, one_lab, verify
from sslcells.data._found import Clock, Found
from sslcells.data._labs import LabFolder, check_above, class_in, lab_names, labs_of
from sslcells.data._names import check_classes
from sslcells.data._packed import Packed
from sslcells.data._patterns import Patterns, checked
from sslcells.data._planes import file_of, images_of, to_look_at
from sslcells.data._scales import Scales, unknown
from sslcells.data._scan import EVERY, KINDS, Listing, find_root, is_image, subfolders, walk
from sslcells.data._sources import look_up_sources, read_table, source_ids
from sslcells.data._splits import class_below, find_splits, refuse_hidden
from sslcells.data._verified import headers_of
from sslcells.storage import is_file, is_folder, patiently
from sslcells.values import place

Globs = Annotated[tuple[str, ...] | str, BeforeValidator(checked)]
"""Patterns; `str`, which none of them is when checked, keeps the text of one on the command line as it was typed."""


class Config(Files):
    """Image files at any depth in a folder: PATH/[split/][class/]…/image.png; hidden and other files are ignored."""

    kind: Literal["folder"] = "folder"
    """A folder of JPEG, PNG, TIFF, BMP and WebP files and OME-Zarr folders; docs/files.md says how each is read."""
    path: str = Field(min_length=1)
    """Folder with the images."""
    train: str | None = None
    """Sub-folder of the training images, `.` for the whole folder; none: train/, Training/, train_set/, … or all images
    if there are no splits."""
    val: str | None = None
    """Sub-folder of the validation images; none: val/, valid/, validation_set/, … if there is one."""
    test: str | None = None
    """Sub-folder of the test images; none: test/, Testing/, test_images/, … if there is one."""
    include: Globs = ()
    """Read only images whose path relative to `path` matches one of these patterns, such as `*.tif` or `train/*/good`;
    `*` does not match /, `**` any folders; a pattern without / may match any folder or the name. None: all images."""
    exclude: Globs = ()
    """Leave out images whose path matches one of these patterns, such as `*_dup*` or `blurred`."""
    labels: Literal["folder", "none"] = "folder"
    """`folder`: the first sub-folder in the split is the class; images outside sub-folders have no label."""
    sources: str | None = None
    """CSV file with the source (slide, donor, photograph) of each image; its path may be relative to `path`."""
    sources_path_column: str = "path"
    """Column with the image's path relative to `path`."""
    sources_column: str = "source"
    """Column with the source."""
    source_pattern: str | None = None
    """Regular expression, searched in the image's path relative to `path`; its one group is the source."""

    lab_pattern: str | None = None
    """Regular expression, searched in the image's path relative to `path`; its one group is the laboratory (site,
    scanner, stain batch)."""
    lab_folder: LabFolder = "none"
    """`above`: PATH/[split/]lab/class/…, the first sub-folder is the laboratory and the second the class; `below`:
    PATH/[split/]class/lab/…; not with `lab_pattern`."""

    _one_group = field_validator("source_pattern")(one_group)
    _one_lab = field_validator("lab_pattern")(one_lab)

    @model_validator(mode="after")
    def _one_way_to_labs(self) -> Self:
        if self.lab_pattern is not None and self.lab_folder != "none":
            raise ValueError(f"lab_folder={self.lab_folder} and lab_pattern both give the laboratory: set only one")
        return self


class FolderImages(ImageSet):
    """One split of a folder; only paths, labels and sources are in memory."""

    whole_files = True
    skipped: dict[str, str]
    """path relative to data.path → reason, for images that were left out"""

    def __init__(
        self,
        root: Path,
        names: Sequence[str],
        decoder: Decoder,
        classes: tuple[str, ...],
        labels: Tensor,
        sources: Tensor,
        skipped: dict[str, str],
        found: Found | None = None,
        sourced: Tensor | None = None,
        scales: NDArray[np.float64] | None = None,
    ) -> None:
        """`scales`: (N,) µm per pixel of each file, NaN where only the file says it."""
        self._root = str(root)
        self._names = Packed(names)
        self._decoder = decoder
        self.channels = decoder.channels
        self.classes = classes
        self.labels = labels
        self.sources = sources
        self.skipped = skipped
        self.found = found
        self.sourced = sourced
        self._scales = scales

    def pixels(self, index: int) -> Tensor:
        """Image `index`: (C, H, W) uint8.

        Raises:
            DataError: if the file can no longer be read; the message names it.
        """
        file = f"{self._root}/{self._names[index]}"
        um = None if self._scales is None or np.isnan(self._scales[index]) else float(self._scales[index])

        def read() -> Tensor:
            try:
                return self._decoder(file, um)
            except Unreadable as error:
                if isinstance(error.__cause__, OSError) and error.__cause__.errno is not None:
                    raise error.__cause__ from None  # a storage error, which may pass
                raise

        try:
            return patiently(read, file)
        except OSError as error:
            raise DataError(f"{file}: {error.strerror}") from None
        except Unreadable as error:
            raise DataError(f"{file}: {error}") from None

    def plain_jpeg(self, index: int) -> bytes | None:
        """The file of image `index`, if a device can decode it; None if not, or if it cannot be read."""
        return read_plain(f"{self._root}/{self._names[index]}")

    def values(self, index: int) -> NDArray[Any]:
        """The raw values in the file of image `index`."""
        file = f"{self._root}/{self._names[index]}"
        try:
            return self._decoder.values(file)
        except Unreadable as error:
            raise DataError(f"{file}: {error}") from None

    def header(self, index: int) -> Header | None:
        """The file header of image `index`; None if it cannot be read."""
        try:
            return self._decoder.header(f"{self._root}/{self._names[index]}")
        except Unreadable:
            return None

    def name(self, index: int) -> str:
        """The image's path relative to data.path."""
        return self._names[index]


def list_images(folder: Path, decoder: Decoder | None = None, patterns: Patterns = EVERY) -> list[str]:
    """Sorted relative paths of the images in a folder, at any depth; or, if it is one, of those in one OME-Zarr image.

    With `decoder`, the files of a multi-file OME-TIFF set are one image, and planes are images if it reads `each`.
    `patterns` are those of a command's --include and --exclude.

    Raises:
        ConfigError: if there is no such folder, no image in it, or a pattern matches none.
    """
    if not is_folder(folder):
        what = "is a file, not a folder of images" if folder.is_file() else f"no such folder{nearest_folder(folder)}"
        raise ConfigError(f"{folder}: {what}")
    names = sorted(walk(folder))
    if not names:
        raise ConfigError(f"{folder} holds no images ({', '.join(KINDS)}) at any depth")
    patterns.check_used(names, folder, ("--include", "--exclude"))
    names = [name for name in names if patterns.leaves_out(name) is None]
    if not names:
        raise ConfigError(f"{folder}: --include and --exclude leave out every image")
    return expanded(folder, names, decoder) if decoder is not None else names


def expanded(folder: Path, names: Sequence[str], decoder: Decoder) -> list[str]:
    """The images in these files of a folder, as `list_images` names them; files that cannot be read are one each."""
    asked = to_look_at(names, decoder)
    headers = dict(zip(asked, headers_of(folder, asked, decoder), strict=True)) if asked else {}
    return images_of(names, [headers.get(name) for name in names], decoder).names


def class_of(name: str, lab_above: bool = False) -> str | None:
    """The class's sub-folder on an image's path, below a split's and with `lab_above` a laboratory's; None if none."""
    folders = list(takewhile(lambda folder: not folder.lower().endswith(ZARR), name.split("/")[:-1]))
    return class_below(folders, lab_above)


def nearest_folder(missing: Path) -> str:
    """` (did you mean x?)` for the first part of the path that does not exist; empty if no folder is similar."""
    while not missing.parent.is_dir() and missing.parent != missing:
        missing = missing.parent
    return nearest(missing.name, subfolders(missing.parent)) if missing.parent.is_dir() else ""


def open_splits(config: Config, wanted: Sequence[str] = SPLITS) -> dict[str, ImageSet]:
    """Those of the wanted splits that the folder has, their images sorted by path.

    Raises:
        ConfigError: if folders, images or sources contradict the configuration.
    """
    clock = Clock()
    opened = dict[str, ImageSet]()
    whole = _Whole.of(config, wanted)
    clock.lap("listing")
    for split in wanted:
        if split in whole.folders:
            opened[split] = _opened(config, whole, split, clock)
            clock = Clock()
    return opened


class _Whole(NamedTuple):
    """What the splits of a folder have in common."""

    root: Path
    folders: dict[str, str]
    """split → sub-folder"""
    listings: dict[str, Listing]
    """of the wanted splits"""
    classes: tuple[str, ...]
    labs: tuple[str, ...]

    @classmethod
    def of(cls, config: Config, wanted: Sequence[str]) -> Self:
        """List the folder; classes and laboratories are of all splits, so that a number means the same in each."""
        root, patterns = find_root(config.path), Patterns(config.include, config.exclude)
        folders = find_splits(root, {"train": config.train, "val": config.val, "test": config.test})
        if "train" in wanted:
            patterns.check_used(_every(root, folders), root, ("data.include", "data.exclude"))
        listings = {split: _listed(config, root, folders, split, patterns) for split in wanted if split in folders}
        classes = _classes(root, folders, config.lab_folder, patterns) if config.labels == "folder" else ()
        by_lab = (config.lab_pattern, config.lab_folder)
        labs = lab_names(root, folders.values(), *by_lab, patterns) if by_lab != (None, "none") else ()
        if config.labels == "folder" and config.lab_folder == "above":
            check_above(labs, classes, root)
        return cls(root, folders, listings, classes, labs)


def _listed(config: Config, root: Path, folders: dict[str, str], split: str, patterns: Patterns) -> Listing:
    folder = folders[split]
    listing = Listing.of(root / folder, f"{folder}/" if folder else "", patterns)
    if not listing.names:
        but = " that data.include and data.exclude take" * bool(patterns)
        raise ConfigError(f"{root / folder} holds no images ({', '.join(KINDS)}) at any depth{but}")
    if getattr(config, split) is None:
        refuse_hidden(root, split, folder, listing.names)
    return listing


def _opened(config: Config, whole: _Whole, split: str, clock: Clock) -> FolderImages:
    root, folder, listing = whole.root, whole.folders[split], whole.listings[split]
    start = len(f"{folder}/") if folder else 0
    decoder = config.decoder()
    looks = verify(config, root, listing, decoder, folder, unknown(config, listing.names))
    kept = [(n, h) for n, h in zip(listing.names, looks.headers, strict=True) if n not in looks.broken]
    images = images_of([n for n, _ in kept], [h for _, h in kept], decoder)
    names = images.names
    scales = Scales(config, names, images.headers)
    scales.check(root / folder)
    clock.lap("verifying")
    labels = _labels(names, start, whole.classes, config.lab_folder)
    sources, sourced = _sources(config, root, [file_of(name, decoder) for name in names])
    clock.lap("sources")
    found = Found(
        where=_where(root, folder, getattr(config, split), split),
        ignored=listing.ignored | images.parts | (_beside(root, whole.folders) if split == "train" else {}),
        broken=looks.broken,
        looked=looks.looked,
        scales=scales.lines(),
        seconds=clock.laps,
    ).with_headers(*images.known)
    opened = FolderImages(root, names, decoder, whole.classes, labels, sources, looks.broken, found, sourced)
    if whole.labs:
        opened.labs = labs_of(names, start, whole.labs, config.lab_pattern, config.lab_folder)
        opened.lab_names = whole.labs
    return opened


def _where(root: Path, folder: str, given: str | None, split: str) -> str:
    if not folder:
        return f"{root}, the whole folder"
    return f"{root / folder}, {f'as data.{split} says' if given is not None else 'by its name'}"


def _every(root: Path, folders: dict[str, str]) -> Iterator[str]:
    """The paths of the images of all splits, relative to `root`."""
    return (f"{folder}/{name}" if folder else name for folder in folders.values() for name in walk(root / folder))


def _beside(root: Path, folders: dict[str, str]) -> dict[str, tuple[int, str]]:
    """Files and folders beside the splits, which belong to none."""
    used = {folder.split("/")[0] for folder in folders.values()}
    if "" in used:
        return {}
    folders_too = subfolders(root)
    others = [folder for folder in folders_too if folder not in used]
    files = sorted(name for name in os.listdir(root) if not name.startswith(".") and name not in folders_too)
    kinds = {
        "folders beside the splits": others,
        "images beside the splits": [name for name in files if is_image(name)],
        "other files beside the splits": [name for name in files if not is_image(name)],
    }
    return {kind: (len(names), names[0]) for kind, names in kinds.items() if names}


def _classes(root: Path, folders: dict[str, str], lab_folder: LabFolder, patterns: Patterns) -> tuple[str, ...]:
    """Names of the classes of all splits, so that a number means the same class in each split."""
    names: set[str] = set()
    for folder in folders.values():
        split = root / folder
        for above in [split / lab for lab in subfolders(split)] if lab_folder == "above" else [split]:
            way = (above.relative_to(root) / "_").as_posix().removesuffix("_")
            names |= {name for name in subfolders(above) if any(walk(above / name, f"{way}{name}/", patterns))}
    check_classes(sorted(names), str(root))
    return tuple(sorted(names))


def _labels(names: Sequence[str], start: int, classes: tuple[str, ...], lab_folder: LabFolder) -> Tensor:
    """(N,) int64: the class in each path at position `start`; -1 if it has none."""
    number = {name: k for k, name in enumerate(classes)}
    labels = (number.get(class_in(name[start:], lab_folder) or "", -1) for name in names)
    return torch.from_numpy(np.fromiter(labels, np.int64, len(names)))


def _sources(config: Config, root: Path, names: Sequence[str]) -> tuple[Tensor, Tensor | None]:
    """(N,) int64 sources, and (N,) bool whether known. If sources are configured, at least half must be known."""
    if config.sources is None and config.source_pattern is None:
        return source_ids(names, [None] * len(names)), None
    table: dict[str, str] = {}
    if config.sources is not None:
        table = read_table(_sources_file(config.sources, root), config.sources_path_column, config.sources_column)
    found = look_up_sources(names, table, config.source_pattern)
    known = torch.tensor([source is not None for source in found], dtype=torch.bool)
    if 2 * int(known.sum()) < len(names):
        example = names[found.index(None)]
        ways = [f"data.sources lists paths such as {next(iter(table), 'none')!r}"] if config.sources else []
        ways += [f"data.source_pattern={config.source_pattern!r}"] if config.source_pattern else []
        raise ConfigError(
            f"only {int(known.sum())} of {len(names)} images get a source: {example!r} (below {root}) has none; "
            f"{' and '.join(ways)}"
        )
    return source_ids(names, found), known


def _sources_file(given: str, root: Path) -> Path:
    for file in (place(given), root / given):
        if is_file(file):
            return file
    near = nearest(Path(given).name, sorted(file.name for file in root.glob("*.csv")))
    raise ConfigError(f"data.sources={given!r}: no such file, neither here nor in {root}{near}")
