"""`sslcells compare-runs RUN_A RUN_B`: which run is better on the same images, and what differs, on one page."""

import json
import tempfile
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from rich.console import Console

from sslcells import __version__
from sslcells.config import ConfigError, load
from sslcells.data import DataError, ImageSet, open_splits
from sslcells.evaluation import answer_table, disagreements, two_in_short, two_labs, two_pictures, two_tables
from sslcells.evaluation.answer_table import AnswerTable
from sslcells.evaluation.baselines import METHOD
from sslcells.evaluation.paired import Pair, paired
from sslcells.evaluation.report import answer_section, document, say_answers, say_table, section_of
from sslcells.evaluation.scores import Units
from sslcells.evaluation.sheets import Image
from sslcells.names import CONFIG, EVALUATION
from sslcells.run import starts
from sslcells.run.metrics import METRICS, flat, read_metrics
from sslcells.storage import is_file, write_text


class Evaluated(NamedTuple):
    """A run as its evaluation left it."""

    name: str
    result: dict[str, Any]
    """what evaluation.json holds"""
    answers: AnswerTable
    labs: dict[str, AnswerTable]
    """what it answered about the images of each laboratory by the labels of the others"""
    config: dict[str, Any]
    """key → value as in config.yaml; empty if the run's folder is not there"""
    metrics: list[dict[str, Any]]
    start: dict[str, Any]
    """the run's first start; empty if it is not known"""
    folder: Path
    """the run's own, where its results may lie elsewhere"""

    @classmethod
    def read(cls, folder: Path) -> "Evaluated":
        """Read the folder of a run, or that of `sslcells evaluate --out`.

        Raises:
            ConfigError: if it holds no evaluation with answers.
        """
        answers, labs = answer_table.read(folder), answer_table.read_labs(folder)
        try:
            result = json.loads((folder / EVALUATION).read_text(encoding="utf-8"))
            own = folder / (result.get("made") or {}).get("run", ".")
            name, _ = str(result["run"]), (result["figures"], result["resamples"], result["encoder"]["sha256"])
            config = flat(yaml.safe_load((own / CONFIG).read_text(encoding="utf-8"))) if is_file(own / CONFIG) else {}
            metrics = read_metrics(own) if is_file(own / METRICS) else []
        except (OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError) as error:
            raise ConfigError(f"{folder}: the evaluation cannot be read: {error!r}; evaluate again") from None
        return cls(name, result, answers, labs, config, metrics, starts.first(own), own)


def compare_runs(folders: Sequence[Path], out: Path | None = None, common: bool = False) -> Path:
    """Compare the second of two evaluated runs with the first, print what is found and write a page; returns its path.

    With `common` the images alone that both were asked about are compared.

    Raises:
        ConfigError: if a folder holds no evaluation with answers, the images cannot be paired, or the page not written.
    """
    runs = [Evaluated.read(folder) for folder in folders]
    names = _told_apart(runs, folders)
    pair = paired([run.answers for run in runs], names, common)
    result = compared(pair, runs, names, common)
    console = Console(highlight=False, width=160)
    for table in (two_tables.scores(result), *two_tables.laboratories(result), two_tables.settings(result)):
        if table.rows:
            say_table(console, table)
    say_answers(console, result["answers"])
    for note in result["notes"]:
        console.print(f"  · {note}", markup=False, soft_wrap=True)
    file = out or folders[1] / f"compared_with_{folders[0].resolve().name}.html"
    write_text(file, _page(pair, runs, result))
    print(file)
    return file


def _told_apart(runs: Sequence[Evaluated], folders: Sequence[Path]) -> list[str]:
    """The runs' names; their folders where these are the same."""
    names = [run.name for run in runs]
    if names[0] != names[1]:
        return names
    if folders[0].resolve() == folders[1].resolve():
        raise ConfigError(f"{folders[0]} is both runs: name two, or the folders that `sslcells evaluate --out` wrote")
    return [str(folder) for folder in folders]


def compared(pair: Pair, runs: Sequence[Evaluated], names: Sequence[str], common: bool = False) -> dict[str, Any]:
    """What two runs answered about the same images, beside each other; `common` is for the laboratories'."""
    draws = max(run.result["resamples"] for run in runs)
    units = Units(pair.sources, 0, draws)
    labs, notes = two_labs.compared([run.labs for run in runs], names, common, draws)
    method = METHOD if METHOD in pair.methods else next(iter(pair.methods))
    result: dict[str, Any] = {
        "names": list(names),
        "asked": " and ".join(dict.fromkeys(str(run.result["asked"]) for run in runs if run.result.get("asked"))),
        "images": len(pair.images),
        "sources": units.count if units.known else None,
        "resamples": draws,
        "method": method,
        "scores": pair.scores(units),
        "by class": pair.by_class(units, method),
        "labs": labs,
        "robustness": two_labs.indices([run.result for run in runs]),
        "agreement": [{"method": one, **_agreement(pair, one)} for one in pair.methods],
        "settings": _settings([run.config for run in runs]),
        "leaks": [_leaks(run) for run in runs],
        "made": [_made(run) for run in runs],
        "notes": [*pair.notes, *notes],
    }
    result["notes"] += [
        f"{name}: {run.folder} holds no {CONFIG}, so that its settings and its training are not known here"
        for name, run in zip(names, runs, strict=True)
        if not run.config
    ]
    return result | {"answers": two_in_short.answers(result)}


def _agreement(pair: Pair, method: str) -> dict[str, int]:
    first, second = pair.right(method)
    return {
        "both": int((first & second).sum()),
        "first": int((first & ~second).sum()),
        "second": int((second & ~first).sum()),
        "neither": int((~first & ~second).sum()),
    }


_NO_SETTINGS = {"name", "out"}


def _settings(configs: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, str]]:
    """Keys that differ with both values, in the order of the configuration; empty if one is not known."""
    first, second = configs
    if not (first and second):
        return []
    keys = [key for key in dict.fromkeys([*first, *second]) if key not in _NO_SETTINGS]
    both = [(key, *(_value(of.get(key, "–")) for of in configs)) for key in keys]
    return [(key, one, its) for key, one, its in both if one != its]


def _value(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else "none" if value in (None, "None") else str(value)


def _leaks(run: Evaluated) -> dict[str, Any] | None:
    """What the run's own evaluation says of leaks."""
    said: list[dict[str, Any]] = run.result.get("answers") or []
    return next((one for one in said if "leaks" in one["question"]), None)


def _made(run: Evaluated) -> dict[str, str]:
    """Where a run and its evaluation come from."""
    made, start, encoder = run.result.get("made") or {}, run.start, run.result["encoder"]
    images = run.result.get("leaks", {}).get("images", {}).get("train", {}).get("images")
    return {
        "folder": str(run.folder),
        "method": str(run.config.get("method.name", "not known")),
        "encoder": f"{encoder['model']}, weights sha256 {encoder['sha256'][:16]}…",
        "images of train": f"{images:,}" if isinstance(images, int) else "not known",
        "trained": _version(start),
        "trained by": str(start.get("command") or "not known"),
        "evaluated": _version({"sslcells": run.result.get("sslcells"), **made}),
        "evaluated by": str(made.get("command") or "not known"),
        "asked": f"the {run.result.get('asked')} split",
    }


def _version(of: Mapping[str, Any]) -> str:
    if not of.get("sslcells"):
        return "not known"
    commit = f", commit {of['commit']}" if of.get("commit") else ""
    return f"{of.get('date', '')}, sslcells {of['sslcells']}{commit}".removeprefix(", ")


def _page(pair: Pair, runs: Sequence[Evaluated], result: Mapping[str, Any]) -> str:
    names, method = result["names"], result["method"]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        drawn = two_pictures.intervals(result["scores"], names, folder)
        body = answer_section(result["answers"], two_in_short.basis(result), drawn[:1])
        body += section_of("Scores", [two_tables.scores(result), two_tables.agreement(result)], drawn[1:])
        body += section_of("Classes", [two_tables.by_class(result)], ())
        if labs := two_tables.laboratories(result):
            body += section_of("Laboratories", labs, ())
        body += [f"<h2>Where they disagree, by {escape(two_pictures.by(method))}</h2>"]
        chosen = disagreements.chosen(pair, method)
        shown, why_not = _pixels(runs, {pair.images[i] for _, rows in chosen for i in rows})
        body += [f'<p class="caption">{escape(why_not)}</p>'] if why_not else []
        body += disagreements.sheet(pair, method, names, chosen, shown)
        batches = [_batch(run) for run in runs]
        pictures = two_pictures.trainings([run.metrics for run in runs], batches, names, folder)
        body += section_of("Training", (), pictures) if pictures else []
        body += ['<div class="long">', *section_of("What was set differently", [two_tables.settings(result)], ())]
        body += [*section_of("How they were made", [two_tables.made(result)], ()), "</div>"]
    body += two_tables.notes(result["notes"])
    title = f"{names[1]} beside {names[0]}"
    return document(title, f"sslcells {__version__}", body, f"{disagreements.STYLE}{_STYLE}")


_STYLE = """
figure img { width: 30rem; } .long td { white-space: normal; min-width: 7rem; overflow-wrap: anywhere; }
@media print { figure img { width: 8.5cm; } }
"""
"""All pictures are drawn for that width, and shrink with the window."""


def _batch(run: Evaluated) -> int | None:
    batch = run.config.get("train.global_batch")
    return batch if isinstance(batch, int) else None


def _pixels(runs: Sequence[Evaluated], wanted: set[str]) -> tuple[dict[str, Image], str]:
    """The wanted images by their names; none, and why, if they cannot be read."""
    why = ""
    for run in reversed(runs):
        if not (wanted and is_file(run.folder / CONFIG)):
            continue
        try:
            overrides = (run.result.get("made") or {}).get("overrides", [])
            splits = open_splits(load(str(run.folder / CONFIG), ["log.tracker=none", *overrides]).data)
            found = _found(splits, wanted)
            return {name: images.pixels(i).permute(1, 2, 0).numpy() for name, (images, i) in found.items()}, ""
        except (ConfigError, DataError) as error:
            why = f"The images cannot be shown: {error}"
    return {}, why


def _found(splits: Mapping[str, ImageSet], wanted: set[str]) -> dict[str, tuple[ImageSet, int]]:
    """The set and place of the images of these names."""
    found: dict[str, tuple[ImageSet, int]] = {}
    for images in splits.values():
        found |= {name: (images, i) for i in range(len(images)) if (name := images.name(i)) in wanted}
    return found
