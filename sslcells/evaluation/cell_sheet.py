"""A sheet of cells with the outlines that were found, for a person to check in a minute before training goes on."""

from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torch.nn import functional as F

from sslcells.standardise import Standard
from sslcells.standardise.cell import background_of, find, reduced

NUCLEUS, CELL, MISSED = (255, 220, 0), (0, 170, 60), (220, 30, 30)
_SIDE, _GAP, _HEAD, _COLUMNS = 128, 6, 22, 12


def cell_sheet(pixels: Tensor, standard: Standard, out: Path, of_labs: Tensor | None = None) -> Path:
    """Each image (N, C, H, W) uint8 with its nucleus and cell outlined, and below it as the network gets it.

    `of_labs` (N, P) are the rows of the images' laboratories, as for the Standard. A red frame marks images in which no
    nucleus was found. Shown are the first three channels, or the mean of two.
    """
    x = pixels.float() / 255
    small = reduced(x)
    at = find(small, background_of(small, standard.stain), standard.stain)
    changed = standard(x, of_labs)
    shown, after = (F.interpolate(_colours(images), (_SIDE, _SIDE), mode="nearest") for images in (x, changed))
    for mask, colour in ((at.cell, CELL), (at.nucleus, NUCLEUS)):
        edge = _edge(mask, x.shape[-2:]) & at.found[:, None, None, None]
        shown = torch.where(edge, torch.tensor(colour)[:, None, None] / 255, shown)
    frame = torch.zeros(_SIDE, _SIDE, dtype=torch.bool)
    frame[:4], frame[-4:], frame[:, :4], frame[:, -4:] = True, True, True, True
    missed = frame & ~at.found[:, None, None, None]
    shown = torch.where(missed, torch.tensor(MISSED)[:, None, None] / 255, shown)
    columns = min(_COLUMNS, len(x))
    rows, step = -(-len(x) // columns), _SIDE + _GAP
    sheet = Image.new("RGB", (columns * step + _GAP, _HEAD + rows * (2 * _SIDE + 2 * _GAP)), "white")
    for i, pair in enumerate(zip(shown, after, strict=True)):
        for below, image in enumerate(pair):
            left, top = _GAP + i % columns * step, _HEAD + i // columns * (2 * _SIDE + 2 * _GAP) + below * _SIDE
            sheet.paste(Image.fromarray((image.permute(1, 2, 0) * 255).round().byte().numpy()), (left, top))
    none = int((~at.found).sum())
    ImageDraw.Draw(sheet).text(
        (_GAP, 5),
        f"nucleus yellow, cell green; no nucleus found in {none} of {len(x)} (red); below each: what the network gets",
        fill="black",
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(out)
    return out


def _colours(x: Tensor) -> Tensor:
    """(N, C, H, W) → (N, 3, H, W)."""
    return x[:, :3] if x.shape[1] >= 3 else x.mean(1, keepdim=True).expand(-1, 3, -1, -1)


def _edge(mask: Tensor, size: torch.Size) -> Tensor:
    """The pixels just inside a mask (N, h, w) of images of this size: (N, 1, _SIDE, _SIDE) bool."""
    k = -(-max(size) // mask.shape[-1]) if max(size) > mask.shape[-1] else 1
    large = mask[:, None].float().repeat_interleave(k, 2).repeat_interleave(k, 3)[:, :, : size[0], : size[1]]
    large = F.interpolate(large, (_SIDE, _SIDE), mode="nearest")
    inner = 1 - F.max_pool2d(1 - large, 3, 1, padding=1)
    return (large > 0) & (inner == 0)
