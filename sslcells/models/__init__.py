"""Backbones from timm, with a stem for small images, and the encoder file that timm loads."""

from typing import Any

import timm
import torch
from timm.layers import DropPath, PatchDropout  # type: ignore[attr-defined]
from torch import Tensor, nn

from sslcells.config import ConfigError, Model, nearest
from sslcells.models import small_cnn as small_cnn  # registers itself with timm


def check(config: Model, channels: int) -> None:
    """Raise a ConfigError where timm has no such backbone, or mean and std fit no image of so many channels."""
    if not timm.is_model(config.backbone):
        near = nearest(config.backbone, timm.list_models())
        raise ConfigError(f"model.backbone={config.backbone!r}: timm has no such model{near}")
    for key, values in (("mean", config.mean), ("std", config.std)):
        if len(values) not in (1, channels):
            raise ConfigError(f"model.{key} has {len(values)} values; the images have {channels} channels")


def normalisation(config: Model, channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and std with one value for each channel; a single one of the configuration stands for all."""
    mean, std = (tuple(v) * (channels // len(v)) for v in (config.mean, config.std))
    return mean, std


def build(config: Model, channels: int) -> nn.Module:
    """The backbone without a classifier: (N, C, H, W) → (N, F).

    Raises:
        ConfigError: for a name or argument that timm does not know, weights that cannot be had, or a stem that the
            backbone has not.
    """
    check(config, channels)
    try:
        encoder = create(config.backbone, channels, config.args, pretrained=config.pretrained)
    except Exception as error:  # timm and its hub raise many kinds; each is a mistake in this section or no network
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        what = "its published weights cannot be had" if config.pretrained else "it cannot be made"
        raise ConfigError(f"model.backbone={config.backbone!r} with args={config.args}: {what}: {first}") from error
    if config.stem == "small":
        small_stem(encoder, channels)
    return encoder


def create(backbone: str, channels: int, args: dict[str, Any], pretrained: bool = False) -> nn.Module:
    """Timm's model without its classifier."""
    encoder: nn.Module = timm.create_model(
        backbone, pretrained=pretrained, in_chans=channels, **{"num_classes": 0, **args}
    )
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
        elif isinstance(module, PatchDropout):
            module.prob = 0.0


@torch.no_grad()
def width(encoder: nn.Module, channels: int, size: int, key: str = "augment.size") -> int:
    """F: how many features the encoder gives to an image of `size` pixels, which `key` says.

    Raises:
        ConfigError: where the encoder does not take images of this size.
    """
    training = encoder.training
    try:
        features: Tensor = encoder.eval()(torch.zeros(1, channels, size, size))
    except Exception as error:  # each backbone refuses sizes in its own way
        reason = str(error).splitlines()[0]
        raise ConfigError(f"{key}={size}: the backbone takes no images of {size}×{size} px: {reason}") from error
    finally:
        encoder.train(training)
    if features.ndim != 2:
        raise ConfigError(f"the backbone gives features of shape {tuple(features.shape)}, not (N, F)")
    return features.shape[1]
