"""An encoder's start from published weights: all of them, or an error that names what does not fit."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import timm
import torch
from timm.models import get_arch_name
from torch import Tensor, nn

from sslcells.config import ConfigError, Model
from sslcells.models import CROP, INTERPOLATION, MEAN, STD, arguments, create, files
from sslcells.models.weights import _read
from sslcells.models.weights._fit import Account, fit, takers
from sslcells.models.weights._layouts import (
    BILINEAR,
    IGNORED,
    IMAGENET,
    OUTSIDE,
    Layout,
    Preparation,
    networks,
    renamed,
)


class Described(NamedTuple):
    """What published weights say of their network; None and empty where they say nothing."""

    architecture: str | None
    """timm's name"""
    args: dict[str, Any]
    """arguments of timm.create_model that it was made with"""
    size: int | None
    """height and width in pixels of the images that it was trained with"""


def described(given: str) -> Described:
    """What the weights that `given` names, as `model.weights` does, say of their network; timm's are not downloaded.

    Raises:
        ConfigError: if there are none, or they cannot be read.
    """
    if _read.names_timm(given):
        return Described(get_arch_name(given), {}, _size(_read.timm_cfg(given)))
    found = _read.find(given)
    args: Any = found.config.get("model_args") or {}
    return Described(
        found.architecture, {k: v for k, v in args.items() if k not in _SIZES}, _size(found.pretrained_cfg)
    )


def default_size(backbone: str) -> int | None:
    """Height and width in pixels of the images of timm's default weights of a backbone; None where it has none."""
    cfg: Any = timm.get_pretrained_cfg(backbone)
    return None if cfg is None else _size(cfg.to_dict())


def _size(cfg: Mapping[str, Any]) -> int | None:
    size = cfg.get("input_size")
    return int(size[-1]) if size else None


class Network(NamedTuple):
    """One network of a checkpoint."""

    layout: Layout
    root: str
    """what comes before its names, such as `teacher.backbone.`"""
    tensors: dict[str, Tensor]
    """by its own names"""
    left_out: list[str]
    """names in the checkpoint that are of no encoder, or of another one"""
    unknown: list[str]
    """names outside of the network that nothing is known of"""


def load(encoder: nn.Module, config: Model, channels: int) -> list[str]:
    """Give the encoder the weights of `config.weights`; returns an account of every tensor, in lines.

    Raises:
        ConfigError: if they cannot be read, or a tensor is missing, left over or of another shape.
    """
    given = str(config.start)
    try:
        found = _read.find(given)
        _same_network(found, config)
        network = _network(found.tensors, encoder.state_dict(), config)
        account = _fitted(encoder, network, config, channels)
    except ConfigError as error:
        raise ConfigError(f"model.weights={given}: {error}") from None
    where = f", the network {network.root.rstrip('.')}" if network.root else ""
    first, *more = account.lines()
    return [f"weights: {given} ({network.layout.name}'s names{where}): {first}", *more]


def _same_network(found: _read.Found, config: Model) -> None:
    """Raise a ConfigError where the weights say that they are of another network than the run builds."""
    name = found.architecture
    if name is None:
        return
    if name != config.backbone.partition(".")[0]:
        raise ConfigError(f"these are weights of {name}, and model.backbone={config.backbone}: set the backbone")
    given: Any = found.config.get("model_args")
    args = {k: v for k, v in (given or {}).items() if k not in _SIZES and k not in config.args}
    if args:
        told = ", ".join(f"{k}: {str(v).lower() if isinstance(v, bool) else v}" for k, v in args.items())
        raise ConfigError(f"their network was made with other arguments: model.args needs {{{told}}}, or other values")


_SIZES = {"img_size", "in_chans", "num_classes", "pretrained", "model_name"}
"""Arguments of timm's that the run and its images decide."""


def _network(tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor], config: Model) -> Network:
    """The network that the run starts from, among those of a checkpoint.

    Raises:
        ConfigError: if there is none, or several and the run does not say which.
    """
    roots = networks(tensors, wanted)
    key = config.weights_key
    chosen = {r: layout for r, layout in roots.items() if key is None or _called(r, key)}
    labels = ", ".join(r.rstrip(".") or "(the whole)" for r in roots)
    if not roots:
        few = ", ".join(list(tensors)[:4])
        raise ConfigError(
            f"no network is found for model.backbone={config.backbone} among its {len(tensors)} tensors ({few}, …)"
            if tensors
            else "it holds no tensors"
        )
    if not chosen:
        raise ConfigError(f"model.weights_key={key} is none of its networks: {labels}")
    if len(chosen) > 1:
        raise ConfigError(f"it holds several networks: {labels}; choose one with model.weights_key")
    ((root, layout),) = chosen.items()
    inside = {n.removeprefix(root): x for n, x in tensors.items() if n.startswith(root)}
    if root == "":
        inside = {n: x for n, x in inside.items() if not IGNORED.fullmatch(n.partition(".")[0])}
    others = [r for r in roots if r != root and r]
    left_out, unknown = list[str](), list[str]()
    for name in tensors:
        if name.startswith(root) and name.removeprefix(root) in inside:
            continue
        known = IGNORED.fullmatch(name.partition(".")[0]) or any(name.startswith(r) for r in others)
        known = known or any(OUTSIDE.fullmatch(part) for part in name.split("."))
        (left_out if known else unknown).append(name)
    return Network(layout, root, inside, left_out, unknown)


def _called(root: str, key: str) -> bool:
    label = root.rstrip(".")
    return key == label or label.startswith(f"{key}.") or key in label.split(".")


def _fitted(encoder: nn.Module, network: Network, config: Model, channels: int) -> Account:
    wanted = encoder.state_dict()
    parts = renamed(network.tensors, network.layout, wanted)
    left_out = list(network.left_out)
    for name in [n for n in parts if n not in wanted]:
        if OUTSIDE.fullmatch(name.partition(".")[0]) or OUTSIDE.fullmatch(parts[name].origins[0].partition(".")[0]):
            left_out += parts.pop(name).origins
    allowed = config.allow_missing, config.allow_left_over
    return fit(encoder, channels, parts, left_out, network.unknown, allowed)


def resolved(config: Model, channels: int) -> tuple[Model, str]:
    """The section with values for how images are prepared, and a line that says them and where they come from.

    They are those of the weights or the encoder that training starts from, unless the run has its own.

    Raises:
        ConfigError: if these cannot be read, or nothing says it.
    """
    own = {key: getattr(config, key) for key in Preparation._fields if getattr(config, key) is not None}
    if len(own) == len(Preparation._fields):
        prepared, who = Preparation(**own), "the run"
    elif config.start is not None:
        prepared, who = preparation(config, channels)
    elif config.encoder is not None:
        prepared, who = Preparation(*files.preparation(config)), "its encoder.json"
        if len(prepared.mean) not in (1, channels):  # start_from refuses an encoder of other channels
            prepared = prepared._replace(mean=MEAN, std=STD)
    else:
        prepared, who = Preparation(MEAN, STD, INTERPOLATION, CROP), "the defaults"
    full = config.model_copy(update=prepared._asdict() | own)
    said = [f"{key} {_told(getattr(full, key))}" + " (the run's)" * (key in own) for key in Preparation._fields]
    origin = "all as the run says" if who == "the run" else who if who.startswith("as ") else f"from {who}"
    return full, f"images: {', '.join(said)}; {origin}"


def _told(value: Any) -> str:
    return ", ".join(f"{x:.4g}" for x in value) if isinstance(value, tuple) else str(value)


def preparation(config: Model, channels: int) -> tuple[Preparation, str]:
    """How the weights' images were prepared, with a value for each of the channels, and who says so.

    Raises:
        ConfigError: if the weights cannot be read, or nothing says it.
    """
    given = str(config.start)
    try:
        if _read.names_timm(given):
            prepared, who = _of_cfg(_read.timm_cfg(given)), "timm"
        else:
            prepared, who = _of(_read.find(given), config, channels)
    except ConfigError as error:
        raise ConfigError(f"model.weights={given}: {error}") from None
    mean, std = (shared(values, channels) for values in prepared[:2])
    return prepared._replace(mean=mean, std=std), who


def _of(found: _read.Found, config: Model, channels: int) -> tuple[Preparation, str]:
    if found.pretrained_cfg:
        return _of_cfg(found.pretrained_cfg), "their config.json"
    if found.processor.get("image_mean"):
        return _of_processor(found.processor), "their preprocessor_config.json"
    with torch.device("meta"):
        wanted = create(config.backbone, channels, arguments(config)).state_dict()
    layout = _network(found.tensors, wanted, config).layout
    prepared = layout.prepared
    if prepared is None and any(name.endswith("layer1.0.conv1.weight") for name in found.tensors):
        return BILINEAR, "as torchvision's, lightly's and solo-learn's ResNets are"
    if prepared is not None:
        return prepared, f"as {layout.name}'s are published"
    if config.mean is None or config.std is None:
        mean, std = ([*values] for values in IMAGENET)
        raise ConfigError(
            f"nothing says how their images were normalised: set model.mean and model.std ({mean} and {std} are "
            f"ImageNet's); a finished run or an export is named by its folder, in model.encoder, and says it itself"
        )
    return Preparation(config.mean, config.std, "bilinear", 1.0), "the run"


def _of_cfg(cfg: Mapping[str, Any]) -> Preparation:
    """From timm's pretrained_cfg; what it does not say is as timm takes it then."""
    mean, std = (
        tuple(float(x) for x in cfg.get(key) or values) for key, values in zip(("mean", "std"), IMAGENET, strict=True)
    )
    return Preparation(mean, std, _known(cfg.get("interpolation")), float(cfg.get("crop_pct") or 0.875))


def _of_processor(processor: Mapping[str, Any]) -> Preparation:
    """From the preprocessor_config.json of transformers, whose numbers of filters are Pillow's."""
    whole, part = (_side(processor.get(key)) for key in ("size", "crop_size"))
    kept = min(1.0, part / whole) if processor.get("do_center_crop") and part and whole else 1.0
    mean, std = (tuple(float(x) for x in processor.get(key) or ()) for key in ("image_mean", "image_std"))
    return Preparation(mean, std or IMAGENET[1], {2: "bilinear"}.get(processor.get("resample", 2), "bicubic"), kept)


def _side(size: Any) -> int:
    """A side in pixels, of a number or of what transformers has for it; 0 where it has none."""
    value = size.get("shortest_edge", size.get("height")) if isinstance(size, dict) else size
    return value if isinstance(value, int) else 0


def _known(interpolation: Any) -> str:
    return "bicubic" if interpolation in ("bicubic", "lanczos", "hamming") else "bilinear"


def shared(values: Sequence[float], channels: int) -> tuple[float, ...]:
    """A value for each channel: the mean of those of the published channels that it takes."""
    if len(values) in (1, channels):
        return tuple(values) * (channels // len(values))
    return tuple(
        sum(share * v for share, v in zip(row, values, strict=True)) / sum(row) for row in takers(len(values), channels)
    )
