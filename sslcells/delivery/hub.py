"""An encoder as timm's hub has its models: config.json and model.safetensors."""

import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import timm
from torch import Tensor, nn

from sslcells.delivery.encoder import Encoder
from sslcells.models import CROP, INTERPOLATION, files
from sslcells.storage import json_text

CONFIG, WEIGHTS = "config.json", "model.safetensors"


def write(backbone: nn.Module, spec: Mapping[str, Any], out: Path) -> str | None:
    """Write both beside the encoder's weights; returns why not, where timm alone cannot make the network."""
    args = dict(spec["timm"])
    name, channels = args.pop("model_name"), args.pop("in_chans")
    own = "the small stem" if spec["stem"] == "small" else "small_cnn" if name == "small_cnn" else ""
    if own:
        return f"{CONFIG} and {WEIGHTS}: timm alone does not know {own}; load.py does"
    args.pop("num_classes", None)
    cfg = {
        "input_size": [channels, spec["size"], spec["size"]],
        "fixed_input_size": "img_size" in args,
        "mean": spec["mean"],
        "std": spec["std"],
        "interpolation": spec.get("interpolation", INTERPOLATION),
        "crop_pct": spec.get("crop", CROP),
        "crop_mode": "squash",  # images are brought to a square, whatever their shape
        "num_classes": 0,
        "first_conv": (getattr(backbone, "pretrained_cfg", None) or {}).get("first_conv"),
        "classifier": None,
    }
    config = {
        "architecture": name.partition(".")[0],
        "num_classes": 0,
        "num_features": int(getattr(backbone, "num_features", 0)),
        "pretrained_cfg": cfg,
        "model_args": {"in_chans": channels, **args},
    }
    (out / CONFIG).write_text(f"{json_text(config, indent=2)}\n", encoding="utf-8")
    try:
        os.link(out / files.WEIGHTS, out / WEIGHTS)
    except OSError:  # this file system has no hard links
        shutil.copyfile(out / files.WEIGHTS, out / WEIGHTS)
    return None


def network(out: Path, encoder: Encoder, lab: Tensor | None) -> Callable[[Tensor], Tensor]:
    """What timm alone makes of the folder, on images as the encoder prepares them for a laboratory."""
    made = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    return lambda pixels: made(encoder.prepare(pixels, lab))
