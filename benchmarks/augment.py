"""How much white noise the crops keep, by frequency, compared with evaluated images; and the time that they take.

python benchmarks/augment.py [--device cuda] [--out benchmarks/RESULTS.md]

`plain` is an image resized as for evaluation; `bilinear` takes one bilinear sample per pixel; `warp` is the crop of the
recipes. A view that keeps more noise than `plain` is aliased: training and evaluation then see different images.
"""

import argparse
import math
from collections.abc import Callable
from pathlib import Path

import torch
from _measure import markdown, seconds, section, show
from torch import Tensor
from torch.nn import functional as F

from sslcells.augment import Augment, _operations, cells, channels, resized, simclr

BANDS = [(0.0, 0.1), (0.1, 0.2), (0.2, 0.3), (0.3, 0.4), (0.4, 0.5)]
PIXELS = [(49, 48), (58, 48), (64, 48), (96, 48), (128, 48), (128, 96), (224, 48)]
COSTS = [(28, 28), (48, 48), (64, 64), (96, 96), (128, 96), (128, 48), (224, 96)]
Warp = Callable[[Tensor, int, Tensor, Tensor, Tensor, Tensor], Tensor]


def bilinear(x: Tensor, size: int, centre: Tensor, half: Tensor, angle: Tensor, flip: Tensor) -> Tensor:
    """One bilinear sample a pixel, of square images."""
    cos, sin = angle.cos(), angle.sin()
    first = torch.stack([cos * half[:, 0], -sin * half[:, 1], centre[:, 0]], 1)
    second = torch.stack([sin * half[:, 0], cos * half[:, 1], centre[:, 1]], 1)
    theta = torch.stack([first, second], 1).to(x.device)
    grid = F.affine_grid(theta, [len(x), x.shape[1], size, size], align_corners=False)
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="reflection", align_corners=False)


def power(x: Tensor) -> list[float]:
    """Power of (N, C, S, S) noise in bands of radial frequency, cycles a pixel: 1 for white noise of variance 1."""
    size = x.shape[-1]
    spectrum = torch.fft.fft2(x - x.mean()).abs().square().mean((0, 1)) / size**2
    frequency = torch.fft.fftfreq(size)
    radius = (frequency[:, None].square() + frequency.square()).sqrt()
    return [float(spectrum[(radius > low) & (radius <= high)].mean()) for low, high in BANDS]


def spectra(pixels: int, size: int) -> list[list[str]]:
    """Of noise through each: power by band, that of `plain` as it is, and of the others in parts of it; and in all."""
    count = max(8, 2**21 // pixels**2)
    drawn = torch.Generator().manual_seed(0)
    x = torch.randn(count, 1, pixels, pixels, generator=drawn)
    centre = (torch.rand(count, 2, generator=drawn) - 0.5) / pixels
    whole, upright = torch.ones(count, 2), torch.zeros(count, 2, dtype=torch.bool)
    plain = resized(x, size)
    rows = [[f"{pixels} → {size}", "plain", *(f"{p:.3f}" for p in [*power(plain), float(plain.var())])]]
    for turn in (0.0, 0.6):
        ways: dict[str, Warp] = {"bilinear": bilinear, "warp": _operations.warp}
        for name, warp in ways.items():
            y = warp(x, size, centre, whole, torch.full((count,), turn), upright)
            kept = [*(p / q for p, q in zip(power(y), power(plain), strict=True)), float(y.var() / plain.var())]
            named = name + (", turned by 0.6" if turn else "")
            rows.append([f"{pixels} → {size}", named, *(f"× {k:.2f}" for k in kept)])
    return rows


def costs(pixels: int, size: int, views: int, device: str, repeats: int) -> list[str]:
    """Milliseconds for 256 images: evaluated, cropped both ways (0.4 to 1 of the area, turned), and whole recipes."""
    count, drawn = 256, torch.Generator().manual_seed(0)
    raw = torch.randint(0, 256, (count, 3, pixels, pixels), generator=drawn, dtype=torch.uint8).to(device)
    x, image = raw.float() / 255, torch.arange(count)
    half = (0.4 + 0.6 * torch.rand(count, generator=drawn)).sqrt()[:, None].expand(count, 2)
    centre = (1 - half) * (2 * torch.rand(count, 2, generator=drawn) - 1)
    angle, upright = 2 * math.pi * torch.rand(count, generator=drawn), torch.zeros(count, 2, dtype=torch.bool)
    steps: list[Callable[[], object]] = [
        lambda: resized(x, size),
        lambda: bilinear(x, size, centre, half, angle, upright),
        lambda: _operations.warp(x, size, centre, half, angle, upright),
    ]
    for recipe in (cells, simclr, channels):
        made = Augment(recipe.Config(size=size), (0.5,), (0.25,))
        steps.append(lambda made=made: made(raw, image, seed=0, step=0, views=views))  # type: ignore[misc]
    out = []
    for step in steps:
        step()
        out.append(f"{1000 * sorted(seconds(step, device, repeats))[0]:.1f}")
    return [f"{pixels} → {size}", "", *out]


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--few", action="store_true", help="one size of each, to see that it runs")
    parser.add_argument("--pixels", type=int, nargs=2, metavar=("FROM", "TO"), help="times of these sizes alone")
    parser.add_argument("--views", type=int, default=1, help="of each image, that the recipes make (1)")
    parser.add_argument("--out", type=Path, help="append the section to this file")
    return parser.parse_args()


def main() -> None:
    """Print the tables."""
    args = arguments()
    few = 1 if args.few else None
    sizes = [tuple(args.pixels)] if args.pixels else COSTS[:few]
    cost = [costs(pixels, size, args.views, args.device, args.repeats) for pixels, size in sizes]
    tables = [markdown(["px", "", "plain", "bilinear", "warp", "cells", "simclr", "channels"], cost)]
    notes = (
        "The least milliseconds for 256 images of three channels: crops of 0.4 to 1 of the area at any angle, and "
        f"recipes with their defaults, {args.views} view(s) of each image."
    )
    if not args.pixels:
        bands = [f"{low}–{high}" for low, high in BANDS]
        noise = [row for pixels, size in PIXELS[:few] for row in spectra(pixels, size)]
        tables = [markdown(["px", "way", *bands, "all"], noise), *tables]
        notes = (
            "Power of white noise of variance 1 by radial frequency, cycles a pixel of the view: `plain` as it is, the "
            f"others in parts of it. Then: {notes[0].lower()}{notes[1:]}"
        )
    text = section("Augmentation", args.device, notes, tables)
    show(text, args.out)


if __name__ == "__main__":
    main()
