"""Variants of a run side by side: each trained with several seeds and evaluated; means and spread over the seeds.

  python benchmarks/variants.py --config configs/simclr_pbc28.yaml data.path=pbc28.npz --folder runs/variants \
      --variants method.same_source=negative method.same_source=ignore --seeds 0 1 2

A variant is a string of overrides, put after those of all; `--config FILE` in it takes the place of the common one.
Each run is `python -m sslcells.train` and then `python -m sslcells.evaluate`, which a classifier's own predictions take
the place of, in a folder that stays: what was measured before is not run again, and a run that was cut off goes on.
"""

import argparse
import json
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from _measure import append, markdown, section

from sslcells.config import load
from sslcells.evaluation.classifier import FILE, read_predictions

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
    """Train and evaluate a run in folder/name unless that was done; what was found, and seconds.

    `figures` by unit (image, source), and `asked`, the split they are of.
    """
    predictions, result = folder / name / FILE, folder / name / "evaluation.json"
    log, took = folder / f"{name}.log", folder / f"{name}.seconds"
    config, plain = split_config(overrides)
    if not result.is_file() and not predictions.is_file():
        began = time.monotonic()
        train = [*config, *plain, f"name={name}", f"out={folder}"]
        with log.open("a", encoding="utf-8") as file:
            for module, arguments in (("train", train), ("evaluate", [str(folder / name)])):
                if module == "evaluate" and predictions.is_file():
                    break
                command = [sys.executable, "-m", f"sslcells.{module}", *arguments]
                if subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, check=False).returncode:
                    raise SystemExit(f"{shlex.join(command)}\n{log.read_text(encoding='utf-8')[-2000:]}")
        before = float(took.read_text(encoding="ascii")) if took.is_file() else 0.0
        took.write_text(str(before + time.monotonic() - began), encoding="ascii")
    seconds = float(took.read_text(encoding="ascii"))
    if predictions.is_file():
        said = read_predictions(folder / name).figures()
        shown = {column: said[key] * (1 if key == "loss" else 100) for column, key in CLASSIFIER.items()}
        return {
            "figures": {"image": shown},
            "asked": load(str(folder / name / "config.yaml")).evaluate.split,
            "seconds": seconds,
        }
    found: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
    units = sorted({row["unit"] for row in found["figures"]})
    by_unit = {unit: figures(found, unit) for unit in units}
    return {"figures": by_unit, "asked": found["asked"], "seconds": seconds}


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
    found = {}
    for column, (task, metric) in FIGURES.items():
        rows = [r for r in result["figures"] if r["task"] == task and r["unit"] == unit]
        for row in rows:
            if TASKS[task] in ("", row["name"]) and row["scores"][metric]["value"] is not None:
                found[column] = 100 * row["scores"][metric]["value"]
    return found | {key: result["health"][result["asked"]][key] for key in HEALTH}


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
    parser.add_argument("--title", default="Variants")
    parser.add_argument("--out", type=Path, metavar="FILE", help="also append the section to this file")
    return parser.parse_intermixed_args()


def main() -> None:
    """Run what is missing, print the table, and write what was asked for."""
    args = arguments()
    names = args.names or [f"variant{i}" for i in range(len(args.variants))]
    args.folder.mkdir(parents=True, exist_ok=True)
    common = [*(["--config", args.config] if args.config else []), *args.overrides]
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for seed in args.seeds:
        for name, variant in zip(names, args.variants, strict=True):
            overrides = [*common, *shlex.split(variant), f"seed={seed}"]
            results[name].append(measure(args.folder, f"{name}_{seed}", overrides))
            print(name, seed, results[name][-1]["figures"]["image"], file=sys.stderr, flush=True)
    units = list(results[names[0]][0]["figures"])
    shown = dict.fromkeys(key for each in results.values() for result in each for key in result["figures"]["image"])
    columns = ["variant", "per", *shown, "seconds a run"]
    rows = []
    for name in names:
        for unit in units:
            each = [result["figures"][unit] for result in results[name]]
            cells = [spread([f[c] for f in each if c in f]) for c in columns[2:-1]]
            rows.append([name, unit, *cells, f"{statistics.mean(r['seconds'] for r in results[name]):.0f}"])
    asked, seeds = results[names[0]][0]["asked"], ", ".join(map(str, args.seeds))
    notes = f"Of the {asked} split, in %; mean ± standard deviation over seeds {seeds}."
    variants = "\n".join(f"- {name}: `{variant}`" for name, variant in zip(names, args.variants, strict=True))
    text = section(args.title, "cpu", notes, [markdown(columns, rows), variants])
    print(text)
    if args.out:
        append(text, args.out)


if __name__ == "__main__":
    main()
