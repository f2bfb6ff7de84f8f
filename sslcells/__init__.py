"""Distributed large-batch self-supervised and metric learning for cell images."""

import importlib
import os
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sslcells.delivery.encoder import Encoder, load_encoder
    from sslcells.delivery.vectors import embed

if "torch" not in sys.modules:  # OpenMP reads it when torch loads
    # Threads that wait sleep. By default they spin, and take the cores from the processes that read images and from
    # whatever else runs on the machine.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

__version__ = "0.1.0"
__all__ = ["Encoder", "embed", "load_encoder"]


def __getattr__(name: str) -> Any:
    """What a trained encoder is used with, imported when it is first asked for: it needs torch and timm."""
    if name in __all__:
        file = "vectors" if name == "embed" else "encoder"
        return getattr(importlib.import_module(f"sslcells.delivery.{file}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
