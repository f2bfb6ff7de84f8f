"""Standardised input: what laboratories differ in is brought to a reference, in training and wherever else.

`cell` finds the cell in an image, `standard` changes the image; both need torch alone, as they go with an export.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from sslcells.config import Standardise
from sslcells.standardise.standard import Standard as Standard
from sslcells.standardise.standard import medians

SAMPLE = 512
"""images that the reference is measured on"""


def standard_of(spec: Mapping[str, Any] | None) -> Standard | None:
    """The Standard that an encoder.json describes; None if it describes none."""
    return None if spec is None else Standard(spec)


def fit(config: Standardise, x: Tensor) -> dict[str, Any]:
    """The `spec` of a Standard whose reference is measured on a sample (N, C, H, W), float in 0..1."""
    spec: dict[str, Any] = config.model_dump(mode="json")
    rows, failed = Standard(spec | {"reference": None}).measure(x)
    return spec | {"reference": medians(rows, failed), "measured": len(x), "failed": int(failed.sum())}
