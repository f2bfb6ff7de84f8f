"""Momentum contrast: rows against keys without gradient, from the global batch and from a queue."""

from typing import Any, final

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from sslcells import ranks
from sslcells.losses import torch_engine
from sslcells.losses._rows import check_ids, check_views, gather_rows, sound, unit


@final
class MoCoLoss(nn.Module):
    """InfoNCE of queries and keys, arXiv 1911.05722, eq. 1, with the keys of the whole global batch.

    A query's own key is its positive. All other keys are negatives: those of all ranks (arXiv 2104.02057, algorithm 1)
    and those of a queue where one is given; except, where image ids are given, the keys of the query's own image. The
    mean over ranks is the loss of the global batch. Keys carry no gradient, so backward needs no collective. Computed
    in float32 (float64 stays), also under autocast; one tile of similarities is kept at a time.

    After each call `stats` holds detached scalars of this rank: `accuracy`, the fraction of queries that are nearest to
    their own key, and `positive_similarity`.

    Example:
        >>> q, k = torch.eye(3), torch.eye(3)
        >>> print(f"{MoCoLoss(temperature=0.5)(q, k):.3f}")  # log(1 + 2 exp(−1/0.5))
        0.240
        >>> print(f"{MoCoLoss(temperature=0.5)(q, k, queue=-torch.eye(3)):.3f}")  # three more negatives
        0.444
    """

    def __init__(self, temperature: float = 0.2) -> None:
        super().__init__()
        if temperature <= 0:
            raise ValueError(f"temperature={temperature} is not above 0")
        self.temperature = temperature
        self.stats: dict[str, Tensor] = {}

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        queue: Tensor | None = None,
        image: Tensor | None = None,
        queue_image: Tensor | None = None,
    ) -> Tensor:
        """Loss of queries with keys.

        Args:
            q: (B, D) rows of any norm.
            k: (B, D) rows of any norm; k[b] shows the same image as q[b].
            queue: (Q, D), equal on every rank.
            image: (B,) int64; other keys of equal id show the query's image and are not negatives.
            queue_image: (Q,) int64, the images of the queue's keys; a negative id equals no other.

        Raises:
            ValueError: for shapes that do not fit, no rows, or numbers of rows that differ between ranks.
        """
        check_views(q, k, "q and k")
        if queue is not None and queue.shape[1:] != k.shape[1:]:
            raise ValueError(f"queue must be (Q, {k.shape[1]}); it is {tuple(queue.shape)}")
        check_ids(image, len(k), "image")
        if queue_image is not None:
            if queue is None or image is None:
                raise ValueError("queue_image goes with queue and image")
            check_ids(queue_image, len(queue), "queue_image")
        with torch.autocast(q.device.type, enabled=False):
            batch = gather_rows(unit(k.detach()))
            keys = batch.refs if queue is None else torch.cat([batch.refs, unit(queue.detach())])
            ids = None if image is None else ranks.gather(image)
            if ids is not None and queue is not None:
                unknown = torch.full((len(queue),), -1, device=ids.device)
                ids = torch.cat([ids, unknown if queue_image is None else queue_image.to(ids)])
            loss: Tensor
            loss, accuracy, similarity = _InfoNCE.apply(unit(q), keys, batch.offset, 1 / self.temperature, ids)
        self.stats = {"accuracy": accuracy, "positive_similarity": similarity}
        return loss * sound(keys)


class _InfoNCE(torch.autograd.Function):
    """Mean loss of queries. The forward pass computes their gradient too: (softmax · keys − key) / τ."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, keys: Tensor, offset: int, inv_t: float, ids: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        loss, right, similarity = (q.new_zeros(()) for _ in range(3))
        grad = torch.empty_like(q)
        tile = torch_engine.tile_size(keys)
        for start in range(0, len(q), tile):
            part = slice(start, start + tile)
            own = torch.arange(offset + start, offset + start + len(q[part]), device=q.device)
            logits = q[part] @ keys.T * inv_t  # (T, R + Q)
            if ids is not None:
                again = (ids[own, None] == ids) & (ids >= 0)
                logits.masked_fill_(again.scatter_(1, own[:, None], False), -torch.inf)
            log_sum = logits.logsumexp(1, keepdim=True)
            positive = logits.gather(1, own[:, None])
            loss += (log_sum - positive).sum()
            right += (logits.argmax(1) == own).sum()
            similarity += positive.sum() / inv_t
            grad[part] = ((logits - log_sum).exp_() @ keys - keys[own]) * inv_t
        ctx.save_for_backward(grad / len(q))
        out = loss / len(q), right / len(q), similarity / len(q)
        ctx.mark_non_differentiable(*out[1:])
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor, None, None, None, None]:
        (by_query,) = ctx.saved_tensors
        return by_query * grad, None, None, None, None
