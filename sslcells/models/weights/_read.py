"""Where published weights are: a file, a folder, the Hugging Face hub, or timm; nothing in a file is executed."""

import argparse
import json
import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.models import get_arch_name
from torch import Tensor

from sslcells.config import ConfigError, load, nearest
from sslcells.models import lora
from sslcells.names import CONFIG, WEIGHTS
from sslcells.storage import denied, is_file, is_folder
from sslcells.values import place

HUB, FOLDER = "hf-hub:", "local-dir:"
_CONFIG, _PROCESSOR = "config.json", "preprocessor_config.json"
_NAMES = ("model.safetensors", "pytorch_model.bin")
"""The weights in a folder as Hugging Face has them, in order of preference."""


class Found(NamedTuple):
    """Published weights as they are stored."""

    tensors: dict[str, Tensor]
    """every tensor by its dotted name, those of optimizers too"""
    config: dict[str, Any]
    """config.json, or timm's pretrained_cfg of a tag under the same keys; empty where nothing describes the weights"""
    processor: dict[str, Any]
    """preprocessor_config.json; empty where there is none"""

    @property
    def architecture(self) -> str | None:
        """Timm's name of the network, where the weights are described as timm does."""
        name = self.config.get("architecture")
        return name if isinstance(name, str) else None

    @property
    def pretrained_cfg(self) -> dict[str, Any]:
        """What timm says of the weights: mean, std, interpolation, crop_pct; empty where it says nothing."""
        cfg = self.config.get("pretrained_cfg", self.config if self.architecture else {})
        return cfg if isinstance(cfg, dict) else {}


def find(given: str) -> Found:
    """Read the weights that `model.weights` names.

    Raises:
        ConfigError: if there are none, they cannot be read, or reading them would run code.
    """
    if given.startswith(HUB):
        return _folder(_downloaded(given.removeprefix(HUB)))
    if given.startswith(FOLDER):
        folder = place(given.removeprefix(FOLDER))
        if not is_folder(folder):
            raise ConfigError(f"no such folder: {folder}")
        return _folder(folder)
    path = place(given)
    try:
        if is_file(path):
            beside = path.name in _NAMES and is_file(path.parent / _CONFIG)
            return _folder(path.parent) if beside else Found(_without_adapters(_tensors(path), path), {}, {})
        if is_folder(path):
            raise ConfigError(
                f"is a folder: {FOLDER}{given} for one with {_CONFIG} and {_NAMES[0]}, model.encoder={given} for a run"
            )
    except PermissionError as error:
        raise ConfigError(denied(error)) from None
    return _of_timm(given)


def names_timm(given: str) -> bool:
    """True if it can only be a name of timm's: no file, folder or repository."""
    return not given.startswith((HUB, FOLDER)) and not place(given).exists()


def timm_cfg(name: str) -> dict[str, Any]:
    """What timm says of the weights of a name, with or without a tag; nothing is downloaded.

    Raises:
        ConfigError: if it has none.
    """
    known = timm.list_pretrained()
    cfg: Any = timm.get_pretrained_cfg(name) if name in known or (timm.is_model(name) and "." not in name) else None
    if cfg is None or not cfg.has_weights:
        near = nearest(name, [n for n in known if n.partition(".")[0] == name.partition(".")[0]] or known)
        raise ConfigError(f"no such file, and timm has no weights of that name{near}")
    return dict(cfg.to_dict())


def _of_timm(name: str) -> Found:
    """The weights of a name and tag that timm knows, as it publishes them for its own network."""
    timm_cfg(name)
    try:
        with torch.random.fork_rng(devices=[]):
            network: Any = timm.create_model(name, pretrained=True)
    except Exception as error:  # timm and its hub raise many kinds; each means that there is no network or no file
        raise ConfigError(f"these published weights cannot be had: {_first(error)}") from error
    config = {"architecture": get_arch_name(name), "pretrained_cfg": dict(network.pretrained_cfg)}
    return Found(dict(network.state_dict()), config, {})


def _downloaded(repository: str) -> Path:
    """The folder of a repository of the Hugging Face hub, in its cache."""
    from huggingface_hub import snapshot_download

    name, _, revision = repository.partition("@")
    try:
        for weights in ("model*.safetensors", "pytorch_model*.bin"):
            patterns = [_CONFIG, _PROCESSOR, weights, f"{weights}.index.json"]
            folder = Path(snapshot_download(name, revision=revision or None, allow_patterns=patterns))
            if next(folder.glob(weights), None):
                break
    except Exception as error:  # the hub raises many kinds; each means no network, no such repository or no access
        raise ConfigError(f"{name} cannot be had from the Hugging Face hub: {_first(error)}") from error
    return folder


def _folder(folder: Path) -> Found:
    """The weights of a folder as Hugging Face has them, in one file or in shards."""
    shards = [folder / f"{name}.index.json" for name in _NAMES if is_file(folder / f"{name}.index.json")]
    files = [folder / name for name in _NAMES if is_file(folder / name)][:1]
    if not files and shards:
        named = _json(shards[0]).get("weight_map", {})
        files = [folder / name for name in sorted({str(n) for n in named.values()})]
    if not files:
        raise ConfigError(f"{folder} holds neither {_NAMES[0]} nor {_NAMES[1]}; name the file of weights itself")
    tensors = {name: x for file in files for name, x in _tensors(file).items()}
    return Found(tensors, _json(folder / _CONFIG), _json(folder / _PROCESSOR))


def _json(file: Path) -> dict[str, Any]:
    if not is_file(file):
        return {}
    try:
        read = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file} cannot be read: {_first(error)}") from None
    return read if isinstance(read, dict) else {}


def _tensors(file: Path) -> dict[str, Tensor]:
    """Every tensor of a file by its dotted name; no code of the file runs."""
    try:
        if file.suffix == ".safetensors":
            file.open("rb").close()  # safetensors says "no such file" of one that may not be read
            return dict(load_file(file))
        with torch.serialization.safe_globals([argparse.Namespace]):  # MAE and DINO keep their arguments; no code
            tree = torch.load(file, map_location="cpu", weights_only=True)
    except PermissionError as error:
        raise ConfigError(denied(error)) from None
    except pickle.UnpicklingError as error:
        raise ConfigError(_unsafe(file, error)) from None
    except (OSError, EOFError, RuntimeError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise ConfigError(f"{file} is no file of weights, or a damaged one: {_first(error)}") from None
    return dict(_flat(tree))


def _without_adapters(tensors: dict[str, Tensor], file: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint with its LoRA adapters merged, by the strength in the configuration of its run."""
    if not lora.unmerged(tensors):
        return tensors
    config = file.absolute().parent.parent.parent / CONFIG  # of RUN/checkpoints/step_N/FILE
    if not is_file(config):
        raise ConfigError(
            f"it holds LoRA adapters beside the weights, and their strength, lora_alpha, stands in the {CONFIG} of the "
            f"run alone: name the file where the run left it, in checkpoints/, or take the run's {WEIGHTS}"
        )
    return lora.merged_tensors(tensors, load(str(config)).model.lora_scale)


def _unsafe(file: Path, error: Exception) -> str:
    """Why a pickle is refused: what it would need to run, and how to leave that behind."""
    try:
        needs = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(file))
    except Exception:  # only zip files can be asked; an older or damaged one cannot
        needs = []
    if not needs and "GLOBAL" not in str(error):
        return f"{file} is no file of weights, or a damaged one: {_first(error)}"
    named = f" ({', '.join(needs[:4])})" if needs else ""
    return (
        f"{file} holds Python objects{named}, and reading them would run code; where you trust it, keep its tensors "
        f"alone: x = torch.load(FILE, weights_only=False); torch.save(x['state_dict'], NEW), or the key that it has"
    )


def _flat(tree: Any, name: str = "", depth: int = 0) -> Iterator[tuple[str, Tensor]]:
    """The tensors of nested mappings, by their dotted names."""
    if isinstance(tree, Tensor):
        yield name or "tensor", tree.detach()
    elif isinstance(tree, Mapping) and depth < _DEEPEST:
        for key, value in tree.items():
            yield from _flat(value, f"{name}.{key}" if name else str(key), depth + 1)


_DEEPEST = 8


def _first(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
