"""Encoders that stay as they are: published weights, a finished run or an export, with the images that they take."""

import hashlib
import re
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self

import torch
from pydantic import Field, ValidationError, model_validator
from torch import Tensor, nn

from sslcells import models, values
from sslcells.config import ConfigError, Model, Section
from sslcells.models import files, weights
from sslcells.storage import is_folder
from sslcells.values import place


class Frozen(Section):
    """An encoder that stays as it is. A name alone stands for {weights: NAME}."""

    weights: str
    """A name of timm's with or without tag, `hf-hub:OWNER/NAME`, `local-dir:FOLDER`, a file of weights, or the folder
    of a finished run or of an export."""
    backbone: str | None = None
    """Timm's name of the network; none where the weights say it, as all but files and repositories of transformers
    do."""
    args: dict[str, Any] = Field({})
    """More keyword arguments for timm.create_model."""
    weights_key: str | None = None
    """Which network of a checkpoint that holds several."""
    allow_missing: tuple[str, ...] = ()
    """Tensors of the encoder that the weights may lack, as in the model section."""
    allow_left_over: tuple[str, ...] = ()
    """Published tensors that may be left over, as in the model section."""
    size: int | None = Field(None, ge=8)
    """Height and width in pixels of its images; none: those it was trained with."""
    mean: tuple[float, ...] | None = None
    """Mean of each channel, for pixels in 0..1; none: that of the weights."""
    std: tuple[Annotated[float, Field(gt=0)], ...] | None = None
    """Standard deviation of each channel; none: that of the weights."""
    interpolation: Literal["bilinear", "bicubic"] | None = None
    """How images are resized; none: as for the weights."""
    crop: float | None = Field(None, gt=0, le=1)
    """Central part of the height and width of whole images to keep; none: as for the weights."""

    @model_validator(mode="before")
    @classmethod
    def _of_name(cls, given: Any) -> Any:
        name = given.text if isinstance(given, values.Word) and not isinstance(given.value, dict) else given
        return {"weights": name} if isinstance(name, str) else given

    @model_validator(mode="after")
    def _run_says_all(self) -> Self:
        if _is_run(self.weights):
            own = {"backbone", "args", "weights_key", "allow_missing", "allow_left_over"} & self.model_fields_set
            given = sorted(key for key in own if getattr(self, key))
            if given:
                raise ValueError(
                    f"{', '.join(given)}: {self.weights} is the folder of an encoder, which says it itself"
                )
        return self


class Preparation(NamedTuple):
    """The images that an encoder takes."""

    size: int
    """height and width in pixels"""
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    crop: float
    """central part of the height and width of whole images that is kept"""


class FrozenEncoder:
    """An encoder in eval mode and without gradients.

    It is no module, so that no optimizer, no checkpoint and no DDP holds it; copies share it.
    """

    def __init__(
        self,
        name: str,
        network: nn.Module,
        prepared: Preparation,
        standardise: dict[str, Any] | None,
        account: list[str],
        folder: Path | None = None,
    ) -> None:
        self.name, self.network, self.prepared = name, network.eval().requires_grad_(False), prepared
        self.standardise = standardise
        """the `spec` of the Standard that it learned with; None if it takes images as they are"""
        self.account = account
        """what became of each tensor of its weights, in lines"""
        self.folder = folder
        """that of its run or export; None for published weights"""
        self.features = models.width(network, len(prepared.mean), prepared.size, "size")
        """F"""

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        """Prepared images (N, C, S, S) → features (N, F), on the device of the images."""
        features: Tensor = self.network.to(x.device)(x)
        return features

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self

    def digest(self) -> str:
        """SHA-256 of the weights and of how images are prepared, in hexadecimal digits."""
        told = repr((tuple(self.prepared), self.standardise))
        whole = hashlib.sha256(told.encode())
        for key, value in self.network.state_dict().items():
            whole.update(f"{key} {value.dtype} {tuple(value.shape)}".encode())
            whole.update(value.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return whole.hexdigest()

    def about(self) -> str:
        """What it is and takes, in words."""
        size, mean, std, interpolation, crop = self.prepared
        told = [", ".join(f"{x:.4g}" for x in part) for part in (mean, std)]
        return (
            f"{self.name}: {self.features:,} features of images of {size}×{size} px, mean {told[0]}, std {told[1]}, "
            f"{interpolation}, crop {crop:.4g}"
        )


def named(text: str) -> Frozen:
    """The encoder that a command's argument names: NAME, or a mapping such as {weights: FILE, backbone: resnet18}.

    Raises:
        ConfigError: if a key or a value is wrong.
    """
    given = values.typed(text)
    try:
        return Frozen.model_validate(given.value if isinstance(given.value, dict) else {"weights": text})
    except ValidationError as error:
        wrong = [f"{'.'.join(map(str, e['loc']))}: {e['msg'].removeprefix('Value error, ')}" for e in error.errors()]
        raise ConfigError(f"{text}: {'; '.join(w.removeprefix(': ') for w in wrong)}") from None


def opened(config: Frozen, channels: int, where: str = "") -> FrozenEncoder:
    """The encoder of the section, for images of so many channels; `where` comes before its keys in messages.

    Raises:
        ConfigError: naming it, if it cannot be had or read, or does not fit.
    """
    try:
        with torch.random.fork_rng(devices=[]):
            return _of_folder(config, channels) if _is_run(config.weights) else _of_weights(config, channels)
    except ConfigError as error:
        text = str(error).removeprefix(f"model.weights={config.weights}: ")
        raise ConfigError(f"{config.weights}: {_KEY.sub(where, text)}") from None


_KEY = re.compile(rf"\bmodel\.(?=(?:{'|'.join(Frozen.model_fields)})\b)")
"""What comes before the section's keys in messages about the model section."""


def _is_run(given: str) -> bool:
    return ":" not in given and is_folder(place(given))


def _of_folder(config: Frozen, channels: int) -> FrozenEncoder:
    """The encoder of a run or an export; with another number of channels its first convolution is inflated."""
    folder = place(config.weights)
    network, spec = files.load(folder)
    own = config.model_dump(include={"mean", "std", "interpolation", "crop"}, exclude_none=True)
    before = {"mean": spec["mean"], "std": spec["std"]}
    before |= {"interpolation": spec.get("interpolation", models.INTERPOLATION), "crop": spec.get("crop", models.CROP)}
    if spec["channels"] == channels:
        model, account = Model(**before | own), ["weights: its own encoder.safetensors, all tensors"]
    else:
        args = {key: value for key, value in spec["timm"].items() if key not in ("model_name", "in_chans")}
        known = {"backbone": spec["timm"]["model_name"], "args": args, "stem": spec["stem"]}
        before |= {key: weights.shared(before[key], channels) for key in ("mean", "std")}
        model = Model(weights=str(folder / files.WEIGHTS), **known, **before | own)
        network = models.build(model, channels)
        account = weights.load(network, model, channels)
    return _made(config, network, model, channels, spec["size"], spec.get("standardise"), account)


def _of_weights(config: Frozen, channels: int) -> FrozenEncoder:
    said = weights.described(config.weights)
    backbone = config.backbone or said.architecture
    if backbone is None:
        raise ConfigError("nothing says which of timm's networks it is: set model.backbone")
    given = {"args", "weights_key", "allow_missing", "allow_left_over", "mean", "std", "interpolation", "crop"}
    options = config.model_dump(include=given)
    options["args"] = {**(said.args if config.backbone is None else {}), **config.args}
    model = Model(backbone=backbone, weights=config.weights, **options)
    models.check(model, channels)
    size = config.size or said.size or weights.default_size(backbone)
    if size is None:
        raise ConfigError("nothing says what size of images it was trained with: set model.size")
    model = _for_size(model, channels, size)
    network = models.build(model, channels)
    account = weights.load(network, model, channels)
    model, _ = weights.resolved(model, channels)
    return _made(config, network, model, channels, size, None, account)


def _for_size(model: Model, channels: int, size: int) -> Model:
    """The section with what the network needs, if anything, to take images of this size."""
    for change in ({}, {"img_size": size}, {"dynamic_img_size": True}):
        if models.takes(model, channels, size, change):
            return model.model_copy(update={"args": model.args | change})
    return model  # the network says why it takes none


def _made(
    config: Frozen,
    network: nn.Module,
    model: Model,
    channels: int,
    size: int,
    standardise: dict[str, Any] | None,
    account: list[str],
) -> FrozenEncoder:
    mean, std, interpolation, crop = models.preparation(model, channels)
    prepared = Preparation(config.size or size, mean, std, interpolation, crop)
    path = Path(config.weights)
    name = config.weights if ":" in config.weights or not path.is_absolute() else path.name
    folder = place(config.weights) if _is_run(config.weights) else None
    return FrozenEncoder(name, network, prepared, standardise, account, folder)
