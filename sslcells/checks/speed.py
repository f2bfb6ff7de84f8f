"""How fast this machine decodes images and takes a small step, from one short training on drawn files."""

import contextlib
import io
import math
import tempfile
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from sslcells.checks import Check
from sslcells.config import load
from sslcells.data._smear import draw_smear
from sslcells.run.metrics import read_metrics
from sslcells.train import train

IMAGES, PIXELS, BATCH, STEPS = 64, 256, 32, 8
"""Drawn JPEG files, their width, images a step, and steps of the training; the last half is measured."""


def speed() -> Iterator[Check]:
    """Train SimCLR on drawn files; decoding and computing take turns, so one line of its figures tells both."""
    with tempfile.TemporaryDirectory(prefix="sslcells-") as folder:
        _draw(Path(folder, "cells"))
        run = load(None, [*_SETTINGS, f"data.path={folder}/cells", f"out={folder}"])
        with contextlib.redirect_stdout(io.StringIO()):
            last = [row for row in read_metrics(train(run)) if "images_per_second" in row][-1]
    waited = min(0.999, max(0.001, last["data_wait"]))
    decoded, stepped = last["images_per_second"] / waited, last["images_per_second"] / (1 - waited)
    workers = math.ceil(stepped / decoded)
    yield Check("decoding", True, f"{decoded:,.0f} JPEG files of {PIXELS} px a second in one process")
    yield Check(
        "small step",
        None if workers > 1 else True,
        f"{stepped:,.0f} images a second, test_resnet at 48 px, {BATCH} images a step",
        f"a step is faster than one reader: train.workers={workers} for such files, data.cache=ram, or sslcells pack",
    )


_SETTINGS = (
    *("data.kind=folder", "name=speed", f"train.global_batch={BATCH}", f"train.total_steps={STEPS}"),
    *("train.workers=0", f"log.every_steps={STEPS // 2}", "evaluate.pictures=false", "log.tracker=none"),
    *("evaluate.holdout=0", f"checkpoint.every_steps={STEPS}"),
)


def _draw(folder: Path) -> None:
    """JPEG files of five classes; a few drawings, brightened, as drawing takes longer than decoding."""
    drawn = [Image.fromarray(draw_smear(0, number, number, PIXELS)) for number in range(5)]
    for number in range(IMAGES):
        file = folder / f"class_{number % 5}" / f"{number}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        drawn[number % 5].point([min(255, v + number // 5) for v in range(256)] * 3).save(file, quality=88)
