"""The names that tensors have in each published layout, and those that timm's networks have for them."""

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from sslcells.config import ConfigError

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
Rule = tuple[str, str | Callable[[re.Match[str]], str]]


class Part(NamedTuple):
    """A tensor under the name that timm has for it, and the names it was stored under."""

    tensor: Tensor
    origins: tuple[str, ...]


class Preparation(NamedTuple):
    """How images become the input of a network."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    """bilinear or bicubic"""
    crop: float
    """the central fraction of height and width that is kept of a whole image"""


class Layout(NamedTuple):
    """One way to name the tensors of a network."""

    name: str
    mark: str
    """pattern of a name that this layout has once in a network, `root` being what comes before the network's names"""
    rules: tuple[Rule, ...]
    """replacements, one after the other, that lead to timm's names"""
    prepared: Preparation | None = None
    """as published; None where the layout is used with more than one"""


def _plus_one(before: str, after: str, number: int = 1) -> Rule:
    """A rule whose `number`th group counts from 0 in the layout and from 1 in timm."""

    def replace(match: re.Match[str]) -> str:
        groups = list(match.groups())
        groups[number - 1] = str(int(groups[number - 1]) + 1)
        return after.format(*groups)

    return before, replace


_TRANSFORMERS: tuple[Rule, ...] = (
    (r"^embeddings\.(cls_token|mask_token|register_tokens)$", r"\1"),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.patch_embeddings\.(projection\.)?", "patch_embed.proj."),
    (r"^(encoder\.|model\.)?layers?\.(\d+)\.", r"blocks.\2."),
    (r"\.attention\.attention\.(query|key|value)\.", r".attn.\1."),
    (r"\.attention\.([qkv])_proj\.", r".attn.\1."),
    (r"\.attn\.([qkv])(uery|ey|alue)\.", r".attn.\1."),
    (r"\.attention\.(output\.dense|o_proj)\.", ".attn.proj."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.(intermediate\.dense|mlp\.up_proj)\.", ".mlp.fc1."),
    (r"^(blocks\.\d+)\.(output\.dense|mlp\.down_proj)\.", r"\1.mlp.fc2."),
    (r"\.mlp\.weights_in\.", ".mlp.fc1."),
    (r"\.mlp\.weights_out\.", ".mlp.fc2."),
    (r"\.mlp\.gate_proj\.", ".mlp.fc1_g."),
    (r"\.layer_scale([12])\.lambda1$", r".ls\1.gamma"),
    (r"^layernorm\.", "norm."),
)
_TORCHVISION_VIT: tuple[Rule, ...] = (
    (r"^class_token$", "cls_token"),
    (r"^conv_proj\.", "patch_embed.proj."),
    (r"^encoder\.pos_embedding$", "pos_embed"),
    (r"^encoder\.ln\.", "norm."),
    (r"^encoder\.layers\.encoder_layer_(\d+)\.", r"blocks.\1."),
    (r"\.ln_([12])\.", r".norm\1."),
    (r"\.self_attention\.in_proj_", ".attn.qkv."),
    (r"\.self_attention\.out_proj\.", ".attn.proj."),
    (r"\.mlp\.(0|linear_1)\.", ".mlp.fc1."),
    (r"\.mlp\.(3|linear_2)\.", ".mlp.fc2."),
)
_TORCHVISION_CONVNEXT: tuple[Rule, ...] = (
    (r"^features\.0\.(\d)\.", r"stem.\1."),
    (r"^features\.([1357])\.(\d+)\.", lambda m: f"stages.{int(m[1]) // 2}.blocks.{m[2]}."),
    (r"^features\.([246])\.", lambda m: f"stages.{int(m[1]) // 2}.downsample."),
    (r"\.block\.0\.", ".conv_dw."),
    (r"\.block\.2\.", ".norm."),
    (r"\.block\.3\.", ".mlp.fc1."),
    (r"\.block\.5\.", ".mlp.fc2."),
    (r"\.layer_scale$", ".gamma"),
    (r"^classifier\.0\.", "head.norm."),
)
_CONVNEXT: tuple[Rule, ...] = (
    (r"^downsample_layers\.0\.", "stem."),
    (r"^downsample_layers\.(\d)\.", r"stages.\1.downsample."),
    (r"^stages\.(\d)\.(\d+)\.", r"stages.\1.blocks.\2."),
    (r"\.dwconv\.", ".conv_dw."),
    (r"\.pwconv([12])\.", r".mlp.fc\1."),
    (r"^norm\.", "head.norm."),
)
_TRANSFORMERS_RESNET: tuple[Rule, ...] = (
    (r"^embedder\.embedder\.convolution\.", "conv1."),
    (r"^embedder\.embedder\.normalization\.", "bn1."),
    _plus_one(r"^encoder\.stages\.(\d)\.layers\.(\d+)\.", "layer{0}.{1}."),
    _plus_one(r"\.layer\.(\d)\.convolution\.", ".conv{0}."),
    _plus_one(r"\.layer\.(\d)\.normalization\.", ".bn{0}."),
    (r"\.shortcut\.convolution\.", ".downsample.0."),
    (r"\.shortcut\.normalization\.", ".downsample.1."),
)
_DINO: tuple[Rule, ...] = (
    (r"^blocks\.\d+\.(\d+)\.", r"blocks.\1."),  # in chunks, as a training with FSDP saves them
    (r"\.mlp\.w12\.", ".mlp.fc1."),
    (r"\.mlp\.w1\.", ".mlp.fc1_g."),
    (r"\.mlp\.w2\.", ".mlp.fc1_x."),
    (r"\.mlp\.w3\.", ".mlp.fc2."),
    (r"^storage_tokens$", "reg_token"),
)
BICUBIC = Preparation(*IMAGENET, "bicubic", 0.875)
BILINEAR = Preparation(*IMAGENET, "bilinear", 0.875)
_ROOT = r"^(?P<root>(?:.*\.)?)"

LAYOUTS = (
    Layout("transformers", _ROOT + r"embeddings\.patch_embeddings\.(?:projection\.)?weight$", _TRANSFORMERS),
    Layout("transformers ResNet", _ROOT + r"embedder\.embedder\.convolution\.weight$", _TRANSFORMERS_RESNET),
    Layout("torchvision ViT", _ROOT + r"conv_proj\.weight$", _TORCHVISION_VIT, BILINEAR),
    Layout("torchvision ConvNeXt", _ROOT + r"features\.1\.0\.layer_scale$", _TORCHVISION_CONVNEXT, BILINEAR),
    Layout("ConvNeXt as published", _ROOT + r"downsample_layers\.0\.0\.weight$", _CONVNEXT, BICUBIC),
    Layout("DINOv3", _ROOT + r"storage_tokens$", _DINO, BICUBIC),
    Layout("DINOv2", _ROOT + r"(?:blocks\.0\.(?:0\.)?ls1\.gamma)$", _DINO, BICUBIC),
    Layout("MAE", _ROOT + r"decoder_pos_embed$", (), BICUBIC),
    Layout("EfficientNet-PyTorch", _ROOT + r"_conv_stem\.weight$", ()),
    Layout("lightly, a Sequential of a ResNet", _ROOT + r"0\.weight$", (), BILINEAR),
)
"""The first whose mark is found in a network is taken; one without any has timm's names, as torchvision's ResNets and
DINO's ViTs have, and solo-learn's networks."""
PLAIN = Layout("timm", "", ())

OUTSIDE = re.compile(
    r"(?:.*_)?(?:heads?|fc|classifiers?|last_linear|project(?:or|ors|ion)|predictor|prediction|prototypes?|queue"
    r"|queue_ptr|pooler|mask_token|method|decoder.*|.*_head|.*_classifier|.*loss.*|local_cls_norm|temperature|centre"
    r"|center|lm_head|fc_layer|knn|metrics?)"
)
"""Parts of a checkpoint that are of no encoder, by one component of their names."""
IGNORED = re.compile(
    r"(?:optimizers?|optimizer_states?|optim|lr_schedulers?|schedulers?|scaler|.*_scaler|amp|callbacks|loops|rng.*"
    r"|hyper_parameters|args|meter|generator|random.*)"
)
"""Parts of a checkpoint that are of no network, by the first component of their names."""


def networks(tensors: Mapping[str, Tensor], wanted: Collection[str]) -> dict[str, Layout]:
    """The roots of the networks in a checkpoint → their layout; `wanted` are timm's names in the encoder.

    A root is what comes before a network's own names, such as `teacher.backbone.`; the empty one is the checkpoint.
    """
    found = dict[str, Layout]()
    for layout in LAYOUTS:
        for name in tensors:
            match = re.match(layout.mark, name)
            if match and match["root"] not in found and _is(layout, match["root"], tensors):
                found[match["root"]] = layout
    for root in _with_names_of(tensors, wanted):
        found.setdefault(root, PLAIN)
    within = {root for root in found for other in found if root != other and root.startswith(other) and other}
    return {root: layout for root, layout in found.items() if root not in within}


def _is(layout: Layout, root: str, tensors: Mapping[str, Tensor]) -> bool:
    """True unless a mark that is not telling enough alone misleads."""
    parts = root.split(".")  # the last is empty
    if len(parts) > 1 and (IGNORED.fullmatch(parts[0]) or OUTSIDE.fullmatch(parts[-2])):
        return False
    if layout.name == "MAE":
        return f"{root}patch_embed.proj.weight" in tensors
    if layout.name.startswith("lightly"):
        deeper = re.compile(re.escape(root) + r"\d+\.0\.conv1\.weight$")
        return tensors[f"{root}0.weight"].ndim == 4 and any(deeper.match(name) for name in tensors)
    return True


def _with_names_of(tensors: Mapping[str, Tensor], wanted: Collection[str]) -> Iterator[str]:
    """The roots below which at least half of the wanted names are."""
    names, count = set(wanted), dict[str, int]()
    for name in tensors:
        parts = name.split(".")
        for i in range(len(parts)):
            if ".".join(parts[i:]) in names and not IGNORED.fullmatch(parts[0] if i else ""):
                root = "".join(f"{part}." for part in parts[:i])
                count[root] = count.get(root, 0) + 1
    yield from (root for root, some in count.items() if 2 * some >= len(names))


def renamed(tensors: Mapping[str, Tensor], layout: Layout, wanted: Mapping[str, Tensor]) -> dict[str, Part]:
    """A network's tensors under timm's names, split projections of queries, keys and values joined.

    Raises:
        ConfigError: where a network means something else by them than timm's can.
    """
    if layout.name.startswith("EfficientNet"):
        return _in_order(tensors, wanted)
    rules = _of_sequential(tensors) if layout.name.startswith("lightly") else layout.rules
    parts = dict[str, Part]()
    for name, tensor in tensors.items():
        new = name
        for pattern, replacement in rules:
            new = re.sub(pattern, replacement, new)
        parts[new] = Part(tensor, (name,))
    for name in [n for n in parts if ".mlp.fc1." in n and n.replace(".fc1.", ".fc1_g.") in parts]:
        parts[name.replace(".fc1.", ".fc1_x.")] = parts.pop(name)
    eva = any(name.endswith(".gamma_1") for name in wanted)
    _join(parts, no_bias_of_keys=eva and not any(name.endswith(".attn.k.bias") for name in parts))
    if eva:
        _as_eva(parts, wanted)
    if "reg_token" in wanted and "register_tokens" in parts:
        parts["reg_token"] = parts.pop("register_tokens")
    return parts


def _of_sequential(tensors: Mapping[str, Tensor]) -> tuple[Rule, ...]:
    """Rules for a Sequential of a ResNet's children: the modules that have blocks are its layers, in their order."""
    numbers = {name.partition(".")[0] for name in tensors}
    layers = sorted((n for n in numbers if f"{n}.0.conv1.weight" in tensors), key=int)
    plain = sorted((n for n in numbers if n.isdigit() and n not in layers), key=int)
    new = dict(zip(plain, ("conv1", "bn1"), strict=False)) | {n: f"layer{i}" for i, n in enumerate(layers, 1)}
    return (
        (r"^(\d+)\.", lambda m: f"{new.get(m[1], m[1])}."),
        (r"\.shortcut\.", ".downsample."),
    )


def _in_order(tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, Part]:
    """Tensors in the order of the encoder's own: each must have its shape, and be a weight, a bias, … as it is."""
    left = iter([name for name in tensors if not name.startswith("_fc.")])
    parts = dict[str, Part]()
    for target in wanted:
        name = next(left, None)
        if name is None:
            break
        same = name.rpartition(".")[2] == target.rpartition(".")[2]
        parts[target if same else name] = Part(tensors[name], (name,))
    for name in left:
        parts[name] = Part(tensors[name], (name,))
    return parts | {name: Part(x, (name,)) for name, x in tensors.items() if name.startswith("_fc.")}


def _join(parts: dict[str, Part], no_bias_of_keys: bool) -> None:
    """Join the projections of queries, keys and values, which timm has as one."""
    for name in [n for n in parts if re.search(r"\.attn\.q\.(weight|bias)$", n)]:
        three = [name.replace(".attn.q.", f".attn.{x}.") for x in "qkv"]
        if name.endswith("bias") and no_bias_of_keys and three[2] in parts:
            parts[three[1]] = Part(torch.zeros_like(parts[name].tensor), ())
        if all(n in parts for n in three) and len({parts[n].tensor.shape for n in three}) == 1:
            q, k, v = (parts.pop(n) for n in three)
            whole = torch.cat([q.tensor, k.tensor, v.tensor])
            parts[name.replace(".attn.q.", ".attn.qkv.")] = Part(whole, q.origins + k.origins + v.origins)


def _as_eva(parts: dict[str, Part], wanted: Collection[str]) -> None:
    """DINOv3's names as timm's EVA has them: no bias of keys, positions that are computed and not stored."""
    for name in [n for n in parts if n.endswith(".attn.qkv.bias_mask")]:
        mask, bias = parts.pop(name), parts[name.removesuffix("_mask")]
        kept = torch.where(mask.tensor.isfinite() & (mask.tensor != 0), bias.tensor, torch.zeros_like(bias.tensor))
        parts[name.removesuffix("_mask")] = Part(kept, bias.origins + mask.origins)
    for name in [n for n in parts if n.endswith(".attn.qkv.bias")]:
        if name in wanted:
            continue
        whole = parts.pop(name)
        q, k, v = whole.tensor.chunk(3)
        if k.any():
            raise ConfigError(f"{whole.origins[0]}: the keys have a bias, which timm's network has not")
        if name.replace("qkv.bias", "q_bias") in wanted:
            parts[name.replace("qkv.bias", "q_bias")] = Part(q, whole.origins)
            parts[name.replace("qkv.bias", "v_bias")] = Part(v, whole.origins)
        elif q.any() or v.any():
            raise ConfigError(f"{whole.origins[0]} is not zero: take the backbone whose name ends in _qkvb")
    for name in list(parts):
        new = re.sub(r"\.ls([12])\.gamma$", r".gamma_\1", name)
        new = "reg_token" if new == "register_tokens" else new
        if new != name and new in wanted:
            parts[new] = parts.pop(name)
        elif name.endswith("rope_embed.periods"):
            _same_positions(name, parts.pop(name).tensor)


def _same_positions(name: str, periods: Tensor) -> None:
    """Raise a ConfigError unless positions turn as in DINOv3, section 3.2: periods 100^(2i/D), i < D/2."""
    count = len(periods)
    ours = 100.0 ** (torch.arange(count, dtype=torch.float32) / count)
    if not torch.allclose(periods.float(), ours, rtol=1e-2):
        raise ConfigError(f"{name}: its positions turn at other rates than DINOv3's, which timm computes")
