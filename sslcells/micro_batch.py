"""Loss and gradients of a batch whose activations do not fit at once: GradCache, arXiv 2101.06983, section 3."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from sslcells.data import Batch
from sslcells.methods import Method, Outputs


def backward(
    accelerator: Accelerator,
    network: nn.Module,
    embed: Callable[[Batch, int], Outputs],
    method: Method,
    parts: Sequence[Batch],
    batch: Batch,
    progress: float,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss and its figures, and add the gradients to the parameters; DDP synchronises once.

    1. Embed every micro-batch of `parts` without a graph.
    2. Compute the loss of the global batch and its gradient by the rows, once.
    3. Embed every micro-batch again, now with its graph, and push the gradient of its rows through.

    The gradient is that of the plain step. Only BatchNorm differs: it sees the statistics of a micro-batch, and moves
    its running ones twice. `embed(part, index)` must return the same numbers at both calls; `batch` has the ids of all.
    """
    with torch.no_grad():
        outputs = [embed(part, i) for i, part in enumerate(parts)]
    rows = by_image([o.rows for o in outputs], method.views_in_all).requires_grad_()  # (V·B, D)
    targets = [o.teacher for o in outputs if o.teacher is not None]
    teacher = by_image(targets, method.views) if targets else None
    loss, figures = method.loss(Outputs(rows, teacher), batch, progress)
    accelerator.backward(loss)
    assert rows.grad is not None
    grads = torch.split(rows.grad.view(method.views_in_all, -1, rows.shape[1]), [len(p.image) for p in parts], 1)
    for i, (part, grad) in enumerate(zip(parts, grads, strict=True)):
        with accelerator.no_sync(network) if i + 1 < len(parts) else nullcontext():
            torch.autograd.backward(embed(part, i).rows, grad.flatten(0, 1))
    return loss, figures


def by_image(parts: Sequence[Tensor], views: int) -> Tensor:
    """Join the rows of micro-batches, (V·b, D) each in view-major order → (V·B, D) in view-major order."""
    return torch.cat([part.view(views, -1, part.shape[1]) for part in parts], 1).flatten(0, 1)
