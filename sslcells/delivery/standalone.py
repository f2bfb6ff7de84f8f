"""Load the encoder in this folder with torch, timm and safetensors alone.

from load import load, prepare
encoder = load()
features = encoder(prepare(pixels))  # pixels (N, C, H, W) uint8 → (N, F)
"""

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

HERE = Path(__file__).parent


def specification(folder: Path = HERE) -> dict[str, Any]:
    """The contents of encoder.json: timm's arguments, the stem, channels, size, mean, std."""
    spec: dict[str, Any] = json.loads((folder / "encoder.json").read_text(encoding="utf-8"))
    return spec


def load(folder: Path = HERE) -> nn.Module:
    """The network in eval mode: normalised images (N, C, size, size) → features (N, F)."""
    spec = specification(folder)
    if not timm.is_model(spec["timm"]["model_name"]):  # small_cnn: importing the module registers it with timm
        sys.path.insert(0, str(folder))
        importlib.import_module("small_cnn")
    encoder: Any = timm.create_model(**spec["timm"])
    if spec["stem"] == "small":  # for small images: a 3×3 convolution of stride 1, and no max-pool
        encoder.conv1 = nn.Conv2d(spec["channels"], encoder.conv1.out_channels, 3, padding=1, bias=False)
        encoder.maxpool = nn.Identity()
    encoder.load_state_dict(load_file(folder / "encoder.safetensors"))
    encoder.eval()
    module: nn.Module = encoder
    return module


def prepare(pixels: Tensor, folder: Path = HERE) -> Tensor:
    """(N, C, H, W) uint8 → (N, C, size, size) float32: standardised, resized and normalised, as in training."""
    spec = specification(folder)
    x, size, mode = pixels.float() / 255, spec["size"], spec.get("interpolation", "bilinear")
    if spec.get("standardise") is not None:
        sys.path.insert(0, str(folder))
        x = importlib.import_module("standard").Standard(spec["standardise"])(x)
    whole = max(size, round(size / spec.get("crop", 1.0)))  # of which the central part is kept
    if x.shape[-2:] != (whole, whole):
        x = F.interpolate(x, (whole, whole), mode=mode, antialias=True, align_corners=False)
        x = x.clamp(0, 1) if mode == "bicubic" else x
    first = (whole - size) // 2
    x = x[..., first : first + size, first : first + size]
    mean, std = (torch.tensor(spec[key], device=x.device)[:, None, None] for key in ("mean", "std"))
    return (x - mean) / std
