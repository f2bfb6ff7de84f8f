"""Methods: what is learned from a batch; one file each.

A method is a module with a `Config(Section)` and a `Method(config, features, images)`; the folder is the registry. It
turns features into rows inside the network that DDP wraps, and rows into a loss outside of it.
"""

import importlib
from abc import ABC, abstractmethod
from typing import Any, Self

from torch import Tensor, nn

from sslcells.config import Section
from sslcells.data import Batch, ImageSet


class Method(nn.Module, ABC):
    """Head and loss of a method; V = `views` augmented views of each image."""

    views: int
    head: nn.Module

    @abstractmethod
    def forward(self, features: Tensor) -> Tensor:
        """(A, F) features, view-major → (A, D) rows."""

    @abstractmethod
    def loss(self, rows: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """(A, D) rows and the batch they came from → the loss, a scalar, and detached figures for the log."""

    def loss_parameters(self) -> list[nn.Parameter]:
        """What the loss learns, beside the head: a temperature, class centres."""
        return [p for name, p in self.named_parameters() if not name.startswith("head.")]


class Classifier(Method, ABC):
    """A method whose rows are logits of the K classes."""

    several: bool
    """whether an image may have several classes"""

    @abstractmethod
    def probabilities(self, rows: Tensor) -> Tensor:
        """(M, K) rows → probabilities (M, K)."""


class Learner(nn.Module):
    """Backbone and method's head: what is trained; the head alone, on a backbone in eval mode, where it is frozen."""

    def __init__(self, backbone: nn.Module, method: Method, frozen: bool = False) -> None:
        super().__init__()
        self.backbone, self.method, self._frozen = backbone, method, frozen
        backbone.requires_grad_(not frozen)
        self.train()

    def train(self, mode: bool = True) -> Self:
        """As every module's, but a frozen backbone stays in eval mode."""
        super().train(mode)
        self.backbone.train(mode and not self._frozen)
        return self

    def forward(self, x: Tensor) -> Tensor:
        """(A, C, S, S) → rows (A, D)."""
        rows: Tensor = self.method(self.backbone(x))
        for parameter in self.method.loss_parameters():
            rows = rows + 0 * parameter.sum()  # so that DDP, which sees no loss, waits for its gradient and averages it
        return rows


def build(config: Section, features: int, images: ImageSet) -> Method:
    """The method that `config` is the section of, on F features, to learn from the images of a train split.

    Raises:
        ConfigError: where these images have not what the method learns from, such as labels.
    """
    module: Any = importlib.import_module(f"sslcells.methods.{config.name}")  # type: ignore[attr-defined]
    method: Method = module.Method(config, features, images)
    return method
