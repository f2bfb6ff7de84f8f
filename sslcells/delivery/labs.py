"""Which laboratory each embedded image is of, for encoders that standardise by laboratory."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sslcells.data import DataError
from sslcells.delivery.encoder import Encoder
from sslcells.delivery.listed import Listed
from sslcells.evaluation.encode import spread
from sslcells.inputs import said_of_lab
from sslcells.standardise import SAMPLE_OF_LAB


class OfLabs(NamedTuple):
    """The laboratories of N images."""

    labs: Mapping[str, Mapping[str, Any]]
    """name → what stands for its images, as Standard.laboratory returns it"""
    rows: Tensor
    """(labs + 1, P): the first is NaN, for images without a laboratory"""
    of: Tensor
    """(N,) int64: the row of each image"""
    said: Sequence[str]
    """where the rows are from, in sentences"""

    def at(self, image: Sequence[int]) -> Tensor:
        """(B, P) the rows of images with these indices."""
        return self.rows[self.of[torch.tensor(image, dtype=torch.int64)]]


def of_labs(
    encoder: Encoder, found: Listed, lab: str | None, before: Mapping[str, Mapping[str, Any]] | None
) -> OfLabs | None:
    """The laboratories of the images; None if the encoder takes each image by itself.

    They are the laboratory `lab`, or those that the table or the folders name as in training; if nothing names any,
    all images are taken for those of one new laboratory. One that the encoder does not know is measured on its own
    images; `before` has what an embedding that goes on measured.
    """
    standard = encoder.standard
    if standard is None or not standard.by_lab:
        return None
    names = [lab or found.name] * len(found.images) if lab or found.labs is None else found.labs
    distinct = sorted({name for name in names if name is not None})
    number = {name: i for i, name in enumerate(distinct, 1)}
    of = torch.tensor([0 if name is None else number[name] for name in names], dtype=torch.int64)
    known: Mapping[str, Mapping[str, Any]] = standard.spec.get("labs") or {}
    labs, said = dict[str, Mapping[str, Any]](), list[str]()
    for name, i in number.items():
        if name in known:
            labs[name] = known[name]
            said.append(f"{name}: standardised as in training")
        else:
            there = before is not None and name in before
            labs[name] = before[name] if there and before else _measured(encoder, found, (of == i).nonzero()[:, 0])
            said.append(said_of_lab(name, labs[name]))
    if alone := int((of == 0).sum()):
        said.append(f"{alone:,} images without a laboratory: each is standardised by itself")
    return OfLabs(labs, standard.rows([None, *labs.values()]), of, said)


def _measured(encoder: Encoder, found: Listed, index: Tensor) -> dict[str, Any]:
    """What stands for the images with these indices, from those of them that can be read."""
    assert encoder.standard is not None
    read = list[Tensor]()
    for i in index[spread(len(index), SAMPLE_OF_LAB)].tolist():
        try:
            read.append(found.images.pixels(i)[None].to(encoder.mean.device).float() / 255)
        except DataError:  # listed when its turn comes
            continue
    if not read:
        return {"row": None, "measured": 0, "failed": 0}
    with torch.no_grad():
        return encoder.standard.laboratory(read)
