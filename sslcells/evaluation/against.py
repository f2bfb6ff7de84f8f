"""Frozen encoders beside a run, `sslcells evaluate RUN --against NAME`: same images, same probe, same resamples."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sslcells.augment import Augment, none
from sslcells.config import ConfigError, Run
from sslcells.data import ImageSet
from sslcells.evaluation.across import Across, finding
from sslcells.evaluation.encode import encode, spread
from sslcells.evaluation.figures import ClassScores, Figures
from sslcells.evaluation.leaks import SplitFeatures
from sslcells.evaluation.new_labs import NewLab
from sslcells.evaluation.scores import METRIC, difference, rounded
from sslcells.evaluation.tables import Table, of_images, shown
from sslcells.inputs import lab_rows
from sslcells.models import frozen
from sslcells.models.frozen import FrozenEncoder
from sslcells.run.progress import Bars
from sslcells.standardise import standard_of


def opened(names: Sequence[str], splits: Mapping[str, ImageSet], option: str = "--against") -> list[FrozenEncoder]:
    """The encoders of the arguments of an option.

    Raises:
        ConfigError: naming the argument, if one cannot be had or does not fit, or the images have no labels.
    """
    train = splits["train"]
    if names and not train.labelled:
        raise ConfigError(f"{option} needs images of one known class each, and the train split has none")
    out = list[FrozenEncoder]()
    for name in names:
        try:
            one = frozen.opened(frozen.named(name), train.channels)
        except ConfigError as error:
            raise ConfigError(f"{option} {error}") from None
        if one.name in {before.name for before in out}:
            raise ConfigError(f"{option} {name}: there is an encoder {one.name} already")
        out.append(one)
    return out


class Beside(NamedTuple):
    """A frozen encoder, and features of it."""

    encoder: FrozenEncoder
    by_split: dict[str, SplitFeatures]
    labs: dict[str, SplitFeatures]
    """of laboratories that training never saw"""


class Encoding:
    """Encodes the images that a run's figures are of by other encoders; every rank calls it."""

    def __init__(self, run: Run, device: torch.device, bar: Bars) -> None:
        self._run, self._device, self._bar = run, device, bar

    def of(
        self,
        encoder: FrozenEncoder,
        splits: Mapping[str, ImageSet],
        read: Mapping[str, SplitFeatures],
        labs: Sequence[NewLab],
        read_labs: Mapping[str, SplitFeatures],
    ) -> "Beside":
        """What was read of the splits and of new laboratories, with features of this encoder; on rank 0 alone."""
        most = self._run.evaluate.max_images
        rows = lab_rows(standard_of(encoder.standardise), splits, {lab.name: lab.parts for lab in labs}).rows

        def z(images: ImageSet, what: str) -> Tensor:
            return self.z(encoder, images, spread(len(images), most), what, rows, everywhere=False)

        of_splits = {split: read[split]._replace(z=z(images, split)) for split, images in splits.items()}
        of_labs = {
            lab.name: read_labs[lab.name]._replace(z=torch.cat([z(images, lab.name) for images in lab.parts]))
            for lab in labs
        }
        return Beside(encoder, of_splits, of_labs)

    def z(
        self,
        encoder: FrozenEncoder,
        images: ImageSet,
        index: Sequence[int],
        what: str,
        rows: Tensor | None,
        everywhere: bool = True,
    ) -> Tensor:
        """(N, F) features of the images with these indices, on every rank, or else on rank 0 alone.

        `rows` are those of `lab_rows` for the encoder.
        """
        size, mean, std, interpolation, crop = encoder.prepared
        recipe, standard = none.Config(size=size), standard_of(encoder.standardise)
        augment = Augment(recipe, mean, std, interpolation, crop, standard, lab_rows=rows)
        evaluate, bar = self._run.evaluate, self._bar(f"{what} by {encoder.name}", len(index))
        network = encoder.network.to(self._device)
        return encode(
            images,
            network,
            lambda pixels, image: augment.plain(pixels, images.labs_of(image)),
            self._device,
            evaluate.batch,
            self._run.train.workers,
            index,
            what=f"images of {what}",
            progress=bar,
            everywhere=everywhere,
        ).z


def compared(one: Beside, ours: Figures, theirs: Figures, across: Across) -> dict[str, Any]:
    """A frozen encoder's figures, and how much higher those of the run are, for evaluation.json."""
    encoder = one.encoder
    differences = [
        {"method": mine.method, "unit": unit, "scores": {k: rounded(score) for k, score in scores.items()}}
        for mine, other in zip(ours.predictions, theirs.predictions, strict=True)
        for unit, scores in _differences(ours, mine, other)
    ]
    said = [
        _said(_value(ours, mine), _value(theirs, other), differences, mine.method)
        for mine, other in zip(ours.predictions, theirs.predictions, strict=True)
    ]
    lower = any(_high(of) < 0 for of in differences if of["unit"] == "image")
    text = f"this run and {encoder.name}, frozen, in {METRIC}: " + ("; ".join(said) or "no classifier can be trained")
    return {
        "encoder": encoder.name,
        "about": encoder.about(),
        "sha256": encoder.digest(),
        "figures": theirs.rows,
        "differences": differences,
        "labs": across.result,
        "finding": finding(text, warning=lower or not said),
    }


def _differences(figures: Figures, mine: ClassScores, other: ClassScores) -> Iterator[tuple[str, dict[str, Any]]]:
    """The run's scores minus the other's on the same resamples, for each way to count."""
    for one, its in zip(figures.ways(mine.scores), figures.ways(other.scores), strict=True):
        yield one.unit, difference(one.units, one.labels, [one.predicted], [its.predicted], one.weighs)


def verdict(score: Mapping[str, float | None]) -> str:
    """Whether a difference, with its interval, is better, worse, or neither; in points of percent."""
    value, low, high = score["value"], score["low"], score["high"]
    if value is None:
        return "not defined"
    points = f"{100 * value:+.1f} points"
    if low is None or high is None:
        return f"{points}, with too few sources for an interval"
    word = "better" if low > 0 else "worse" if high < 0 else "within the interval"
    return f"{word}, {points} [{100 * low:+.1f}, {100 * high:+.1f}]"


def _said(ours: str, theirs: str, differences: Sequence[Mapping[str, Any]], method: str) -> str:
    score = next(of["scores"][METRIC] for of in differences if (of["method"], of["unit"]) == (method, "image"))
    return f"{method} {ours} and {theirs}: {verdict(score)}"


def _value(figures: Figures, answer: ClassScores) -> str:
    """The score of an answer by image, in percent."""
    rows = (r for r in figures.rows if f"{r['task']}, {r['name']}" == answer.name and r["unit"] == "image")
    score = next(rows)["scores"][METRIC]["value"]
    return "–" if score is None else f"{100 * score:.1f} %"


def _high(of: Mapping[str, Any]) -> float:
    high = of["scores"][METRIC]["high"]
    return 0.0 if high is None else float(high)


def against_tables(result: Mapping[str, Any]) -> list[Table]:
    """The frozen encoders beside the run; empty where there are none."""
    found = [_classes(result), _labs(result)]
    return [table for table in found if table.rows]


def _classes(result: Mapping[str, Any]) -> Table:
    metrics = ("accuracy", METRIC, "macro F1")
    measured = {(of["method"], of["unit"]) for one in result["against"] for of in one["differences"]}
    lines = []
    for name, figures, differences in _encoders(result):
        for row in figures:
            method = f"{row['task']}, {row['name']}".partition(", C = ")[0]
            if (method, row["unit"]) not in measured:
                continue
            cells = [shown(row["scores"].get(metric)) for metric in metrics]
            less = differences.get((method, row["unit"]))
            minus = "" if less is None else signed(less)
            lines.append([name, row["task"], row["name"], row["unit"], of_images(row), *cells, minus])
    caption = (
        f"%, with 95 % intervals from {result['resamples']:,} resamples of sources, or of images. Every encoder is "
        f"frozen, gets the same images, prepared as it was trained, and the same kNN and probe. Last column: the run's "
        f"{METRIC} minus the encoder's, on the same resamples"
    )
    columns = ["encoder", "method", "", "per", "images", *metrics, "run − encoder"]
    return Table(f"Against frozen encoders, {result['asked']} split", columns, lines, caption)


def _labs(result: Mapping[str, Any]) -> Table:
    metrics = (METRIC, "accuracy", "macro F1")
    of_each = [("this run", result.get("labs")), *((one["encoder"], one["labs"]) for one in result["against"])]
    lines = [
        [lab["lab"], name, row["method"], row["labels of"], row["among"], row["unit"], of_images(row)]
        + [shown(row["scores"].get(metric)) for metric in metrics]
        for name, across in of_each
        for lab in (across or {"labs": []})["labs"]
        for row in lab["figures"]
    ]
    columns = ["laboratory", "encoder", "method", "labels of", "among", "per", "images", *metrics]
    caption = "%, with 95 % intervals from resamples of sources; classes and images as in the table of laboratories"
    return Table("Laboratories by frozen encoders", columns, sorted(lines, key=lambda line: line[0]), caption)


def _encoders(result: Mapping[str, Any]) -> Iterator[tuple[str, Any, dict[tuple[str, str], Any]]]:
    """Each encoder's name, figures, and the run's difference to it by method and unit."""
    yield "this run", result["figures"], {}
    for one in result["against"]:
        yield (
            one["encoder"],
            one["figures"],
            {(of["method"], of["unit"]): of["scores"][METRIC] for of in one["differences"]},
        )


def signed(score: Mapping[str, float | None]) -> str:
    """`+1.3 [0.4, 2.2]`, in points of percent."""
    text = shown(score)
    return text if text[0] in "-–" else f"+{text}"
