"""Published tensors made to fit an encoder, and an account of every one of them."""

import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch
from timm.layers.patch_embed import resample_patch_embed
from timm.layers.pos_embed import resample_abs_pos_embed
from timm.layers.pos_embed_rel import resize_rel_pos_bias_table
from torch import Tensor, nn

from sslcells.config import ConfigError
from sslcells.models.weights._layouts import Part


class Account(NamedTuple):
    """What became of the tensors of an encoder and of those that were published."""

    tensors: int
    """how many the encoder has"""
    resized: list[str]
    inflated: list[str]
    new: list[str]
    """tensors of the encoder that keep their first values, with the reason"""
    left_out: list[str]
    """published names that are of no encoder"""
    left_over: list[str]
    """published names that the run allows to be left over"""

    def lines(self) -> list[str]:
        """A summary, and one line for every tensor that is not simply loaded."""
        loaded = self.tensors - len(self.new) - len({text.partition(":")[0] for text in self.resized + self.inflated})
        kinds = {"resized": self.resized, "inflated": self.inflated, "new": self.new, "left over": self.left_over}
        counts = [f"{len(some)} {kind}" for kind, some in kinds.items() if some or kind != "left over"]
        groups = Counter(_group(name) for name in self.left_out)
        alone = {_group(name): name for name in self.left_out}
        out = f"; left out: {', '.join(f'{g} {n}' if n > 1 else alone[g] for g, n in groups.items())}" if groups else ""
        return [
            f"{self.tensors} tensors of the encoder: {loaded} loaded, {', '.join(counts)}{out}",
            *(f"  {kind:9} {text}" for kind, some in kinds.items() for text in some),
        ]


def _group(name: str) -> str:
    """The part of a name before its first number, and without the tensor's own name."""
    parts = name.split(".")
    numbers = [i for i, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[: numbers[0] if numbers else -1]) or name


def fit(
    encoder: nn.Module,
    channels: int,
    parts: Mapping[str, Part],
    left_out: Sequence[str],
    unknown: Sequence[str] = (),
    allowed: tuple[Collection[str], Collection[str]] = ((), ()),
) -> Account:
    """Load the parts, whose names are timm's, into the encoder.

    `unknown` are published names that lie outside of the network; `allowed` are patterns of names that may be missing,
    and of those that may be left over.

    Raises:
        ConfigError: naming every tensor that is missing, left over, of another shape, or not finite. The encoder is
            unchanged then.
    """
    parts, now = dict(parts), encoder.state_dict()
    _fold_class_position(encoder, parts)
    made = dict[str, Tensor]()
    resized, inflated, new, missing, wrong = (list[str]() for _ in range(5))
    for name, target in now.items():
        part = parts.pop(name, None)
        if part is None:
            made[name] = target
            counts = name.endswith("num_batches_tracked")  # older files lack the counter, which computes nothing
            if counts or _matches(name, allowed[0]):
                new.append(f"{name}: not among the weights")
            else:
                missing.append(name)
            continue
        tensor = _usable(name, part)
        for change, said in ((_channels, inflated), (_grid, resized), (_window, resized)):
            after = change(encoder, name, tensor, target, channels)
            if after is not None:
                tensor, text = after
                said.append(f"{name}: {text}")
        if _long(tensor) == _long(target):
            tensor = tensor.reshape(target.shape)
        if tensor.shape != target.shape:
            if not _matches(name, allowed[0]):
                wrong.append(f"{name} {_shape(target)} here, {_shape(part.tensor)} there")
            else:
                new.append(f"{name}: {_shape(target)} here, {_shape(part.tensor)} there")
            tensor = target
        made[name] = tensor
    over = [*(origin for part in parts.values() for origin in part.origins), *unknown]
    surplus = [name for name in over if not _matches(name, allowed[1])]
    if problems := _problems(len(now), missing, wrong, surplus):
        raise ConfigError(problems)
    encoder.load_state_dict(made)
    return Account(len(now), resized, inflated, new, list(left_out), over)


def _problems(count: int, missing: Sequence[str], wrong: Sequence[str], surplus: Sequence[str]) -> str:
    """What does not fit, in one line; empty where all fits."""
    said = [f"{len(missing)} of the encoder's {count} tensors are missing: {_some(missing)}"] if missing else []
    said += [f"{len(wrong)} have another shape: {_some(wrong)}"] if wrong else []
    said += [f"{len(surplus)} are left over: {_some(surplus)}"] if surplus else []
    if not said:
        return ""
    keys = [*(["model.allow_missing"] if missing or wrong else []), *(["model.allow_left_over"] if surplus else [])]
    return f"{'; '.join(said)}. Take the backbone of these weights, or list what may be so in {' and '.join(keys)}"


def _some(names: Sequence[str], most: int = 6) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _matches(name: str, patterns: Collection[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _usable(name: str, part: Part) -> Tensor:
    """The tensor, if it holds finite numbers."""
    x, origin = part.tensor, part.origins[0] if part.origins else name
    if x.is_quantized or x.is_complex():
        raise ConfigError(f"{origin} holds {str(x.dtype).removeprefix('torch.')}, not plain numbers")
    if x.is_floating_point() and not x.isfinite().all():
        raise ConfigError(f"{origin} holds values that are not finite (NaN or infinite)")
    return x


def _shape(x: Tensor) -> str:
    return f"({', '.join(map(str, x.shape))})"


_Change = tuple[Tensor, str] | None


def _channels(encoder: nn.Module, name: str, x: Tensor, target: Tensor, channels: int) -> _Change:
    """Weights of the first convolution for another number of channels.

    Every published channel's weights are shared out among the channels that take it, or added up in the channel that
    takes several: an image whose channels are equal gives the activations that it gave.
    """
    if name not in _first(encoder, channels) or x.ndim != 4 or target.ndim != 4:
        return None
    before = x.shape[1]
    if before == channels or target.shape[1] != channels:
        return None
    who = takers(before, channels)
    shared = torch.einsum("cs,oshw->ochw", torch.tensor(who).float(), x.float())
    return shared, f"{before} → {channels} channels, {_told(who)}; equal channels give the same activations"


def takers(before: int, after: int) -> list[list[float]]:
    """Which share of each published channel each channel takes: (after, before), every column adds up to 1."""
    share = [
        [float(c % before == s if after >= before else s % after == c) for s in range(before)] for c in range(after)
    ]
    total = [sum(row[s] for row in share) for s in range(before)]
    return [[row[s] / total[s] for s in range(before)] for row in share]


def _told(who: Sequence[Sequence[float]]) -> str:
    """The shares in words: 0.5·c1 for a channel that takes half of the first published one."""
    one = [" + ".join(f"{v:.3g}·c{s}" if v != 1 else f"c{s}" for s, v in enumerate(row, 1) if v) for row in who]
    return ", ".join(one)


def _first(encoder: nn.Module, channels: int) -> set[str]:
    """The names of the weights that see the pixels."""
    cfg: Any = getattr(encoder, "pretrained_cfg", None) or {}
    first = cfg.get("first_conv")
    if first is None:
        convs = (n for n, m in encoder.named_modules() if isinstance(m, nn.Conv2d) and m.in_channels == channels)
        first = next(convs, "")
    return {f"{one}.weight" for one in ([first] if isinstance(first, str) else first)}


def _grid(encoder: nn.Module, name: str, x: Tensor, target: Tensor, channels: int) -> _Change:
    """Positional embeddings of another number of patches, or a patch embedding of another patch size."""
    if name == "patch_embed.proj.weight" and x.ndim == 4 and x.shape[:2] == target.shape[:2]:
        if x.shape == target.shape:
            return None
        size = [int(target.shape[2]), int(target.shape[3])]
        return resample_patch_embed(x.float(), size), f"patches of {_by(x.shape[2:])} → {_by(size)} px"
    if name != "pos_embed" or x.ndim != 3 or target.ndim != 3 or x.shape[2] != target.shape[2]:
        return None
    embed: Any = getattr(encoder, "patch_embed", None)
    grid = getattr(embed, "grid_size", None)
    own = 0 if getattr(encoder, "no_embed_class", False) else int(getattr(encoder, "num_prefix_tokens", 1))
    if grid is None or target.shape[1] != grid[0] * grid[1] + own:
        return None
    side = math.isqrt(x.shape[1] - own) if x.shape[1] > own else 0
    if side * side != x.shape[1] - own or (side, side) == tuple(grid):
        return None
    moved = resample_abs_pos_embed(x.float(), list(grid), num_prefix_tokens=own)
    return moved, f"positions of {side}×{side} → {_by(grid)} patches"


def _by(size: Iterable[int]) -> str:
    return "×".join(map(str, size))


def _window(encoder: nn.Module, name: str, x: Tensor, target: Tensor, channels: int) -> _Change:
    """A table of relative positions (Swin, BEiT) for another window."""
    if not name.endswith("relative_position_bias_table") or x.shape == target.shape:
        return None
    window = getattr(encoder.get_submodule(name.rpartition(".")[0]), "window_size", None)
    if window is None or x.shape[1:] != target.shape[1:]:
        return None
    moved = resize_rel_pos_bias_table(x.float(), new_window_size=window, new_bias_shape=target.shape)
    return moved, f"relative positions {_shape(x)} → {_shape(target)}"


def _long(x: Tensor) -> list[int]:
    """The shape without dimensions of length 1, which some networks have where others have none."""
    return [n for n in x.shape if n != 1]


def _fold_class_position(encoder: nn.Module, parts: dict[str, Part]) -> None:
    """Add the class token's position to the token where timm's network keeps positions of patches alone."""
    if not getattr(encoder, "no_embed_class", False) or not {"cls_token", "pos_embed"} <= parts.keys():
        return
    token, position = parts["cls_token"], parts["pos_embed"]
    if position.tensor.ndim == 3 and math.isqrt(position.tensor.shape[1] - 1) ** 2 == position.tensor.shape[1] - 1:
        parts["cls_token"] = Part(token.tensor + position.tensor[:, :1], token.origins + position.origins)
        parts["pos_embed"] = Part(position.tensor[:, 1:], position.origins)
