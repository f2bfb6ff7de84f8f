"""Comparison of models by the number of labels: `sslcells compare`, and fine-tuning in `evaluate`.

Supervised from scratch, a probe on the run's frozen encoder, and the encoder fine-tuned: the same backbone, data, steps
and fractions of the labels, each with several seeds. Each is a run of the usual training loop in a folder of its own
below the run's, and resumes if it was interrupted. When all are trained, each is measured on `evaluate.split`.
"""

import argparse
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.console import Console

from sslcells import __version__, commandline, inputs, launcher, ranks, values
from sslcells.config import PLUGINS, ConfigError, Run, load, validated
from sslcells.data import ImageSet
from sslcells.data.subset import labelled_part
from sslcells.evaluation.classifier import Predictions, predict
from sslcells.evaluation.gallery import Picture
from sslcells.evaluation.pictures import fractions_plot, model_curves
from sslcells.evaluation.report import Table, document, say_table, section_of, write
from sslcells.evaluation.scores import Units, of_classes, of_ranking
from sslcells.evaluation.sheets import Image, prediction_sheet
from sslcells.models import files
from sslcells.plan import open_run
from sslcells.run.folder import OF_WEIGHTS, changed
from sslcells.run.metrics import read_metrics
from sslcells.run.state import trained
from sslcells.standardise import standard_of
from sslcells.storage import is_file, json_text
from sslcells.train import train

MODELS = {"supervised": "from scratch", "probe": "frozen encoder", "fine-tuned": "from the encoder"}
RESULTS, REPORT = "comparison.json", "comparison.html"
_CURVE = 12
"""Evaluations on val during each training."""


class Part(NamedTuple):
    """One of the trainings that are compared."""

    model: str
    fraction: float
    seed: int
    run: Run


def compare(run: Run) -> dict[str, Any]:
    """Train the run, then every part of the comparison; print and write the results, and return them on rank 0.

    Raises:
        ConfigError: if the configuration of the run or of the comparison does not fit the data.
        DataError, TrainingError, Stopped, Lost: as training does.
    """
    began = time.perf_counter()
    device = launcher.accelerator(run).device
    splits = open_run(run)
    _check_labels(run, splits)
    parts = list(plan(run, splits, MODELS))
    if not ranks.from_main(lambda: _finished(run)):
        train(run)
    predictions = carry_out(parts, splits, run.evaluate.split, device)
    if ranks.rank() > 0:
        return {}
    result: dict[str, Any] = {
        "run": run.name,
        "sslcells": __version__,
        "asked": run.evaluate.split,
        "seeds": run.compare.seeds,
        "starts": starts(parts),
        "models": rows(predictions),
        "made": {"date": time.strftime("%Y-%m-%d %H:%M:%S"), "seconds": round(time.perf_counter() - began, 1)},
    }
    shown = table(result)
    say_table(Console(highlight=False, width=160), shown)
    pictures = draw(run, predictions, splits[run.evaluate.split])
    write(run.folder / RESULTS, json_text(result, indent=2) + "\n")
    about = f"sslcells {__version__}, {run.model.backbone}, {run.method.name}"  # type: ignore[attr-defined]
    body = section_of("Supervised, probe and fine-tuned", [shown], pictures)
    write(run.folder / REPORT, document(f"{run.name}: what labels are worth", about, body))
    print(f"{run.folder / RESULTS}, {REPORT}; {result['made']['seconds']:.0f} s")
    return result


def fine_tuned(folder: Path, overrides: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Fine-tune a finished run's encoder on fractions of the labels; returns the rows for `evaluate` on rank 0.

    Raises:
        ConfigError: if the folder is no finished run's, or its data has no labels; else as `compare`.
    """
    config = folder / "config.yaml"
    if not is_file(config) or not is_file(folder / files.SPEC):
        raise ConfigError(f"{folder} is not the folder of a finished run: fine-tuning starts from its encoder")
    run = load(str(config), overrides).model_copy(update={"name": folder.name, "out": str(folder.parent)})
    device = launcher.accelerator(run).device
    splits = open_run(run)
    _check_labels(run, splits)
    parts = list(plan(run, splits, ["fine-tuned"]))
    predictions = carry_out(parts, splits, run.evaluate.split, device)
    if ranks.rank() > 0:
        return []
    out = []
    for row in rows(predictions):
        means = {key: score["mean"] for key, score in row["scores"].items() if key != "loss"}
        scores = {key: {"value": value, "low": None, "high": None} for key, value in means.items()}
        name = f"{100 * row['fraction']:g} % of the labels, {run.compare.seeds} seeds"
        found = {"task": "fine-tuning", "name": name, "unit": row["unit"], "images": row["images"], "scores": scores}
        spread = row["scores"].get("accuracy", {}).get("sd")
        out.append(found | {"spread over seeds": spread})
    return out


def _check_labels(run: Run, splits: Mapping[str, ImageSet]) -> None:
    if not splits["train"].labelled and splits["train"].targets is None:
        raise ConfigError("a comparison needs labels, and the train split has none")
    if run.evaluate.split not in splits:
        raise ConfigError(f"evaluate.split={run.evaluate.split}: the data has only {', '.join(splits)}")
    query = splits[run.evaluate.split]
    if not query.labelled and query.targets is None:
        raise ConfigError(f"evaluate.split={run.evaluate.split}: a comparison needs labels, and that split has none")


def plan(run: Run, splits: Mapping[str, ImageSet], models: Sequence[str] | Mapping[str, str]) -> Iterator[Part]:
    """Every training of these models, in order: fractions, then models, then seeds.

    Raises:
        ConfigError: if `compare` describes no valid run.
    """
    config, images, world = run.compare, splits["train"], ranks.world()
    for fraction in config.fractions:
        some = len(labelled_part(images, fraction, run.seed))
        batch = min(config.global_batch, some) // world * world
        if batch < 2:
            raise ConfigError(
                f"compare.fractions: {fraction:g} of {len(images)} images leaves {some}: too few for {world} ranks"
            )
        per_epoch = max(1, some // batch)
        steps = max(config.min_steps, round(config.total_epochs * per_epoch))
        for model in models:
            for seed in range(run.seed, run.seed + config.seeds):
                fixed = {
                    "name": f"{model}_{fraction:g}_{seed}",
                    "out": str(run.folder / "compare"),
                    "seed": seed,
                    "train": {
                        "label_fraction": fraction,
                        "global_batch": batch,
                        "total_steps": steps,
                        "micro_batch": None,
                    },
                    "optim": {"warmup_epochs": 0.1 * steps / per_epoch},
                    "evaluate": {"every_epochs": max(1, steps // _CURVE) / per_epoch, "pictures": False},
                    "checkpoint": {"every_steps": max(1, steps // 2), "keep": 1},
                    "log": {"every_steps": max(1, steps // 20), "tracker": "none"},
                    "model": _start(run, model),
                }
                yield Part(model, fraction, seed, _run(run, model, fixed))


_OF_THE_ENCODER: dict[str, Any] = {
    "pretrained": False,
    "weights": None,
    "weights_key": None,
    "allow_missing": (),
    "allow_left_over": (),
    **dict.fromkeys(OF_WEIGHTS),
}
"""A model that starts from an encoder reads no published weights, and prepares images as for the encoder."""


_WHOLE: dict[str, Any] = {"freeze": False, "lora_rank": None, "lora_alpha": None, "lora_layers": ("*",)}
"""All of an encoder learns, until `compare.fine_tuned` says otherwise: how the run adapted its own start is past."""


def _start(run: Run, model: str) -> dict[str, Any]:
    fixed = {"freeze": True} if model == "probe" else {}
    return {} if model == "supervised" else {"encoder": str(run.folder), **_OF_THE_ENCODER, **fixed}


def _run(run: Run, model: str, fixed: Mapping[str, Any]) -> Run:
    """The run with changes: first `compare.classifier`, then the model's section, then `fixed`."""
    of_model = {"supervised": run.compare.supervised, "probe": run.compare.probe, "fine-tuned": run.compare.fine_tuned}
    tree = run.model_dump(mode="json") | {"method": {"name": "supervised"}}
    if model != "supervised":
        tree = values.merged(tree, {"model": _WHOLE})
    for changes in (run.compare.classifier, of_model[model], fixed):
        tree = values.merged(_without_other_choices(tree, changes), changes)
    try:
        return validated(tree)
    except ConfigError as error:
        raise ConfigError(f"compare, the {model} model: {error}") from None


def _without_other_choices(tree: Any, changes: Mapping[str, Any]) -> Any:
    """The tree without the sections whose plugin is changed; only the images' size stays of them."""
    kept = dict(tree)
    for section, plugin in PLUGINS.items():
        change, now = changes.get(section), kept[section]
        if isinstance(change, Mapping) and change.get(plugin.key, now[plugin.key]) != now[plugin.key]:
            kept[section] = {"size": now["size"]} if section == "augment" else {}
    return kept


def carry_out(
    parts: Sequence[Part], splits: Mapping[str, ImageSet], split: str, device: torch.device
) -> list[tuple[Part, Predictions]]:
    """Train or resume the parts that are not finished, then compute all predictions on a split.

    The split is read after all training. Every rank calls this; each part's predictions are written to its folder.
    """
    for part in parts:
        if not ranks.from_main(lambda p=part: _finished(p.run)):  # type: ignore[misc]
            train(part.run)
    out = []
    for part in parts:
        run, images = part.run, splits["train"]
        model = load(str(run.folder / "config.yaml")).model  # which says how its images were prepared
        standard = standard_of(inputs.read(run.folder))
        augment = inputs.augment(run.model_copy(update={"model": model}), images, standard)
        found = predict(trained(run, run.folder, images, device), splits[split], run, augment, device)
        assert found is not None, "the split's labels were checked before"
        if ranks.rank() == 0:
            found.write(run.folder, split)
        out.append((part, found))
    return out


def _finished(run: Run) -> bool:
    """True if the run's folder holds an encoder trained with this configuration."""
    return all(is_file(run.folder / file) for file in ("config.yaml", files.SPEC)) and not changed(run)


def starts(parts: Sequence[Part]) -> dict[str, str]:
    """What each model starts from; the supervised one from published weights where the run does."""
    weights = next((part.run.model.start for part in parts if part.model == "supervised"), None)
    return MODELS | ({} if weights is None else {"supervised": f"from {weights}"})


def rows(predictions: Sequence[tuple[Part, Predictions]]) -> list[dict[str, Any]]:
    """Scores of each model and fraction of the labels, by image and by source: mean and deviation over the seeds."""
    out = []
    groups = dict.fromkeys((part.model, part.fraction) for part, _ in predictions)
    for model, fraction in groups:
        of_seeds = [one for part, one in predictions if (part.model, part.fraction) == (model, fraction)]
        for unit in Units(of_seeds[0].sources, 0).names if of_seeds[0].labels.ndim == 1 else ["image"]:
            each = [_scores(one, unit) for one in of_seeds]
            scores = {key: _over_seeds([e[key] for e in each]) for key in each[0]}
            images = len(of_seeds[0].labels)
            out.append({"model": model, "fraction": fraction, "unit": unit, "images": images, "scores": scores})
    return out


def _over_seeds(values: Sequence[float]) -> dict[str, float | None]:
    """Mean and sample standard deviation; None if a score is undefined, as for a class without images."""
    if not np.isfinite(values).all():
        return {"mean": None, "sd": None}
    return {"mean": float(np.mean(values)), "sd": float(np.std(values, ddof=1)) if len(values) > 1 else None}


def _scores(predictions: Predictions, unit: str) -> dict[str, float]:
    if predictions.labels.ndim > 1:
        return {{"auroc": "AUROC"}.get(key, key): value for key, value in predictions.figures().items()}
    units = Units(predictions.sources, 0, draws=100)
    found = units.scored(
        of_classes(predictions.labels, predictions.probabilities.argmax(1), len(predictions.classes)), unit, 1
    )
    found |= units.scored(of_ranking(predictions.labels, predictions.probabilities), unit, 1)
    return {"loss": predictions.loss(), **{key: score.value for key, score in found.items()}}


def table(result: Mapping[str, Any]) -> Table:
    """The comparison as a table: a row for each model, fraction of the labels and way to count."""
    metrics = list(dict.fromkeys(m for row in result["models"] for m in row["scores"]))
    lines = []
    for row in result["models"]:
        cells = [_cell(metric, row["scores"].get(metric)) for metric in metrics]
        start = result["starts"][row["model"]]
        lines.append([f"{100 * row['fraction']:g} %", row["model"], start, row["unit"], *cells])
    caption = (
        f"{result['asked']} split, after the last step, in % except the loss (cross-entropy): mean ± standard "
        f"deviation over {result['seeds']} seeds, each with labels of its own"
    )
    return Table("Three models", ["labels", "model", "", "per", *metrics], lines, caption)


def _cell(metric: str, score: Mapping[str, float | None] | None) -> str:
    if score is None or score["mean"] is None:
        return "–"
    scale, digits = (1, 3) if metric == "loss" else (100, 1)
    sd = "" if score["sd"] is None else f" ± {scale * score['sd']:.{digits}f}"
    return f"{scale * score['mean']:.{digits}f}{sd}"


def draw(run: Run, predictions: Sequence[tuple[Part, Predictions]], images: ImageSet) -> list[Picture]:
    """Draw curves of the three on val, accuracy against labels, and images of the query split with predictions."""
    folder, most = run.folder / "plots", max(part.fraction for part, _ in predictions)
    full = [(part, one) for part, one in predictions if part.fraction == most]
    logged = [(part.model, read_metrics(part.run.folder)) for part, _ in full]
    drawn = list[Picture]()
    if any("val/loss" in row for _, metrics in logged for row in metrics):
        curves = model_curves(logged, "val", folder / "comparison_curves.png", f"{100 * most:g} % of the labels")
        drawn.append(Picture("Validation curves", curves, "A line for each seed."))
    score = "top1" if full[0][1].labels.ndim == 1 else "auroc"
    points = [(part.model, part.fraction, one.figures()[score]) for part, one in predictions]
    path = fractions_plot(points, folder / "comparison_labels.png", {"top1": "accuracy"}.get(score, "AUROC"))
    drawn.append(Picture("What labels are worth", path, "A point for each seed, lines through the means."))
    first = {part.model: found for part, found in full if part.seed == run.seed}
    one = next(iter(first.values()))
    if one.labels.ndim == 1:
        index = {images.name(i): i for i in range(len(images))}

        def pixels(row: int) -> Image:
            return images.pixels(index[one.names[row]]).permute(1, 2, 0).numpy()

        answers = {model: torch.stack(w.probabilities.max(1)) for model, w in first.items()}
        path = prediction_sheet(
            pixels, one.labels, one.classes, answers, folder / "comparison_predictions.png", run.seed
        )
        caption = f"Images of {run.evaluate.split} with the true class, and each model's prediction and confidence."
        drawn.append(Picture("Predictions", path, caption))
    return drawn


def command(args: argparse.Namespace) -> None:
    """`sslcells compare`."""
    compare(load(args.config, args.overrides))


if __name__ == "__main__":
    raise SystemExit(commandline.run("compare", command))
