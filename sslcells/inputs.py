"""What images go through before the network: the standardisation of a run, fitted or read, and its augmentation."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sslcells import models, ranks
from sslcells.augment import Augment, Bank
from sslcells.config import ConfigError, Run, Standardise
from sslcells.data import ImageSet
from sslcells.data._names import some
from sslcells.data.sampler import permutation
from sslcells.models import files
from sslcells.models.frozen import FrozenEncoder
from sslcells.standardise import SAMPLE, SAMPLE_OF_LAB, Standard, fit, standard_of
from sslcells.storage import is_file, json_text, write_atomically
from sslcells.values import place

FILE = "standardise.json"
"""In a run's folder: what its standardisation measured before the first step."""
UNNAMED = "images without a laboratory"
_PART = 32
"""images that are measured at a time"""


class Labs(NamedTuple):
    """What stands for the images of each laboratory."""

    rows: Tensor | None
    """(labs + 1, P) by the laboratory's number, 0 for unknown; NaN for the image itself; None if nothing goes by it"""
    said: list[str]
    """a sentence about each laboratory that was measured just now"""


def prepared(run: Run, splits: Mapping[str, ImageSet], resumes: bool) -> Standard | None:
    """The run's standardisation: read if the run resumes, else fitted and written; every rank must call it.

    A run that starts from an encoder takes over what that encoder learned with.

    Raises:
        ConfigError: if the encoder that it starts from learned with another one, or the images have other channels.
    """

    def spec() -> dict[str, Any] | None:
        if resumes and is_file(run.folder / FILE):
            return read(run.folder)
        found = measured(run, splits)
        if found is not None:
            write_atomically(run.folder / FILE, lambda file: file.write(json_text(found, indent=2).encode()))
        else:
            (run.folder / FILE).unlink(missing_ok=True)  # of an earlier start
        return found

    return standard_of(ranks.from_main(spec))


def measured(run: Run, splits: Mapping[str, ImageSet]) -> dict[str, Any] | None:
    """The `spec` of the run's Standard, of the encoder that it starts from or measured on its images; None if none.

    The reference is train's. Laboratories are measured in train and val; an encoder keeps those that it knows.

    Raises:
        ConfigError: as `prepared`, or if laboratories are needed and the data names none.
    """
    config, images = run.standardise, splits["train"]
    if config.active or run.augment.of_others:
        _check_channels(config, images.channels)
    if config.by == "lab" and images.labs is None:
        raise ConfigError(
            "standardise.by=lab needs laboratories, and the data names none: data.site_column of a table, "
            "data.lab_pattern or data.lab_folder of a folder"
        )
    seen = [*in_training(splits).values()]
    if run.model.encoder is not None:
        spec = _of_encoder(run)
        if spec is not None and config.by == "lab":
            spec = spec | {"labs": {**(spec.get("labs") or {}), **_new_labs(Standard(spec), seen)}}
        return spec
    if not config.active:
        return None
    by_lab = _by_lab(seen) if config.by == "lab" else {}
    return fit(config, sample(images, SAMPLE), {name: _parts(seen, number) for name, number in by_lab.items()})


def _by_lab(splits: Sequence[ImageSet]) -> dict[str, int]:
    """The names of the laboratories that these splits have images of → their numbers."""
    there = {int(lab) for images in splits if images.labs is not None for lab in images.labs.unique()}  # type: ignore[no-untyped-call]
    return {name: number for number, name in enumerate(splits[0].lab_names, 1) if number in there}


def _new_labs(standard: Standard, splits: Sequence[ImageSet]) -> dict[str, Any]:
    """What stands for the images of each laboratory that the standardisation does not know yet."""
    known = standard.spec.get("labs") or {}
    new = {name: number for name, number in _by_lab(splits).items() if name not in known}
    return {name: standard.laboratory(_parts(splits, number)) for name, number in new.items()}


def _parts(splits: Sequence[ImageSet], lab: int | None) -> Iterator[Tensor]:
    """At most SAMPLE_OF_LAB images of a laboratory, of any where None, a fixed random choice of each split in turn."""
    left = SAMPLE_OF_LAB
    for images in splits:
        order = permutation(len(images), 0)
        if lab is not None:
            order = order[images.labs_of(order) == lab]
        chosen = sorted(order[:left].tolist())
        left -= len(chosen)
        for start in range(0, len(chosen), _PART):
            yield torch.stack([images.pixels(i) for i in chosen[start : start + _PART]]).float() / 255


def lab_rows(standard: Standard | None, splits: Mapping[str, ImageSet], new: Mapping[str, Sequence[ImageSet]]) -> Labs:
    """What stands for images of each laboratory of a data set, and of new ones, which have the next numbers.

    A laboratory that the standardisation does not know is measured on its own images. An image without a laboratory
    is standardised by itself; if the data set names none at all, it is taken for one. Every rank must call this.
    """

    def found() -> Labs:
        if standard is None or not standard.by_lab:
            return Labs(None, [])
        seen, known = [*splits.values()], standard.spec.get("labs") or {}
        fresh = _new_labs(standard, seen)
        fresh |= {name: standard.laboratory(_parts(parts, None)) for name, parts in new.items()}
        names = seen[0].lab_names
        if all(images.labs is None for images in seen):
            fresh[UNNAMED] = standard.laboratory(_parts(seen, None))
        of = {**known, **fresh}
        rows = standard.rows(of.get(name) for name in (UNNAMED, *names, *new))
        return Labs(rows, [said_of_lab(name, one) for name, one in fresh.items()])

    return ranks.from_main(found)


def said_of_lab(name: str, of: Mapping[str, Any]) -> str:
    """A sentence about a laboratory that was measured on its own images."""
    failed = f", in {of['failed']:,} of which no cell was found" if of["failed"] else ""
    return f"{name}: standardised by {of['measured']:,} of its own images, without labels{failed}"


def in_training(splits: Mapping[str, ImageSet]) -> dict[str, ImageSet]:
    """The splits that training reads: all but test."""
    return {split: images for split, images in splits.items() if split != "test"}


def _check_channels(config: Standardise, channels: int) -> None:
    if channels != 3 and config.colour in ("reinhard", "macenko"):
        raise ConfigError(f"standardise.colour={config.colour} is for images of three channels; these have {channels}")
    if channels != 3 and config.channels == "red_green":
        raise ConfigError(f"standardise.channels=red_green is for images of red, green, blue; these have {channels}")
    if channels != 3 and config.stain in ("giemsa", "haematoxylin-eosin"):
        raise ConfigError(
            f"standardise.stain={config.stain} is for images with three channels; these have {channels}: "
            f"standardise.stain=dark, or bright for fluorescence"
        )


def _of_encoder(run: Run) -> dict[str, Any] | None:
    """What the encoder that a run starts from learned with."""
    file = place(str(run.model.encoder)) / files.SPEC
    theirs = json.loads(file.read_text(encoding="utf-8")).get("standardise") if is_file(file) else None
    before: dict[str, Any] = Standardise().model_dump(mode="json") | (theirs or {})
    different = [
        f"standardise.{key}={value!r}, but it learned with {before[key]!r}"
        for key, value in run.standardise.model_dump(mode="json").items()
        if value != before[key] and (theirs is not None or run.standardise.active)
    ]
    if different:
        raise ConfigError(f"model.encoder={run.model.encoder}: {'; '.join(different)}")
    return theirs


def sample(images: ImageSet, count: int) -> Tensor:
    """At most `count` images, a fixed random choice, as (N, C, H, W) float in 0..1."""
    chosen = sorted(permutation(len(images), 0)[:count].tolist())
    return torch.stack([images.pixels(i) for i in chosen]).float() / 255


def read(folder: Path) -> dict[str, Any] | None:
    """The `spec` in a run's folder; None if the run does not standardise."""
    if not is_file(folder / FILE):
        return None
    spec: dict[str, Any] = json.loads((folder / FILE).read_text(encoding="utf-8"))
    return spec


def augment(run: Run, splits: Mapping[str, ImageSet], standard: Standard | None, rows: Tensor | None = None) -> Augment:
    """The run's augmentation of images of these splits; every rank must call it.

    `rows` are those of `lab_rows`, with new laboratories; None: those of the splits alone.
    """
    images = splits["train"]
    preparation = models.preparation(run.model, images.channels)
    if rows is None:
        rows = lab_rows(standard, splits, {}).rows
    if not run.augment.of_others:
        return Augment(run.augment, *preparation, standard, lab_rows=rows)
    if standard is None:
        standard = Standard(run.standardise.model_dump(mode="json"))
    pixels, lab = ranks.from_main(lambda: in_equal_parts(images, run.augment.bank, run.seed))  # type: ignore[attr-defined]
    bank = Bank(pixels, lab, standard, None if rows is None else rows[lab])
    return Augment(run.augment, *preparation, standard, bank, rows)


def of_teacher(augment: Augment, teacher: FrozenEncoder | None, splits: Mapping[str, ImageSet]) -> Augment | None:
    """The augmentation that makes the same views for a frozen teacher; None where there is none.

    Every rank must call it.
    """
    if teacher is None:
        return None
    size, mean, std, *_ = teacher.prepared
    standard = standard_of(teacher.standardise)
    return augment.at(size, mean, std, standard, lab_rows(standard, splits, {}).rows)


def in_equal_parts(images: ImageSet, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """At most `count` images (N, C, H, W) uint8 and their laboratories (N,), in parts as equal as can be."""
    labs = torch.zeros(len(images), dtype=torch.int64) if images.labs is None else images.labs
    order = permutation(len(images), seed)
    turn = torch.zeros_like(labs)  # how many of its laboratory come before an image
    for lab in labs.unique().tolist():  # type: ignore[no-untyped-call]
        mine = order[labs[order] == lab]
        turn[mine] = torch.arange(len(mine))
    chosen = order[turn[order].argsort(stable=True)][:count]
    return torch.stack([images.pixels(int(i)) for i in chosen]), labs[chosen]


def summary(standard: Standard | None) -> str:
    """A line for the log: how the input is standardised, and in how many images no cell was found."""
    if standard is None:
        return "input: as it is"
    spec: Mapping[str, Any] = standard.spec
    parts = [
        *[f"colour {spec['colour']}"] * (spec["colour"] != "none"),
        *[f"nucleus of {spec['diameter']:g} of the image"] * (spec["scale"] == "nucleus"),
        *["nucleus in the middle"] * spec["centre"],
        *["blank around the cell"] * (spec["outside"] == "blank"),
        *["by laboratory"] * standard.by_lab,
    ]
    what = "no nucleus found in" if standard.needs_cell else "nothing measured in"
    labs: Mapping[str, Any] = spec.get("labs") or {}
    each = some([f"{name} {of['failed']} of {of['measured']}" for name, of in labs.items()], 12)
    by_lab = f"; of each laboratory: {each}" if labs else ""
    return f"input: {', '.join(parts)}; {what} {spec['failed']} of {spec['measured']} images of train{by_lab}"
