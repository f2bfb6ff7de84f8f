"""Which engine computes: the fused Triton kernels where the device has them, torch operations everywhere else."""

import functools
import importlib
import logging
from typing import Any, Literal

import torch
from torch import Tensor

from sslcells.losses import torch_engine
from sslcells.losses.torch_engine import Exclude, RowSums

Precision = Literal["bf16", "tf32", "fp32"]
"""Of the fused kernels' products; sums are float32 always. The torch engine computes in the rows' own precision."""

MiningPrecision = Literal["exact", "bf16", "tf32", "fp32"]
"""The same where rows are only compared; "exact" is as good as float32 at several times its speed."""

logger = logging.getLogger(__name__)


def row_sums(
    refs: Tensor,
    offset: int,
    count: int,
    inv_t: float,
    exclude: Exclude,
    group: Tensor | None,
    precision: Precision,
) -> RowSums:
    """Sums and largest summands of exp(inv_t · (cos − 1)): (R, D) unit rows, (R,) int32 codes of groups → (A,) each."""
    if (fused := _fused(refs)) is not None:
        found: RowSums = fused.row_sums(refs, offset, count, inv_t, exclude, group, precision=precision)
        return found
    return torch_engine.row_sums(refs, offset, count, inv_t, exclude, group)


def weighted_rows(
    refs: Tensor, offset: int, count: int, inv_t: float, weight: Tensor, exclude: Exclude, precision: Precision
) -> Tensor:
    """Σ_j E_ij (weight_i + weight_j) z_j with E as in `row_sums`: (R, D) unit rows, (R,) weights → (A, D)."""
    if (fused := _fused(refs)) is not None:
        out: Tensor = fused.weighted_rows(refs, offset, count, inv_t, weight, exclude, precision=precision)
        return out
    return torch_engine.weighted_rows(refs, offset, count, inv_t, weight, exclude)


def hardest(
    refs: Tensor,
    offset: int,
    count: int,
    positive: Tensor,
    source: Tensor | None,
    precision: MiningPrecision,
    lab: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Least similar positive and most similar negative of each anchor, (A,) int64 twice; -1 where there is none."""
    if (fused := _fused(refs)) is not None:
        far, near = fused.hardest(refs, offset, count, positive, source, lab, precision=precision)
        return far, near
    return torch_engine.hardest(refs, offset, count, positive, source, lab)


def _fused(refs: Tensor) -> Any:
    """The Triton engine where it can serve: float32 rows, narrow enough, on a device that runs it."""
    if refs.device.type == "cpu" or refs.dtype != torch.float32:
        return None
    triton_engine = _triton_engine()
    served = triton_engine is not None and triton_engine.available(refs.device)
    return triton_engine if served and refs.shape[1] <= triton_engine.WIDEST else None


@functools.cache
def _triton_engine() -> Any:
    try:
        return importlib.import_module("sslcells.losses.triton_engine")
    except ImportError as error:
        logger.warning("no Triton here (%s): the losses use torch operations, which are slower", error)
        return None
