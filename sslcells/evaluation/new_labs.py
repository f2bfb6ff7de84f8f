"""Laboratories that training never saw: `sslcells evaluate RUN --lab NAME=FOLDER`, by the classes of the run."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from sslcells.config import ConfigError, Section, nearest
from sslcells.data import ImageSet, folder, present_splits, reading, table
from sslcells.data._files import Files
from sslcells.data._names import some
from sslcells.data.subset import Subset
from sslcells.values import place

TABLES = (".csv", ".tsv", ".parquet", ".pq")


class NewLab(NamedTuple):
    """The images of a laboratory whose class is one of the run's."""

    name: str
    parts: Sequence[ImageSet]
    """its splits, all of which are new to the encoder"""
    left_out: Mapping[str, int]
    """class that the run's data has not → images"""
    unlabelled: int

    def about(self) -> str:
        """A sentence about what was read."""
        images = sum(map(len, self.parts))
        text = f"{self.name}: {images:,} images of the run's classes"
        if self.left_out:
            named = some([f"{name} ({count:,})" for name, count in self.left_out.items()], 12)
            text += f"; left out, as training has no such class: {named}"
        return text + (f"; {self.unlabelled:,} images without a class left out" if self.unlabelled else "")


def opened(
    given: Sequence[str], config: Section, train: ImageSet, size: int, sources: Sequence[str] = ()
) -> list[NewLab]:
    """The laboratories of arguments NAME=FOLDER or NAME=TABLE, read as the run's own images were.

    `sources` are arguments NAME=CSV, tables with the source of each image of a folder.

    Their images have the numbers after those of the run's own laboratories as `labs`.
    Classes are matched by name, whatever their letter case, blanks, hyphens and underscores.

    Raises:
        ConfigError: if an argument, a folder or its classes do not fit.
    """
    if given and not train.labelled:
        raise ConfigError("--lab needs labels of the run's train split, which has none, to be measured by")
    named = [_named(argument, "--lab", "FOLDER", "path/to/images") for argument in given]
    tables = dict(_named(argument, "--lab-sources", "CSV", "path/to/sources.csv") for argument in sources)
    for name in tables:
        if name not in dict(named):
            raise ConfigError(
                f"--lab-sources {name}={tables[name]}: no --lab has that name{nearest(name, [*dict(named)])}"
            )
    out: list[NewLab] = []
    for number, (name, path) in enumerate(named, len(train.lab_names) + 1):
        if name in (*train.lab_names, *(lab.name for lab in out)):
            raise ConfigError(f"--lab {name}={path}: there is a laboratory {name} already; choose another name")
        fields = _fields(config, train, size) | _place(name, path, tables.get(name))
        out.append(_opened(name, path, fields, train, number))
    return out


def _named(argument: str, option: str, what: str, such: str) -> tuple[str, str]:
    """NAME and what follows it."""
    name, equals, given = argument.partition("=")
    if not equals or not name or not given:
        raise ConfigError(f"{option} {argument}: expected NAME={what}, such as {option} clinic={such}")
    return name, given


def _place(name: str, path: str, sources: str | None) -> dict[str, Any]:
    """Where images and sources of a laboratory are, as fields of a folder's or a table's Config."""
    if place(path).suffix.lower() not in TABLES:
        return {"path": path, "sources": sources}
    if sources is not None:
        raise ConfigError(f"--lab-sources {name}={sources}: {path} is a table; its own column names the sources")
    return {"table": path}


def _opened(name: str, path: str, fields: Mapping[str, Any], train: ImageSet, number: int) -> NewLab:
    kind = table if "table" in fields else folder
    try:
        splits = [*present_splits(kind.Config(**fields)).values()]
    except ConfigError as error:
        given = f", --lab-sources {name}={fields['sources']}" if fields.get("sources") else ""
        raise ConfigError(f"--lab {name}={path}{given}: {error}") from None
    theirs = splits[0].classes
    to = _matched(theirs, train.classes)
    if not any(c is not None for c in to):
        near = nearest(theirs[0], train.classes) if theirs else ""
        raise ConfigError(
            f"--lab {name}={path}: none of its classes, {some(theirs, 12) or 'of which there are none'}, is one of the "
            f"run's: {some(train.classes, 12)}{near}"
        )
    ours = torch.tensor([-1 if c is None else c for c in to] + [-1])  # the last one is for images without a class
    parts, left_out, unlabelled = list[ImageSet](), dict[str, int](), 0
    for images in splits:
        labels = ours[images.labels]
        for c, theirs_name in enumerate(theirs):
            if to[c] is None and (count := int((images.labels == c).sum())):
                left_out[theirs_name] = left_out.get(theirs_name, 0) + count
        unlabelled += int((images.labels < 0).sum())
        if (labels >= 0).any():
            kept = Subset(images, (labels >= 0).nonzero()[:, 0])
            kept.classes, kept.labels = train.classes, labels[labels >= 0]
            kept.labs = torch.full_like(kept.labels, number)
            parts.append(kept)
    return NewLab(name, parts, left_out, unlabelled)


def _fields(config: Section, train: ImageSet, size: int) -> dict[str, Any]:
    """How the run's images are read, as fields of a folder's or a table's Config."""
    if isinstance(config, Files):
        fields = config.model_dump(include={*Files.model_fields})
        if config.size is None:
            fields["size"] = tuple(train.pixels(0).shape[1:])
        return fields
    return {**reading(config, size), "channels": train.channels}


def _matched(theirs: Sequence[str], ours: Sequence[str]) -> list[int | None]:
    """For each of their classes, the number of ours with that name."""
    exact = {name: c for c, name in enumerate(ours)}
    loose = {_plain(name): c for c, name in enumerate(ours)}
    return [exact.get(name, loose.get(_plain(name))) for name in theirs]


def _plain(name: str) -> str:
    return "".join(letter for letter in name.casefold() if letter not in " -_")
