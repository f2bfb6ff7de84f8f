"""What `sslcells embed` embeds: the images below a folder, or the rows of a table."""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import torch
import yaml
from pydantic import ValidationError

from sslcells.config import ConfigError, load
from sslcells.data import ImageSet, table
from sslcells.data._columns import CSV, PARQUET
from sslcells.data._labs import LabFolder, lab_in
from sslcells.data._patterns import Patterns
from sslcells.data._splits import split_depth
from sslcells.data.folder import FolderImages, class_of, list_images
from sslcells.delivery.encoder import Encoder, find_run
from sslcells.delivery.shards import OURS, SHOWN, list_digest, spelt
from sslcells.names import CONFIG
from sslcells.storage import is_file, is_folder
from sslcells.values import place

_FREE = {"table", "path", "verify", "on_error"}
"""settings of a table that may differ when an embedding goes on"""


class Listed(NamedTuple):
    """Images to embed, in their order."""

    root: str
    """the folder that their paths start from"""
    images: ImageSet
    digest: str
    """equal for equal lists, and tables"""
    name: str
    """of the folder of embeddings, if nothing else names it"""
    files: list[str] | None = None
    """path below the root of the file of each row of a table"""
    labels: list[str | None] | None = None
    """class of each row of a table"""
    more: pa.Table | None = None
    """(N rows) what a table says of each image, in columns as the shards call them"""
    table: str | None = None
    """the file of the table"""
    key: str | None = None
    """the table's column with ids of cells"""
    lab_above: bool = False
    """true if a folder's sub-folders are laboratories, and classes lie below them"""
    labs: Sequence[str | None] | None = None
    """laboratory of each image, as the table or the folders name it; None if nothing does"""

    def label(self, index: int) -> str | None:
        """The class of an image: in the table, or by its sub-folder."""
        if self.files is None:
            label = class_of(self.images.name(index), self.lab_above)
        else:
            label = (self.labels or {index: None})[index]
        return None if label is None else spelt(label)

    def reason(self, index: int, why: str) -> str:
        """Why an image cannot be read, without its name, which the message begins with."""
        name = self.images.name(index)
        file = name if self.files is None else self.files[index]
        return spelt(why.removeprefix(f"{self.root}/{file}: ").removeprefix(f"{name}: "))


def listed(
    run: str, images: str, encoder: Encoder, patterns: Patterns, overrides: Sequence[str], labels: bool
) -> Listed:
    """The images of a folder, or of a table (.csv, .tsv, .parquet) with the settings `data.….=` of `overrides`.

    Raises:
        ConfigError: if there is no such folder or table, or it contradicts the settings.
    """
    root = place(images)
    if root.suffix.lower() in (*CSV, *PARQUET) and not is_folder(root):
        if patterns.include or patterns.exclude:
            raise ConfigError("--include and --exclude choose images of a folder; a table lists its own")
        return _of_table(root, _config(run, root, encoder, overrides), labels)
    if overrides:
        raise ConfigError(f"{overrides[0]}: settings of data are for tables; {images} is none (.csv, .tsv, .parquet)")
    names = list_images(root, encoder.decoder, patterns)
    unknown = torch.full((len(names),), -1)
    files = FolderImages(root, names, encoder.reader(), (), unknown, unknown, {})
    data = _data_section(run)
    pattern, lab_folder = data.get("lab_pattern"), data.get("lab_folder", "none")
    by_path = [_lab_of(name, pattern, lab_folder) for name in names] if pattern or lab_folder != "none" else []
    labs, above = by_path if any(by_path) else None, lab_folder == "above"
    return Listed(str(root), files, list_digest(names), root.resolve().name, lab_above=above, labs=labs)


def _lab_of(name: str, pattern: str | None, lab_folder: LabFolder) -> str | None:
    """The laboratory in an image's path, which may begin with the folder of a split."""
    folders = name.split("/")[:-1]
    prefix = "".join(f"{folder}/" for folder in folders[: split_depth(folders)])
    return lab_in(name.removeprefix(prefix), prefix, pattern, lab_folder)


def _data_section(run: str) -> dict[str, Any]:
    """The section data of the run's configuration as it is written, which may be of another version; empty without."""
    saved = find_run(run) / CONFIG
    try:
        tree = yaml.safe_load(saved.read_text(encoding="utf-8")) if is_file(saved) else None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{saved} cannot be read: {' '.join(str(error).split())}") from None
    data = tree.get("data") if isinstance(tree, dict) else None
    return data if isinstance(data, dict) else {}


def _of_own_table(data: Mapping[str, Any], file: Path) -> bool:
    """True if the run with this section was trained on this very table."""
    named = data.get("table")
    return (
        data.get("kind") == "table"
        and isinstance(named, str)
        and os.path.realpath(place(named)) == os.path.realpath(file)
    )


def _config(run: str, file: Path, encoder: Encoder, overrides: Sequence[str]) -> table.Config:
    """How the table is read: as in the run's training if it was trained on this very table; images as the encoder does.

    Raises:
        ConfigError: if a setting is not of a table, or is the encoder's own.
    """
    own = {"channels", "kind", "table", *encoder.reading}
    for word in overrides:
        section, _, key = word.partition("=")[0].partition(".")
        if section != "data":
            raise ConfigError(f"{word}: only settings of data can be given, such as data.path=")
        if key in own:
            raise ConfigError(f"{word}: data.{key} is not a choice here: images are read as the encoder of {run} does")
    own_table = _of_own_table(_data_section(run), file)
    saved = str(find_run(run) / CONFIG) if own_table else None
    data = load(saved, overrides if own_table else ["data.kind=table", "data.table=x", *overrides]).data
    given = data.model_dump() | encoder.reading | {"channels": encoder.channels, "table": str(file)}
    try:
        return table.Config.model_validate(given)
    except ValidationError as error:
        why = str(error.errors()[0]["msg"]).removeprefix("Value error, ")
        raise ConfigError(f"{file} cannot be read as the encoder of {run} reads images: {why}") from None


def _of_table(file: Path, config: table.Config, labels: bool) -> Listed:
    rows = table.open_rows(config)
    called = _called(rows, labels)
    digest = hashlib.blake2b(digest_size=16)
    with file.open("rb") as opened:
        digest.update(hashlib.file_digest(opened, "sha256").digest())
    digest.update(json.dumps(config.model_dump(mode="json", exclude=_FREE), sort_keys=True).encode())
    digest.update(list_digest([rows.images.name(i) for i in range(len(rows.images))]).encode())
    return Listed(
        str(rows.root),
        rows.images,
        digest.hexdigest(),
        file.stem,
        rows.files,
        rows.labels,
        _told(rows, called),
        str(file.resolve()),
        None if rows.cell is None else called[rows.cell],
        labs=rows.sites if any(rows.sites) else None,
    )


def _called(rows: table.AllRows, labels: bool) -> dict[str, str]:
    """The table's columns that the shards get → what they are called there: the shards' own keep their names."""
    taken, called = {*OURS, *SHOWN}, dict[str, str]()
    for name in rows.columns.column_names:
        if labels and name == "label" == rows.label:
            continue  # the shards have it
        new = name.replace("\0", "") or "unnamed"
        while new in taken:
            new = f"table_{new}"
        taken.add(new)
        called[name] = new
    return called


def _told(rows: table.AllRows, called: dict[str, str]) -> pa.Table:
    """What the table says of each row, and the file and the box that are read for it."""
    columns = {"image_file": pa.array(map(spelt, rows.files), pa.string())}
    if rows.boxes is not None:
        flat = pa.array(rows.boxes.reshape(-1), pa.int64())
        columns["image_box"] = pa.FixedSizeListArray.from_arrays(flat, 4)
    return pa.table(columns | {new: rows.columns[name] for name, new in called.items()})
