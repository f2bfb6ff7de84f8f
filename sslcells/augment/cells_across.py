"""Augmentation that takes the laboratory away: surroundings and stain of other images, density, sharpness, size."""

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from sslcells.augment._crops import CellCrops, blurred, cropped
from sslcells.augment._draws import Draws
from sslcells.augment._operations import blur, on_some
from sslcells.augment._others import Others, amount, shown, stain_moments


class Config(CellCrops):
    """Strengths of the recipe."""

    of_others: ClassVar[bool] = True

    recipe: Literal["cells_across"] = "cells_across"
    background: float = Field(0.8, ge=0, le=1)
    """Probability that what surrounds the cell comes from another image, of another laboratory if there is one."""
    stain_mix: float = Field(0.5, ge=0, le=1)
    """The stain's mean and deviation in each channel move by up to this fraction to those of another image's cell, of
    another laboratory if there is one."""
    density: float = Field(0.4, ge=0, lt=1)
    """The optical density of each channel changes by up to this fraction; in fluorescence the intensity does."""
    gamma: float = Field(0.3, ge=0, le=2)
    """The density of each channel is raised to a power of up to exp(gamma), half of it common to all channels: cameras
    differ in how much they compress what is dark."""
    mix: float = Field(0.15, ge=0, le=0.5)
    """Up to this fraction of the density of each channel is added to, or taken from, each other one: cameras and stains
    differ in more than the strength of a channel. Off in fluorescence."""
    sharpness: float = Field(0.5, ge=0, le=2)
    """Some views are sharpened by up to this amount (as many as are blurred, `blur`)."""
    zoom: float = Field(0.15, ge=0, le=1)
    """Views are magnified or shrunk by up to exp(zoom), beside the crop."""
    bank: int = Field(128, ge=2, le=4096)
    """Number of train images, of all laboratories in equal parts, that views take surroundings and stain from."""


def views(config: Config, x: Tensor, draws: Draws, others: Others) -> Tensor:
    """(N, C, H, W) in 0..1, and what goes with each row → (N, C, S, S)."""
    x = surrounded(config, x, draws, others)
    x, cell = cropped(config, torch.cat([x, others.cell], 1), draws, config.zoom).tensor_split([x.shape[1]], 1)
    found = stained(config, amount(x, others.bank.bright), draws, others._replace(cell=cell))
    x = shown(dense(config, found, draws, others.bank.bright), others.bank.bright)
    x = on_some(x, draws.chance(config.blur), _sharpened, draws.uniform(0, config.sharpness))
    return blurred(config, x, draws)


def surrounded(config: Config, x: Tensor, draws: Draws, others: Others) -> Tensor:
    """Some images with the surroundings of another one, mirrored at random, outside of their cell."""
    which = others.bank.drawn(others.lab, draws.uniform())
    chosen = draws.chance(config.background)
    flips = draws.chance(0.5), draws.chance(0.5)

    def changed(x: Tensor, cell: Tensor, which: Tensor, *flips: Tensor) -> Tensor:
        around = others.bank.around[which].to(x.dtype) / 255
        for axis, flip in zip((2, 3), flips, strict=True):
            around = torch.where(flip[:, None, None, None], around.flip(axis), around)
        return cell * x + (1 - cell) * around

    rows = chosen.nonzero()[:, 0].to(x.device, non_blocking=True)
    if len(rows) == 0:
        return x
    there = [t[chosen].to(x.device, non_blocking=True) for t in (which, *flips)]
    return x.index_copy(0, rows, changed(x[rows], others.cell[rows], *there))


def stained(config: Config, found: Tensor, draws: Draws, others: Others) -> Tensor:
    """Amounts whose stain moves towards that of another image's cell (Reinhard's transfer, in optical density)."""
    bank = others.bank
    which = bank.drawn(others.lab, draws.uniform()).to(found.device, non_blocking=True)
    part = draws.uniform(0, config.stain_mix).to(found.device, non_blocking=True)[:, None]
    mean, deviation = stain_moments(found, others.cell)
    ratio = (bank.deviation[which] / deviation.clamp_min(1e-3)).clamp(0.5, 2)
    gain = (1 + part * (ratio - 1))[:, :, None, None]
    to_mean = (mean + part * (bank.mean[which] - mean))[:, :, None, None]
    moved = (found - mean[:, :, None, None]) * gain + to_mean
    # Where there is nothing there is no stain: the change grows with the amount, up to that of the cell.
    share = (found / mean.clamp_min(1e-3)[:, :, None, None]).clamp(0, 1)
    return found + share * (moved - found)


def dense(config: Config, found: Tensor, draws: Draws, bright: bool) -> Tensor:
    """Other amounts: a gamma and a gain of each channel, and something of the others."""
    channels = found.shape[1]
    matrix = torch.zeros(len(draws), channels, channels)
    for to in range(channels):
        for of in range(channels):
            if to == of:
                matrix[:, to, of] = draws.uniform(1 - config.density, 1 + config.density)
            elif config.mix and not bright:
                matrix[:, to, of] = draws.uniform(-config.mix, config.mix)
    gamma = draws.uniform(-config.gamma, config.gamma)[:, None]
    apart = [draws.uniform(-config.gamma, config.gamma) for _ in range(channels)]
    gamma = (0.5 * gamma + 0.5 * torch.stack(apart, 1)).exp()  # (N, C)
    matrix, gamma = (t.to(found.device, non_blocking=True) for t in (matrix, gamma))
    powered = found.clamp_min(1e-4).pow(gamma[:, :, None, None])
    return (matrix @ powered.flatten(2)).view_as(found)


def _sharpened(x: Tensor, strength: Tensor) -> Tensor:
    """Unsharp mask with a blur of one pixel."""
    soft = blur(x, torch.ones_like(strength), 1.0)
    return (x + strength[:, None, None, None] * (x - soft)).clamp(0, 1)
