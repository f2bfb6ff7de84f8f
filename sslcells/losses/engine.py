"""Which engine computes: the fused Triton kernels where the device has them, torch operations everywhere else."""

import functools
import importlib
import logging
from typing import Any, Literal

import torch
from torch import Tensor

from sslcells.losses import torch_engine
from sslcells.losses.torch_engine import FLOAT32_INV_T, Exclude, RowSums

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
    *,
    figures: bool = True,
) -> RowSums:
    """Sums, and with `figures` largest summands, of exp(inv_t · (cos − 1)).

    (R, D) unit rows as `accurate` gives them, (R,) int32 codes of groups → (A,) each.
    """
    if (fused := _fused(refs)) is not None:
        found: RowSums = fused.row_sums(
            refs, offset, count, inv_t, exclude, group, figures=figures, precision=precision
        )
        return found
    return torch_engine.row_sums(refs, offset, count, inv_t, exclude, group, figures=figures)


def accurate(refs: Tensor, inv_t: float) -> Tensor:
    """The rows in the precision that sums at this 1/τ need: float64 where float32 has no number for each summand.

    The fused kernels divide the summands by the largest there, and take float32 rows at any 1/τ.
    """
    return refs if inv_t <= FLOAT32_INV_T or _fused(refs) is not None else refs.double()


def weighted_rows(
    refs: Tensor,
    offset: int,
    count: int,
    inv_t: float,
    weight: Tensor,
    exclude: Exclude,
    precision: Precision,
    shift: Tensor | None = None,
) -> Tensor:
    """Σ_j E_ij (weight_i + weight_j) z_j with E as in `row_sums`: (R, D) unit rows, (R,) weights → (A, D).

    With the shifts of `row_sums`, (R,), each weight is divided by 2^shift of its row.
    """
    if (fused := _fused(refs)) is not None:
        out: Tensor = fused.weighted_rows(refs, offset, count, inv_t, weight, exclude, shift, precision=precision)
        return out
    assert shift is None
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
    if triton_engine is None or not triton_engine.available(refs.device):
        return None
    if refs.shape[1] > triton_engine.WIDEST:
        _too_wide(refs.shape[1], triton_engine.WIDEST)
        return None
    return triton_engine


@functools.cache
def _too_wide(width: int, widest: int) -> None:
    logger.warning(
        "rows are %d wide and the fused kernels take up to %d: the losses use torch operations, which are slower "
        "(in float64 at a temperature below %g)",
        width,
        widest,
        1 / FLOAT32_INV_T,
    )


@functools.cache
def _triton_engine() -> Any:
    try:
        return importlib.import_module("sslcells.losses.triton_engine")
    except ImportError as error:
        logger.warning("no Triton here (%s): the losses use torch operations, which are slower", error)
        return None
