"""Small networks written for the tests in each published layout: its names, and a forward pass of its own."""

import math

import torch
from torch.nn import functional as F

WIDTH, HEADS, DEPTH, PATCH, SIZE = 48, 3, 2, 8, 32
VIT = {"patch_size": PATCH, "embed_dim": WIDTH, "depth": DEPTH, "num_heads": HEADS, "mlp_ratio": 2, "img_size": SIZE}
"""Arguments that make timm's ViTs as small."""


class Draw:
    """Random tensors by name, in the order in which they are asked for."""

    def __init__(self, seed=0):
        self.x, self._generator = {}, torch.Generator().manual_seed(seed)

    def __call__(self, name, *shape, scale=0.2, around=0.0):
        self.x[name] = around + scale * torch.randn(*shape, generator=self._generator)

    def linear(self, name, rows, columns, bias=True):
        self(f"{name}.weight", rows, columns)
        if bias:
            self(f"{name}.bias", rows)

    def norm(self, name, width, running=False):
        self(f"{name}.weight", width, around=1.0)
        self(f"{name}.bias", width)
        if running:
            self(f"{name}.running_mean", width)
            self.x[f"{name}.running_var"] = torch.rand(width, generator=self._generator) + 0.5
            self.x[f"{name}.num_batches_tracked"] = torch.tensor(7)


FUSED = {
    "cls": "cls_token", "pos": "pos_embed", "patch": "patch_embed.proj", "block": "blocks.{}", "norm": "norm",
    "norm1": "norm1", "norm2": "norm2", "qkv": "attn.qkv", "proj": "attn.proj", "fc1": "mlp.fc1", "fc2": "mlp.fc2",
    "ls1": "ls1.gamma", "ls2": "ls2.gamma",
}  # fmt: skip
SPLIT = FUSED | {
    "cls": "embeddings.cls_token", "pos": "embeddings.position_embeddings",
    "patch": "embeddings.patch_embeddings.projection", "block": "encoder.layer.{}", "norm": "layernorm",
    "norm1": "layernorm_before", "norm2": "layernorm_after", "qkv": None, "q": "attention.attention.query",
    "k": "attention.attention.key", "v": "attention.attention.value", "proj": "attention.output.dense",
    "fc1": "intermediate.dense", "fc2": "output.dense",
}  # fmt: skip
NAMES = {
    "timm": FUSED,
    "MAE": FUSED,
    "DINOv2": FUSED | {"scaled": True},
    "DINOv2 with registers": FUSED | {"scaled": True, "registers": "register_tokens"},
    "DINOv2 in chunks": FUSED | {"scaled": True, "block": "blocks.0.{}"},
    "transformers ViT": SPLIT,
    "transformers 5 ViT": SPLIT
    | {"block": "layers.{}", "q": "attention.q_proj", "k": "attention.k_proj", "v": "attention.v_proj",
       "proj": "attention.o_proj", "fc1": "mlp.fc1", "fc2": "mlp.fc2"},
    "transformers DINOv2": SPLIT
    | {"scaled": True, "norm1": "norm1", "norm2": "norm2", "fc1": "mlp.fc1", "fc2": "mlp.fc2",
       "ls1": "layer_scale1.lambda1", "ls2": "layer_scale2.lambda1", "registers": "embeddings.register_tokens"},
    "torchvision ViT": FUSED
    | {"cls": "class_token", "pos": "encoder.pos_embedding", "patch": "conv_proj",
       "block": "encoder.layers.encoder_layer_{}", "norm": "encoder.ln", "norm1": "ln_1", "norm2": "ln_2",
       "qkv": "self_attention.in_proj_", "proj": "self_attention.out_proj", "fc1": "mlp.0", "fc2": "mlp.3"},
}  # fmt: skip
"""What each layout calls the parts of a ViT; `scaled` where it has layer scale."""


def vit(layout, channels=3, seed=0):
    """A ViT's tensors under the names of a layout, without any head."""
    n, draw = NAMES[layout], Draw(seed)
    draw(n["cls"], 1, 1, WIDTH)
    draw(n["pos"], 1, (SIZE // PATCH) ** 2 + 1, WIDTH)
    if "registers" in n:
        draw(n["registers"], 1, 4, WIDTH)
    draw(f"{n['patch']}.weight", WIDTH, channels, PATCH, PATCH, scale=0.1)
    draw(f"{n['patch']}.bias", WIDTH)
    for i in range(DEPTH):
        b = n["block"].format(i)
        draw.norm(f"{b}.{n['norm1']}", WIDTH)
        if n["qkv"]:
            between = "" if n["qkv"].endswith("_") else "."
            draw(f"{b}.{n['qkv']}{between}weight", 3 * WIDTH, WIDTH)
            draw(f"{b}.{n['qkv']}{between}bias", 3 * WIDTH)
        else:
            for part in "qkv":
                draw.linear(f"{b}.{n[part]}", WIDTH, WIDTH)
        draw.linear(f"{b}.{n['proj']}", WIDTH, WIDTH)
        draw.norm(f"{b}.{n['norm2']}", WIDTH)
        draw.linear(f"{b}.{n['fc1']}", 2 * WIDTH, WIDTH)
        draw.linear(f"{b}.{n['fc2']}", WIDTH, 2 * WIDTH)
        if n.get("scaled"):
            draw(f"{b}.{n['ls1']}", WIDTH)
            draw(f"{b}.{n['ls2']}", WIDTH)
    draw.norm(n["norm"], WIDTH)
    return draw.x


def vit_features(layout, t, x):
    """(N, C, SIZE, SIZE) → the class token (N, WIDTH), from a layout's tensors."""
    n = NAMES[layout]
    x = F.conv2d(x, t[f"{n['patch']}.weight"], t[f"{n['patch']}.bias"], stride=PATCH).flatten(2).mT
    x = torch.cat([t[n["cls"]].expand(len(x), -1, -1), x], 1) + t[n["pos"]]
    if "registers" in n:
        x = torch.cat([x[:, :1], t[n["registers"]].expand(len(x), -1, -1), x[:, 1:]], 1)
    for i in range(DEPTH):
        b = n["block"].format(i)
        y = _norm(t, f"{b}.{n['norm1']}", x)
        if n["qkv"]:
            between = "" if n["qkv"].endswith("_") else "."
            y = F.linear(y, t[f"{b}.{n['qkv']}{between}weight"], t[f"{b}.{n['qkv']}{between}bias"]).chunk(3, 2)
        else:
            y = [_linear(t, f"{b}.{n[part]}", y) for part in "qkv"]
        y = _linear(t, f"{b}.{n['proj']}", attention(*y))
        x = x + (y * t[f"{b}.{n['ls1']}"] if n.get("scaled") else y)
        y = _norm(t, f"{b}.{n['norm2']}", x)
        y = _linear(t, f"{b}.{n['fc2']}", F.gelu(_linear(t, f"{b}.{n['fc1']}", y)))
        x = x + (y * t[f"{b}.{n['ls2']}"] if n.get("scaled") else y)
    return _norm(t, n["norm"], x)[:, 0]


def attention(q, k, v, turn=lambda x: x):
    """Attention of HEADS heads over (N, T, WIDTH) each."""
    q, k, v = (x.unflatten(2, (HEADS, WIDTH // HEADS)).transpose(1, 2) for x in (q, k, v))
    weight = (turn(q) @ turn(k).mT / math.sqrt(WIDTH // HEADS)).softmax(3)
    return (weight @ v).transpose(1, 2).flatten(2)


def _linear(t, name, x):
    return F.linear(x, t[f"{name}.weight"], t.get(f"{name}.bias"))


def _norm(t, name, x, eps=1e-6):
    return F.layer_norm(x, x.shape[-1:], t[f"{name}.weight"], t[f"{name}.bias"], eps)


WIDTHS = 8, 12, 16, 24
RESNET = {"layers": [1, 1, 1, 1], "channels": list(WIDTHS)}
"""Arguments that make timm's ResNet-18 as small."""


def resnet():
    """The tensors of a small ResNet of basic blocks under torchvision's names, without its head."""
    draw, before = Draw(2), 64
    draw("conv1.weight", 64, 3, 7, 7)
    draw.norm("bn1", 64, running=True)
    for i, width in enumerate(WIDTHS, 1):
        b = f"layer{i}.0"
        draw(f"{b}.conv1.weight", width, before, 3, 3, scale=0.1)
        draw.norm(f"{b}.bn1", width, running=True)
        draw(f"{b}.conv2.weight", width, width, 3, 3, scale=0.1)
        draw.norm(f"{b}.bn2", width, running=True)
        draw(f"{b}.downsample.0.weight", width, before, 1, 1)
        draw.norm(f"{b}.downsample.1", width, running=True)
        before = width
    return draw.x


def resnet_features(t, x):
    """(N, 3, H, W) → (N, WIDTHS[-1])."""

    def norm(name, x):
        return F.batch_norm(x, *(t[f"{name}.{k}"] for k in ("running_mean", "running_var", "weight", "bias")))

    x = F.max_pool2d(F.relu(norm("bn1", F.conv2d(x, t["conv1.weight"], stride=2, padding=3))), 3, 2, 1)
    for i in range(1, 5):
        b, stride = f"layer{i}.0", 1 if i == 1 else 2
        y = F.relu(norm(f"{b}.bn1", F.conv2d(x, t[f"{b}.conv1.weight"], stride=stride, padding=1)))
        y = norm(f"{b}.bn2", F.conv2d(y, t[f"{b}.conv2.weight"], padding=1))
        x = F.relu(y + norm(f"{b}.downsample.1", F.conv2d(x, t[f"{b}.downsample.0.weight"], stride=stride)))
    return x.mean((2, 3))


def dinov3(transformers=False, registers=4):
    """DINOv3's tensors, as published or as transformers has them: rotary positions, no bias of keys."""
    draw, n = Draw(3), {}
    if transformers:
        n = {"cls": "embeddings.cls_token", "registers": "embeddings.register_tokens", "block": "layer.{}",
             "patch": "embeddings.patch_embeddings", "proj": "attention.o_proj", "fc1": "mlp.up_proj",
             "fc2": "mlp.down_proj", "ls": "layer_scale{}.lambda1"}  # fmt: skip
    else:
        n = {"cls": "cls_token", "registers": "storage_tokens", "block": "blocks.{}", "patch": "patch_embed.proj",
             "proj": "attn.proj", "fc1": "mlp.fc1", "fc2": "mlp.fc2", "ls": "ls{}.gamma"}  # fmt: skip
        draw.x["rope_embed.periods"] = 100.0 ** (torch.arange(WIDTH // HEADS // 4) / (WIDTH // HEADS // 4))
    draw("embeddings.mask_token" if transformers else "mask_token", 1, WIDTH)
    draw(n["cls"], 1, 1, WIDTH)
    draw(n["registers"], 1, registers, WIDTH)
    draw(f"{n['patch']}.weight", WIDTH, 3, PATCH, PATCH, scale=0.1)
    draw(f"{n['patch']}.bias", WIDTH)
    for i in range(DEPTH):
        b = n["block"].format(i)
        draw.norm(f"{b}.norm1", WIDTH)
        if transformers:
            for part in "qkv":
                draw.linear(f"{b}.attention.{part}_proj", WIDTH, WIDTH, bias=part != "k")
        else:
            draw.linear(f"{b}.attn.qkv", 3 * WIDTH, WIDTH)
            mask = torch.ones(3, WIDTH)
            mask[1] = 0
            draw.x[f"{b}.attn.qkv.bias_mask"] = mask.flatten()
        draw.linear(f"{b}.{n['proj']}", WIDTH, WIDTH)
        draw(f"{b}.{n['ls'].format(1)}", WIDTH)
        draw.norm(f"{b}.norm2", WIDTH)
        draw.linear(f"{b}.{n['fc1']}", 2 * WIDTH, WIDTH)
        draw.linear(f"{b}.{n['fc2']}", WIDTH, 2 * WIDTH)
        draw(f"{b}.{n['ls'].format(2)}", WIDTH)
    draw.norm("norm", WIDTH)
    return draw.x, n


def dinov3_features(t, n, x):
    """(N, 3, SIZE, SIZE) → the class token (N, WIDTH)."""
    side = SIZE // PATCH
    x = F.conv2d(x, t[f"{n['patch']}.weight"], t[f"{n['patch']}.bias"], stride=PATCH).flatten(2).mT
    x = torch.cat([t[n[k]].expand(len(x), -1, -1) for k in ("cls", "registers")] + [x], 1)
    at = 2 * (torch.arange(side) + 0.5) / side - 1
    at = torch.stack(torch.meshgrid(at, at, indexing="ij"), 2).flatten(0, 1)  # (T, 2)
    periods = 100.0 ** (torch.arange(WIDTH // HEADS // 4) / (WIDTH // HEADS // 4))
    angle = (2 * math.pi * at[:, :, None] / periods).flatten(1).tile(2)  # (T, WIDTH / HEADS)

    def turn(q):
        first, rest = q[:, :, : -side * side], q[:, :, -side * side :]
        half = torch.cat([-rest[..., rest.shape[-1] // 2 :], rest[..., : rest.shape[-1] // 2]], 3)
        return torch.cat([first, rest * angle.cos() + half * angle.sin()], 2)

    for i in range(DEPTH):
        b = n["block"].format(i)
        y = _norm(t, f"{b}.norm1", x, 1e-5)
        if f"{b}.attn.qkv.weight" in t:
            bias = t[f"{b}.attn.qkv.bias"] * t[f"{b}.attn.qkv.bias_mask"]
            y = F.linear(y, t[f"{b}.attn.qkv.weight"], bias).chunk(3, 2)
        else:
            y = [_linear(t, f"{b}.attention.{part}_proj", y) for part in "qkv"]
        x = x + _linear(t, f"{b}.{n['proj']}", attention(*y, turn)) * t[f"{b}.{n['ls'].format(1)}"]
        y = F.gelu(_linear(t, f"{b}.{n['fc1']}", _norm(t, f"{b}.norm2", x, 1e-5)))
        x = x + _linear(t, f"{b}.{n['fc2']}", y) * t[f"{b}.{n['ls'].format(2)}"]
    return _norm(t, "norm", x, 1e-5)[:, 0]
