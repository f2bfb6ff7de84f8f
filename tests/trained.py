"""A trained run, as far as its folder shows, and folders of images, for the tests of what is done with them."""

from pathlib import Path

import torch
from PIL import Image

from sslcells import models
from sslcells.config import dump, load
from sslcells.data import reading
from sslcells.data._smear import draw_smear
from sslcells.models import files

SMALL = [
    "data.size=32",
    "data.train=60",
    "data.val=20",
    "data.test=20",
    "augment.size=32",
    "model.backbone=small_cnn",
    "model.args={width: 8}",
]
"""Drawn cells and a network that are trained in a second."""


def make_run(folder: Path, *overrides: str, channels: int = 3, seed: int = 0) -> Path:
    """A run's folder with an untrained encoder whose BatchNorm statistics are not those of a new one."""
    small = ["model.backbone=small_cnn", "model.args={width: 8}", "augment.size=32", "data.size=32"]
    run = load(None, [*small, f"out={folder.parent}", f"name={folder.name}", *overrides])
    torch.manual_seed(seed)
    encoder = models.build(run.model, channels)
    encoder(torch.randn(4, channels, run.augment.size, run.augment.size))
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(dump(run), encoding="utf-8")
    (folder / "metrics.jsonl").write_text(
        '{"step": 0, "epoch": 0.0, "knn/top1": 0.4, "health/alignment": 1.0}\n'
        '{"step": 8, "epoch": 1.0, "loss": 2.5}\n{"step": 8, "epoch": 1.0, "knn/top1": 0.875}\n',
        encoding="utf-8",
    )
    how = reading(run.data, run.augment.size)
    files.export(encoder.eval(), run.model, channels, run.augment.size, folder, how)
    return folder


def make_cells(folder: Path, count: int, size: int = 32, classes: tuple[str, ...] = ()) -> Path:
    """PNG files of drawn cells, in a folder a class where there are classes."""
    drawn = [draw_smear(7, i, i % 5, size) for i in range(min(count, 16))]
    for i in range(count):
        below = folder / classes[i % len(classes)] if classes else folder
        below.mkdir(parents=True, exist_ok=True)
        pixels = drawn[i % 16].copy()
        pixels[0, :3] = i // 65536 % 256, i // 256 % 256, i % 256  # no two files are the same
        Image.fromarray(pixels).save(below / f"cell_{i:06}.png", compress_level=1)
    return folder
