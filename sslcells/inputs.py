"""What images go through before the network: the standardisation of a run, fitted or read, and its augmentation."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sslcells import models, ranks
from sslcells.augment import Augment, Bank
from sslcells.config import ConfigError, Run, Standardise
from sslcells.data import ImageSet
from sslcells.data.sampler import permutation
from sslcells.models import files
from sslcells.models.frozen import FrozenEncoder
from sslcells.standardise import SAMPLE, Standard, fit, standard_of
from sslcells.storage import is_file, json_text, write_atomically
from sslcells.values import place

FILE = "standardise.json"
"""In a run's folder: what its standardisation measured before the first step."""


def prepared(run: Run, images: ImageSet, resumes: bool) -> Standard | None:
    """The run's standardisation: read if the run resumes, else fitted and written; every rank must call it.

    A run that starts from an encoder takes over what that encoder learned with.

    Raises:
        ConfigError: if the encoder that it starts from learned with another one, or the images have other channels.
    """

    def spec() -> dict[str, Any] | None:
        if resumes and is_file(run.folder / FILE):
            return read(run.folder)
        found = measured(run, images)
        if found is not None:
            write_atomically(run.folder / FILE, lambda file: file.write(json_text(found, indent=2).encode()))
        else:
            (run.folder / FILE).unlink(missing_ok=True)  # of an earlier start
        return found

    return standard_of(ranks.from_main(spec))


def measured(run: Run, images: ImageSet) -> dict[str, Any] | None:
    """The `spec` of the run's Standard, of the encoder that it starts from or measured on its images; None if none.

    Raises:
        ConfigError: as `prepared`.
    """
    config = run.standardise
    if config.active or run.augment.of_others:
        _check_channels(config, images.channels)
    if run.model.encoder is not None:
        return _of_encoder(run)
    if not config.active:
        return None
    return fit(config, sample(images, SAMPLE))


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


def augment(run: Run, images: ImageSet, standard: Standard | None) -> Augment:
    """The run's augmentation of images of this train split; every rank must call it."""
    preparation = models.preparation(run.model, images.channels)
    if not run.augment.of_others:
        return Augment(run.augment, *preparation, standard)
    if standard is None:
        standard = Standard(run.standardise.model_dump(mode="json"))
    pixels, lab = ranks.from_main(lambda: in_equal_parts(images, run.augment.bank, run.seed))  # type: ignore[attr-defined]
    return Augment(run.augment, *preparation, standard, Bank(pixels, lab, standard))


def of_teacher(augment: Augment, teacher: FrozenEncoder | None) -> Augment | None:
    """The augmentation that makes the same views for a frozen teacher; None where there is none."""
    if teacher is None:
        return None
    size, mean, std, *_ = teacher.prepared
    return augment.at(size, mean, std, standard_of(teacher.standardise))


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
    ]
    what = "no nucleus found in" if standard.needs_cell else "nothing measured in"
    return f"input: {', '.join(parts)}; {what} {spec['failed']} of {spec['measured']} images of train"
