"""The encoder's file: weights as safetensors, and a JSON that says how timm makes the network they fit."""

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from sslcells import sharding
from sslcells.config import ConfigError, Model
from sslcells.models import CROP, INTERPOLATION, MEAN, STD, arguments, create, lora, normalisation, small_stem
from sslcells.models import preparation as prepared
from sslcells.names import SPEC as SPEC
from sslcells.names import WEIGHTS as WEIGHTS
from sslcells.storage import denied, is_file, json_text, write_atomically
from sslcells.values import place


def export(
    encoder: nn.Module,
    config: Model,
    channels: int,
    size: int,
    folder: Path,
    reading: Mapping[str, Any] | None = None,
    standardise: Mapping[str, Any] | None = None,
) -> None:
    """Write encoder.safetensors and encoder.json: what images it takes, and how to make it again.

    `reading` says how files became the pixels it learned from: a decoder's fields without `channels`.
    `standardise` is the `spec` of a Standard; None if images are taken as they are.

    `timm.create_model(**spec["timm"], checkpoint_path="encoder.safetensors")` loads it; with stem "small", which timm
    has no argument for, the stem is replaced first, as `load` does.

    Raises:
        ConfigError: if a weight is not finite; nothing is written then.
    """
    mean, std, interpolation, crop = prepared(config, channels)
    spec: dict[str, Any] = {
        "timm": {"model_name": config.backbone, "in_chans": channels, "num_classes": 0, **arguments(config)},
        "stem": config.stem,
        "channels": channels,
        "size": size,
        "mean": mean,
        "std": std,
        "reading": reading,
        "standardise": standardise,
        "timm_version": timm.__version__,
    }
    if (interpolation, crop) != (INTERPOLATION, CROP):
        spec |= {"interpolation": interpolation, "crop": crop}
    weights = {key: value.detach().cpu().contiguous() for key, value in lora.merged(encoder).items()}
    if bad := not_finite(weights.items()):
        raise ConfigError(f"the encoder is not exported to {folder}: {said_of(bad)}")
    content = save(weights, metadata={"format": "pt"})
    write_atomically(folder / WEIGHTS, lambda file: file.write(content))
    write_atomically(folder / SPEC, lambda file: file.write(f"{json_text(spec, indent=2)}\n".encode()))


def not_finite(tensors: Iterable[tuple[str, Tensor]]) -> list[str]:
    """The names of the tensors that hold NaN or an infinity on this rank; each device is waited for once."""
    found = defaultdict[torch.device, list[tuple[str, Tensor]]](list)
    for name, x in tensors:
        if x.is_floating_point():
            found[x.device].append((name, sharding.local(x.detach()).isfinite().all()))
    bad = []
    for each in found.values():
        names, fine = zip(*each, strict=True)
        bad += [name for name, well in zip(names, torch.stack(fine).tolist(), strict=True) if not well]
    return bad


def said_of(bad: Sequence[str]) -> str:
    """Weights that are not finite, in words."""
    more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
    return f"weights that are not finite (NaN or infinite): {bad[0]}{more}"


def start_from(encoder: nn.Module, config: Model, channels: int) -> None:
    """Give an encoder the weights of `config.encoder`, the folder of a finished run or an export.

    Raises:
        ConfigError: if the folder holds no encoder, or that of another network.
    """
    folder = place(str(config.encoder))
    try:
        loaded, spec = load(folder)
    except ConfigError as error:
        raise ConfigError(f"model.encoder={config.encoder}: {error}") from error
    made = spec["timm"]
    now = {"model_name": config.backbone, "in_chans": channels, "num_classes": 0, **arguments(config)}
    wrong = [f"model.backbone={config.backbone!r}, but it is a {made['model_name']}"]
    wrong = wrong if made["model_name"] != config.backbone else []
    wrong += [f"model.stem={config.stem}, but it has {spec['stem']}"] if spec["stem"] != config.stem else []
    wrong += [f"{channels} channels here, but it takes {spec['channels']}"] if spec["channels"] != channels else []
    wrong += [f"model.args={arguments(config)}, but it was made with {made}"] if not wrong and made != now else []
    for key, here in zip(("mean", "std"), normalisation(config, channels), strict=True):
        if not wrong and tuple(spec[key]) != here:
            wrong.append(f"model.{key}={list(here)}, but it learned with {spec[key]}")
    if wrong:
        raise ConfigError(f"model.encoder={config.encoder}: {'; '.join(wrong)}")
    encoder.load_state_dict(loaded.state_dict())


def preparation(config: Model) -> tuple[tuple[float, ...], tuple[float, ...], str, float]:
    """Mean, std, interpolation and crop of the encoder in `config.encoder`; the defaults where its file says nothing.

    What is wrong with the folder is for `start_from` to say.
    """
    try:
        spec = json.loads((place(str(config.encoder)) / SPEC).read_text(encoding="utf-8"))
        return tuple(spec["mean"]), tuple(spec["std"]), spec.get("interpolation", INTERPOLATION), spec.get("crop", CROP)
    except (OSError, ValueError, KeyError, TypeError):
        return MEAN, STD, INTERPOLATION, CROP


def load(folder: Path) -> tuple[nn.Module, dict[str, Any]]:
    """The encoder of a run's folder, in eval mode, and its encoder.json.

    Raises:
        ConfigError: if the folder holds no encoder, a damaged one, or one whose weights are not finite, or it may
            not be read.
    """
    try:
        if not is_file(folder / SPEC):
            raise ConfigError(f"{folder} holds no {SPEC}: is it the folder of a finished run?")
        for name in (SPEC, WEIGHTS):
            (folder / name).open("rb").close()  # safetensors says "no such file" of one that may not be read
        spec: dict[str, Any] = json.loads((folder / SPEC).read_text(encoding="utf-8"))
        weights = load_file(folder / WEIGHTS)
        encoder = untrained(spec)
        encoder.load_state_dict(weights)
    except PermissionError as error:
        raise ConfigError(denied(error)) from error
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else ""
        raise ConfigError(f"{folder} holds no complete encoder: {type(error).__name__}: {first}") from error
    if bad := not_finite(weights.items()):
        raise ConfigError(
            f"{folder / WEIGHTS} holds {said_of(bad)}; its training broke down, and it must be made again"
        )
    return encoder, spec


def untrained(spec: Mapping[str, Any]) -> nn.Module:
    """The network of an encoder.json with random weights, in eval mode."""
    args = dict(spec["timm"])
    encoder = create(args.pop("model_name"), args.pop("in_chans"), args)
    if spec["stem"] == "small":
        small_stem(encoder, spec["channels"])
    return encoder.eval()
