"""The cell in the middle of each image: its background, nucleus and outline by classical means. Needs torch alone.

Everything is a fixed sequence of operations on (N, C, H, W) float images in 0..1, on their device, with no loop that
depends on the values: so a batch, a replay, an exported program and a fresh process find the same masks.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

DYES = {
    "giemsa": ((0.834, 0.513, 0.196), (0.092, 0.954, 0.283), (0.635, 0.001, 0.771)),
    "haematoxylin-eosin": ((0.650, 0.704, 0.286), (0.072, 0.990, 0.105), (0.268, 0.570, 0.776)),
}
"""Optical densities of the dyes in red, green and blue (Ruifrok and Johnston 2001); the first stains the nucleus."""
NUCLEAR = {name: F.normalize(torch.tensor(of), dim=1).inverse()[:, 0].tolist() for name, of in DYES.items()}
"""How much of the first dye an optical density of 1 in red, green and blue adds"""
GRID = 64
"""masks are found on images of at most this many pixels a side"""
LEVELS = 64
"""levels of the density of the nucleus"""
BLACK = 0.1
"""where no channel is brighter, a rotation or a stitch has filled the image"""
REPEATED = 0.015
"""mean difference up to which rows or columns at a border repeat the last one"""


class Cell(NamedTuple):
    """What was found in N images; h and w are the sides of the reduced images."""

    nucleus: Tensor
    """(N, h, w) bool"""
    cell: Tensor
    """(N, h, w) bool: nucleus and cytoplasm; everything where no nucleus was found"""
    found: Tensor
    """(N,) bool: whether there is a nucleus"""
    centre: Tensor
    """(N, 2) x and y of the nucleus, −1 to 1 over the image; 0 where none was found"""
    diameter: Tensor
    """(N,) of the disc with the nucleus's area, as a fraction of the image's shorter side; 0 where none was found"""
    red: Tensor
    """(N, h, w) bool: the red cells around it, or other tissue without the nucleus's dye"""


def reduced(x: Tensor) -> Tensor:
    """(N, C, H, W) → (N, C, h, w), averaged over k × k pixels so that h and w are at most GRID."""
    k = -(-max(x.shape[-2:]) // GRID)
    if k == 1:
        return x
    bottom, right = -x.shape[-2] % k, -x.shape[-1] % k
    if bottom or right:
        x = F.pad(x, (0, right, 0, bottom), mode="replicate")
    return F.avg_pool2d(x, k)


def filled(x: Tensor) -> Tensor:
    """Where a program has filled images (N, C, H, W), with black or by repeating the edge: (N, 1, H, W), 1 or 0."""
    k = 2 * (-(-max(x.shape[-2:]) // GRID)) + 1  # and the pixels between
    black = _pooled(x.amax(1) < BLACK, k, k)[:, None]
    for axis in (2, 3):
        for first in (True, False):
            line = x.narrow(axis, 0 if first else x.shape[axis] - 1, 1)
            edge = (x - line).abs_().mean((1, 5 - axis), keepdim=True)
            edge = edge if first else edge.flip(axis)
            run = (edge >= REPEATED).long().cumsum(axis) == 0
            run = run & (run.sum(axis, keepdim=True) > 3)
            black = black | (run if first else run.flip(axis))
    return black.to(x.dtype)


def density(x: Tensor) -> Tensor:
    """Optical density, Beer–Lambert: 0 for white; values below 1/255 count as 1/255."""
    return -x.clamp(1 / 255, 1.0).log()


def at_rank(values: Tensor, fraction: float, most: float = 1.0) -> Tensor:
    """(..., M) → (...): the value below which this fraction of the M lie, one of 256 levels of 0 … `most`."""
    level = (values * (255 / most)).round().long().clamp(0, 255)
    return level_at(counted(level, 256), fraction, values.shape[-1]).to(values.dtype) * (most / 255)


def level_at(count: Tensor, fraction: float, total: int) -> Tensor:
    """(..., L) how often each level occurs among `total` values → (...): the level that this fraction lie below."""
    return (count.cumsum(-1) <= round(fraction * (total - 1))).sum(-1)


def counted(level: Tensor, levels: int) -> Tensor:
    """(..., M) integers in 0 … levels − 1 → how often each occurs, (..., levels) int64."""
    zero = torch.zeros(*level.shape[:-1], levels, dtype=torch.int64, device=level.device)
    one = torch.ones(1, dtype=torch.int64, device=level.device)
    return zero.scatter_add(-1, level, one.expand_as(level))


def middle(values: Tensor, mask: Tensor, most: float) -> Tensor:
    """The median inside a mask: (N, C, M), bool (N, M) → (N, C), one of 512 levels of 0 … `most`; 0 if it is empty."""
    level = (values * (511 / most)).round().long().clamp(0, 511)
    inside = mask[:, None].expand_as(level).long()
    zero = torch.zeros(*level.shape[:-1], 512, dtype=torch.int64, device=level.device)
    below = zero.scatter_add(-1, level, inside).cumsum(-1)
    half = (inside.sum(-1, keepdim=True) + 1) // 2
    return (below < half).sum(-1).to(values.dtype) * (most / 511)


def background_of(small: Tensor, stain: str) -> Tensor:
    """(N, C, h, w) → (N, C): the colour of the background, bright where light is absorbed, dark in fluorescence."""
    return at_rank(small.flatten(2), 0.05 if stain == "bright" else 0.95)


def stained(small: Tensor, background: Tensor, stain: str) -> tuple[Tensor, Tensor]:
    """How strongly each pixel shows the nucleus, and anything at all: (N, C, h, w) → (N, h, w) each, 0 where empty."""
    if stain == "bright":
        anything = (small - background[:, :, None, None]).mean(1)
        return anything, anything
    od = density(small) - density(background)[:, :, None, None]
    anything = od.mean(1)
    if stain not in DYES or small.shape[1] != 3:
        return anything, anything
    return torch.einsum("nchw,c->nhw", od, torch.tensor(NUCLEAR[stain], device=small.device)), anything


def levels(amount: Tensor, most: float) -> Tensor:
    """(N, h, w) → the same in integers, 0 … LEVELS − 1; the last is `most` times the 99th percentile."""
    smooth = F.avg_pool2d(amount[:, None], 3, 1, padding=1, count_include_pad=False)[:, 0]
    top = most * at_rank(smooth.flatten(1), 0.99, 4.0).clamp_min(1e-3)[:, None, None]
    return ((smooth / top).clamp(0, 1) * (LEVELS - 1)).round().long()


def find(small: Tensor, background: Tensor, stain: str, bits: bool = True) -> Cell:
    """Find the nucleus and the cell nearest to the middle of each reduced image (N, C, h, w).

    Without `bits` masks grow by pooling: slower, with the same result, and in operations that ONNX has.
    """
    pack = packed if bits else _as_it_is
    nuclear, anything = stained(small, background, stain)
    height, width = small.shape[-2:]
    level = levels(nuclear, 1.0)
    dark = level > three_classes(level)[:, None, None]
    nucleus = unpacked(around(pack(central(_thick(dark))), pack(dark), width, GRID // LOBES, LOBES), width)
    area = nucleus.flatten(1).sum(1)
    found = (area >= 0.002 * height * width) & (area <= 0.6 * height * width)
    nucleus = nucleus & found[:, None, None]
    diameter = 2 * (area * found / torch.pi).sqrt() / min(height, width)
    level = levels(anything, 0.4)
    tissue = level > two_classes(level)[:, None, None]
    cell = unpacked(_outline(pack(nucleus), pack(tissue), diameter * min(height, width), width, pack), width)
    stained_by_it = unpacked(grown(pack(dark), width), width)
    red = tissue & ~cell & ~stained_by_it
    return Cell(nucleus, cell | ~found[:, None, None], found, _centre(nucleus, area, found), diameter, red)


def _thick(mask: Tensor) -> Tensor:
    """(N, h, w) bool: the mask without its rim, so without platelets and specks; the mask itself if nothing is left."""
    inner = F.avg_pool2d(mask[:, None].float(), 3, 1, padding=1, count_include_pad=False)[:, 0] > 0.999
    return _where(inner.flatten(1).any(1)[:, None, None], inner, mask)


def _where(condition: Tensor, one: Tensor, other: Tensor) -> Tensor:
    """torch.where, which ONNX Runtime has for numbers only."""
    if one.dtype == torch.bool:
        return one & condition | other & ~condition
    return torch.where(condition, one, other)


def _centre(nucleus: Tensor, area: Tensor, found: Tensor) -> Tensor:
    height, width = nucleus.shape[1:]
    y = torch.arange(height, device=nucleus.device) * 2 + 1
    x = torch.arange(width, device=nucleus.device) * 2 + 1
    summed = torch.stack([(nucleus.sum(1) * x).sum(1) / width, (nucleus.sum(2) * y).sum(1) / height], 1)
    return (summed / area.clamp_min(1)[:, None] - 1) * found[:, None]


def _outline(nucleus: Tensor, tissue: Tensor, diameter: Tensor, width: int, pack: Callable[[Tensor], Tensor]) -> Tensor:
    """The cell, from nucleus and all tissue as `pack` gives masks: what is near the nucleus and not a neighbour."""
    reach = (0.45 * diameter).clamp_min(2).view(-1, *[1] * (nucleus.ndim - 1))
    cell = nucleus
    for step in range(REACH):
        further = grown(cell, width, corners=step % 2 == 0) & (tissue | nucleus)
        cell = _where(step < reach, further, cell)
    whole = torch.ones(1, nucleus.shape[1], width, dtype=torch.bool, device=nucleus.device)
    full, inside = pack(whole), pack(F.pad(whole[:, 2:, 2:], (1, 1, 1, 1)))
    inner = ~grown_by(full & ~cell, width, NECK) & full  # without what hangs on by a narrow neck
    inner = around(nucleus, inner | nucleus, width, REACH, jump=1) & inner
    cell = nucleus | (grown_by(inner, width, NECK) & cell)
    outside = full & ~cell
    return full & ~around(outside & ~inside, outside, width, GRID // 2, jump=1)  # with its holes


LOBES = 4
"""lobes of a nucleus are at most LOBES − 1 pixels of a reduced image apart"""
NECK = 3
"""a neighbour that touches the cell along at most twice as many pixels of a reduced image is cut off"""
REACH = 20
"""most pixels of a reduced image that a cell reaches beyond its nucleus"""


def two_classes(level: Tensor) -> Tensor:
    """Otsu's threshold, (N,), of integer levels (N, h, w): the largest variance between the two classes."""
    n, s = _cumulated(level)
    return (_spread(n, s) + _spread(n[:, -1:] - n, s[:, -1:] - s)).argmax(1)


def three_classes(level: Tensor) -> Tensor:
    """The upper of Otsu's two thresholds of three classes, (N,), of integer levels (N, h, w)."""
    n, s = _cumulated(level)
    middle = _spread(n[:, None, :] - n[:, :, None], s[:, None, :] - s[:, :, None])  # (N, lower, upper)
    score = _spread(n, s)[:, :, None] + middle + _spread(n[:, -1:] - n, s[:, -1:] - s)[:, None, :]
    ordered = torch.ones(LEVELS, LEVELS, dtype=torch.bool, device=level.device).triu(1)
    return score.masked_fill(~ordered, -1.0).amax(1).argmax(1)


def _spread(n: Tensor, s: Tensor) -> Tensor:
    """A class's part of the variance between classes, but for a constant: n · mean²."""
    return s.square() / n.clamp_min(1)


def _cumulated(level: Tensor) -> tuple[Tensor, Tensor]:
    """Number and sum of the levels up to each one: (N, LEVELS) float64, whole numbers."""
    count = counted(level.flatten(1), LEVELS)
    return count.cumsum(1).double(), (count * torch.arange(LEVELS, device=level.device)).cumsum(1).double()


def central(mask: Tensor) -> Tensor:
    """(N, h, w) bool: the pixels of the mask that are nearest to the middle of the image."""
    height, width = mask.shape[1:]
    y = torch.arange(height, device=mask.device) - (height - 1) / 2
    x = torch.arange(width, device=mask.device) - (width - 1) / 2
    distance = (y.square()[:, None] + x.square()).expand_as(mask)
    distance = distance.masked_fill(~mask, torch.inf)
    return distance <= distance.flatten(1).amin(1)[:, None, None] + 1e-6


_POSITIVE = 2**63 - 1


def packed(mask: Tensor) -> Tensor:
    """(N, h, w) bool, w at most 64 → (N, h) int64, a bit for each pixel: whole rows of a mask are grown at once."""
    weight = 1 << torch.arange(mask.shape[-1], device=mask.device)
    return (mask * weight).sum(-1)


def _as_it_is(mask: Tensor) -> Tensor:
    return mask


def unpacked(rows: Tensor, width: int) -> Tensor:
    """The inverse of `packed`; a mask as it is."""
    if rows.dtype == torch.bool:
        return rows
    return (rows[..., None] >> torch.arange(width, device=rows.device) & 1).bool()


def grown(rows: Tensor, width: int, corners: bool = True) -> Tensor:
    """A packed mask, or one (N, h, w) bool, and its eight neighbours, four without `corners`."""
    if rows.dtype == torch.bool:
        return _pooled(rows, 3, 3) if corners else _pooled(rows, 3, 1) | _pooled(rows, 1, 3)
    tall = rows | F.pad(rows[:, 1:], (0, 1)) | F.pad(rows[:, :-1], (1, 0))
    across = tall if corners else rows
    return (tall | across << 1 | across >> 1 & _POSITIVE) & ((1 << width) - 1 if width < 64 else -1)


def _pooled(mask: Tensor, height: int, width: int) -> Tensor:
    """A mask (N, h, w) bool, grown by rectangles of an odd height and width."""
    across = F.max_pool2d(mask[:, None].float(), (1, width), 1, (0, width // 2))
    return F.max_pool2d(across, (height, 1), 1, (height // 2, 0))[:, 0] > 0.5


def grown_by(rows: Tensor, width: int, pixels: int) -> Tensor:
    """A packed mask and all within so many pixels, in octagons."""
    for step in range(pixels):
        rows = grown(rows, width, corners=step % 2 == 1)
    return rows


def around(seed: Tensor, mask: Tensor, width: int, steps: int, jump: int) -> Tensor:
    """The part of a packed mask, or one (N, h, w) bool, that is reached from the seed, over gaps of up to jump − 1."""
    for _ in range(steps):
        if seed.dtype == torch.bool:
            seed = _pooled(seed, 2 * jump + 1, 2 * jump + 1)
        else:
            for _ in range(jump):
                seed = grown(seed, width)
        seed = seed & mask
    return seed
