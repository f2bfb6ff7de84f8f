"""Files that come with the package: recipes, launch files and SLURM templates; and how they are copied.

A wheel has them in `_shipped/`; a checkout has them beside the package.
"""

import shutil
from pathlib import Path
from typing import NamedTuple

from sslcells.errors import ConfigError
from sslcells.storage import is_file
from sslcells.values import place

FOLDERS = {"launch": "*.yaml", "slurm": "*.sh", "docs": "cluster.md", "configs": "*.*"}
"""Folder → pattern of its files."""


def folder(name: str) -> Path:
    """Path of one of FOLDERS."""
    package = Path(__file__).parent
    inside = package / "_shipped" / name
    return inside if inside.is_dir() else package.parent / name


def recipes() -> dict[str, Path]:
    """Recipe name → file."""
    return {file.stem: file for file in sorted(folder("configs").glob("*.yaml"))}


def recipe(given: str) -> Path | None:
    """The file at that path, or else the recipe of that name, with or without .yaml; None if there is neither."""
    file = place(given)
    return file if is_file(file) else recipes().get(given.removesuffix(".yaml"))


def about(file: Path) -> str:
    """The first sentence of a recipe's head comment, after its command, hardware, time and figure."""
    lines = [line.removeprefix("# ") for line in file.read_text(encoding="utf-8").split("\n\n")[0].splitlines()]
    facts = [i for i, line in enumerate(lines) if line.split(":")[0] in ("command", "hardware", "time", "figure")]
    after = [line for line in lines[facts[-1] + 1 :] if not line.startswith(" ")]
    sentence, stop, _ = " ".join(after).partition(". ")
    return sentence.rstrip(".") + "." if stop or sentence else ""


class Copied(NamedTuple):
    """Result of `copy`: names of files."""

    written: list[str]
    same: list[str]
    kept: list[str]
    """existing files that differ, and were not replaced"""


def copy(target: str, with_recipes: bool = False, overwrite: bool = False) -> Copied:
    """Write the launch files, the SLURM templates and their documentation, and optionally all recipes into a folder.

    An existing file that differs is kept unless `overwrite` is true.

    Raises:
        ConfigError: if the folder cannot be written.
    """
    out, done = place(target), Copied([], [], [])
    sources = [(f"{name}/{file.name}", file) for name, which in FOLDERS.items() for file in folder(name).glob(which)]
    try:
        for name, source in sorted(sources):
            if name.startswith("configs/") and name.endswith(".yaml") and not with_recipes:
                continue
            file = out / name
            there = file.read_bytes() if file.is_file() else None
            if there == source.read_bytes():
                done.same.append(name)
            elif there is not None and not overwrite:
                done.kept.append(name)
            else:
                file.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, file)
                done.written.append(name)
    except OSError as error:
        raise ConfigError(f"{target}: cannot be written: {error}") from None
    return done
