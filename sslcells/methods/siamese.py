"""A siamese network that judges pairs, the same or not: Koch et al. 2015 (`difference`), and two other heads.

https://www.cs.cmu.edu/~rsalakhu/papers/oneshot1.pdf

Every row of the global batch is an anchor with one positive and one negative partner, drawn from the global batch by
what images it holds. `concat` judges (a, b) side by side and so says one thing of (a, b) and another of (b, a): its
judgement is no distance, and depends on who asks. `difference` judges |a − b|, `cosine` is the cosine; both are
symmetric.
"""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from sslcells.data import Batch, ImageSet
from sslcells.losses import gather_ids, gather_with_grad, sound
from sslcells.methods import Outputs
from sslcells.methods._embedding import Embedding, Head, Positive, check_positives, drawn_by, positives


class Config(Head):
    """The judge of pairs, and the embedding head below it."""

    name: Literal["siamese"] = "siamese"
    judge: Literal["concat", "difference", "cosine"] = "difference"
    """A perceptron on both rows or on their absolute difference, with binary cross-entropy; or the cosine, regressed
    to 1 and 0."""
    positive: Positive = "view"
    """Who is whose positive: the other view of the image (no labels needed), its class, or its source."""
    same_source: Literal["negative", "ignore"] = "negative"
    """Whether an image of the same source, when it is no positive, may be a negative partner."""
    views: int = Field(2, ge=1, le=2)
    """Augmented views of each image; 1 is enough with labels."""


class Method(Embedding):
    """An embedding head, and a judge of pairs of its rows."""

    def __init__(self, config: Config, features: int, images: ImageSet) -> None:
        super().__init__(config, features, views=2 if config.positive == "view" else config.views)
        check_positives(config.positive, images, self.views)
        self._config = config
        width = {"concat": 2 * config.dimension, "difference": config.dimension, "cosine": 0}[config.judge]
        layers = [nn.Linear(width, config.hidden), nn.ReLU(), nn.Linear(config.hidden, 1)] if width else []
        self._judge = nn.Sequential(*layers)

    def judge(self, a: Tensor, b: Tensor) -> Tensor:
        """How much the same two rows are: (N, D) twice → (N,), a logit, or the cosine."""
        if self._config.judge == "cosine":
            return F.cosine_similarity(a, b)
        pair = torch.cat([a, b], 1) if self._config.judge == "concat" else (a - b).abs()
        logit: Tensor = self._judge(pair)
        return logit[:, 0]

    def loss(self, outputs: Outputs, batch: Batch, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean over the pairs of the global batch, which every rank judges; and how many are judged rightly."""
        z = gather_with_grad(outputs.rows.float(), self.views)  # (R, D)
        whole = Batch(z, *(gather_ids(ids) for ids in batch[1:]))
        source = whole.source.repeat(self.views) if self._config.same_source == "ignore" else None
        generator = torch.Generator().manual_seed(drawn_by(batch))
        chosen, exists = partners(positives(self._config.positive, whole, self.views), source, generator)
        with torch.autocast(z.device.type, enabled=False):
            said = self.judge(z.repeat(2, 1), z[chosen.flatten()])  # (2R,): the positive pairs, then the negative ones
        same = torch.arange(2 * len(z), device=z.device) < len(z)
        if self._config.judge == "cosine":
            each, right = (said - same.to(said)).square(), (said > 0.5) == same
        else:
            each, right = F.binary_cross_entropy_with_logits(said, same.to(said), reduction="none"), (said > 0) == same
        exists, count = exists.flatten(), exists.sum().clamp_min(1)
        return (each * exists).sum() / count * sound(z), {"pair_accuracy": (right & exists).sum() / count}


def partners(positive: Tensor, source: Tensor | None, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A positive and a negative partner of each row: (R,) ids → (2, R) indices, and whether there is one, (2, R) bool.

    Both are drawn evenly, the negative from all rows of other ids; one that is of the row's source, where sources are
    given, does not count.
    """
    count = len(positive)
    order = positive.argsort(stable=True)
    _, group, size = positive[order].unique_consecutive(return_inverse=True, return_counts=True)  # type: ignore[no-untyped-call]
    n = size[group]  # (R,) of the row at each place of `order`
    first = (size.cumsum(0) - size)[group]
    place = torch.arange(count, device=positive.device)
    number = torch.randint(2**31, (2, count), generator=generator).to(positive.device)
    own = first + (place - first + 1 + number[0] % (n - 1).clamp_min(1)) % n
    other = (first + n + number[1] % (count - n).clamp_min(1)) % count
    chosen = torch.empty_like(number)
    chosen[:, order] = order[torch.stack([own, other])]
    exists = torch.empty_like(chosen, dtype=torch.bool)
    exists[:, order] = torch.stack([n > 1, n < count])
    if source is not None:
        exists[1] &= source != source[chosen[1]]
    return chosen, exists
