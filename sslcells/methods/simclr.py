"""SimCLR, arXiv 2002.05709: two views of an image attract, all other images of the global batch repel."""

from typing import Literal, Self, final

from pydantic import Field, model_validator
from torch import Tensor

from sslcells.data import Batch, ImageSet
from sslcells.losses import DCLLoss, HardNegativeLoss, NTXentLoss, SupConLoss
from sslcells.methods import Outputs
from sslcells.methods._embedding import Embedding, Head, SameLab, check_labs, labs


class Config(Head):
    """Loss and projection head."""

    name: Literal["simclr"] = "simclr"
    temperature: float = Field(0.2, ge=0.003, le=100)
    """Temperature of the similarities."""
    learn_temperature: bool = False
    """Learn the temperature, starting from `temperature`; not with hard_negative."""
    loss: Literal["nt_xent", "decoupled", "hard_negative"] = "nt_xent"
    """NT-Xent; DCL, without the positive in the denominator; or NT-Xent corrected for false and hard negatives."""
    prior: float = Field(0.1, ge=0, lt=1)
    """With hard_negative: the fraction of the negatives assumed to be of the anchor's class."""
    beta: float = Field(0.0, ge=0)
    """With hard_negative: how much more weight a similar negative gets; 0 for the debiased loss without weights."""
    same_source: Literal["negative", "ignore", "positive"] = "negative"
    """Other images of the same source: negatives, left out, or positives."""
    same_lab: SameLab = "any"
    """Negatives: images of any laboratory, or `only` of the anchor's own, so that none teaches the laboratory."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.same_source == "positive" and self.loss != "nt_xent":
            raise ValueError(
                f"same_source=positive uses SupCon's loss, which is nt_xent of groups, and not {self.loss}"
            )
        if self.learn_temperature and self.loss == "hard_negative":
            raise ValueError("learn_temperature goes with nt_xent and decoupled, not with hard_negative")
        if self.same_lab == "only" and self.loss == "hard_negative":
            raise ValueError("same_lab=only goes with nt_xent and decoupled, not with hard_negative")
        return self


@final
class Method(Embedding):
    """A projection head and NT-Xent."""

    def __init__(self, config: Config, features: int, images: ImageSet) -> None:
        super().__init__(config, features, views=2)
        check_labs(config.same_lab, images)
        self._same_source, self._same_lab = config.same_source, config.same_lab
        self._loss = _loss(config)

    def loss(self, outputs: Outputs, batch: Batch, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        """NT-Xent of the two views; SupCon's loss by source where images of one source are positives.

        Where an image occurs more than once in the batch, its other rows are left out of its negatives.
        """
        rows = outputs.rows
        self._loss.figures = self.figures
        if self._same_source == "positive":
            loss: Tensor = self._loss(rows, batch.source.repeat(2), **self._labs(batch, 2))
        else:
            left_out = batch.source if self._same_source == "ignore" else batch.image if self.repeated else None
            loss = self._loss(*rows.chunk(2), left_out, **self._labs(batch, 1))
        return loss, self._loss.stats

    def _labs(self, batch: Batch, views: int) -> dict[str, Tensor | None]:
        """The laboratories, for the losses that take them."""
        return {} if self._same_lab == "any" else {"lab": labs(self._same_lab, batch, views)}


def _loss(config: Config) -> NTXentLoss | DCLLoss | HardNegativeLoss | SupConLoss:
    if config.same_source == "positive":
        return SupConLoss(config.temperature, learnable=config.learn_temperature)
    if config.loss == "hard_negative":
        return HardNegativeLoss(config.temperature, prior=config.prior, beta=config.beta)
    kind = DCLLoss if config.loss == "decoupled" else NTXentLoss
    return kind(config.temperature, learnable=config.learn_temperature)
