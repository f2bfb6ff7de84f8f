"""Compare variants of a run: each is trained with several seeds and evaluated; prints means and spread over seeds.

  python benchmarks/variants.py --config configs/simclr_pbc28.yaml data.path=pbc28.npz --folder runs/variants \
      --variants method.same_source=negative method.same_source=ignore --seeds 0 1 2

A variant is a string of overrides, which follow the common ones; `--config FILE` in it replaces the common recipe. Each
run is `python -m sslcells.train`, then `python -m sslcells.evaluate`; for a classifier, its predictions replace the
evaluation. The folder is kept: finished runs are not run again, and interrupted ones resume.

Variants are compared on val, or on the images that training held out in its place. Once one is chosen, the same command
with `--report-test NAME` evaluates its runs on test, once; results that exist are read from FOLDER/NAME_SEED.test.json.
"""

import argparse
import json
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from _measure import markdown, section, show

from sslcells.evaluation.classifier import predictions_file, read_predictions

TASKS = {"kNN": "k = 20, weighted", "linear probe": "", "retrieval": ""}
FIGURES = {
    "kNN": ("kNN", "accuracy"),
    "kNN balanced": ("kNN", "balanced accuracy"),
    "linear": ("linear probe", "accuracy"),
    "linear balanced": ("linear probe", "balanced accuracy"),
    "recall@1": ("retrieval", "recall@1"),
    "mAP@R": ("retrieval", "mAP@R"),
}
HEALTH = ("effective rank", "row std")
CLASSIFIER = {"accuracy": "top1", "balanced accuracy": "balanced", "loss": "loss"}


def measure(folder: Path, name: str, overrides: Sequence[str]) -> dict[str, Any]:
    """Train a run in folder/name and ask it about val unless that was done; what was found, and seconds.

    `figures` by unit (image, source), and `asked`, the split that they measure.
    """
    run = folder / name
    config, plain = split_config(overrides)
    if not (folder / f"{name}.val.json").is_file() and not (run / predictions_file("val")).is_file():
        with timed(folder, name):
            call(folder, name, "train", *config, *plain, f"name={name}", f"out={folder}")
            if not (run / predictions_file("val")).is_file():
                ask(folder, name, "val")
    return found(folder, name, "val") | {"seconds": took(folder, name)}


@contextmanager
def timed(folder: Path, name: str) -> Iterator[None]:
    """Add the seconds that a block takes to those of a run, unless it fails."""
    began = time.monotonic()
    yield
    seconds = took(folder, name) + time.monotonic() - began
    (folder / f"{name}.seconds").write_text(str(seconds), encoding="ascii")


def took(folder: Path, name: str) -> float:
    """Seconds of a run, of all its starts together."""
    file = folder / f"{name}.seconds"
    return float(file.read_text(encoding="ascii")) if file.is_file() else 0.0


def ask(folder: Path, name: str, split: str) -> dict[str, Any]:
    """Evaluate a run on a split unless that was done, and keep what was found beside it."""
    kept = folder / f"{name}.{split}.json"
    if not kept.is_file():
        call(folder, name, "evaluate", str(folder / name), f"evaluate.split={split}")
        shutil.copy(folder / name / "evaluation.json", kept)
    return found(folder, name, split)


def call(folder: Path, name: str, module: str, *arguments: str) -> None:
    """Run a module of sslcells, its output in folder/name.log."""
    command, log = [sys.executable, "-m", f"sslcells.{module}", *arguments], folder / f"{name}.log"
    with log.open("a", encoding="utf-8") as file:
        if subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, check=False).returncode:
            raise SystemExit(f"{shlex.join(command)}\n{log.read_text(encoding='utf-8')[-2000:]}")


def found(folder: Path, name: str, split: str) -> dict[str, Any]:
    """`figures` and `asked` of a run on a split."""
    if (folder / name / predictions_file(split)).is_file():
        said = read_predictions(folder / name, split).figures()
        shown = {column: said[key] * (1 if key == "loss" else 100) for column, key in CLASSIFIER.items()}
        return {"figures": {"image": shown}, "asked": split}
    result: dict[str, Any] = json.loads((folder / f"{name}.{split}.json").read_text(encoding="utf-8"))
    units = sorted({row["unit"] for row in result["figures"]})
    return {"figures": {unit: figures(result, unit) for unit in units}, "asked": result["asked"]}


def split_config(overrides: Sequence[str]) -> tuple[list[str], list[str]]:
    """`--config FILE`, the last one given, and the other overrides."""
    config: list[str] = []
    plain: list[str] = []
    words = iter(overrides)
    for word in words:
        if word == "--config":
            config = [word, next(words)]
        else:
            plain.append(word)
    return config, plain


def figures(result: dict[str, Any], unit: str) -> dict[str, float]:
    """The columns of one run, per image or per source."""
    columns = {}
    for column, (task, metric) in FIGURES.items():
        rows = [r for r in result["figures"] if r["task"] == task and r["unit"] == unit]
        for row in rows:
            if TASKS[task] in ("", row["name"]) and row["scores"][metric]["value"] is not None:
                columns[column] = 100 * row["scores"][metric]["value"]
    return columns | {key: result["health"][result["asked"] or "train"][key] for key in HEALTH}


def spread(values: Sequence[float]) -> str:
    """Mean ± sample standard deviation; the value alone where there is one."""
    if not values:
        return "–"
    mean = f"{statistics.mean(values):.2f}" if max(values) < 1 else f"{statistics.mean(values):.1f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.1f}"


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="of every run")
    parser.add_argument("--config", metavar="FILE", help="the recipe of every run")
    parser.add_argument("--variants", nargs="+", required=True, metavar="OVERRIDES", help="each one quoted string")
    parser.add_argument("--names", nargs="+", metavar="NAME", help="of the variants, in their order")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--folder", type=Path, required=True, help="of the runs")
    chosen = "variants, chosen on val, evaluated once on test too"
    parser.add_argument("--report-test", nargs="+", default=[], metavar="NAME", help=chosen)
    parser.add_argument("--title", default="Variants")
    parser.add_argument("--out", type=Path, metavar="FILE", help="also append the section to this file")
    return parser.parse_intermixed_args()


def table(results: Mapping[str, Sequence[dict[str, Any]]]) -> str:
    """A line for each variant and way to count: mean and deviation over the seeds, and seconds a run if known."""
    first = next(iter(results.values()))
    shown = dict.fromkeys(key for each in results.values() for result in each for key in result["figures"]["image"])
    timed = ["seconds a run"] * ("seconds" in first[0])
    rows = []
    for name, runs in results.items():
        for unit in first[0]["figures"]:
            each = [run["figures"][unit] for run in runs]
            cells = [spread([f[c] for f in each if c in f]) for c in shown]
            cells += [f"{statistics.mean(run['seconds'] for run in runs):.0f}" for _ in timed]
            rows.append([name, unit, *cells])
    return markdown(["variant", "per", *shown, *timed], rows)


def main() -> None:
    """Run what is missing, print the table, and write the section."""
    args = arguments()
    names = args.names or [f"variant{i}" for i in range(len(args.variants))]
    if unknown := sorted({*args.report_test} - {*names}):
        raise SystemExit(f"--report-test {' '.join(unknown)}: no such variant; there are {' '.join(names)}")
    args.folder.mkdir(parents=True, exist_ok=True)
    common = [*(["--config", args.config] if args.config else []), *args.overrides]
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for seed in args.seeds:
        for name, variant in zip(names, args.variants, strict=True):
            overrides = [*common, *shlex.split(variant), f"seed={seed}"]
            results[name].append(measure(args.folder, f"{name}_{seed}", overrides))
            print(name, seed, results[name][-1]["figures"]["image"], file=sys.stderr, flush=True)
    asked, seeds = results[names[0]][0]["asked"], ", ".join(map(str, args.seeds))
    notes = f"Of {asked or 'train'}, in %; mean ± standard deviation over seeds {seeds}."
    variants = "\n".join(f"- {name}: `{variant}`" for name, variant in zip(names, args.variants, strict=True))
    parts = [table(results), variants]
    if args.report_test:
        test = {n: [ask(args.folder, f"{n}_{seed}", "test") for seed in args.seeds] for n in args.report_test}
        parts += ["On test, evaluated once, for the variants chosen on val:", table(test)]
    text = section(args.title, "cpu", notes, parts)
    show(text, args.out)


if __name__ == "__main__":
    main()
