"""iBOT, arXiv 2111.07832: DINO's loss of images, and hidden patches assigned as the teacher assigns them unhidden.

With centring=sinkhorn and koleo=0.1 it is DINOv2's recipe, arXiv 2304.07193. The backbone is a Vision Transformer.
"""

import math
from collections.abc import Sequence
from typing import Literal, Self, final

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from sslcells import methods
from sslcells.augment import Draws
from sslcells.data import Batch, ImageSet
from sslcells.losses import at_least_float32, sound
from sslcells.methods._self_distillation import PrototypeHead, SelfDistillation, assigned, of_images
from sslcells.models import tokens


class Config(SelfDistillation):
    """Loss, heads, teacher and hidden patches."""

    name: Literal["ibot"] = "ibot"
    patch_weight: float = Field(1.0, ge=0)
    """Weight of the loss of patches; that of images has 1."""
    patch_head: Literal["shared", "own"] = "shared"
    """Head and prototypes of the patches: those of the images (the paper), or their own (DINOv2)."""
    masking: Literal["blocks", "random"] = "blocks"
    """Which patches are hidden: two rectangles, or patches anywhere."""
    mask_probability: float = Field(0.5, ge=0, le=1)
    """Probability that patches of a full-size view are hidden."""
    min_masked: float = Field(0.1, gt=0, le=1)
    """Smallest fraction of the patches that is hidden in such a view."""
    max_masked: float = Field(0.5, gt=0, le=1)
    """Largest fraction of the patches that is hidden in such a view."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.min_masked > self.max_masked:
            raise ValueError(f"min_masked={self.min_masked} is above max_masked={self.max_masked}")
        if self.norm == "batch":
            raise ValueError("norm=batch: the head sees images and patches, and their statistics differ; none or layer")
        return self


class Heads(nn.Module):
    """The head of the images, and that of the patches where they have their own."""

    def __init__(self, config: Config, features: int) -> None:
        super().__init__()
        self.image = PrototypeHead(config, features)
        self.own = PrototypeHead(config, features) if config.patch_head == "own" else None

    def forward(self, features: Tensor, frozen: bool = False) -> Tensor:
        """(A, F) features of images → (A, K)."""
        scores: Tensor = self.image(features, frozen)
        return scores

    def patch(self, tokens: Tensor, frozen: bool = False) -> Tensor:
        """(M, F) tokens of patches → (M, K)."""
        scores: Tensor = (self.own or self.image)(tokens, frozen)
        return scores


@final
class Method(methods.Masked):
    """Heads with prototypes, which the teacher has too, the token of a hidden patch, and the teacher's centres."""

    views = 2
    negative_views = 0
    exported = "teacher"
    centre: Tensor
    patch_centre: Tensor

    def __init__(self, config: Config, features: int, images: ImageSet, layout: tokens.Layout) -> None:
        super().__init__()
        assert features == layout.width, (features, layout)
        self.head: Heads = Heads(config, features)
        self.mask_token = nn.Parameter(0.02 * torch.randn(layout.width))
        self.momentum, self.local = config.momentum, config.local
        self._config, self._layout = config, layout
        self.register_buffer("centre", torch.zeros(config.prototypes))
        self.register_buffer("patch_centre", torch.zeros(config.prototypes))

    def forward(self, features: Tensor, progress: float) -> Tensor:
        """(V·B, F) features of images, local views last → (V·B, K)."""
        rows: Tensor = self.head(features, frozen=progress < self._config.freeze)
        return rows

    def teacher_copies(self) -> nn.Module:
        """Heads and prototypes."""
        return self.head

    def encode(
        self,
        backbone: nn.Module,
        teacher: methods.Teacher | None,
        crops: Sequence[Tensor],
        draws: Draws,
        progress: float,
    ) -> methods.Outputs:
        """The student sees the full-size views with patches hidden, the teacher the whole ones."""
        assert teacher is not None
        x, prefix = crops[0], self._layout.prefix
        mask = hidden(self._config, self._layout.grid, draws)  # (A, L), on the CPU
        index = mask.flatten().nonzero()[:, 0].to(x.device, non_blocking=True)
        weight = (mask / mask.sum(1, keepdim=True).clamp_min(1))[mask].to(x.device, non_blocking=True)

        seen = tokens.encode(backbone, x, mask=mask.to(x.device, non_blocking=True), mask_token=self.mask_token)
        features = [tokens.features(backbone, seen), *(backbone(small) for small in crops[1:])]
        rows = self.head.patch(seen[:, prefix:].flatten(0, 1)[index], progress < self._config.freeze)
        of_teacher = self._of_teacher(teacher, x, index)
        patches = methods.Patches(rows, of_teacher[1], weight.to(rows.dtype))
        return methods.Outputs(self(torch.cat(features), progress), of_teacher[0], features[0], patches)

    @torch.no_grad()
    def _of_teacher(self, teacher: methods.Teacher, x: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """The teacher's scores of the images (A, K), and of the patches that the student does not see (M, K)."""
        assert isinstance(teacher.head, Heads)
        whole = tokens.encode(teacher.backbone, x)
        patches = whole[:, self._layout.prefix :].flatten(0, 1)[index]
        return teacher.head(tokens.features(teacher.backbone, whole)), teacher.head.patch(patches)

    def loss(self, outputs: methods.Outputs, batch: Batch, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of images + patch_weight · eq. 2: of a view its hidden patches' mean, 0 where none are hidden."""
        assert outputs.teacher is not None
        assert outputs.patches is not None
        c, (rows, teacher, weight) = self._config, outputs.patches
        loss, figures = of_images(c, outputs, self.centre, progress)
        target = assigned(c, at_least_float32(teacher.detach()), self.patch_centre, progress)  # (M, K)
        cross = -(target * (at_least_float32(rows) / c.temperature).log_softmax(1)).sum(1)
        views = len(outputs.teacher)
        patch = (weight * cross).sum() / views * sound(rows) * sound(teacher)
        entropy = (weight * torch.special.entr(target).sum(1)).sum() / weight.sum().clamp_min(1)
        figures |= {
            "patch_loss": patch.detach(),
            "patch_teacher_entropy": entropy / math.log(c.prototypes),
            "masked": weight.new_tensor(len(rows) / (views * self._layout.patches)),
        }
        return loss + c.patch_weight * patch, figures


def hidden(config: Config, grid: tuple[int, int], draws: Draws) -> Tensor:
    """Which patches of each view are hidden: (A, L) bool, at least one in a view of which any are."""
    patches = grid[0] * grid[1]
    some = draws.chance(config.mask_probability)
    count = (draws.uniform(config.min_masked, config.max_masked) * patches).round().clamp_min(1)
    place = draws.order(patches) if config.masking == "random" else _by_blocks(grid, draws)  # (A, L)
    return (place < count[:, None]) & some[:, None]


def _by_blocks(grid: tuple[int, int], draws: Draws) -> Tensor:
    """The places of the patches in an order in which two rectangles grow: (A, L).

    Their centres and aspect ratios (0.3 to 1 / 0.3, as in BEiT, arXiv 2106.08254, algorithm 1) are drawn.
    """
    row, column = torch.meshgrid(*(torch.arange(n) + 0.5 for n in grid), indexing="ij")
    distance = torch.full((len(draws), grid[0] * grid[1]), torch.inf)
    for _ in range(2):
        stretch = draws.uniform(math.log(0.3), -math.log(0.3)).mul(0.5).exp()[:, None]  # of the height by the width
        up = (row.flatten() - draws.uniform(0, grid[0])[:, None]).abs() / stretch
        across = (column.flatten() - draws.uniform(0, grid[1])[:, None]).abs() * stretch
        distance = distance.minimum(up.maximum(across))
    return distance.argsort(dim=1, stable=True).argsort(1)
