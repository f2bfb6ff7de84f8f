"""What a global batch consists of: how often two images share a source, a class or a laboratory."""

import numpy as np
import torch
from torch import Tensor

from sslcells import ranks
from sslcells.data import Batch


def composition(batch: Batch, device: torch.device) -> dict[str, float]:
    """Shares of the other images of the global batch that have an anchor's source, class or laboratory: means.

    `batch/same_source` is the share with its source. `batch/same_label` is the share with its class, among the images
    with a known class, and `batch/same_lab` that with its laboratory, among those with a known one; they are left out
    if there are none. Every rank must call it.
    """
    ids = torch.stack([batch.label, batch.source, batch.lab], 1)
    label, source, lab = ranks.gather(ids.to(device)).cpu().unbind(1)
    out = {"batch/same_source": _share(source)}
    for name, of, known in (("label", label, label >= 0), ("lab", lab, lab > 0)):
        if bool(known.any()):
            out[f"batch/same_{name}"] = _share(of[known])
    return out


def _share(ids: Tensor) -> float:
    """Mean over i of the share of j ≠ i with equal ids: (G,) → a number."""
    count = np.unique(ids.numpy(), return_counts=True)[1]
    return float((count * (count - 1)).sum() / max(1, len(ids) * (len(ids) - 1)))
