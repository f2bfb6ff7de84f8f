"""What `--check` accepts takes a step; what it refuses is told as a mistake: on random configurations."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from trained import make_run

from sslcells.config import PLUGINS, ConfigError, load
from sslcells.plan import consequences
from sslcells.train import train

QUICK, MANY = 5, 60
CROPS = ("dino", "ibot", "swav")
"""Methods with local views."""


def written(folder: Path, draw: random.Random) -> str:
    """A small folder of files or a file like MedMNIST's; its kind."""
    kind, channels = draw.choice(["folder", "folder", "medmnist"]), draw.choice([1, 3, 3])
    side, classes = draw.choice([8, 16, 21]), draw.randint(1, 9)
    pixels = np.random.default_rng(draw.randrange(2**32))
    splits = {"train": draw.choice([draw.randint(2, 15), *[draw.randint(16, 60)] * 5])} | {
        s: draw.randint(1, 9) for s in ("val", "test") if draw.random() < 0.6
    }
    several = draw.random() < 0.2
    arrays = {}
    for split, count in splits.items():
        images = pixels.integers(0, 255, (count, side, side, channels), np.uint8)
        classed = pixels.integers(0, classes, count)
        if kind == "medmnist":
            labels = pixels.integers(0, 2, (count, classes)) if several else classed[:, None]
            arrays |= {f"{split}_images": images, f"{split}_labels": labels}
            continue
        for i, (image, c) in enumerate(zip(images, classed, strict=True)):
            labelled = f"{split}/class{c}" if draw.random() < 0.95 else split
            file = folder / labelled / f"{i % 7}_{i}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image[..., 0] if channels == 1 else image).save(file)
    if kind == "medmnist":
        np.savez(folder / "x.npz", **arrays)
    return kind


def configuration(folder: Path, seed: int) -> list[str]:
    """Overrides that look right, and may not fit each other or the data."""
    draw = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    kind = written(folder, draw)
    batch = draw.choice([2, 3, 4, 6, 8, 12, 16])
    said: dict[str, Any] = {
        "name": "fuzz",
        "out": folder / "runs",
        "seed": draw.randint(0, 3),
        "data.kind": kind,
        "data.path": folder if kind == "folder" else folder / "x.npz",
        "model.backbone": draw.choice(["test_resnet", "small_cnn", "test_vit", "test_convnext"]),
        "method.name": draw.choice(PLUGINS["method"].names()),
        "augment.recipe": draw.choice(PLUGINS["augment"].names()),
        "augment.size": draw.choice([8, 32, 32, 48, 160]),
        "train.global_batch": batch,
        "train.total_steps": 1,
        "train.workers": 0,
        "train.device": "cpu",
        "sampler.kind": draw.choice(["shuffle", "balanced", "classes", "sources"]),
        "optim.name": draw.choice(["adamw", "sgd", "lars", "lamb"]),
        "optim.warmup_epochs": 0,
        "evaluate.pictures": "false",
        "evaluate.k": draw.choice([1, 20]),
    }
    if kind == "folder":
        said["data.channels"] = draw.choice([1, 3])
        said |= {"data.labels": "none"} if draw.random() < 0.2 else {}
        said |= {"data.source_pattern": r"/(\d)_"} if draw.random() < 0.3 else {}
    elif draw.random() < 0.2:
        said["data.long_tail"] = draw.choice([2, 10])
    maybe = {
        "train.micro_batch": draw.choice([n for n in range(1, batch + 1) if batch % n == 0 or n == 5]),
        "train.label_fraction": draw.choice([0.1, 0.5, 0.9]),
        "sampler.per_class": draw.choice([1, 2, 2, 3]),
        "sampler.per_source": draw.choice([1, 2, 2]),
        "evaluate.max_images": draw.choice([2, 5]),
        "evaluate.batch": draw.choice([1, 3]),
        "model.freeze": draw.choice([1, 0.5]),
        "model.stem": "small",
        "train.precision": "bf16",
        "train.channels_last": "false",
        "data.size": draw.choice([1, 8, 40]) if kind == "folder" else None,
        "checkpoint.every_steps": 1,
        "method.queue": draw.choice([1, 7, 64]) if said["method.name"] == "moco" else None,
        "method.local_views": draw.choice([0, 1, 2]) if said["method.name"] in CROPS else None,
        "method.local_size": draw.choice([8, 32]) if said["method.name"] in CROPS else None,
        "optim.clip_norm": 1,
    }
    said |= {key: value for key, value in maybe.items() if draw.random() < 0.3 and value is not None}
    if said["sampler.kind"] == "classes" and draw.random() < 0.8:  # P × K that go into the batch
        said["sampler.per_class"] = draw.choice([n for n in (1, 2, 3) if batch % n == 0])
    if said["method.name"] == "distill" and draw.random() < 0.9:
        said["method.teacher.weights"] = make_run(folder.with_name(f"teacher_{seed}"))
    if said["method.name"] in ("ibot", "mae") and draw.random() < 0.9:
        said["model.backbone"] = "test_vit"
    if said["model.backbone"] == "test_vit" and draw.random() < 0.9:
        said["augment.size"] = 160
    return [f"{key}={value}" for key, value in said.items()]


def holds(folder: Path, seed: int) -> str:
    """Check, and take a step where the check has nothing against it; what came of it."""
    overrides = configuration(folder, seed)
    try:
        run = load(None, overrides)
        consequences(run, 1)
    except ConfigError as error:
        return f"refused: {error}"
    try:
        train(run)
    except Exception as error:
        raise AssertionError(f"seed {seed}, accepted by --check: {' '.join(overrides)}: {error!r}") from error
    return "trained"


@pytest.mark.parametrize("seed", range(QUICK))
def test_what_is_accepted_takes_a_step(tmp_path, seed):
    holds(tmp_path / "cells", seed)


@pytest.mark.slow
def test_what_is_accepted_takes_a_step_of_many(tmp_path):
    came = [holds(tmp_path / str(seed), seed) for seed in range(QUICK, QUICK + MANY)]
    assert came.count("trained") > MANY // 4  # the others were refused, each with its reason
