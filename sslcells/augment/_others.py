"""What a view takes from other images: a bank of train images that every rank holds, drawn by key like all else.

A partner from the rank's own batch would depend on the number of ranks and on micro-batches; the bank does not.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from sslcells.standardise.cell import density
from sslcells.standardise.standard import Standard, blanked


class Bank:
    """K images of train, standardised: what surrounds their cells, and the statistics of the cells' stain."""

    def __init__(self, pixels: Tensor, lab: Tensor, standard: Standard, rows: Tensor | None = None) -> None:
        """Pixels (K, C, H, W) uint8; lab (K,) int64, 0 where unknown; rows (K, P) of the laboratories, as Standard."""
        self.bright = standard.stain == "bright"
        self.lab = lab.cpu()
        around, mean, deviation = [], [], []
        for index in torch.arange(len(pixels)).split(256):  # type: ignore[no-untyped-call]
            of_labs = None if rows is None else rows[index]
            x, cell, _ = standard.found(pixels[index].float() / 255, of_labs, cell=True)
            assert cell is not None
            around.append(blanked(x, 1 - cell, standard.background(x)))
            moments = stain_moments(amount(x, self.bright), cell)
            mean.append(moments[0])
            deviation.append(moments[1])
        self.around = (torch.cat(around) * 255).round().to(torch.uint8)
        """(K, C, H, W): the images, with the cell replaced by the colour of their background"""
        self.mean, self.deviation = torch.cat(mean), torch.cat(deviation)
        """(K, C) each, of the amounts in the cell"""

    def __len__(self) -> int:
        return len(self.lab)

    def to(self, device: torch.device) -> None:
        """Move the images to the device."""
        self.around, self.mean, self.deviation = (t.to(device) for t in (self.around, self.mean, self.deviation))

    def drawn(self, lab: Tensor, luck: Tensor) -> Tensor:
        """An image of the bank for each row: lab (N,) int64 and luck (N,) in [0, 1), on the CPU → (N,) int64.

        It is of another laboratory where the bank has one, else of any.
        """
        other = self.lab != lab[:, None]  # (N, K)
        other |= ~other.any(1, keepdim=True)
        count = other.sum(1)
        place = (luck * count).long().minimum(count - 1)  # the place-th of the others
        return (other.cumsum(1) <= place[:, None]).sum(1)


class Others(NamedTuple):
    """What goes with N rows of images."""

    cell: Tensor
    """(N, 1, H, W) float in 0..1: 1 inside the cell; 1 everywhere where none was found"""
    lab: Tensor
    """(N,) int64 on the CPU; 0 where unknown"""
    bank: Bank


def amount(x: Tensor, bright: bool) -> Tensor:
    """Optical density; in fluorescence the intensity itself."""
    return x if bright else density(x)


def shown(amount: Tensor, bright: bool) -> Tensor:
    """The inverse of `amount`, in 0..1."""
    return (amount if bright else (-amount).exp()).clamp(0, 1)


def stain_moments(amount: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel inside the cell: (N, C, H, W), (N, 1, H, W) → (N, C) each."""
    area = cell.flatten(2).sum(2).clamp_min(1)
    mean = (amount * cell).flatten(2).sum(2) / area
    apart = (amount - mean[:, :, None, None]) * cell
    return mean, (apart.square().flatten(2).sum(2) / area).sqrt()
