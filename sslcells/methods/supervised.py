"""A classifier trained on labels: from scratch, fine-tuning, or, with a frozen encoder, a linear probe."""

from typing import Literal, final

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from sslcells import methods, ranks
from sslcells.config import ConfigError, Section
from sslcells.data import Batch, ImageSet
from sslcells.losses import sound
from sslcells.models.heads import Norm, projection


class Config(Section):
    """Loss and classification head."""

    name: Literal["supervised"] = "supervised"
    loss: Literal["cross_entropy", "focal", "bce"] = "cross_entropy"
    """cross_entropy or focal for one class per image; bce for several classes per image (ChestMNIST)."""
    gamma: float = Field(2.0, ge=0)
    """With focal: how strongly well-classified images are down-weighted; 0 is cross-entropy."""
    class_weights: Literal["none", "balanced"] = "none"
    """balanced: weight N / (K · images of its class) per image; with bce, negatives / positives of the class."""
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    """With cross_entropy: the fraction of the target that is spread over all classes."""
    hidden: int = Field(256, ge=1)
    """Width of the head's hidden layers."""
    layers: int = Field(1, ge=1)
    """Linear maps in the head; 1 for a linear classifier."""
    norm: Norm = "batch"
    """Normalisation in the head's hidden layers."""
    standardise: bool = False
    """Normalise each feature to mean 0 and standard deviation 1 over the batch before the head, as a probe on a frozen
    encoder needs: BatchNorm without scale and shift, arXiv 2111.06377, appendix A."""


@final
class Method(methods.Classifier):
    """A head with one logit per class."""

    views = 1
    negative_views = 0
    _weights: Tensor
    _targets: Tensor | None

    def __init__(self, config: Config, features: int, images: ImageSet) -> None:
        super().__init__()
        self._config = config
        self.several = config.loss == "bce"
        _check(config, images)
        targets = _targets(images) if self.several else None
        # (K,) images of each class
        shown = _counts(images) if targets is None else targets.sum(0)
        known = int(shown.sum()) if targets is None else len(targets)
        weights = torch.ones(len(shown))
        if config.class_weights == "balanced":
            rest = known - shown if self.several else torch.full_like(shown, known) / len(shown)
            weights = torch.where(shown > 0, rest / shown.clamp(min=1), 0.0).float()
        self.register_buffer("_weights", weights, persistent=False)
        self.register_buffer("_targets", None if targets is None else targets.to(torch.uint8), persistent=False)
        self.head = _logits(features, config, len(shown))

    def forward(self, features: Tensor, progress: float) -> Tensor:
        """(B, F) → logits (B, K)."""
        rows: Tensor = self.head(features)
        return rows

    def teacher_copies(self) -> None:
        """There is no teacher."""

    def loss(self, outputs: methods.Outputs, batch: Batch, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean loss over the labelled images of the global batch, weighted by class; 0 if none is labelled."""
        rows = outputs.rows.float()
        if self._targets is not None:
            target = self._targets[batch.image].float()  # (B, K)
            each = F.binary_cross_entropy_with_logits(rows, target, pos_weight=self._weights, reduction="none").mean(1)
            weight = torch.ones_like(each)
            right = ((rows > 0) == (target > 0)).float().mean(1)
        else:
            known, label = batch.label >= 0, batch.label.clamp(min=0)
            each = self._of_one_class(rows, label)
            weight = self._weights[label] * known
            right = (rows.argmax(1) == label).float() * known
        total = ranks.gather(torch.stack([weight.sum(), weight.count_nonzero()])[None]).sum(0)
        world = ranks.world()
        figures = {"top1": (right * (weight > 0)).detach().sum() * world / total[1].clamp(min=1)}
        mean = (weight * each).sum() * world / total[0].clamp(min=torch.finfo(torch.float32).tiny)
        return mean * sound(rows), figures

    def probabilities(self, rows: Tensor) -> Tensor:
        """Logits (M, K) → softmax over the classes, or sigmoids where an image may have several classes."""
        return rows.float().sigmoid() if self.several else rows.float().softmax(1)

    def _of_one_class(self, rows: Tensor, label: Tensor) -> Tensor:
        """(B,): cross-entropy, or focal loss, arXiv 1708.02002, equation 4: −(1 − p)^γ log p."""
        if self._config.loss == "cross_entropy":
            return F.cross_entropy(rows, label, reduction="none", label_smoothing=self._config.label_smoothing)
        log_p = rows.log_softmax(1).gather(1, label[:, None])[:, 0]
        return -((1 - log_p.exp()) ** self._config.gamma) * log_p


def _logits(features: int, config: Config, classes: int) -> nn.Module:
    """The head, (N, F) → (N, K); its last map has a bias, as classes are not equally frequent."""
    *before, last = projection(features, config.hidden, classes, config.layers, config.norm).children()
    assert isinstance(last, nn.Linear)
    first = [nn.BatchNorm1d(features, affine=False)] if config.standardise else []
    return nn.Sequential(*first, *before, nn.Linear(last.in_features, classes))


def _check(config: Config, images: ImageSet) -> None:
    """Raise a ConfigError if these images lack the labels that the loss needs."""
    if config.loss == "bce":
        if images.targets is None and not images.labelled:
            raise ConfigError("method.loss=bce learns from labels, and the train split has none")
        if images.targets is None and (images.labels < 0).any():
            raise ConfigError("method.loss=bce takes every image as labelled; some of these are not")
    elif images.targets is not None:
        raise ConfigError(f"method.loss={config.loss}: these images have several classes each: method.loss=bce")
    elif not images.labelled:
        raise ConfigError("method.name=supervised learns from labels, and the train split has none")


def _targets(images: ImageSet) -> Tensor:
    """(N, K) of 0 and 1: the classes of each image."""
    return images.targets.long() if images.targets is not None else F.one_hot(images.labels, len(images.classes))


def _counts(images: ImageSet) -> Tensor:
    """(K,) labelled images of each class."""
    return images.labels[images.labels >= 0].bincount(minlength=len(images.classes))
