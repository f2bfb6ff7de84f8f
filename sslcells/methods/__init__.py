"""Methods: what is learned from a batch; one file each.

A method is a module with a `Config(Section)` and a `Method(config, features, images)`; the folder is the registry. It
turns features into rows inside the network that DDP wraps, and rows into a loss outside of it.
"""

import copy
import importlib
import math
from abc import ABC, abstractmethod
from typing import Any, Literal, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sslcells import models
from sslcells.config import Section
from sslcells.data import Batch, ImageSet


class Local(NamedTuple):
    """Small views of parts of an image, beside the full-size ones: multi-crop, arXiv 2006.09882, section 3.2."""

    views: int
    size: int
    """height and width in pixels"""
    scale: tuple[float, float]
    """smallest and largest crop, as a part of the image's area"""


class Method(nn.Module, ABC):
    """Head and loss of a method; V = `views` augmented views of each image."""

    views: int
    head: nn.Module
    negative_views: int | None = None
    """how many views of every other image are negatives of a row; none for all, 0 where there are no negatives"""
    queued: int = 0
    """negatives of a row from earlier steps"""
    local: Local | None = None
    """the small views of each image, whose rows come after those of the others"""
    momentum: float | None = None
    """of the teacher, at the first step; none where there is no teacher"""
    taught: str = "head"
    """the part of the method that the teacher has a copy of; it takes features"""
    delivers: Literal["student", "teacher"] = "student"
    """whose backbone is evaluated and exported"""
    repeated: bool = True
    """whether an image may come more than once in a global batch; the loop says what the sampler does"""
    done: float = 0.0
    """part of the training's steps that are done; the loop says it before each step"""

    @property
    def views_in_all(self) -> int:
        """Rows of each image: of its full-size views and of its local ones."""
        return self.views + (self.local.views if self.local else 0)

    def negatives(self, images: int) -> int:
        """Negatives of a row in a global batch of so many images."""
        views = self.views if self.negative_views is None else self.negative_views
        return views * (images - 1) + self.queued

    @abstractmethod
    def forward(self, features: Tensor) -> Tensor:
        """(A, F) features, view-major → (A, D) rows."""

    @abstractmethod
    def loss(self, rows: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """(A, D) rows and the batch they came from → the loss, a scalar, and detached figures for the log.

        Where there is a teacher, rows are those of the student and, as further columns, those of the teacher, which
        carry no gradient; those of the teacher for local views are zeros.
        """

    def loss_parameters(self) -> list[nn.Parameter]:
        """What the loss learns, beside the head: a temperature, class centres."""
        return [p for name, p in self.named_parameters() if not name.startswith("head.")]


class Teacher(nn.Module):
    """An exponential moving average of the backbone and of the head that it is followed by.

    BatchNorm sees the batch, as the student's does; dropout and drop path are off.
    """

    def __init__(self, backbone: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.backbone, self.head = copy.deepcopy(backbone), copy.deepcopy(head)
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
        for ours, theirs in zip(self.parameters(), [*backbone.parameters(), *head.parameters()], strict=True):
            ours.lerp_(theirs, 1 - momentum)


class Classifier(Method, ABC):
    """A method whose rows are logits of the K classes."""

    several: bool
    """whether an image may have several classes"""

    @abstractmethod
    def probabilities(self, rows: Tensor) -> Tensor:
        """(M, K) rows → probabilities (M, K)."""


class Learner(nn.Module):
    """Backbone and method's head: what is trained; the head alone, on a backbone in eval mode, where it is frozen.

    And the teacher that follows them, where the method has one.
    """

    teacher: Teacher | None

    def __init__(self, backbone: nn.Module, method: Method, frozen: bool = False) -> None:
        super().__init__()
        self.backbone, self.method, self._frozen = backbone, method, frozen
        # What a method keeps, such as a queue, is the same on every rank: DDP need not send it at every forward pass.
        self._ddp_params_and_buffers_to_ignore = [f"method.{name}" for name, _ in method.named_buffers(recurse=False)]
        backbone.requires_grad_(not frozen)
        has = method.momentum is not None
        self.teacher = Teacher(backbone, method.get_submodule(method.taught)) if has else None
        self.train()

    def train(self, mode: bool = True) -> Self:
        """As every module's, but a frozen backbone stays in eval mode."""
        super().train(mode)
        self.backbone.train(mode and not self._frozen)
        return self

    def forward(self, *crops: Tensor) -> Tensor:
        """(A, C, S, S), and the local views (L·B, C, s, s) where the method has some → rows (A + L·B, D).

        With a teacher D is the sum of the widths of its rows and of the student's.
        """
        rows: Tensor = self.method(torch.cat([self.backbone(x) for x in crops]))
        for parameter in self.method.loss_parameters():
            rows = rows + 0 * parameter.sum()  # so that DDP, which sees no loss, waits for its gradient and averages it
        if self.teacher is None:
            return rows
        taught = self.teacher(crops[0])
        taught = F.pad(taught, (0, 0, 0, len(rows) - len(taught)))
        return torch.cat([rows, taught.to(rows.dtype)], 1)

    def follow(self) -> None:
        """Move the teacher, after the optimizer's step: momentum goes to 1 by half a cosine (arXiv 2006.07733, 3.2)."""
        if self.teacher is not None and self.method.momentum is not None:
            momentum = 1 - (1 - self.method.momentum) * (1 + math.cos(math.pi * self.method.done)) / 2
            self.teacher.follow(self.backbone, self.method.get_submodule(self.method.taught), momentum)

    def no_weight_decay(self) -> set[str]:
        """The backbone's parameters that timm takes no weight decay of: positional embeddings, tokens."""
        named = getattr(self.backbone, "no_weight_decay", set[str])
        return {f"backbone.{name}" for name in named()}

    @property
    def encoder(self) -> nn.Module:
        """The backbone that is evaluated and exported."""
        return (
            self.teacher.backbone if self.teacher is not None and self.method.delivers == "teacher" else self.backbone
        )


def build(config: Section, features: int, images: ImageSet) -> Method:
    """The method that `config` is the section of, on F features, to learn from the images of a train split.

    Raises:
        ConfigError: where these images have not what the method learns from, such as labels.
    """
    method: Method = _class_of(config)(config, features, images)
    return method


def classifies(config: Section) -> bool:
    """Whether the method that `config` is the section of is a Classifier."""
    return issubclass(_class_of(config), Classifier)


def _class_of(config: Section) -> Any:
    return importlib.import_module(f"sslcells.methods.{config.name}").Method  # type: ignore[attr-defined]
