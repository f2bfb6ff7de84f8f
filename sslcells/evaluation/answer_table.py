"""What each query image was answered, beside evaluation.json: answers.csv, which people can open and sort too.

Its columns are image, source (a number that the images of one source share), class, and a column for each method that
has intervals, with the class that it says. answers_labs.csv has the same, and before them the laboratory, of the images
of each laboratory that the labels of the others were asked about.
"""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from sslcells.config import ConfigError
from sslcells.evaluation.classifier import Predictions
from sslcells.evaluation.leaks import SplitFeatures
from sslcells.run.folder import check_is_there
from sslcells.storage import is_file, write_text

if TYPE_CHECKING:  # figures are compared across laboratories, and those write answers
    from sslcells.evaluation.figures import ClassScores

FILE, LABS_FILE = "answers.csv", "answers_labs.csv"
OWN = "the run's classifier"
_LAB, _COLUMNS = "laboratory", ("image", "source", "class")


class AnswerTable(NamedTuple):
    """M images of known class, and what methods answered about them."""

    images: Sequence[str]
    sources: Tensor
    """(M,) int64"""
    classes: Sequence[str]
    """of each image the true one"""
    methods: Mapping[str, Sequence[str]]
    """of each image the class that a method says; empty if it says none"""

    @classmethod
    def of(
        cls,
        asked: SplitFeatures,
        classes: Sequence[str],
        predictions: Sequence["ClassScores"],
        own: Predictions | None,
    ) -> "AnswerTable | None":
        """The answers to the labelled ones of the images that were asked; None if there are none.

        `predictions` are for these, in order; `own` are the run's own classifier's, of the same split or of another.
        """
        known = (asked.labels >= 0).nonzero()[:, 0]
        images, names = [asked.names[i] for i in known.tolist()], [*classes, ""]  # −1 is no answer
        methods = {of.method: [names[guess] for guess in of.predicted.tolist()] for of in predictions}
        if own is not None and own.labels.ndim == 1:
            said = dict(zip(own.names, own.probabilities.argmax(1).tolist(), strict=True))
            if said.keys() >= {*images}:
                methods[OWN] = [own.classes[said[image]] for image in images]
        if not (images and methods):
            return None
        return cls(images, asked.sources[known], [classes[c] for c in asked.labels[known].tolist()], methods)


def write(folder: Path, table: AnswerTable | None, labs: Mapping[str, AnswerTable]) -> None:
    """Write what was answered into a folder, in place of what an earlier evaluation left there.

    `labs` are answers about the images of each laboratory by the labels of the others; they have a file of their own.

    Raises:
        ConfigError: if it cannot be written.
    """
    _write(folder / FILE, {} if table is None else {"": table}, _COLUMNS)
    _write(folder / LABS_FILE, labs, (_LAB, *_COLUMNS))


def _write(file: Path, tables: Mapping[str, AnswerTable], known: Sequence[str]) -> None:
    """Write the tables by laboratory, or remove the file if there are none."""
    if not tables:
        try:
            file.unlink(missing_ok=True)
        except OSError as error:
            raise ConfigError(f"{file} cannot be removed: {error}") from None
        return
    methods = list(dict.fromkeys(method for one in tables.values() for method in one.methods))
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow([*known, *methods])
    for lab, one in tables.items():
        said = [one.methods.get(method, [""] * len(one.images)) for method in methods]
        first = [lab] if known[0] == _LAB else []
        for row in zip(one.images, one.sources.tolist(), one.classes, *said, strict=True):
            rows.writerow([*first, *row])
    write_text(file, text.getvalue())


def read(folder: Path) -> AnswerTable:
    """Read what an evaluation wrote to a folder.

    Raises:
        ConfigError: if there is no such folder or file, or it is not as `write` leaves it.
    """
    check_is_there(folder)
    file = folder / FILE
    if not is_file(file):
        raise ConfigError(
            f"{folder} has no {FILE}: `sslcells evaluate` writes it beside evaluation.json where images have labels; "
            f"run it again for an evaluation of an earlier version"
        )
    return _read(file, _COLUMNS)[""]


def read_labs(folder: Path) -> dict[str, AnswerTable]:
    """Read the answers about each laboratory by the labels of the others; empty if there are none.

    Raises:
        ConfigError: if the file is not as `write` leaves it.
    """
    file = folder / LABS_FILE
    return _read(file, (_LAB, *_COLUMNS)) if is_file(file) else {}


def _read(file: Path, known: Sequence[str]) -> dict[str, AnswerTable]:
    """The tables of a file by laboratory; one that has no such column is of the laboratory ""."""
    found: dict[str, list[list[str]]] = {}
    try:
        with file.open(encoding="utf-8", errors="surrogateescape", newline="") as opened:
            header, *rows = csv.reader(opened)
        methods = header[len(known) :]
        if header[: len(known)] != [*known] or not methods or not rows:
            raise ValueError(f"its columns are {', '.join(header)}, and it has {len(rows)} rows")
        for row in rows:
            lab, *rest = row if known[0] == _LAB else ["", *row]
            if len(row) != len(header):
                raise ValueError(f"a row has {len(row)} columns and the first line {len(header)}")
            found.setdefault(lab, []).append(rest)
        return {lab: _table(rows, methods) for lab, rows in found.items()}
    except (OSError, ValueError, csv.Error) as error:
        raise ConfigError(f"{file} is not as `sslcells evaluate` writes it: {error}; evaluate again") from None


def _table(rows: Sequence[Sequence[str]], methods: Sequence[str]) -> AnswerTable:
    images, sources, classes, *answers = zip(*rows, strict=True)
    numbers = torch.tensor([int(number) for number in sources], dtype=torch.int64)
    said = {method: of for method, of in zip(methods, answers, strict=True) if any(of)}
    return AnswerTable(images, numbers, classes, said)
