"""Distillation: a small student learns the features of a frozen teacher, or how similar it finds images."""

from typing import Literal, final

import torch
from pydantic import Field
from torch import Tensor, nn

from sslcells import methods
from sslcells.config import ConfigError, Section
from sslcells.data import Batch, ImageSet
from sslcells.losses import FeatureDistillationLoss, SimilarityDistillationLoss
from sslcells.models.frozen import Frozen, FrozenEncoder, opened
from sslcells.models.heads import Norm, projection


class Config(Section):
    """Teacher, loss and projection head."""

    name: Literal["distill"] = "distill"
    teacher: Frozen
    """The encoder to learn from: its name alone, or its fields, such as `teacher.weights` and `teacher.size`. It sees
    the student's views at its own size, with its own mean and std; a checkpoint does not hold it."""
    loss: Literal["cosine", "mse", "similarity"] = "cosine"
    """`cosine` and `mse` (the share of the features' variance that is not predicted) bring projected features to the
    teacher's; `similarity` brings the cosines between all images of the global batch to the teacher's (1 − CKA), and
    needs no projection."""
    views: Literal[1, 2] = 1
    """Augmented views of an image in a batch."""
    hidden: int = Field(512, ge=1)
    """Width of the head's hidden layers; the teacher's features say how wide the rows are."""
    layers: int = Field(1, ge=1)
    """Linear maps in the head; with one, whatever it learns can be read linearly from the student's features."""
    norm: Norm = "batch"
    """Normalisation in the head's hidden layers."""


@final
class Method(methods.Method):
    """A head that predicts the teacher's features, or none."""

    negative_views = 0
    frozen_teacher: FrozenEncoder

    def __init__(self, config: Config, features: int, images: ImageSet) -> None:
        super().__init__()
        self.views = config.views
        try:
            self.frozen_teacher = opened(config.teacher, images.channels, "method.teacher.")
        except ConfigError as error:
            raise ConfigError(f"method.teacher={error}") from None
        self.about = (f"teacher: {self.frozen_teacher.about()}", *self.frozen_teacher.account)
        self._digest = self.frozen_teacher.digest()
        self._loss: FeatureDistillationLoss | SimilarityDistillationLoss
        if config.loss == "similarity":
            self.head, self._loss = nn.Identity(), SimilarityDistillationLoss()
        else:
            self.head = _predictor(features, self.frozen_teacher.features, config)
            self._loss = FeatureDistillationLoss(config.loss)

    def forward(self, features: Tensor, progress: float) -> Tensor:
        """(V·B, F) → (V·B, D), D being the teacher's width, or F where similarities are learned."""
        rows: Tensor = self.head(features)
        return rows

    def teacher_copies(self) -> None:
        """The teacher follows nobody."""

    def loss(self, outputs: methods.Outputs, batch: Batch, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        """The distance of the rows from what the teacher says of the same views."""
        assert outputs.teacher is not None
        loss: Tensor = self._loss(outputs.rows, outputs.teacher)
        return loss, self._loss.stats

    def get_extra_state(self) -> Tensor:
        """What a checkpoint keeps of the teacher: its SHA-256, (32,) uint8."""
        return torch.tensor(list(bytes.fromhex(self._digest)), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        """Check that a checkpoint was made with this teacher.

        Raises:
            ConfigError: if it was another one.
        """
        before = bytes(state.tolist()).hex()
        if before != self._digest:
            raise ConfigError(
                f"method.teacher={self.frozen_teacher.name}: its weights or how it prepares images are not those that "
                f"this run began with (sha256 {self._digest[:16]}…, then {before[:16]}…); give back the earlier ones, "
                f"or choose another name="
            )


def _predictor(features: int, width: int, config: Config) -> nn.Module:
    """(N, F) → (N, D) with a bias at the end, as a teacher's features have a mean."""
    *before, last = projection(features, config.hidden, width, config.layers, config.norm).children()
    assert isinstance(last, nn.Linear)
    return nn.Sequential(*before, nn.Linear(last.in_features, width))
