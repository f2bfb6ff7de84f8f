"""A siamese network that classifies pairs as same or different: Koch et al. 2015 (`difference`), and two other heads.

https://www.cs.cmu.edu/~rsalakhu/papers/oneshot1.pdf

Every row of the global batch is an anchor with one positive and one negative partner, sampled from the global batch
with a seed made from its image ids. `concat` classifies (a, b) side by side, so its answers for (a, b) and (b, a)
differ: it is not a distance. `difference` classifies |a − b|, `cosine` is the cosine; both are symmetric.
"""

from typing import Literal, final

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from sslcells.data import Batch, ImageSet
from sslcells.losses import gather_ids, gather_with_grad, sound
from sslcells.methods import Outputs
from sslcells.methods._embedding import Embedding, Head, Positive, check_positives, positives, seed_of


class Config(Head):
    """The classifier of pairs, and the embedding head below it."""

    name: Literal["siamese"] = "siamese"
    judge: Literal["concat", "difference", "cosine"] = "difference"
    """concat, difference: a perceptron on both rows, or on their absolute difference, with binary cross-entropy;
    cosine: the cosine, regressed to 1 for positive and 0 for negative pairs."""
    positive: Positive = "view"
    """Positives: the other view of the image (no labels needed), images of its class, or images of its source."""
    same_source: Literal["negative", "ignore"] = "negative"
    """Images of the same source that are not positives: possible negative partners, or left out."""
    views: int = Field(2, ge=1, le=2)
    """Augmented views of each image; 1 is enough with labels."""


@final
class Method(Embedding):
    """An embedding head, and a classifier of pairs of its rows."""

    def __init__(self, config: Config, features: int, images: ImageSet) -> None:
        super().__init__(config, features, views=2 if config.positive == "view" else config.views)
        check_positives(config.positive, images, self.views)
        self._config = config
        width = {"concat": 2 * config.dimension, "difference": config.dimension, "cosine": 0}[config.judge]
        layers = [nn.Linear(width, config.hidden), nn.ReLU(), nn.Linear(config.hidden, 1)] if width else []
        self._judge = nn.Sequential(*layers)

    def judge(self, a: Tensor, b: Tensor) -> Tensor:
        """Score of each pair for being the same: (N, D) twice → (N,), a logit, or the cosine."""
        if self._config.judge == "cosine":
            return F.cosine_similarity(a, b)
        pair = torch.cat([a, b], 1) if self._config.judge == "concat" else (a - b).abs()
        logit: Tensor = self._judge(pair)
        return logit[:, 0]

    def loss(self, outputs: Outputs, batch: Batch, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean over the pairs of the global batch, on every rank, and the fraction classified correctly."""
        z = gather_with_grad(outputs.rows.float(), self.views)  # (R, D)
        whole = Batch(z, *(gather_ids(ids) for ids in batch[1:]))
        source = whole.source.repeat(self.views) if self._config.same_source == "ignore" else None
        generator = torch.Generator().manual_seed(seed_of(batch))
        chosen, exists = partners(positives(self._config.positive, whole, self.views), source, generator)
        with torch.autocast(z.device.type, enabled=False):
            score = self.judge(z.repeat(2, 1), z[chosen.flatten()])  # (2R,): the positive pairs, then the negative ones
        same = torch.arange(2 * len(z), device=z.device) < len(z)
        if self._config.judge == "cosine":
            each, right = (score - same.to(score)).square(), (score > 0.5) == same
        else:
            each, right = (
                F.binary_cross_entropy_with_logits(score, same.to(score), reduction="none"),
                (score > 0) == same,
            )
        exists, count = exists.flatten(), exists.sum().clamp_min(1)
        return (each * exists).sum() / count * sound(z), {"pair_accuracy": (right & exists).sum() / count}


def partners(positive: Tensor, source: Tensor | None, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A positive and a negative partner of each row: (R,) ids → (2, R) indices, and (2, R) bool: True if there is one.

    Both are sampled uniformly, the negative from all rows of other ids. Where sources are given, a negative of the
    row's own source counts as none.
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
