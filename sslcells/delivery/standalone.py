"""Load the encoder in this folder with torch, timm and safetensors alone.

from load import load, prepare
encoder = load()
features = encoder(prepare(pixels))  # pixels (N, C, H, W) uint8 → (N, F)

If images are standardised by laboratory: prepare(pixels, lab="NAME"), or lab=laboratory(some_pixels) of a new one.
"""

import importlib
import json
import sys
import warnings
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


def standard(folder: Path = HERE) -> Any:
    """What standardises images; None if they are taken as they are."""
    spec = specification(folder).get("standardise")
    if spec is None:
        return None
    sys.path.insert(0, str(folder))
    return importlib.import_module("standard").Standard(spec)


def laboratory(pixels: Tensor, folder: Path = HERE) -> Tensor:
    """(P,) what stands for the images of a new laboratory, from some of them, about a hundred, (N, C, H, W) uint8.

    Raises:
        ValueError: if images are not standardised by laboratory, or there is only one.
    """
    how = standard(folder)
    if how is None or not how.by_lab:
        raise ValueError("images are not standardised by laboratory here: prepare(pixels) takes each by itself")
    if len(pixels) < 2:
        raise ValueError(f"a laboratory is measured on several of its images, about a hundred; here is {len(pixels)}")
    with torch.no_grad():
        return torch.tensor(how.laboratory(part.float() / 255 for part in torch.split(pixels, 64))["row"])


def prepare(pixels: Tensor, folder: Path = HERE, lab: str | Tensor | None = None) -> Tensor:
    """(N, C, H, W) uint8 → (N, C, size, size) float32: standardised, resized and normalised, as in training.

    A warning says in how many images no cell was found, where one is looked for: these keep size, place and density.

    Raises:
        ValueError: if images are standardised by laboratory, and `lab`, a known one or what `laboratory` returned, is
            missing.
    """
    spec, how = specification(folder), standard(folder)
    x, size, mode = pixels.float() / 255, spec["size"], spec.get("interpolation", "bilinear")
    if how is not None:
        if how.by_lab and lab is None:
            known = ", ".join(spec["standardise"].get("labs") or ()) or "none"
            raise ValueError(
                f"images are standardised by laboratory: give lab=NAME (known: {known}), or of a new one "
                f"lab=laboratory(some of its images)"
            )
        row = how.row(lab) if isinstance(lab, str) else lab
        x, _, failed = how.found(x, None if row is None else row.expand(len(x), -1))
        if failed.any():
            warnings.warn(f"no cell was found in {int(failed.sum())} of {len(failed)} images", stacklevel=2)
    whole = max(size, round(size / spec.get("crop", 1.0)))  # of which the central part is kept
    if x.shape[-2:] != (whole, whole):
        x = F.interpolate(x, (whole, whole), mode=mode, antialias=True, align_corners=False)
        x = x.clamp(0, 1) if mode == "bicubic" else x
    first = (whole - size) // 2
    x = x[..., first : first + size, first : first + size]
    mean, std = (torch.tensor(spec[key], device=x.device)[:, None, None] for key in ("mean", "std"))
    return (x - mean) / std
