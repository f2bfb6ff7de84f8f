"""From PBC to BCCD: the recipe cells_across_pbc96 whole, each of its parts off in turn, and other ways beside it.

The other ways are supervised training, published weights frozen, GroupNorm, and BCCD's photographs of odd number among
the images of train, without their labels.

  python benchmarks/laboratories.py --pbc pbc96 --bccd bccd96 --folder runs/laboratories

Every run is `sslcells train --config cells_across_pbc96`, and is then asked by PBC's labels about PBC's val and about
the cells of BCCD's photographs of odd number. The folder is kept: finished runs are not run again, and interrupted ones
resume. `--only` runs some of the variants, `--frozen` adds published encoders. Choose by this table; then
`--report NAME` asks the runs of that one variant about the photographs of even number, once.
"""

import argparse
import json
import re
import shlex
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from _measure import markdown, section, show
from variants import call, spread, timed, took

VARIANTS = {
    "whole": "",
    "without colour": "standardise.colour=none",
    "with blue": "standardise.channels=all",
    "without scale": "standardise.scale=none",
    "without centre": "standardise.centre=false",
    "without background": "augment.background=0",
    "without density": "augment.density=0 augment.gamma=0 augment.mix=0",
    "without stain_mix": "augment.stain_mix=0",
    "without all of these": "standardise.colour=none standardise.channels=all standardise.scale=none "
    "standardise.centre=false augment.background=0 augment.density=0 augment.gamma=0 augment.mix=0 augment.stain_mix=0",
    "supervised": "'method={name: supervised}'",
    "GroupNorm": "model.norm=group",
    "with BCCD": "{both}",
    "with BCCD in equal parts": "{both} sampler.kind=labs",
    "with BCCD in equal parts and its own negatives": "{both} sampler.kind=labs method.same_lab=only",
}
BOTH = "data.kind=table data.path=none data.table="
COLUMNS = ("PBC val", "PBC val balanced", "BCCD balanced", "robustness index")


def train(folder: Path, name: str, overrides: Sequence[str]) -> float:
    """Train folder/name unless that was done; the seconds that it took."""
    if not (folder / name / "encoder.json").is_file():
        with timed(folder, name):
            call(folder, name, "train", "--config", "cells_across_pbc96", *overrides, f"name={name}", f"out={folder}")
    return took(folder, name)


def ask(folder: Path, name: str, half: str, against: Sequence[str] = ()) -> dict[str, Any]:
    """What a run reaches on PBC's val and on one half of BCCD's photographs, for evaluation.json."""
    out = folder / f"{name}_{half}"
    file = out / "evaluation.json"
    if not file.is_file() or (against and not json.loads(file.read_text(encoding="utf-8"))["against"]):
        options = ["--lab", f"BCCD={folder / half}.csv", "--out", str(out)]
        options += [word for one in against for word in ("--against", one)]
        call(folder, name, "evaluate", str(folder / name), "evaluate.split=val", *options)
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found


def figures(result: dict[str, Any]) -> dict[str, float]:
    """The columns of an evaluation, or of a frozen encoder in one."""
    val = next(
        r for r in result["figures"] if (r["task"], r["name"], r["unit"]) == ("kNN", "k = 20, weighted", "image")
    )
    lab = next(of for of in result["labs"]["labs"] if of["lab"] == "BCCD")
    wanted = {"labels of": "the others", "unit": "image"}  # among all classes, then among its own where they are fewer
    knn = [r for r in lab["figures"] if r["method"].startswith("kNN") and wanted.items() <= r.items()][-1]
    index = result["labs"]["pairs"][0].get("robustness index")
    scores = [100 * val["scores"][of]["value"] for of in ("accuracy", "balanced accuracy")]
    return dict(zip(COLUMNS, [*scores, 100 * knn["scores"]["balanced accuracy"]["value"]], strict=False)) | (
        {COLUMNS[3]: index["value"]} if index else {}
    )


def halves(bccd: Path, folder: Path) -> dict[str, int]:
    """Tables of the cells of photographs of odd and of even number, in the folder; cells in each."""
    rows: dict[str, list[str]] = {"odd": [], "even": []}
    for file in sorted(bccd.resolve().glob("*/*.jpg")):
        number = re.search(r"(\d+)", file.stem)
        if number is None:
            raise SystemExit(f"{file}: no number of a photograph in its name")
        rows[("even", "odd")[int(number[1]) % 2]].append(f"{file},{file.parent.name}")
    for half, lines in rows.items():
        if not lines:
            raise SystemExit(f"--bccd {bccd}: no CLASS/BloodImage_*.jpg of {half} number")
        (folder / f"{half}.csv").write_text("\n".join(["path,label", *lines]) + "\n", encoding="utf-8")
    return {half: len(lines) for half, lines in rows.items()}


def both(pbc: Path, folder: Path) -> str:
    """Overrides for a table, written here: PBC's splits, and in train BCCD's odd photographs without their labels."""
    files = [file for split in ("train", "val", "test") for file in sorted(pbc.resolve().glob(f"{split}/*/*.jpg"))]
    lines = [f"{file},{file.parent.name},{file.parts[-3]},PBC" for file in files]
    odd = (folder / "odd.csv").read_text(encoding="utf-8").splitlines()[1:]
    lines += [f"{line.rsplit(',', 1)[0]},,train,odd" for line in odd]
    (folder / "both.csv").write_text("\n".join(["path,label,split,lab", *lines]) + "\n", encoding="utf-8")
    return BOTH + shlex.quote(str(folder / "both.csv"))


def overrides(name: str, pbc: Path, folder: Path) -> list[str]:
    """What a variant's run is given beside the recipe's name."""
    if "{both}" in VARIANTS[name]:
        return shlex.split(VARIANTS[name].format(both=both(pbc, folder)))
    return [f"data.path={pbc.resolve()}", *shlex.split(VARIANTS[name])]


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="of every run")
    parser.add_argument("--pbc", type=Path, required=True, metavar="FOLDER", help="{train,val,test}/CLASS/*.jpg")
    parser.add_argument("--bccd", type=Path, required=True, metavar="FOLDER", help="CLASS/BloodImage_*.jpg")
    parser.add_argument("--folder", type=Path, required=True, help="of the runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--frozen", nargs="+", default=[], metavar="NAME", help="published weights, asked as they are")
    words = "a variant chosen by the photographs of odd number, asked once about the others"
    parser.add_argument("--report", metavar="NAME", choices=list(VARIANTS), help=words)
    parser.add_argument("--out", type=Path, metavar="FILE", help="also append the section to this file")
    return parser.parse_intermixed_args()


def row(name: str, each: Sequence[dict[str, float]], seconds: Sequence[float]) -> list[str]:
    """Means over the seeds, and deviations where there are several."""
    took = f"{statistics.mean(seconds):.0f}" if seconds else "–"
    return [name, str(len(each)), *(spread([of[column] for of in each if column in of]) for column in COLUMNS), took]


def main() -> None:
    """Run what is missing, print the table, and write the section."""
    args = arguments()
    folder = args.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    cells = halves(args.bccd, folder)
    lines, frozen = [], dict[str, list[dict[str, float]]]()
    for name in args.only:
        each, seconds = list[dict[str, float]](), list[float]()
        for seed in args.seeds:
            run = f"{name.replace(' ', '_')}_{seed}"
            seconds.append(train(folder, run, [*overrides(name, args.pbc, folder), *args.overrides, f"seed={seed}"]))
            found = ask(folder, run, "odd", args.frozen if name == args.only[0] and seed == args.seeds[0] else ())
            for one in found["against"]:
                frozen.setdefault(f"{one['encoder']}, frozen", []).append(figures(one))
            each.append(figures(found))
            print(run, each[-1], file=sys.stderr, flush=True)
        lines.append(row(name, each, seconds))
    lines += [row(name, each, []) for name, each in frozen.items()]
    columns = ["variant", "seeds", *COLUMNS, "seconds to train"]
    notes = (
        f"In %, the index from 0 to 1; kNN, k = 20, weighted; mean ± deviation over seeds. PBC's val among its "
        f"classes; BCCD by PBC's labels, balanced, among the classes with 10 cells or more: {cells['odd']} cells of "
        f"photographs of odd number."
    )
    used = "\n".join(f"- {name}: `{VARIANTS[name]}`" for name in args.only if VARIANTS[name])
    used = used.replace("{both}", f"{BOTH}both.csv")
    parts = [markdown(columns, lines), used]
    if args.report:
        runs = [f"{args.report.replace(' ', '_')}_{seed}" for seed in args.seeds]
        each = [figures(ask(folder, run, "even")) for run in runs]
        parts += [f"{cells['even']} cells of photographs of even number, once, for the variant chosen:"]
        parts += [markdown(columns, [row(args.report, each, [])])]
    text = section("From PBC to BCCD", "cpu", notes, parts)
    show(text, args.out)


if __name__ == "__main__":
    main()
