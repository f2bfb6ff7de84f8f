"""Standardised input: each image's colours, and its cell's size and place, brought to a reference. Needs torch alone.

What is measured in an image is a row of numbers. With `by: lab` the median row of a laboratory stands for each of its
images. The reference is the median row of the training images. `sslcells export` writes this file beside load.py.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sslcells.standardise.cell import (
    DYES,
    Cell,
    at_rank,
    background_of,
    counted,
    density,
    filled,
    find,
    level_at,
    middle,
    reduced,
)

ZOOM = 2.5
"""a cell is magnified or shrunk by at most this factor"""
GAIN = 4.0
"""a density is multiplied or divided by at most this factor"""
POWER = 2.5
"""a density is raised to at most this power, or its inverse"""
RED = 0.2
"""density of a red cell as a part of the nucleus's, for images that show fewer red cells than SEEN"""
SEEN = 0.02
"""share of an image"""
DARK, LIGHT = 0.001, 0.999
"""with colour=percentiles: the shares of a channel's pixels below black and below white"""
RUDERMAN = ((0.3811, 0.5783, 0.0402), (0.1967, 0.7244, 0.0782), (0.0241, 0.1288, 0.8444))
"""RGB → LMS, as in Reinhard et al. 2001, eq. 4"""
OPPONENT = ((3**-0.5, 3**-0.5, 3**-0.5), (6**-0.5, 6**-0.5, -2 * 6**-0.5), (2**-0.5, -(2**-0.5), 0.0))
"""log LMS → lαβ, eq. 6"""
FROM_RUDERMAN, FROM_OPPONENT = (torch.tensor(of).inverse().tolist() for of in (RUDERMAN, OPPONENT))
"""LMS → RGB, and lαβ → log LMS"""


class Found(NamedTuple):
    """N standardised images and where their cells are."""

    x: Tensor
    """(N, C, H, W) float in 0..1"""
    cell: Tensor | None
    """(N, 1, H, W) float in 0..1: 1 inside the cell; None if nothing asked for it"""
    failed: Tensor
    """(N,) bool: no nucleus was found, or no two dyes: size, place and density were left as they were"""


class Standard(nn.Module):
    """Images (N, C, H, W) float in 0..1 → the same, standardised as `spec` says.

    `spec` has the fields of the section `standardise`, and what `fit` measured: `reference`, and with `by: lab` under
    `labs` what `laboratory` found of each.
    """

    def __init__(self, spec: Mapping[str, Any]) -> None:
        super().__init__()
        self.spec = dict(spec)
        self.colour: str = spec["colour"]
        self.stain: str = spec["stain"]
        self._moves = spec["scale"] == "nucleus" or spec["centre"]
        self._blank = spec["outside"] == "blank"
        self._red_green = spec.get("channels", "all") == "red_green"
        self.needs_cell = self._moves or self._blank or self.colour in ("two_point", "three_point")
        self.does_something = self.needs_cell or self.colour != "none" or self._red_green
        self.by_lab = spec.get("by", "image") == "lab"
        """True if images need to know their laboratory"""
        self.bits = True
        """Masks grow as bits; False gives the same in operations that ONNX has"""

    def forward(self, x: Tensor, rows: Tensor | None = None) -> Tensor:
        """(N, C, H, W) → the same; `rows` (N, P) replace what `measure` finds in each image, but where they are NaN."""
        return self.found(x, rows).x

    def row(self, lab: str) -> Tensor:
        """(P,) what stands for each image of a laboratory that was measured.

        Raises:
            ValueError: if it was not.
        """
        labs: Mapping[str, Any] = self.spec.get("labs") or {}
        if lab not in labs:
            known = f"known are {', '.join(labs)}" if labs else "none is known"
            raise ValueError(f"laboratory {lab!r} was not measured: {known}")
        return torch.tensor(labs[lab]["row"])

    def rows(self, labs: Iterable[Mapping[str, Any] | None]) -> Tensor:
        """(N, P) rows of laboratories as `laboratory` returns them; NaN, for the image itself, where there is none."""
        nothing = [torch.nan] * len(self.spec["reference"])
        return torch.tensor([nothing if of is None or of["row"] is None else of["row"] for of in labs])

    def laboratory(self, parts: Iterable[Tensor]) -> dict[str, Any]:
        """What stands for each image of a laboratory, from some of them, (N, C, H, W) float in 0..1 each.

        Returns `row` (P numbers), and `measured` and `failed`, numbers of images.
        """
        rows, failed, count = list[Tensor](), list[Tensor](), list[Tensor]()
        for x in parts:
            row, bad = self.measure(x)
            rows.append(row)
            failed.append(bad)
            if self.colour == "percentiles":
                pixels = self._unfilled(x).transpose(0, 1).flatten(1)
                count.append(counted((pixels * 255).round().long().clamp(0, 255), 256))
        bad = torch.cat(failed)
        median = [*medians(torch.cat(rows), bad)]
        if count:
            levels = torch.stack(count).sum(0)  # (C, 256)
            ends = [level_at(levels, share, int(levels[0].sum())) for share in (DARK, LIGHT)]
            median[:-1] = (torch.cat(ends) / 255).tolist()
        return {"row": median, "measured": len(bad), "failed": int(bad.sum())}

    def found(self, x: Tensor, rows: Tensor | None = None, cell: bool = False) -> Found:
        """The images, with the outlines of their cells if `cell` is true or the standardisation needs them."""
        if not (self.does_something or cell):
            return Found(x, None, torch.zeros(x.shape[0], dtype=torch.bool, device=x.device))
        x = self._unfilled(x)
        own, at, failed = self._measured(x, cell)
        alone = torch.ones_like(failed)  # whether a row is the image's own
        row = own
        if rows is not None:
            given = rows.to(x.device, x.dtype)
            alone = given.isnan().any(1)
            row = torch.where(alone[:, None], own, given)
        mask = None if at is None else _enlarged(at.cell, x)
        if self._moves and at is not None and mask is not None:
            zoom = row[:, -1] if self.spec["scale"] == "nucleus" else torch.ones_like(row[:, -1])
            x, mask = self._moved(x, mask, zoom, at.centre.to(x.dtype) * self.spec["centre"])
        out = self._coloured(x, row)
        if self.colour == "macenko":
            out = torch.where((failed & alone)[:, None, None, None], x, out)
        if self._red_green:
            out = torch.cat([out[:, :2], out[:, :2].mean(1, keepdim=True)], 1)
        if self._blank and mask is not None:
            out = blanked(out, mask, self.background(out))
        return Found(out, mask, failed)

    def measure(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(N, C, H, W) → what is measured of each image, (N, P) float32, and whether it failed, (N,) bool."""
        row, _, failed = self._measured(self._unfilled(x), cell=False)
        return row, failed

    def background(self, x: Tensor) -> Tensor:
        """The colour of the background of images (N, C, H, W): (N, C)."""
        return background_of(reduced(x), self.stain)

    def _unfilled(self, x: Tensor) -> Tensor:
        """Images whose borders have the colour of the background where a program has filled them."""
        if self.stain not in DYES:
            return x
        return blanked(x, 1 - filled(x), self.background(x))

    def _moved(self, x: Tensor, mask: Tensor, zoom: Tensor, centre: Tensor) -> tuple[Tensor, Tensor]:
        """Images and masks around a new centre; background lies beyond the image's edges."""
        empty = self.background(x)[:, :, None, None]
        side = self.spec.get("size") or min(x.shape[-2:])
        out, mask = _sampled(torch.cat([x - empty, mask], 1), zoom, centre, side).tensor_split([x.shape[1]], 1)
        return (out + empty).clamp(0, 1), mask

    def _measured(self, x: Tensor, cell: bool) -> tuple[Tensor, Cell | None, Tensor]:
        small = reduced(x)
        background = background_of(small, self.stain)
        at = find(small, background, self.stain, self.bits) if self.needs_cell or cell else None
        failed = torch.zeros(x.shape[0], dtype=torch.bool, device=x.device)
        if at is not None and self.needs_cell:
            failed = ~at.found
        row = torch.zeros(x.shape[0], 0, device=x.device)
        if self.colour == "background":
            row = background
        elif self.colour == "two_point":
            assert at is not None
            row = torch.cat([background, self._nuclear(small, background, at)], 1)
        elif self.colour == "three_point":
            assert at is not None
            row = torch.cat([background, *self._red_and_nuclear(small, background, at)], 1)
        elif self.colour == "reinhard":
            row = torch.cat(moments(opponent(small)), 1)
        elif self.colour == "macenko":
            row, kept = macenko(small)
            failed = failed | ~kept
        elif self.colour == "percentiles":
            row = torch.cat([at_rank(x.flatten(2), DARK), at_rank(x.flatten(2), LIGHT)], 1)
        diameter = torch.zeros(x.shape[0], device=x.device) if at is None else at.diameter.to(x.dtype)
        zoom = (diameter / self.spec["diameter"]).clamp(1 / ZOOM, ZOOM)
        zoom = torch.where(diameter > 0, zoom, 1.0)
        return torch.cat([row, zoom[:, None]], 1), at, failed

    def _nuclear(self, small: Tensor, background: Tensor, at: Cell) -> Tensor:
        """(N, 1): mean optical density of the nucleus above the background; in fluorescence its mean brightness."""
        above = self._above(small, background)
        weight = at.nucleus[:, None].to(small.dtype)
        return (above.mean(1, keepdim=True) * weight).flatten(2).sum(2) / weight.flatten(2).sum(2).clamp_min(1)

    def _red_and_nuclear(self, small: Tensor, background: Tensor, at: Cell) -> tuple[Tensor, Tensor]:
        """(N, C) each: median optical density of the red cells and of the nucleus above the background."""
        above = self._above(small, background).flatten(2)
        nucleus = middle(above, at.nucleus.flatten(1), 4.0)
        seen = at.red.flatten(1).to(above.dtype).mean(1) >= SEEN
        return torch.where(seen[:, None], middle(above, at.red.flatten(1), 2.0), RED * nucleus), nucleus

    def _above(self, x: Tensor, background: Tensor) -> Tensor:
        empty = background[:, :, None, None]
        return x - empty if self.stain == "bright" else density(x) - density(empty)

    def _coloured(self, x: Tensor, row: Tensor) -> Tensor:
        row = row[:, :-1]
        if self.colour == "none":
            return x
        parts = row.chunk(2, 1)
        if self.colour == "background":
            return self._shown(self._above(x, row))
        if self.colour == "percentiles":
            low, high = (part[:, :, None, None] for part in parts)
            return ((x - low) / (high - low).clamp_min(1 / 255)).clamp(0, 1)
        reference = torch.tensor(self.spec["reference"], device=x.device, dtype=x.dtype)[:-1]
        if self.colour == "two_point":
            background, nucleus = row[:, :-1], row[:, -1:]
            gain = (reference[-1] / nucleus.clamp_min(1e-3)).clamp(1 / GAIN, GAIN)
            gain = torch.where(nucleus > 1e-3, gain, 1.0)  # 0 where no nucleus was found
            return self._shown(self._above(x, background) * gain[:, :, None, None])
        if self.colour == "three_point":
            background, red, nucleus = row.chunk(3, 1)
            return self._shown(curved(self._above(x, background), red, nucleus, *reference[None].chunk(3, 1)[1:]))
        if self.colour == "reinhard":
            return transferred(x, *parts, *(part[None] for part in reference.chunk(2)))
        return restained(x, row, reference)

    def _shown(self, above: Tensor) -> Tensor:
        return (above if self.stain == "bright" else (-above).exp()).clamp(0, 1)


def blanked(x: Tensor, mask: Tensor, colour: Tensor) -> Tensor:
    """Images whose pixels outside of the mask (N, 1, H, W) are of one colour (N, C)."""
    empty = colour[:, :, None, None]
    return empty + (x - empty) * mask


def curved(od: Tensor, red: Tensor, nucleus: Tensor, to_red: Tensor, to_nucleus: Tensor) -> Tensor:
    """Densities (N, C, H, W) on a power law for each channel on which red cells and nuclei (N, C) become others'.

    A camera that compresses dark colours, and a stain of another strength, then give the same. In a channel in which
    the nucleus is not denser than the red cells, the red cells alone set the gain.
    """
    red, nucleus = red.clamp_min(1e-2), nucleus.clamp_min(1e-2)
    two = (nucleus > 1.2 * red) & (to_nucleus > 1.2 * to_red)
    power = (to_nucleus / to_red).log() / (nucleus / red).log().clamp_min(0.1)
    power = torch.where(two, power.clamp(1 / POWER, POWER), 1.0)
    at, to = torch.where(two, nucleus, red), torch.where(two, to_nucleus, to_red)
    relative = (od / at[:, :, None, None]).clamp_min(1e-3)
    return to[:, :, None, None] * relative.pow(power[:, :, None, None])


def _enlarged(mask: Tensor, x: Tensor) -> Tensor:
    """A mask (N, h, w) of reduced images, at the size of the images: (N, 1, H, W), soft at its edge."""
    k = -(-max(x.shape[-2:]) // mask.shape[-1]) if mask.shape[-1] < x.shape[-1] else 1
    large = mask[:, None].to(x.dtype)
    if k > 1:
        large = F.interpolate(large, scale_factor=float(k), mode="bilinear", align_corners=False)
    return large[:, :, : x.shape[-2], : x.shape[-1]]


def _sampled(x: Tensor, zoom: Tensor, centre: Tensor, size: int) -> Tensor:
    """Squares (N, C, size, size) around a new centre (N, 2), 0 beyond the image's edges.

    They show `zoom` (N,) times half of the image's shorter side to each side.
    """
    height, width = x.shape[-2:]
    side = min(height, width)
    zero = torch.zeros_like(zoom)
    across, down = zoom * (side / width), zoom * (side / height)
    theta = torch.stack([across, zero, centre[:, 0], zero, down, centre[:, 1]], 1).view(-1, 2, 3)
    grid = F.affine_grid(theta, [x.shape[0], x.shape[1], size, size], align_corners=False)
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def opponent(x: Tensor) -> Tensor:
    """RGB (N, 3, H, W) in 0..1 → Ruderman's lαβ."""
    lms = torch.einsum("kc,nchw->nkhw", torch.tensor(RUDERMAN, device=x.device), x.clamp(1 / 255, 1.0))
    return torch.einsum("kc,nchw->nkhw", torch.tensor(OPPONENT, device=x.device), lms.log10())


def colours(lab: Tensor) -> Tensor:
    """The inverse of `opponent`, in 0..1."""
    lms = torch.einsum("kc,nchw->nkhw", torch.tensor(FROM_OPPONENT, device=lab.device), lab)
    to_rgb = torch.tensor(FROM_RUDERMAN, device=lab.device)
    return torch.einsum("kc,nchw->nkhw", to_rgb, (lms * 2.302585092994046).exp()).clamp(0, 1)


def moments(lab: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel over an image: (N, C, H, W) → (N, C) each."""
    flat = lab.flatten(2)
    mean = flat.mean(2)
    return mean, (flat - mean[:, :, None]).square().mean(2).sqrt()


def transferred(x: Tensor, mean: Tensor, deviation: Tensor, to_mean: Tensor, to_deviation: Tensor) -> Tensor:
    """Reinhard et al. 2001, eq. 10 and 11: give images (N, 3, H, W) other means and deviations (N, 3) in lαβ."""
    ratio = (to_deviation / deviation.clamp_min(1e-4)).clamp(1 / GAIN, GAIN)
    lab = (opponent(x) - mean[:, :, None, None]) * ratio[:, :, None, None] + to_mean[:, :, None, None]
    return colours(lab)


BETA, ALPHA = 0.15, 0.01
"""Macenko et al. 2009: pixels of a lower density are no tissue; the share of pixels beyond each dye's direction"""


def macenko(small: Tensor) -> tuple[Tensor, Tensor]:
    """The two dyes of images (N, 3, h, w), Macenko et al. 2009: (N, 8), and whether there are two, (N,) bool.

    A row has two unit vectors of optical density in red, green and blue, the redder-absorbing one first, and the 99th
    percentiles of their amounts.
    """
    od = density(small).flatten(2)  # (N, 3, M)
    kept = (od >= BETA).all(1)  # (N, M)
    count = kept.sum(1)
    weight = kept[:, None].to(od.dtype)
    mean = (od * weight).sum(2) / count.clamp_min(1)[:, None]
    apart = (od - mean[:, :, None]) * weight
    covariance = apart @ apart.mT / count.clamp_min(1)[:, None, None]
    plane = torch.linalg.eigh(covariance).eigenvectors[:, :, 1:]  # (N, 3, 2)
    plane = plane * torch.where(plane.sum(1, keepdim=True) < 0, -1.0, 1.0)
    along = plane.mT @ od
    angle = torch.atan2(along[:, 0], along[:, 1]).masked_fill(~kept, torch.inf).sort(1).values
    last = (count - 1).clamp_min(0)
    ends = [angle.gather(1, (share * last).round().long()[:, None]) for share in (ALPHA, 1 - ALPHA)]
    good = (count >= 16) & torch.stack([end.isfinite()[:, 0] for end in ends]).all(0)
    ends = [end.masked_fill(~end.isfinite(), 0.0) for end in ends]
    dyes = [(plane @ torch.stack([end.sin(), end.cos()], 1))[..., 0] for end in ends]  # (N, 3) each
    dyes = [dye * torch.where(dye.sum(1, keepdim=True) < 0, -1.0, 1.0) for dye in dyes]
    first = (dyes[0][:, :1] > dyes[1][:, :1]).to(od.dtype)
    dyes = [first * dyes[0] + (1 - first) * dyes[1], first * dyes[1] + (1 - first) * dyes[0]]
    amount = _amounts(torch.stack(dyes, 1), od)
    most = at_rank(amount, 0.99)
    return torch.cat([*dyes, most], 1), good & (most > 0.01).all(1)


def _amounts(dyes: Tensor, od: Tensor) -> Tensor:
    """Least squares: dyes (N, 2, 3) and densities (N, 3, M) → amounts (N, 2, M)."""
    gram = dyes @ dyes.mT
    a, b, d = gram[:, 0, 0], gram[:, 0, 1], gram[:, 1, 1]
    one_over = 1 / (a * d - b * b).clamp_min(1e-4)
    inverse = torch.stack([d, -b, -b, a], 1).view(-1, 2, 2) * one_over[:, None, None]
    return inverse @ (dyes @ od)


def restained(x: Tensor, row: Tensor, reference: Tensor) -> Tensor:
    """Images (N, 3, H, W) with the dyes of rows (N, 8), in those of a reference (8,)."""
    amount = _amounts(row[:, :6].view(-1, 2, 3), density(x).flatten(2))
    amount = amount * (reference[6:] / row[:, 6:].clamp_min(1e-3)).clamp(1 / GAIN, GAIN)[:, :, None]
    od = reference[:6].view(2, 3).T @ amount
    return (-od).exp().view_as(x).clamp(0, 1)


def medians(rows: Tensor, failed: Tensor) -> Sequence[float]:
    """The median of each column of the rows that did not fail: (N, P), (N,) → P numbers."""
    good = rows[~failed]
    found: list[float] = (good if len(good) else rows).double().quantile(0.5, dim=0).tolist()
    return found
