"""What each query image was answered, beside evaluation.json: answers.csv, which people can open and sort too.

Its columns are image, source (a number that the images of one source share), class, and a column for each method that
has intervals, with the class that it says.
"""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from sslcells.config import ConfigError
from sslcells.data.folder import nearest_folder
from sslcells.evaluation.classifier import Predictions
from sslcells.evaluation.figures import ClassScores
from sslcells.evaluation.leaks import SplitFeatures
from sslcells.evaluation.report import write
from sslcells.storage import is_file, is_folder

FILE = "answers.csv"
OWN = "the run's classifier"
_COLUMNS = ("image", "source", "class")


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
        predictions: Sequence[ClassScores],
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

    def write(self, folder: Path) -> None:
        """Write answers.csv into a folder.

        Raises:
            ConfigError: if it cannot be written.
        """
        text = io.StringIO()
        rows = csv.writer(text, lineterminator="\n")
        rows.writerow([*_COLUMNS, *self.methods])
        rows.writerows(zip(self.images, self.sources.tolist(), self.classes, *self.methods.values(), strict=True))
        write(folder / FILE, text.getvalue())


def read(folder: Path) -> AnswerTable:
    """Read what an evaluation wrote to a folder.

    Raises:
        ConfigError: if there is no such folder or file, or it is not as `write` leaves it.
    """
    if not is_folder(folder):
        raise ConfigError(f"{folder}: no such run's folder{nearest_folder(folder)}")
    file = folder / FILE
    if not is_file(file):
        raise ConfigError(
            f"{folder} has no {FILE}: `sslcells evaluate` writes it beside evaluation.json where images have labels; "
            f"run it again for an evaluation of an earlier version"
        )
    try:
        with file.open(encoding="utf-8", errors="surrogateescape", newline="") as opened:
            header, *rows = csv.reader(opened)
        images, sources, classes, *answers = zip(*rows, strict=True)
        if tuple(header[: len(_COLUMNS)]) != _COLUMNS or len(header) != len(_COLUMNS) + len(answers):
            raise ValueError(f"its columns are {', '.join(header)}")
        numbers = torch.tensor([int(number) for number in sources], dtype=torch.int64)
    except (OSError, ValueError, csv.Error) as error:
        raise ConfigError(f"{file} is not as `sslcells evaluate` writes it: {error}; evaluate again") from None
    return AnswerTable(images, numbers, classes, dict(zip(header[len(_COLUMNS) :], answers, strict=True)))
