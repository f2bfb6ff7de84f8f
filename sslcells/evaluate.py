"""The evaluation of a run: `sslcells evaluate RUN`, or `accelerate launch -m sslcells.evaluate RUN` on many ranks."""

import argparse
import hashlib
import os
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from sslcells import __version__, commandline, inputs, launcher, methods, ranks
from sslcells.augment import Augment
from sslcells.config import ConfigError, Run, installed, load
from sslcells.data import ImageSet, holdout, listing, open_splits
from sslcells.evaluation import against, answer_table, drift, in_short, in_short_picture, lab_pictures, new_labs
from sslcells.evaluation.across import Across
from sslcells.evaluation.answer_table import OWN, AnswerTable
from sslcells.evaluation.baselines import Baselines, OfRows
from sslcells.evaluation.classifier import Predictions, predict
from sslcells.evaluation.during_training import VIEWED
from sslcells.evaluation.encode import Prepare, drawn, encode, spread
from sslcells.evaluation.figures import Figures, nearest
from sslcells.evaluation.gallery import Picture, draw
from sslcells.evaluation.health import alignment
from sslcells.evaluation.leaks import COPIES, SplitFeatures, copies, digests, histograms, leaks
from sslcells.evaluation.report import page, say_figures, say_leaks
from sslcells.evaluation.scores import Units, of_classes, rounded
from sslcells.evaluation.search import one_thread, searching
from sslcells.evaluation.sheets import Image
from sslcells.evaluation.ways import ways
from sslcells.models import files
from sslcells.names import CONFIG, EVALUATION
from sslcells.plan import leave_out
from sslcells.provenance import made
from sslcells.run import checkpoint, wandb_sync
from sslcells.run.folder import check_is_there
from sslcells.run.metrics import METRICS, note_steps, read_metrics
from sslcells.run.progress import Bars, bars
from sslcells.run.state import trained
from sslcells.standardise import AS_THEY_ARE, standard_of
from sslcells.storage import is_file, json_text, write_text

REPORT = "report.html"


def evaluate(
    folder: Path,
    overrides: Sequence[str] = (),
    also: Sequence[dict[str, Any]] = (),
    labs: Sequence[str] = (),
    frozen: Sequence[str] = (),
    lab_sources: Sequence[str] = (),
    out: Path | None = None,
) -> dict[str, Any]:
    """Evaluate a finished run, print the results and write them to a folder; returns them on rank 0.

    `also` holds rows for the table of classifiers that were measured before, by fine-tuning; `labs` are laboratories
    that training never saw, NAME=FOLDER each, with tables of sources NAME=CSV; `frozen` names encoders to measure
    beside the run's. The results go to `out`; without it to the run's own folder, and its metrics too.

    Every rank encodes its part of each split once, and searches neighbours in its part of the rows, on its device; rank
    0 does the rest, and has the features of all images in memory. The figures are the same to the last digit on any
    number of ranks.

    Raises:
        ConfigError: if the folder is not a finished run's, the data does not fit the encoder, or another encoder cannot
            be had.
        DataError: if an image cannot be read, or features are not finite.
    """
    began = time.perf_counter()
    run = _run(folder, overrides)
    to = folder if out is None else ranks.together(lambda: _elsewhere(out, folder))
    result, pictures = measured(run, folder, launcher.accelerator(run).device, also, labs, frozen, lab_sources, to)
    if result:
        if data := [o for o in overrides if o.startswith(("data.", "data="))]:
            result["notes"].append(f"the data is that of {' '.join(data)}; the encoder is the run's, as it was trained")
        seconds = round(time.perf_counter() - began, 1)
        asked_by = {"run": os.path.relpath(folder, to), "overrides": [*overrides]}
        result["made"] = {**made(), **asked_by, "seconds": seconds, "ranks": ranks.world()}
        write_text(to / EVALUATION, json_text(result, indent=2) + "\n")
        write_text(to / REPORT, page(result, [*_of_training(folder), *pictures]))
        print(f"{to / EVALUATION}, {REPORT}: the results above, and pictures; {seconds:.0f} s")
        if out is None:
            _log(folder, result, pictures)
    return result


def measured(
    run: Run,
    folder: Path,
    device: torch.device,
    also: Sequence[dict[str, Any]] = (),
    labs: Sequence[str] = (),
    frozen: Sequence[str] = (),
    lab_sources: Sequence[str] = (),
    out: Path | None = None,
) -> tuple[dict[str, Any], list[Picture]]:
    """Compute, print and draw the results of `evaluate`; returned on rank 0, empty on the others."""
    to = out or folder
    if run.evaluate.umap:
        installed("umap", "umap", "evaluate.umap=true")
    names = ranks.from_main(lambda: holdout.held_out_by(folder))
    splits = holdout.hold_out_named(leave_out(open_splits(run.data), run.train.without_labs), names)
    encoder, spec = ranks.together(lambda: _encoder(folder, run, splits["train"].channels))
    outside = ranks.together(lambda: new_labs.opened(labs, run.data, splits["train"], run.augment.size, lab_sources))
    others = ranks.together(lambda: against.opened(frozen, splits))
    console = Console(highlight=False, quiet=ranks.rank() > 0)
    most = run.evaluate.queries
    with bars(console) as bar:
        standard = standard_of(spec.get("standardise"))
        labs_now = inputs.lab_rows(standard, splits, {lab.name: lab.parts for lab in outside})
        augment = inputs.augment(run, splits, standard, labs_now.rows)
        encoded = Encoded(run, encoder.to(device), augment, splits, device, bar)
        query_split = _query_split(run, encoded.by_split)
        shown = query_split or "train"
        chosen = drawn(encoded.by_split[shown].labels, most)
        baselines = Baselines(run, encoded.by_split, query_split, chosen)
        baselines.encode(spec, encoded.of_rows(splits))
        new = {lab.name: encoded.lab_features(lab) for lab in outside}
        encoding = against.Encoding(run, device, bar)
        beside = [encoding.of(one, splits, encoded.by_split, outside, new) for one in others]
        predictions, why_not = _predictions(run, folder, splits, encoded.augment, device, bar)
    if not console.is_terminal:
        console = Console(highlight=False, width=160)
    classes = splits["train"].classes
    with searching(device) as search:
        if search is None:
            return {}, []
        asked = encoded.by_split[shown].at(chosen)
        found = leaks(encoded.by_split, shown, classes, encoded.near, run.seed, most, search)
        every = [encoded.by_split, *(one.by_split for one in beside)] if query_split is not None else []
        baselines.search(search)
        near, *theirs = [nearest(of, of[shown].at(chosen), search) for of in every] or [None]
    say_leaks(console, found)
    with one_thread():
        figures = Figures(run, encoded.by_split, query_split, classes, asked, near=near)
        lab_names = splits["train"].lab_names
        across = Across(encoded.by_split, query_split, lab_names, new, classes, run.evaluate, run.seed)
        rivals = [
            against.compared(
                one,
                figures,
                Figures(run, one.by_split, query_split, classes, one.by_split[shown].at(chosen), True, its),
                Across(one.by_split, query_split, lab_names, one.labs, classes, run.evaluate, run.seed),
            )
            for one, its in zip_longest(beside, theirs)
        ]
        beside_plain = baselines.result(classes)
    figures.health["train"]["alignment"] = alignment(*encoded.views)
    left_out = _left_out(splits, encoded.by_split, shown, len(chosen))
    figures.notes = [*left_out, *figures.notes, *_of_val(splits, names), *why_not, *baselines.notes]
    figures.notes += [*(lab.about() for lab in outside), *labs_now.said, *(one.about() for one in others)]
    figures.notes += encoded.cells_not_found()
    if shown != "train":
        for one in others:
            figures.notes += listing.warning(one.name, one.folder, splits[shown], shown)
    figures.notes += drift.notes(_of_steps(folder)) if run.model.adapts else []
    figures.notes += _colour_is_better(found["shortcut"].get(query_split), figures.rows)
    result: dict[str, Any] = {
        "run": run.name,
        "sslcells": __version__,
        "encoder": {"model": spec["timm"]["model_name"], "sha256": _sha256(folder / files.WEIGHTS)},
        "asked": query_split,
        "classes": list(classes),
        "max images": run.evaluate.max_images,
        "left out": left_out,
        "resamples": run.evaluate.bootstrap,
        "leaks": found,
        "baselines": beside_plain,
        "figures": [*figures.rows, *_of_classifier(predictions, run), *also],
        "by class": figures.by_class,
        "confused": figures.confused(),
        "labs": across.result,
        "against": rivals,
        "health": figures.health,
        "notes": figures.notes,
    }
    result["answers"] = in_short.answers(result, _of_steps(folder), folder)
    say_figures(console, result)
    if predictions is not None:
        predictions.write(to, run.evaluate.split)
    answer_table.write(to, AnswerTable.of(asked, classes, figures.predictions, predictions), across.answers)
    pixels = encoded.pixels_of(splits[shown])
    with one_thread():
        pictures = draw(
            asked,
            shown,
            classes,
            figures.predictions,
            lambda i: pixels(chosen[i]),
            (encoded.views[0], encoded.views[1]),
            to / "plots",
            run.seed,
            run.evaluate.umap,
        )
        pictures += in_short_picture.draw(result, to / "plots")
        if across.result is not None:
            pictures += lab_pictures.draw(across, classes, to / "plots", run.seed)
    return result, pictures


class Encoded:
    """Everything that needs the images and the encoder; every rank computes it together, and rank 0 gets all of it."""

    def __init__(
        self,
        run: Run,
        encoder: nn.Module,
        augment: Augment,
        splits: Mapping[str, ImageSet],
        device: torch.device,
        bar: Bars,
    ) -> None:
        self._run, self._encoder, self._device, self._bar = run, encoder, device, bar
        self.augment = augment
        self.no_cell: dict[str, tuple[int, int]] = {}
        """split or new laboratory → images in which no cell was found, and all that were read"""
        self.by_split = {split: self._split_features(images, split) for split, images in splits.items()}
        train, most = splits["train"], run.evaluate.max_images
        few = spread(len(train), min(COPIES, most or COPIES))

        def copied(pixels: Tensor, image: Tensor) -> Tensor:
            return self.augment.plain(copies(pixels.cpu(), image).to(device), train.labs_of(image))

        self.near = (
            self._z(train, few, self._plain(train), "images to copy"),
            self._z(train, few, copied, "their copies"),
        )
        viewed = spread(len(train), min(VIEWED, most or VIEWED))
        self.views = [self._z(train, viewed, self._view(train, which), f"view {which + 1} of 2") for which in (0, 1)]

    def cells_not_found(self) -> list[str]:
        """A sentence about each split and new laboratory that has images in which no cell was found."""
        return [
            f"{what}: no cell was found in {missed:,} of {read:,} images; {AS_THEY_ARE}"
            for what, (missed, read) in self.no_cell.items()
            if missed
        ]

    def pixels_of(self, images: ImageSet) -> Callable[[int], Image]:
        """Row i's image of a split as it was read, (H, W, C) uint8."""
        index = spread(len(images), self._run.evaluate.max_images)
        return lambda i: images.pixels(index[i]).permute(1, 2, 0).numpy()

    def lab_features(self, lab: new_labs.NewLab) -> SplitFeatures:
        """Features of all images of a laboratory that training never saw."""
        parts = [self._split_features(images, lab.name) for images in lab.parts]
        digest, histogram, z, labels, sources = (torch.cat(columns) for columns in list(zip(*parts, strict=True))[:5])
        return SplitFeatures(digest, histogram, z, labels, sources, [name for part in parts for name in part.names])

    def of_rows(self, splits: Mapping[str, ImageSet]) -> OfRows:
        """Features (N, F) of rows of a split by another network that takes the same images; on rank 0 alone."""

        def z(network: nn.Module, split: str, rows: Sequence[int]) -> Tensor:
            images = splits[split]
            every = spread(len(images), self._run.evaluate.max_images)
            index, what = [every[i] for i in rows], f"{split} by random weights"
            return self._z(images, index, self._plain(images), what, network.to(self._device))

        return z

    def _split_features(self, images: ImageSet, split: str) -> SplitFeatures:
        index, evaluate = spread(len(images), self._run.evaluate.max_images), self._run.evaluate
        failed = list[Tensor]()  # of each batch of this rank

        def prepare(pixels: Tensor, image: Tensor) -> Tensor:
            x, no_cell = self.augment.plain_found(pixels, images.labs_of(image))
            failed.append(no_cell.sum().cpu())
            return x

        found = encode(
            images,
            self._encoder,
            prepare,
            self._device,
            evaluate.batch,
            self._run.train.workers,
            index,
            of_pixels=lambda pixels: (digests(pixels), histograms(pixels)),
            what=f"images of {split}",
            progress=self._bar(f"images of {split}", len(index)),
            everywhere=False,
        )
        before, read = self.no_cell.get(split, (0, 0))
        missed = sum(ranks.all_ranks(sum(int(of) for of in failed)))
        self.no_cell[split] = before + missed, read + len(index)
        digest, histogram = found.of_pixels
        labs = None if images.labs is None else images.labs[index]
        return SplitFeatures(digest, histogram, found.z, found.labels, found.sources, found.names, labs)

    def _z(
        self, images: ImageSet, index: Sequence[int], prepare: Prepare, what: str, network: nn.Module | None = None
    ) -> Tensor:
        batch, workers, progress = self._run.evaluate.batch, self._run.train.workers, self._bar(what, len(index))
        network = network or self._encoder
        return encode(
            images, network, prepare, self._device, batch, workers, index, progress=progress, everywhere=False
        ).z

    def _plain(self, images: ImageSet) -> Prepare:
        return lambda pixels, image: self.augment.plain(pixels, images.labs_of(image))

    def _view(self, images: ImageSet, which: int) -> Prepare:
        seed = self._run.seed
        return lambda pixels, image: self.augment(
            pixels, image, seed=seed, step=which, views=1, lab=images.labs_of(image)
        )


def _left_out(splits: Mapping[str, ImageSet], read: Mapping[str, SplitFeatures], shown: str, asked: int) -> list[str]:
    """What the figures leave out of the data, in sentences; empty if nothing."""
    out = [
        f"{len(read[split].z):,} of the {len(images):,} images of {split} were read (evaluate.max_images)"
        for split, images in splits.items()
        if len(read[split].z) < len(images)
    ]
    if asked < (there := len(read[shown].z)):
        out.append(
            f"{asked:,} of the {there:,} images of {shown}, drawn by class, are measured; retrieval and clustering "
            f"look among these alone, and near duplicates are searched for so many of a split (evaluate.queries)"
        )
    return out


def _of_steps(folder: Path) -> list[dict[str, Any]]:
    return read_metrics(folder) if is_file(folder / METRICS) else []


def _of_training(folder: Path) -> list[Picture]:
    """Pictures drawn by training that the report shows too."""
    made = "Images, what the encoder sees of them, and what is made of that; patches have their own mean and contrast."
    drawn = [
        Picture("Training", folder / "plots" / "curves.png", "Loss, learning rate and figures along the training."),
        Picture("Augmented views", folder / "plots" / "views.png", "Views of an image as the network sees them."),
        Picture("Cells", folder / "plots" / "cells.png", "Outlines that were found in images of train; red: none."),
        Picture("Reconstructions", folder / "plots" / "reconstructions.png", made),
    ]
    return [picture for picture in drawn if picture.path.is_file()]


def _log(folder: Path, result: Mapping[str, Any], pictures: Sequence[Picture]) -> None:
    """Add the figures to metrics.jsonl as a step after the last; send them and the pictures to W&B if it is used."""
    before = read_metrics(folder)
    if not before:
        return
    step = max(row["step"] for row in before) + 1
    of = ["evaluation", result["asked"]]
    figures = {
        "/".join(filter(None, [*of, row["task"], row["name"], row["unit"], metric])): score["value"]
        for row in result["figures"]
        for metric, score in row["scores"].items()
        if score["value"] is not None
    }
    line = json_text({"step": step, "epoch": before[-1]["epoch"], **figures})
    try:
        with (folder / METRICS).open("a", encoding="utf-8") as file:
            file.write(f"{line}\n")
        note_steps({picture.title: picture.path for picture in pictures}, step)
    except OSError as error:
        raise ConfigError(f"{folder / METRICS} cannot be written: {error}") from None
    if load(str(folder / CONFIG)).log.tracker == "wandb":
        try:
            print(wandb_sync.sync(folder, "ended"))
        except wandb_sync.TrackingError as error:
            print(f"the figures were not sent to W&B: {error}")


def _run(folder: Path, overrides: Sequence[str]) -> Run:
    """The run's configuration with overrides, which may not change what the encoder was made with."""
    config = folder / CONFIG
    check_is_there(folder)
    if not is_file(config):
        raise ConfigError(f"{folder} holds no config.yaml: is it a run's folder?")
    fixed = [
        o for o in overrides if o.split("=")[0].split(".")[0] in ("model", "method", "augment", "standardise", "optim")
    ]
    if fixed:
        raise ConfigError(
            f"{', '.join(fixed)}: the encoder is already trained; only data.*, evaluate.*, train.* and seed can change"
        )
    return load(str(config), ["log.tracker=none", *overrides])


def _elsewhere(out: Path, folder: Path) -> Path:
    """`out`, a folder that exists now and is no other run's."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out {out}: cannot be made: {error.strerror}") from None
    if is_file(out / CONFIG) and not out.samefile(folder):
        raise ConfigError(f"--out {out} is the folder of another run, whose results would be lost; choose another")
    return out


def _encoder(folder: Path, run: Run, channels: int) -> tuple[nn.Module, dict[str, Any]]:
    encoder, spec = files.load(folder)
    if spec["channels"] != channels:
        raise ConfigError(f"the encoder takes images of {spec['channels']} channels; these have {channels}")
    return encoder, spec


def _query_split(run: Run, by_split: Mapping[str, SplitFeatures]) -> str | None:
    """The split that the figures measure: `evaluate.split`, another labelled one, train itself, or None.

    Test is used only if it is named: with val one chooses between models.
    """
    order = ["test", "val", "train"] if run.evaluate.split == "test" else ["val", "train"]
    return next((s for s in order if s in by_split and bool((by_split[s].labels >= 0).any())), None)


def _of_val(splits: Mapping[str, ImageSet], names: Sequence[str]) -> list[str]:
    """The note on val if it is a part of train."""
    about = splits["val"].about if "val" in splits else ""
    if about:
        return [f"val is {about}"]
    return [f"the run held out {len(names)} images, and none of them is in train here"] if names else []


def _predictions(
    run: Run, folder: Path, splits: Mapping[str, ImageSet], augment: Augment, device: torch.device, bar: Bars
) -> tuple[Predictions | None, list[str]]:
    """The predictions on `evaluate.split` if the run trained a classifier; else None, with the reason for the notes."""
    if not methods.classifies(run.method):
        return None, []
    without = "no figures of the run's own classifier"
    if _classes_may_differ(run, load(str(folder / CONFIG))):
        return None, [f"{without}: the data is not what it was trained on"]
    if run.evaluate.split not in splits:
        return None, [f"{without}: there is no {run.evaluate.split} split"]
    if ranks.from_main(lambda: checkpoint.newest(folder / "checkpoints")) is None:
        return None, [f"{without}: {folder / 'checkpoints'} has no intact checkpoint"]
    learner = trained(run, folder, splits["train"], device)
    return predict(learner, splits[run.evaluate.split], run, augment, device, bar), []


def _classes_may_differ(run: Run, trained: Run) -> bool:
    """True if the data was changed in more than its sources and laboratories: then a class may have another number."""
    now, before = (
        {
            key: value
            for key, value in r.data.model_dump().items()
            if not key.startswith(("source", "site", "lab_pattern"))
        }
        for r in (run, trained)
    )
    return now != before


def _of_classifier(predictions: Predictions | None, run: Run) -> list[dict[str, Any]]:
    """Rows of the run's own classifier; empty if an image may have several classes, which the table cannot show."""
    if predictions is None or predictions.labels.ndim > 1:
        return []
    out, classes = list[dict[str, Any]](), len(predictions.classes)
    units = Units(predictions.sources, run.seed, run.evaluate.bootstrap)
    for way in ways(units, predictions.labels, predictions.probabilities):
        found = way.scored(of_classes(way.labels, way.predicted, classes))
        row = {"task": OWN, "name": "", "unit": way.unit, "images": way.images}
        scores = {key: rounded(score) for key, score in found.items()}
        out.append(row | {"sources": way.sources, "scores": scores})
    return out


def _colour_is_better(colour: Mapping[str, float] | None, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A note if colour alone is better than the encoder."""
    knn = [r["scores"]["accuracy"]["value"] for r in rows if r["task"] == "kNN" and r["unit"] == "image"]
    if not colour or not knn or colour["top1"] <= max(knn):
        return []
    best = f"{max(knn):.1%}"
    return [f"colour histograms alone reach {colour['top1']:.1%}, this encoder's kNN at most {best}: see the leaks"]


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def command(args: argparse.Namespace) -> None:
    """`sslcells evaluate`."""
    also = []
    if args.fine_tune:
        from sslcells.compare import fine_tuned

        also = fine_tuned(args.run, args.overrides)
    evaluate(args.run, args.overrides, also, args.lab, args.against, args.lab_sources, args.out)


if __name__ == "__main__":
    raise SystemExit(commandline.run("evaluate", command))
