"""How far training has moved the features from those of the weights that it started from, and whether it did them good.

The features of the start are kept in the run's folder, so that a run that resumes measures against the same.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from sslcells import losses, ranks
from sslcells.storage import is_file, write_atomically

FEATURES = "start.safetensors"
DISTANCE = "health/distance_from_start"
MOST = 256
"""Images whose features are compared."""
_KNN = "knn/top1", "knn_loo/top1"


def keep(folder: Path, z: Tensor) -> None:
    """Write the features (N, F) of the start; rank 0 does."""
    if ranks.rank() == 0:
        content = safetensors.torch.save({"features": z.contiguous()})
        write_atomically(folder / FEATURES, lambda file: file.write(content))


def kept(folder: Path) -> Tensor | None:
    """The features (N, F) of the start; None if the run's folder has them no more. Every rank calls this."""

    def read() -> Tensor | None:
        try:
            return safetensors.torch.load_file(folder / FEATURES)["features"] if is_file(folder / FEATURES) else None
        except (OSError, SafetensorError, KeyError):
            return None

    return ranks.from_main(read)


def lost(folder: Path, step: int) -> list[str]:
    """A line if a run that resumes after `step` cannot measure the distance from its start; every rank calls this."""
    if step == 0 or kept(folder) is not None:
        return []
    return [f"{folder / FEATURES} is not there: the distance from the start is measured no more"]


def distance(z: Tensor, start: Tensor) -> float:
    """The mean cosine distance, 1 − cosine, between features (N, F) now and at the start: 0 where none has turned.

    Raises:
        ValueError: if they are not of equally many images and equally wide.
    """
    if z.shape != start.shape:
        raise ValueError(f"features {tuple(z.shape)} cannot be compared with {tuple(start.shape)} of the start")
    cosine = (losses.unit(z.double()) * losses.unit(start.double())).sum(1)
    return float(1 - cosine.mean()) if not z.equal(start) else 0.0


def fallen(metrics: Sequence[Mapping[str, Any]], newly: bool = False) -> str | None:
    """A sentence if kNN, as last measured, is below that of the start, which is measured at step 0; else None.

    With `newly`, only if it was not below at the measurement before.
    """
    key = next((k for k in _KNN if any(k in row for row in metrics)), _KNN[0])
    looks = [(row["step"], row[key]) for row in metrics if key in row]
    if len(looks) < 2 or looks[0][0] != 0:
        return None
    (_, first), (step, last) = looks[0], looks[-1]
    if not last < first or (newly and looks[-2][1] < first):
        return None
    return (
        f"warning: after step {step} {key} is {last:.1%}, below the {first:.1%} of the weights that training started "
        f"from: so far it has made them worse for these images. Gentler: a lower optim.lr, optim.layer_decay, "
        f"model.freeze or model.lora_rank"
    )


def notes(metrics: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the report says of a run that started from weights."""
    moved = [row[DISTANCE] for row in metrics if DISTANCE in row]
    said = [f"the features lie at a cosine distance of {moved[-1]:.3g} from those of the start"] if moved else []
    warning = fallen(metrics)
    return said + ([warning] if warning else [])
