"""Comparison of models by the number of labels: `sslcells compare`, and fine-tuning in `evaluate`.

Supervised from scratch, a probe on the run's frozen encoder, and the encoder fine-tuned: the same backbone, data, steps
and fractions of the labels, each with several seeds. Each is a run of the usual training loop in a folder of its own
below the run's, and resumes if it was interrupted. When all are trained, each is measured on `evaluate.split`, and on
laboratories that were left out; beside them logistic regression on frozen encoders.
"""

import argparse
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console

from sslcells import __version__, commandline, inputs, launcher, ranks, values
from sslcells.config import PLUGINS, ConfigError, Run, load, validated
from sslcells.data import ImageSet, listing, open_splits
from sslcells.data.subset import Subset, labelled_part, without_labs
from sslcells.evaluation import against, compared_in_short, frozen_probes, new_labs
from sslcells.evaluation.across import finding
from sslcells.evaluation.answers import FROZEN, Answer, differences, lab_table, of_lab, pairs, rows, said, table
from sslcells.evaluation.classifier import joined, predict
from sslcells.evaluation.frozen_probes import Asked
from sslcells.evaluation.gallery import Picture
from sslcells.evaluation.pictures import fractions_plot, model_curves
from sslcells.evaluation.report import answer_section, document, say_answers, say_findings, say_table, section_of
from sslcells.evaluation.sheets import Image, prediction_sheet
from sslcells.models import files
from sslcells.models.frozen import Frozen, FrozenEncoder
from sslcells.models.frozen import opened as frozen_encoder
from sslcells.names import CONFIG
from sslcells.plan import open_run
from sslcells.run.folder import OF_WEIGHTS, changed
from sslcells.run.metrics import read_metrics
from sslcells.run.progress import no_bars
from sslcells.run.state import trained
from sslcells.standardise import standard_of
from sslcells.storage import is_file, json_text, write_text
from sslcells.train import train

MODELS = {"supervised": "from scratch", "probe": "frozen encoder", "fine-tuned": "from the encoder"}
RESULTS, REPORT = "comparison.json", "comparison.html"
LABELS = "What labels are worth"
"""The title of the picture beside the answers."""
_CURVE = 12
"""Evaluations on val during each training."""


class Part(NamedTuple):
    """One of the trainings that are compared."""

    model: str
    fraction: float
    seed: int
    run: Run


def compare(
    run: Run, frozen: Sequence[str] = (), labs: Sequence[str] = (), lab_sources: Sequence[str] = ()
) -> dict[str, Any]:
    """Train the run, then every part of the comparison; print and write the results, and return them on rank 0.

    `frozen` names encoders to measure beside the run's, and `labs` are laboratories that training never saw,
    NAME=FOLDER each, to ask all models about, with `lab_sources` NAME=CSV; so are those of `train.without_labs`.

    Raises:
        ConfigError: if the configuration of the run or of the comparison does not fit the data, or an encoder or a
            laboratory cannot be had.
        DataError, TrainingError, Stopped, Lost: as training does.
    """
    began = time.perf_counter()
    device = launcher.accelerator(run).device
    splits = open_run(run)
    _check_labels(run, splits)
    parts = list(plan(run, splits, MODELS))
    others = ranks.together(lambda: against.opened(frozen, splits, "--frozen"))
    asked = ranks.together(lambda: _asked(run, splits, labs, lab_sources))
    if not ranks.from_main(lambda: _finished(run)):
        train(run)
    answers = carry_out(parts, splits, asked, device)
    probed = _of_frozen(run, others, splits, asked, device) if others else {}
    if ranks.rank() > 0:
        return {}
    answers = {what: [*found, *probed.get(what, [])] for what, found in answers.items()}
    first, *left_out = asked
    result: dict[str, Any] = {
        "run": run.name,
        "sslcells": __version__,
        "asked": run.evaluate.split,
        "seeds": run.compare.seeds,
        "starts": starts(parts) | {of.model: _PROBED for of in answers[first] if of.model.startswith(FROZEN)},
        "models": rows(answers[first]),
        "frozen": [one.about() for one in others],
        "differences": differences(answers[first]),
        "pairs": pairs(answers[first], run.seed),
        "labs": [of_lab(name, answers[name]) for name in left_out],
        "notes": [note for one in others for note in listing.warning(one.name, one.folder, asked[first][0], first)],
        "made": {"date": time.strftime("%Y-%m-%d %H:%M:%S"), "seconds": round(time.perf_counter() - began, 1)},
    }
    result["answers"] = compared_in_short.answers(result)
    _report(run, result, draw(run, parts, answers[first], asked[first][0]))
    return result


def _of_frozen(
    run: Run,
    others: Sequence[FrozenEncoder],
    splits: Mapping[str, ImageSet],
    asked: Asked,
    device: torch.device,
) -> dict[str, list[Answer]]:
    """What probes on the run's own frozen encoder and on the others answer; on rank 0."""
    encoding, out = against.Encoding(run, device, no_bars), dict[str, list[Answer]]()
    own = frozen_encoder(Frozen(weights=str(run.folder)), splits["train"].channels)
    for encoder in [own, *others]:
        name = run.name if encoder is own else encoder.name
        for what, found in frozen_probes.answers(encoder, name, run, splits, asked, encoding).items():
            out.setdefault(what, []).extend(found)
    return out


def _report(run: Run, result: Mapping[str, Any], pictures: Sequence[Picture]) -> None:
    """Print the results, and write them to the run's folder."""
    findings = said(result["differences"], run.evaluate.split)
    findings += [one for lab in result["labs"] for one in said(lab["differences"], lab["lab"])]
    findings += [finding(note, warning=True) for note in result["notes"]]
    tables = [shown for shown in (table(result), lab_table(result)) if shown.rows]
    console = Console(highlight=False, width=160)
    for shown in tables:
        say_table(console, shown)
    if findings:
        say_findings(console, "Against frozen encoders", findings)
    say_answers(console, result["answers"])
    write_text(run.folder / RESULTS, json_text(result, indent=2) + "\n")
    about = f"sslcells {__version__}, {run.model.backbone}, {run.method.name}"  # type: ignore[attr-defined]
    basis = f"Measured on the {result['asked']} split; in brackets 95 % intervals of differences on the same images."
    first = [picture for picture in pictures if picture.title == LABELS]
    body = answer_section(result["answers"], basis, first)
    body += section_of("The models", tables, [one for one in pictures if one not in first], findings)
    write_text(run.folder / REPORT, document(f"{run.name}: what labels are worth", about, body))
    print(f"{run.folder / RESULTS}, {REPORT}; {result['made']['seconds']:.0f} s")


_PROBED = "logistic regression"
"""What stands beside a frozen encoder in the table."""


def _asked(
    run: Run, splits: Mapping[str, ImageSet], labs: Sequence[str], lab_sources: Sequence[str] = ()
) -> dict[str, Sequence[ImageSet]]:
    """What the models are asked about: first the split, then laboratories that were not trained on, by their names.

    Raises:
        ConfigError: if a laboratory cannot be read, or an image may have several classes there.
    """
    split, without = run.evaluate.split, run.train.without_labs
    query = without_labs(splits[split], without)
    out: dict[str, Sequence[ImageSet]] = {split: [query if len(query) else splits[split]]}
    if without:
        whole = open_splits(run.data)[split]
        for name in without:
            assert whole.labs is not None, "without_labs would have refused it"
            index = torch.nonzero(whole.labs == whole.lab_names.index(name) + 1)[:, 0]
            if len(index):
                out[name] = [Subset(whole, index)]
    for lab in new_labs.opened(labs, run.data, splits["train"], run.augment.size, lab_sources):
        if lab.name in out:
            raise ConfigError(f"--lab {lab.name}: choose another name than that of a split")
        out[lab.name] = lab.parts
    return out


def fine_tuned(folder: Path, overrides: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Fine-tune a finished run's encoder on fractions of the labels; returns the rows for `evaluate` on rank 0.

    Raises:
        ConfigError: if the folder is no finished run's, or its data has no labels; else as `compare`.
    """
    config = folder / CONFIG
    if not is_file(config) or not is_file(folder / files.SPEC):
        raise ConfigError(f"{folder} is not the folder of a finished run: fine-tuning starts from its encoder")
    run = load(str(config), overrides).model_copy(update={"name": folder.name, "out": str(folder.parent)})
    device = launcher.accelerator(run).device
    splits = open_run(run)
    _check_labels(run, splits)
    parts = list(plan(run, splits, ["fine-tuned"]))
    split = run.evaluate.split
    answers = carry_out(parts, splits, {split: [splits[split]]}, device)
    if ranks.rank() > 0:
        return []
    out = []
    for row in rows(answers[split]):
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
    parts: Sequence[Part], splits: Mapping[str, ImageSet], asked: Asked, device: torch.device
) -> dict[str, list[Answer]]:
    """Train or resume the parts that are not finished, then compute all predictions for what is asked.

    That is read after all training. Every rank calls this; each part's predictions of the split, which comes first, are
    written to its folder.
    """
    for part in parts:
        if not ranks.from_main(lambda p=part: _finished(p.run)):  # type: ignore[misc]
            train(part.run)
    out: dict[str, list[Answer]] = {what: [] for what in asked}
    for part in parts:
        run, images = part.run, splits["train"]
        model = load(str(run.folder / CONFIG)).model  # which says how its images were prepared
        standard = standard_of(inputs.read(run.folder))
        rows_of = frozen_probes.lab_rows_of(standard, splits, asked)
        augment = inputs.augment(run.model_copy(update={"model": model}), splits, standard, rows_of)
        learner = trained(run, run.folder, images, device)
        for number, (what, sets) in enumerate(asked.items()):
            found = joined([p for one in sets if (p := predict(learner, one, run, augment, device)) is not None])
            if ranks.rank() == 0 and number == 0:
                found.write(run.folder, what)
            out[what].append(Answer(part.model, part.fraction, part.seed, found))
    return out


def _finished(run: Run) -> bool:
    """True if the run's folder holds an encoder trained with this configuration."""
    return all(is_file(run.folder / file) for file in (CONFIG, files.SPEC)) and not changed(run)


def starts(parts: Sequence[Part]) -> dict[str, str]:
    """What each model starts from; the supervised one from published weights where the run does."""
    weights = next((part.run.model.start for part in parts if part.model == "supervised"), None)
    return MODELS | ({} if weights is None else {"supervised": f"from {weights}"})


def draw(run: Run, parts: Sequence[Part], answers: Sequence[Answer], images: ImageSet) -> list[Picture]:
    """Draw curves of the trained on val, accuracy against labels, and images of the query split with predictions."""
    folder, most = run.folder / "plots", max(of.fraction for of in answers)
    full = [of for of in answers if of.fraction == most]
    logged = [(part.model, read_metrics(part.run.folder)) for part in parts if part.fraction == most]
    drawn = list[Picture]()
    if any("val/loss" in row for _, metrics in logged for row in metrics):
        curves = model_curves(logged, "val", folder / "comparison_curves.png", f"{100 * most:g} % of the labels")
        drawn.append(Picture("Validation curves", curves, "A line for each seed."))
    score = "top1" if full[0].predictions.labels.ndim == 1 else "auroc"
    points = [(of.model, of.fraction, of.predictions.figures()[score]) for of in answers]
    path = fractions_plot(points, folder / "comparison_labels.png", {"top1": "accuracy"}.get(score, "AUROC"))
    drawn.append(Picture(LABELS, path, "A point for each seed, lines through the means."))
    first = {of.model: of.predictions for of in full if of.seed == run.seed and of.model in MODELS}
    one = next(iter(first.values()))
    if one.labels.ndim == 1:
        index = {images.name(i): i for i in range(len(images))}

        def pixels(row: int) -> Image:
            return images.pixels(index[one.names[row]]).permute(1, 2, 0).numpy()

        guesses = {model: torch.stack(w.probabilities.max(1)) for model, w in first.items()}
        path = prediction_sheet(
            pixels, one.labels, one.classes, guesses, folder / "comparison_predictions.png", run.seed
        )
        caption = f"Images of {run.evaluate.split} with the true class, and each model's prediction and confidence."
        drawn.append(Picture("Predictions", path, caption))
    return drawn


def command(args: argparse.Namespace) -> None:
    """`sslcells compare`."""
    compare(load(args.config, args.overrides), args.frozen, args.lab, args.lab_sources)


if __name__ == "__main__":
    raise SystemExit(commandline.run("compare", command))
