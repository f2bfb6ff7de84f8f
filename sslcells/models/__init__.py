"""Backbones from timm, with a stem for small images, and the encoder file that timm loads."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import timm
import torch
from timm.layers import DropPath, PatchDropout, PatchDropoutWithIndices  # type: ignore[attr-defined]
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from sslcells.config import ConfigError, Model, nearest
from sslcells.models import small_cnn as small_cnn  # registers itself with timm


def check(config: Model, channels: int) -> None:
    """Raise a ConfigError where timm has no such backbone, or mean and std fit no image of so many channels."""
    if not timm.is_model(config.backbone):
        near = nearest(config.backbone, timm.list_models())
        raise ConfigError(f"model.backbone={config.backbone!r}: timm has no such model{near}")
    for key, values in (("mean", config.mean), ("std", config.std)):
        if values is not None and len(values) not in (1, channels):
            raise ConfigError(f"model.{key} has {len(values)} values; the images have {channels} channels")
    for key, value in config.args.items():
        if key in _FIXED and not (key in _HARMLESS and value == _HARMLESS[key]):
            raise ConfigError(f"model.args: {key}={value!r} cannot be: {_FIXED[key]}")
    pool = config.args.get("global_pool", "avg")
    if not pool:
        raise ConfigError(f"model.args: global_pool={pool!r} cannot be: {_FIXED['features_only']}")
    if config.norm == "group" and "norm_layer" in config.args:
        raise ConfigError(f"model.norm=group and norm_layer={config.args['norm_layer']!r} in model.args: set only one")


_FIXED = {
    "num_classes": "the head is the method's, and a classifier's logits are no features",
    "features_only": "an encoder gives one vector an image, not maps",
    "out_indices": "an encoder gives one vector an image, not maps",
    "in_chans": "the images say how many channels there are",
    "model_name": "model.backbone names it",
    "pretrained": "model.pretrained=true asks for timm's published weights",
    "checkpoint_path": "model.weights=FILE starts from published weights, model.encoder=FOLDER from an encoder",
}
"""Arguments of timm.create_model that are not the user's to give, and why."""
_HARMLESS: dict[str, Any] = {"num_classes": 0, "features_only": False}
"""Values of these that change nothing."""


MEAN, STD, INTERPOLATION, CROP = (0.5,), (0.25,), "bilinear", 1.0
"""How images are prepared where training starts from no weights and the run does not say otherwise."""


def arguments(config: Model) -> dict[str, Any]:
    """What timm.create_model is given besides name and channels: `model.args`, and the normalisation of `model.norm`.

    Raises:
        ConfigError: if the backbone's BatchNorm cannot be replaced through timm.
    """
    if config.norm == "timm":
        return config.args
    for layer in ("groupnorm", "groupnorm1") if _has(config.backbone, config.args, _BatchNorm) else ():
        args = config.args | {"norm_layer": layer}
        if _has(config.backbone, args, nn.GroupNorm) and not _has(config.backbone, args, _BatchNorm):
            return args
    raise ConfigError(
        f"model.norm=group: timm cannot build backbone={config.backbone!r} with GroupNorm in place of BatchNorm; "
        f"model.norm=timm keeps its own, and ResNets, RegNets and DenseNets can"
    )


def _has(backbone: str, args: dict[str, Any], kind: type[nn.Module]) -> bool:
    """True if timm can make this backbone and it has such a layer; nothing is computed."""
    try:
        with torch.device("meta"):
            made = create(backbone, 3, args)
    except Exception:  # of each backbone another one: no such argument, channels that 32 does not divide
        return False
    return any(isinstance(module, kind) for module in made.modules())


def normalisation(config: Model, channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and std with one value for each channel; a single one of the configuration stands for all."""
    given = MEAN if config.mean is None else config.mean, STD if config.std is None else config.std
    mean, std = (tuple(v) * (channels // len(v)) for v in given)
    return mean, std


def preparation(config: Model, channels: int) -> tuple[tuple[float, ...], tuple[float, ...], str, float]:
    """`normalisation`, how whole images are resized, and the central part of them that is kept."""
    crop = CROP if config.crop is None else config.crop
    return *normalisation(config, channels), config.interpolation or INTERPOLATION, crop


def build(config: Model, channels: int) -> nn.Module:
    """The backbone without a classifier and with random weights: (N, C, H, W) → (N, F).

    Raises:
        ConfigError: for a name or argument that timm does not know, or a stem that the backbone has not.
    """
    check(config, channels)
    args = arguments(config)
    try:
        encoder = create(config.backbone, channels, args)
    except Exception as error:  # timm raises many kinds; each is a mistake in this section
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        what = f"model.backbone={config.backbone!r} with args={config.args}"
        raise ConfigError(f"{what}: it cannot be made: {first}") from error
    if config.stem == "small":
        small_stem(encoder, channels)
    return encoder


def checkpoint_activations(encoder: nn.Module, config: Model) -> None:
    """Let the blocks of a backbone run again for their gradients (`model.grad_checkpointing`), arXiv 1604.06174.

    Raises:
        ConfigError: if timm cannot do so for this backbone, or it has a BatchNorm.
    """
    said = f"model.grad_checkpointing=true: backbone={config.backbone!r}"
    if any(isinstance(module, _BatchNorm) for module in encoder.modules()):
        raise ConfigError(
            f"{said} has BatchNorm, whose statistics would count each batch twice; model.norm=group has none, nor have "
            f"Vision Transformers and ConvNeXts"
        )
    try:
        encoder.set_grad_checkpointing(True)  # type: ignore[operator]
    except (AttributeError, AssertionError):  # timm asserts where there is no such thing
        raise ConfigError(f"{said}: timm cannot run its blocks again; train.micro_batch saves memory too") from None


def create(backbone: str, channels: int, args: dict[str, Any]) -> nn.Module:
    """Timm's model without its classifier, with random weights."""
    encoder: nn.Module = timm.create_model(backbone, in_chans=channels, **{"num_classes": 0, **args})
    return encoder


def small_stem(encoder: nn.Module, channels: int) -> None:
    """Replace a ResNet's stem by a 3×3 convolution of stride 1 without max-pool, arXiv 2002.05709, appendix B.9."""
    first = getattr(encoder, "conv1", None)
    if not isinstance(getattr(encoder, "maxpool", None), nn.Module) or not isinstance(first, nn.Conv2d):
        raise ConfigError("model.stem=small needs a ResNet with a single convolution as its stem: not this backbone")
    encoder.conv1 = nn.Conv2d(channels, first.out_channels, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(encoder.conv1.weight, mode="fan_out", nonlinearity="relu")
    encoder.maxpool = nn.Identity()


def without_dropout(network: nn.Module) -> None:
    """Switch dropout and drop path off, also in training mode."""
    for module in network.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        elif isinstance(module, DropPath):
            module.drop_prob = 0.0
        elif isinstance(module, PatchDropout | PatchDropoutWithIndices):
            module.prob = 0.0


@contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """The module is in eval mode inside the block, and each of its modules as it was afterwards."""
    trained = [one for one in module.modules() if one.training]
    module.eval()
    try:
        yield
    finally:
        for one in trained:
            one.training = True


@torch.no_grad()
def width(encoder: nn.Module, channels: int, size: int, key: str = "augment.size", config: Model | None = None) -> int:
    """F: how many features the encoder gives to an image of `size` pixels, which `key` says.

    Raises:
        ConfigError: if the encoder does not take images of this size; the message gives a remedy if `config` built it.
    """
    try:
        with eval_mode(encoder):
            features: Tensor = encoder(torch.zeros(1, channels, size, size))
    except Exception as error:  # each backbone refuses sizes in its own way
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        remedy = _remedy(config, channels, size, key) if config is not None else ""
        raise ConfigError(
            f"{key}={size}: the backbone takes no images of {size}×{size} px: {reason}{remedy}"
        ) from error
    shape = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
    if not isinstance(features, Tensor) or features.ndim != 2:
        raise ConfigError(f"the backbone gives features of shape {shape}, not (N, F): see model.args")
    return features.shape[1]


def _remedy(config: Model, channels: int, size: int, key: str) -> str:
    """Which model.args, and which size where it must be another, the backbone would take; found by trying."""
    patch = _patch(config, channels)
    sizes = [size] if size % patch == 0 else [size - size % patch, size - size % patch + patch]
    for one in [*sizes, *(s for s in (size - size % 32, size - size % 32 + 32) if s not in sizes)]:
        args: list[dict[str, Any]] = [{"img_size": one}, {"dynamic_img_size": True}]
        for change in args if key == "augment.size" else args[1:]:  # images of two sizes need the second
            if one > 0 and takes(config, channels, one, change):
                given = ", ".join(f"{k}: {str(v).lower()}" for k, v in (config.args | change).items())
                where = "" if one == size else f"{key}={one} and "
                patches = f" (its patches are {patch} px)" if size % patch else ""
                return f"; {where}model.args={{{given}}} would do{patches}"
    return ""


def _patch(config: Model, channels: int) -> int:
    try:
        with torch.device("meta"):
            made = create(config.backbone, channels, arguments(config))
        return int(made.patch_embed.patch_size[0])  # type: ignore[union-attr,index]
    except Exception:  # it has none, or calls them otherwise
        return 1


def takes(config: Model, channels: int, size: int, change: dict[str, Any]) -> bool:
    """True if the backbone with these arguments takes such images; nothing is computed."""
    try:
        with torch.device("meta"):
            made = create(config.backbone, channels, arguments(config) | change)
            out = made.eval()(torch.zeros(1, channels, size, size))
    except Exception:  # each backbone refuses in its own way
        return False
    return isinstance(out, Tensor) and out.ndim == 2
