"""Loss and gradients of a batch whose activations do not fit at once: GradCache, arXiv 2101.06983, section 3."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from sslcells.data import Batch
from sslcells.methods import Method, Outputs, Patches


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
    whole = joined(outputs, method)
    for x in learned(whole):
        if x is not None:
            x.requires_grad_()
    loss, figures = method.loss(whole, batch, progress)
    accelerator.backward(loss)
    images = [len(part.image) for part in parts]
    hidden = [0 if o.patches is None else len(o.patches.rows) for o in outputs]
    orders = (method.views_in_all, images), (method.views, images), (1, hidden)
    grads = [apart(x, *order) for x, order in zip(learned(whole), orders, strict=True)]
    for i, part in enumerate(parts):
        with accelerator.no_sync(network) if i + 1 < len(parts) else nullcontext():
            again = zip(learned(embed(part, i)), grads, strict=True)
            pairs = [(x, of[i]) for x, of in again if x is not None and of is not None and x.requires_grad]
            torch.autograd.backward([x for x, _ in pairs], [grad for _, grad in pairs])
    return loss, figures


def learned(outputs: Outputs) -> list[Tensor | None]:
    """Rows, features and rows of patches: what a loss may have a gradient by."""
    return [outputs.rows, outputs.features, outputs.patches and outputs.patches.rows]


def joined(outputs: Sequence[Outputs], method: Method) -> Outputs:
    """The outputs of micro-batches as those of one batch."""
    rows = by_image([o.rows for o in outputs], method.views_in_all)  # (V·B, D)
    teacher = [o.teacher for o in outputs if o.teacher is not None]
    features = [o.features for o in outputs if o.features is not None]
    patches = [o.patches for o in outputs if o.patches is not None]
    return Outputs(
        rows,
        by_image(teacher, method.views) if teacher else None,
        by_image(features, method.views) if features else None,
        Patches(*map(torch.cat, zip(*patches, strict=True))) if patches else None,
    )


def by_image(parts: Sequence[Tensor], views: int) -> Tensor:
    """Join the rows of micro-batches, (V·b, D) each in view-major order → (V·B, D) in view-major order."""
    return torch.cat([part.view(views, -1, part.shape[1]) for part in parts], 1).flatten(0, 1)


def apart(joined: Tensor | None, views: int, counts: Sequence[int]) -> list[Tensor] | None:
    """The gradient by rows that were joined, a tensor for each micro-batch; None where the loss did not use them."""
    if joined is None or joined.grad is None:
        return None
    by_view = joined.grad.view(views, -1, joined.shape[1])
    return [grad.flatten(0, 1) for grad in torch.split(by_view, list(counts), 1)]
