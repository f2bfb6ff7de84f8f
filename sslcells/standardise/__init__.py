"""Standardised input: what laboratories differ in is brought to a reference, in training and wherever else.

`cell` finds the cell in an image, `standard` changes the image; both need torch alone, as they go with an export.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from sslcells.config import Standardise
from sslcells.standardise.standard import Standard as Standard
from sslcells.standardise.standard import medians

SAMPLE, SAMPLE_OF_LAB = 512, 128
"""images that the reference is measured on, and what stands for a laboratory"""


AS_THEY_ARE = "their size, place and density were left as they are"
"""What is done with images in which no cell was found."""


def standard_of(spec: Mapping[str, Any] | None) -> Standard | None:
    """The Standard that an encoder.json describes; None if it describes none."""
    return None if spec is None else Standard(spec)


def fit(config: Standardise, x: Tensor, labs: Mapping[str, Iterable[Tensor]] | None = None) -> dict[str, Any]:
    """The `spec` of a Standard whose reference is measured on a sample (N, C, H, W), float in 0..1.

    With `by: lab`, `labs` are images of each laboratory in parts, such as the sample.
    """
    spec: dict[str, Any] = config.model_dump(mode="json")
    standard = Standard(spec | {"reference": None})
    rows, failed = standard.measure(x)
    spec |= {"reference": medians(rows, failed), "measured": len(x), "failed": int(failed.sum())}
    if standard.by_lab:
        spec["labs"] = {name: standard.laboratory(parts) for name, parts in (labs or {}).items()}
    return spec
