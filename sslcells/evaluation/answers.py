"""What several models answer about the same images, each with several seeds: scores, differences and tables."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from sslcells.evaluation.across import finding
from sslcells.evaluation.against import verdict
from sslcells.evaluation.classifier import Predictions
from sslcells.evaluation.robustness import FEW
from sslcells.evaluation.scores import METRIC, Units, difference, of_classes, of_ranking, rounded
from sslcells.evaluation.tables import Table
from sslcells.evaluation.ways import VOTE, ways


class Answer(NamedTuple):
    """A model's predictions for the images that were asked."""

    model: str
    fraction: float
    """of the labels of train that it learned from"""
    seed: int
    predictions: Predictions


def rows(answers: Sequence[Answer]) -> list[dict[str, Any]]:
    """Scores of each model and fraction of the labels, by image and by source: mean and deviation over the seeds."""
    out = []
    groups = dict.fromkeys((of.model, of.fraction) for of in answers)
    for model, fraction in groups:
        each = [_counted(of.predictions) for of in answers if (of.model, of.fraction) == (model, fraction)]
        for unit, (images, found) in each[0].items():
            scores = {key: _over_seeds([one[unit][1][key] for one in each]) for key in found}
            out.append({"model": model, "fraction": fraction, "unit": unit, "images": images, "scores": scores})
    return out


def _over_seeds(values: Sequence[float]) -> dict[str, float | None]:
    """Mean and sample standard deviation; None if a score is undefined, as for a class without images."""
    if not np.isfinite(values).all():
        return {"mean": None, "sd": None}
    return {"mean": float(np.mean(values)), "sd": float(np.std(values, ddof=1)) if len(values) > 1 else None}


def _counted(predictions: Predictions) -> dict[str, tuple[int, dict[str, float]]]:
    """Images and scores, by the way to count them."""
    if predictions.labels.ndim > 1:
        figures = {{"auroc": "AUROC"}.get(key, key): value for key, value in predictions.figures().items()}
        return {"image": (len(predictions.labels), figures)}
    out = {}
    for way in ways(Units(predictions.sources, 0, draws=100), predictions.labels, predictions.probabilities):
        found = way.scored(of_classes(way.labels, way.predicted, len(predictions.classes)), 1)
        found |= way.scored(of_ranking(way.labels, way.scores), 1)
        loss = {} if way.unit == VOTE else {"loss": predictions.loss()}
        out[way.unit] = way.images, loss | {key: score.value for key, score in found.items()}
    return out


def of_lab(name: str, answers: Sequence[Answer]) -> dict[str, Any]:
    """What the models answer in a laboratory that they were not trained on, for comparison.json.

    Scores are of the classes with at least FEW images there; the others are named under `few`.
    """
    first = answers[0].predictions
    counts = torch.bincount(first.labels, minlength=len(first.classes)).tolist()
    kept = torch.tensor(counts)[first.labels] >= FEW
    counted = [of._replace(predictions=_at(of.predictions, kept)) for of in answers] if kept.any() else []
    return {
        "lab": name,
        "by class": {first.classes[c]: n for c, n in enumerate(counts) if n},
        "few": [first.classes[c] for c, n in enumerate(counts) if 0 < n < FEW],
        "models": rows(counted),
        "differences": differences(counted),
        "pairs": pairs(counted),
    }


def _at(of: Predictions, kept: torch.Tensor) -> Predictions:
    names = [name for name, keep in zip(of.names, kept.tolist(), strict=True) if keep]
    return Predictions(names, of.classes, of.labels[kept], of.sources[kept], of.probabilities[kept])


FROZEN = "frozen "
"""What the name of a frozen encoder's model begins with."""


def differences(answers: Sequence[Answer], seed: int = 0) -> list[dict[str, Any]]:
    """How much higher the run's own models score than each published encoder, with most labels, means over seeds."""
    most = max((of.fraction for of in answers), default=0.0)
    full = [of for of in answers if of.fraction == most]
    names = list(dict.fromkeys(of.model for of in full))
    frozen = [name for name in names if name.startswith(FROZEN)]
    out = []
    for theirs in frozen[1:]:
        for ours in [name for name in names if name == "fine-tuned"] + frozen[:1]:
            mine, other = ([of.predictions for of in full if of.model == name] for name in (ours, theirs))
            first, second = ([one.probabilities.argmax(1) for one in some] for some in (mine, other))
            found = difference(Units(mine[0].sources, seed), mine[0].labels, first, second)
            out.append({"model": ours, "against": theirs, "scores": {k: rounded(v) for k, v in found.items()}})
    return out


PAIRS = (("fine-tuned", "supervised"), ("probe", "supervised"), ("fine-tuned", "probe"))
"""A model, and the one that it is held beside with as many labels."""


def pairs(answers: Sequence[Answer], seed: int = 0) -> list[dict[str, Any]]:
    """How much higher a model scores than another with as many labels, means over seeds, for comparison.json.

    Empty where an image may have several classes.
    """
    out = []
    for fraction in dict.fromkeys(of.fraction for of in answers):
        for ours, theirs in PAIRS:
            mine, other = (
                {of.seed: of.predictions for of in answers if (of.model, of.fraction) == (model, fraction)}
                for model in (ours, theirs)
            )
            if not mine or mine.keys() != other.keys() or next(iter(mine.values())).labels.ndim > 1:
                continue
            of = next(iter(mine.values()))
            guess, beside = ([one.probabilities.argmax(1) for one in some.values()] for some in (mine, other))
            units = Units(of.sources, seed)
            found = difference(units, of.labels, guess, beside)
            each = [difference(units, of.labels, [m], [t])[METRIC].value for m, t in zip(guess, beside, strict=True)]
            row = {"fraction": fraction, "model": ours, "against": theirs, "units": units.count, "of each seed": each}
            out.append(row | {"scores": {key: rounded(score) for key, score in found.items()}})
    return out


def said(differences: Sequence[Mapping[str, Any]], where: str) -> list[dict[str, Any]]:
    """A sentence for each difference."""
    sentences = []
    for of in differences:
        score = of["scores"][METRIC]
        worse = score["high"] is not None and score["high"] < 0
        text = f"{where}: {of['model']} against {of['against']}, in {METRIC}: {verdict(score)}"
        sentences.append(finding(text, warning=worse))
    return sentences


def table(result: Mapping[str, Any]) -> Table:
    """The models as a table: a row for each fraction of the labels, model and way to count."""
    metrics = _metrics(result["models"])
    lines = [_line(row, result, metrics) for row in result["models"]]
    caption = (
        f"{result['asked']} split, after the last step, in % except the loss (cross-entropy): mean ± standard "
        f"deviation over {result['seeds']} seeds, each with labels of its own"
    )
    return Table("The models", ["labels", "model", "", "per", *metrics], lines, caption)


def lab_table(result: Mapping[str, Any]) -> Table:
    """The models in laboratories that they were not trained on; no rows if there are none."""
    labs = result["labs"]
    metrics = _metrics([row for lab in labs for row in lab["models"]])
    lines = [[lab["lab"], f"{row['images']:,}", *_line(row, result, metrics)] for lab in labs for row in lab["models"]]
    few = [f"{lab['lab']}: {', '.join(lab['few'])}" for lab in labs if lab["few"]]
    without = f"; not counted: {'; '.join(few)}" if few else ""
    caption = (
        f"laboratories that no model was trained on, in % except the loss: mean ± standard deviation over seeds, over "
        f"classes with {FEW} images or more{without}"
    )
    columns = ["laboratory", "images", "labels", "model", "", "per", *metrics]
    return Table("Laboratories that were left out", columns, lines, caption)


def _metrics(models: Sequence[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(metric for row in models for metric in row["scores"]))


def _line(row: Mapping[str, Any], result: Mapping[str, Any], metrics: Sequence[str]) -> list[str]:
    cells = [_cell(metric, row["scores"].get(metric)) for metric in metrics]
    return [f"{100 * row['fraction']:g} %", row["model"], result["starts"][row["model"]], row["unit"], *cells]


def _cell(metric: str, score: Mapping[str, float | None] | None) -> str:
    if score is None or score["mean"] is None:
        return "–"
    scale, digits = (1, 3) if metric == "loss" else (100, 1)
    sd = "" if score["sd"] is None else f" ± {scale * score['sd']:.{digits}f}"
    return f"{scale * score['mean']:.{digits}f}{sd}"
