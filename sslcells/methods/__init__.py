"""Methods: what is learned from a batch; one file each.

A method is a module with a `Config(Section)` and a `Method(config, features, images)`; the folder is the registry. A
method turns features into rows inside the network that DDP wraps, and rows into a loss outside of it.
"""

import copy
import importlib
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, Self

import torch
from torch import Tensor, nn

from sslcells import models
from sslcells.augment import Draws
from sslcells.config import Section
from sslcells.data import Batch, ImageSet
from sslcells.models import lora, tokens
from sslcells.models.frozen import FrozenEncoder


class Local(NamedTuple):
    """Small views of parts of an image, beside the full-size ones: multi-crop, arXiv 2006.09882, section 3.2."""

    views: int
    size: int
    """height and width in pixels"""
    scale: tuple[float, float]
    """smallest and largest crop, as a fraction of the image's area"""


class Patches(NamedTuple):
    """The M hidden patches of a rank's full-size views, in any order."""

    rows: Tensor
    """(M, D) of the student"""
    teacher: Tensor
    """(M, D) of the teacher, without gradient"""
    weight: Tensor
    """(M,) 1 / hidden patches of the same view"""


class Outputs(NamedTuple):
    """What a `Learner` returns for the A rows of a batch, view-major, local views last."""

    rows: Tensor
    """(A + L·B, D) of the student"""
    teacher: Tensor | None = None
    """(A, D) of the teacher, for the full-size views, without gradient; None where there is no teacher. Of a frozen one
    (A, D'), its features"""
    features: Tensor | None = None
    """(A, F) of the student's backbone, for the full-size views"""
    patches: Patches | None = None
    """of methods that compare hidden patches"""


class Method(nn.Module, ABC):
    """Head and loss of a method; V = `views` augmented views of each image.

    `progress` is the fraction of the training's steps that are finished, 0 to 1.
    """

    views: int
    head: nn.Module
    negative_views: int | None = None
    """how many views of every other image are negatives of a row; None for all, 0 where there are no negatives"""
    queued: int = 0
    """negatives of a row from earlier steps"""
    local: Local | None = None
    """the small views of each image; their rows come after those of the full-size views"""
    frozen_teacher: FrozenEncoder | None = None
    """an encoder that never learns; it sees the full-size views as it was trained to"""
    about: Sequence[str] = ()
    """what the log says of it, in lines"""
    momentum: float
    """of the teacher at the first step; methods with a teacher set it"""
    exported: Literal["student", "teacher"] = "student"
    """whose backbone is evaluated and exported"""
    seed: int = 0
    """of the run, for what the loss draws at random; `learner.build` sets it"""
    repeated: bool = True
    """True if an image may occur more than once in a global batch; the train loop sets it from the sampler"""
    figures: bool = True
    """True if the next loss's figures are read; else it may leave out what costs time. The train loop sets it."""

    @property
    def views_in_all(self) -> int:
        """Rows per image: its full-size views and its local ones."""
        return self.views + (self.local.views if self.local else 0)

    def negatives(self, images: int) -> int:
        """Negatives of a row in a global batch of `images`."""
        views = self.views if self.negative_views is None else self.negative_views
        return views * (images - 1) + self.queued

    @abstractmethod
    def forward(self, features: Tensor, progress: float) -> Tensor:
        """(A, F) features, view-major → (A, D) rows."""

    @abstractmethod
    def loss(self, outputs: Outputs, batch: Batch, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        """The rows and the batch they came from → the loss, a scalar, and detached figures for the log."""

    @abstractmethod
    def teacher_copies(self) -> nn.Module | None:
        """The part of the method, (A, F) → (A, D), that the teacher keeps a copy of; None for no teacher."""

    def loss_parameters(self) -> list[nn.Parameter]:
        """What the loss learns besides the head: a temperature, class centres."""
        return [p for name, p in self.named_parameters() if not name.startswith("head.")]


class Teacher(nn.Module):
    """An exponential moving average of the backbone and of the head after it.

    BatchNorm uses the batch's statistics, as the student's does; dropout and drop path are off. Adapters of the
    backbone are merged: the average is of the weights that the student computes with.
    """

    def __init__(self, backbone: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.backbone, self.head = copy.deepcopy(backbone), copy.deepcopy(head)
        lora.merge(self.backbone)  # a mean of adapters is no mean of what they do
        self.requires_grad_(False)
        models.without_dropout(self)

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """(A, C, S, S) → rows (A, D), without gradient."""
        rows: Tensor = self.head(self.backbone(x))
        return rows

    @torch.no_grad()
    def follow(self, backbone: nn.Module, head: nn.Module, momentum: float) -> None:
        """Every weight becomes momentum · itself + (1 − momentum) · the student's, in the weights' own float32."""
        theirs = lora.merged(backbone)
        for name, ours in self.backbone.named_parameters():
            ours.lerp_(theirs[name], 1 - momentum)
        for ours, of_head in zip(self.head.parameters(), head.parameters(), strict=True):
            ours.lerp_(of_head, 1 - momentum)


class Classifier(Method, ABC):
    """A method whose rows are logits of the K classes."""

    several: bool
    """True if an image may have more than one class"""

    @abstractmethod
    def probabilities(self, rows: Tensor) -> Tensor:
        """(M, K) rows → probabilities (M, K)."""


class Masked(Method, ABC):
    """A method that hides patches of the full-size views from a Vision Transformer: masked image modelling.

    It is built as `Method(config, features, images, layout)`; `layout` says how images are cut into patches.
    """

    @abstractmethod
    def encode(
        self, backbone: nn.Module, teacher: Teacher | None, crops: Sequence[Tensor], draws: Draws, progress: float
    ) -> Outputs:
        """Views as `Learner.forward` has them → Outputs, by way of `models.tokens`.

        `draws` has a stream for each of the A views: the same for an image, view and step on any rank and micro-batch.
        """


class Reconstructing(Masked, ABC):
    """A method that predicts the pixels of hidden patches; a picture shows them at the end of a training."""

    @abstractmethod
    def reconstruct(self, backbone: nn.Module, x: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
        """Views (A, C, S, S) → what the backbone sees of them, with zeros elsewhere, and with these as predicted."""


MASKS = 1 << 16
"""Number of the view from which on `Draws` is for hidden patches: far from the views that augmentation draws for."""


class Learner(nn.Module):
    """What is trained: the backbone and the method's head, and the teacher that follows them where there is one.

    What of the backbone requires no gradient is not trained; its modules named in `fixed`, and the teacher's, stay in
    eval mode, "" being all of it.
    """

    teacher: Teacher | None

    def __init__(self, backbone: nn.Module, method: Method, fixed: Sequence[str] = ()) -> None:
        super().__init__()
        self.backbone, self.method, self._fixed = backbone, method, fixed
        # The method's own buffers, such as a queue, are equal on all ranks: DDP need not send them each forward pass.
        self._ddp_params_and_buffers_to_ignore = [f"method.{name}" for name, _ in method.named_buffers(recurse=False)]
        copied = method.teacher_copies()
        self.teacher = None if copied is None else Teacher(backbone, copied)
        self.train()

    def train(self, mode: bool = True) -> Self:
        """Set training mode as in every module; what of the backbone is fixed stays in eval mode."""
        super().train(mode)
        for name in self._fixed:
            self.backbone.get_submodule(name).eval()
            if self.teacher is not None:
                self.teacher.backbone.get_submodule(name).eval()
        return self

    def forward(self, *crops: Tensor, progress: float, draws: Draws | None = None) -> Outputs:
        """Full-size views (A, C, S, S), local views (L·B, C, s, s) where the method has them → Outputs.

        Where it has a frozen teacher, that one's views (A, C, T, T) come last. `draws`, from view `MASKS` on, is for
        methods that hide patches.
        """
        outputs = self._outputs(crops, progress, draws)
        rows = outputs.rows
        for parameter in self.method.loss_parameters():
            rows = rows + 0 * parameter.sum()  # DDP sees no loss: this makes it wait for the gradient and average it
        return outputs._replace(rows=rows)

    def _outputs(self, crops: Sequence[Tensor], progress: float, draws: Draws | None) -> Outputs:
        if isinstance(self.method, Masked):
            assert draws is not None
            return self.method.encode(self.backbone, self.teacher, crops, draws, progress)
        frozen = self.method.frozen_teacher
        features = [self.backbone(x) for x in (crops if frozen is None else crops[:-1])]
        rows = self.method(torch.cat(features), progress)
        if frozen is not None:
            return Outputs(rows, frozen(crops[-1]), features[0])
        return Outputs(rows, None if self.teacher is None else self.teacher(crops[0]), features[0])

    def follow(self, progress: float) -> None:
        """Move the teacher after the optimizer's step; momentum rises to 1 by half a cosine (arXiv 2006.07733, 3.2)."""
        copied = self.method.teacher_copies()
        if self.teacher is not None and copied is not None:
            momentum = 1 - (1 - self.method.momentum) * (1 + math.cos(math.pi * progress)) / 2
            self.teacher.follow(self.backbone, copied, momentum)

    def no_weight_decay(self) -> set[str]:
        """The backbone's parameters that timm takes no weight decay of: positional embeddings, tokens."""
        named = getattr(self.backbone, "no_weight_decay", set[str])
        return {f"backbone.{name}" for name in named()}

    @property
    def encoder(self) -> nn.Module:
        """The backbone that is evaluated and exported."""
        if self.teacher is not None and self.method.exported == "teacher":
            return self.teacher.backbone
        return self.backbone


class Logits(nn.Module):
    """A trained classifier as one network: (N, C, S, S) → logits (N, K)."""

    def __init__(self, learner: Learner) -> None:
        super().__init__()
        self.learner = learner
        self.training = learner.training

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, S, S) → (N, K)."""
        outputs: Outputs = self.learner(x, progress=1.0)
        return outputs.rows


def build(config: Section, features: int, images: ImageSet, layout: tokens.Layout | None = None) -> Method:
    """The method whose section `config` is, on F features, for the images of a train split.

    `layout` is needed by methods that hide patches.

    Raises:
        ConfigError: if the images lack something that the method needs, such as labels.
    """
    method: Method = _class_of(config)(config, features, images, *([layout] if masks(config) else []))
    return method


def masks(config: Section) -> bool:
    """True where the method of this section is Masked."""
    return issubclass(_class_of(config), Masked)


def classifies(config: Section) -> bool:
    """True where the method of this section is a Classifier."""
    return issubclass(_class_of(config), Classifier)


def _class_of(config: Section) -> Any:
    return importlib.import_module(f"sslcells.methods.{config.name}").Method  # type: ignore[attr-defined]
