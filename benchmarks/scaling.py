"""Time and peak memory of a training step, as curves with their slopes: batch, ranks, channels, image size, images.

    python benchmarks/scaling.py --budget 480 --plot benchmarks/scaling.png --out benchmarks/RESULTS.md
    python benchmarks/scaling.py --only batch ranks --budget 120

Every point is a run of the train loop on image files, in processes of their own; its last step is measured. Memory is
the peak of a rank's process during that step, above what it held before. For the number of images, time and peak memory
are from the start of the process to the first batch. A slope is that of the logarithms from one point to the
next: 1 where the time grows as the quantity does, 2 where as its square. Each curve has a share of the budget: points
that would take longer, judged by the one before, are left out and say so.
"""

import argparse
import math
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import psutil
import torch
from _drawn import linked
from _measure import markdown, section, show
from _steps import measured

MICRO_BATCH = 256


class Point(NamedTuple):
    """A run of a curve."""

    x: int
    images: int
    """in the folder"""
    size: int
    """height and width of the images, in pixels"""
    channels: int
    world: int
    words: list[str]


class Curve(NamedTuple):
    """What is varied, and how."""

    x: str
    note: str
    points: list[Point]
    should: tuple[str, str]
    """the slopes of time and memory that are to be expected"""


class Found(NamedTuple):
    """What was measured of a point, or why it was not."""

    x: int
    seconds: float = math.nan
    mib: float = math.nan
    part: float = math.nan
    """of the seconds: in the loss"""
    why: str = ""


def batches(sizes: Sequence[int]) -> Curve:
    """Global batches in micro-batches, on one rank."""
    points = [
        Point(n, n, 32, 3, 1, [*_step(32, n, 3), *([f"train.micro_batch={MICRO_BATCH}"] if n > MICRO_BATCH else [])])
        for n in sizes
    ]
    note = f"one rank, crops of 32 px, train.micro_batch={MICRO_BATCH}; the loss compares every view with every other"
    return Curve("global batch", note, points, ("1, to 2 where the loss outgrows the network", "≤ 1"))


def ranks(counts: Sequence[int], cores: int) -> Curve:
    """The same global batch on more gloo ranks of this machine."""
    batch = 512
    points = [Point(n, batch, 32, 3, n, [*_step(32, batch, 3), "train.threads=1"]) for n in counts]
    note = f"global batch {batch} on gloo ranks of one thread each, which share {cores} cores; memory of the largest"
    return Curve("ranks", note, points, (f"-1 up to {cores} ranks, then 0", "-1"))


def channels(counts: Sequence[int]) -> Curve:
    """Images of more channels."""
    points = [Point(n, 256, 64, n, 1, _step(64, 128, n)) for n in counts]
    return Curve("channels", "global batch 128, crops of 64 px of TIFF or JPEG files", points, ("≤ 1", "≤ 1"))


def sizes(pixels: Sequence[int]) -> Curve:
    """Larger crops of larger images."""
    points = [Point(n, 128, n, 3, 1, _step(n, 64, 3)) for n in pixels]
    return Curve("px", "global batch 64, crops as large as the images", points, ("2", "2"))


def images(counts: Sequence[int]) -> Curve:
    """More files in the set; a few files have so many names."""
    points = [Point(n, n, 32, 3, 1, _step(32, 64, 3)) for n in counts]
    note = "from the start of the process to its first batch of 64 images, no file verified before"
    return Curve("files", note, points, ("≤ 1", "≤ 1"))


CURVES = {
    "batch": ([256, 1024, 4096, 16_384, 65_536], batches),
    "ranks": ([1, 2, 4], lambda counts: ranks(counts, len(os.sched_getaffinity(0)))),
    "channels": ([1, 3, 5, 12], channels),
    "size": ([32, 64, 128, 256], sizes),
    "images": ([10_000, 100_000, 1_000_000], images),
}


def _step(size: int, batch: int, channels: int) -> list[str]:
    """The configuration of a run of three steps, or two large ones."""
    steps = 3 if batch <= 4096 else 2
    colour = ["augment.recipe=simclr"] if channels == 3 else ["augment.recipe=channels", "data.stack=auto"]
    return [
        *colour,
        f"augment.size={size}",
        f"data.channels={channels}",
        "model.backbone=test_resnet",
        f"train.global_batch={batch}",
        f"train.total_steps={steps}",
        f"log.every_steps={steps}",
        f"checkpoint.every_steps={steps}",
        "evaluate.every_epochs=1000000",
        "evaluate.max_images=64",
        "evaluate.pictures=false",
    ]


def measure(curve: str, point: Point, folder: Path, seconds: float) -> Found:
    """Train as a point says, on files that are made for it."""
    files = folder / f"{curve}_{point.x}"
    linked(files, point.images, point.size, point.channels)
    data = ["data.kind=folder", f"data.path={files}", "data.labels=none", f"out={folder}", f"name=run_{files.name}"]
    device = "train.device=auto" if torch.cuda.is_available() else "train.device=cpu"
    got = measured([*data, *point.words, device], folder, point.world, seconds)
    if isinstance(got, str):
        return Found(point.x, why=got)
    if curve == "images":
        return Found(point.x, got[0]["start"]["seconds"], got[0]["start"]["mib"])
    last = [rank["steps"][-1] for rank in got]
    slowest = max(last, key=lambda step: step["seconds"])
    return Found(point.x, slowest["seconds"] - slowest["read"], max(s["mib"] for s in last), slowest["loss"])


def follow(name: str, curve: Curve, budget: float) -> Iterator[Found]:
    """The points of a curve, as far as the budget of seconds goes."""
    began, before = time.monotonic(), (0, 0.0)
    with tempfile.TemporaryDirectory() as folder:
        for point in curve.points:
            left = budget - (time.monotonic() - began)
            x, took = before
            likely = took * (point.x / x) if x and name in ("batch", "images") else took
            if likely > left:
                yield Found(point.x, why=f"left out: about {likely:.0f} s")
                continue
            start = time.monotonic()
            yield measure(name, point, Path(folder), max(60.0, left))
            before = point.x, time.monotonic() - start


def slope(a: Found, b: Found, of: str) -> str:
    """The slope of the logarithms between two points."""
    low, high = getattr(a, of), getattr(b, of)
    known = low > 0 and high > 0
    return f"{math.log(high / low) / math.log(b.x / a.x):.2f}" if known else ""


def table(name: str, curve: Curve, found: Sequence[Found]) -> str:
    """A row for each point, with the slopes from the one before."""
    lines = []
    for before, point in zip([None, *found], found, strict=False):
        if point.why:
            lines.append([f"{point.x:,}", point.why, "", "", "", ""])
            continue
        slopes = [slope(before, point, of) if before else "" for of in ("seconds", "mib")]
        share = "" if math.isnan(point.part) else f"{100 * point.part / point.seconds:.0f} %"
        lines.append([f"{point.x:,}", "", f"{point.seconds:.3g}", slopes[0], f"{point.mib:,.0f}", slopes[1], share])
    heads = [curve.x, "", "seconds", "slope", "MiB", "slope", "in the loss"]
    lines = [line + [""] * (len(heads) - len(line)) for line in lines]
    return f"### {name}\n\n{curve.note}. Expected slopes: time {curve.should[0]}; memory {curve.should[1]}.\n\n" + (
        markdown(heads, lines)
    )


def draw(results: dict[str, tuple[Curve, list[Found]]], out: Path) -> None:
    """Seconds and MiB of each curve, on logarithmic axes."""
    from matplotlib.figure import Figure

    from sslcells.evaluation.pictures import OKABE_ITO, save

    figure = Figure(figsize=(3.2 * len(results), 5.6), layout="constrained")
    axes = figure.subplots(2, len(results), squeeze=False)
    for column, (curve, found) in enumerate(results.values()):
        points = [point for point in found if not point.why]
        for ax, of, unit in zip(axes[:, column], ("seconds", "mib"), ("seconds", "MiB"), strict=True):
            ax.plot([p.x for p in points], [getattr(p, of) for p in points], marker="o", color=OKABE_ITO[column])
            ax.set(xscale="log", yscale="log", xlabel=curve.x, ylabel=unit)
            ax.set_xticks([p.x for p in points], [f"{p.x:,}" for p in points], rotation=30)
            ax.minorticks_off()
            ax.grid(alpha=0.3)
    save(figure, out)


def main() -> None:
    """Follow the curves, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=list(CURVES), choices=list(CURVES))
    parser.add_argument("--budget", type=float, default=480, metavar="SECONDS", help="for all curves together (480)")
    parser.add_argument("--to", type=int, metavar="X", help="leave out points above this number, of every curve")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="write the curves to this PNG")
    parser.add_argument("--out", type=Path, metavar="FILE", help="append the section to this file")
    args = parser.parse_args()
    os.environ.pop("OMP_NUM_THREADS", None)
    torch.set_num_threads(len(os.sched_getaffinity(0)))  # what the section says
    load, ends, results = psutil.getloadavg()[0], time.monotonic() + args.budget, {}
    for at, name in enumerate(args.only):
        xs, make = CURVES[name]
        curve = make([x for x in xs if args.to is None or x <= args.to])
        share = (ends - time.monotonic()) / (len(args.only) - at)
        found = []
        for point in follow(name, curve, share):
            print(f"{name}: {point}", file=sys.stderr, flush=True)
            found.append(point)
        results[name] = curve, found
    notes = (
        "test_resnet, SimCLR, two views, float32; the last of three steps, or of two over 4,096 images, without its "
        f"wait for images; at most {args.budget:.0f} s for all curves. Load of the machine before it: {load:.1f}."
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    text = section("Scaling", device, notes, [table(name, *result) for name, result in results.items()])
    show(text, args.out)
    if args.plot:
        draw(results, args.plot)


if __name__ == "__main__":
    main()
