"""Operations on (N, C, H, W) float images in 0..1, on their device, each row with parameters of its own.

Parameters come as (N,) CPU tensors, so that choosing the rows an operation applies to never waits for the device.
"""

from collections.abc import Callable, Sequence

import kornia
import torch
from torch import Tensor
from torch.nn import functional as F


def on_some(x: Tensor, chosen: Tensor, operation: Callable[..., Tensor], *parameters: Tensor) -> Tensor:
    """Apply an operation to the chosen rows alone: chosen (N,) bool and parameters (N, ...) on the CPU."""
    rows = chosen.nonzero()[:, 0]
    if len(rows) == 0:
        return x
    there = rows.to(x.device, non_blocking=True)
    changed = operation(x[there], *(p[rows].to(x.device, non_blocking=True) for p in parameters))
    return x.index_copy(0, there, changed.to(x.dtype))


def warp(x: Tensor, size: int, centre: Tensor, half: Tensor, angle: Tensor, flip: Tensor) -> Tensor:
    """Crop, turn, flip and resize in one interpolation: (N, C, H, W) → (N, C, size, size).

    Coordinates are x then y, −1 to 1 over the image: the crop has its centre at centre (N, 2) and reaches half (N, 2)
    to each side; it is turned by angle (N,), in radians, about its centre, and mirrored where flip (N, 2) is true.
    What lies outside the image is its reflection.
    """
    aspect = x.shape[-1] / x.shape[-2]
    reach = half * torch.where(flip, -1.0, 1.0)
    cos, sin = angle.cos(), angle.sin()
    first = torch.stack([cos * reach[:, 0], -sin * reach[:, 1] / aspect, centre[:, 0]], 1)
    second = torch.stack([sin * reach[:, 0] * aspect, cos * reach[:, 1], centre[:, 1]], 1)
    theta = torch.stack([first, second], 1).to(x.device, x.dtype, non_blocking=True)
    grid = F.affine_grid(theta, [len(x), x.shape[1], size, size], align_corners=False)
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="reflection", align_corners=False)


def colour_jitter(x: Tensor, chosen: Tensor, order: Tensor, factors: Sequence[Tensor]) -> Tensor:
    """Brightness, contrast, saturation and hue of the chosen rows, in each row's own order (N, 4), factors (N,) each.

    The first three factors are 1 for no change; hue is in radians, 0 for no change. With other than three channels
    saturation and hue do nothing.
    """
    operations = [
        kornia.enhance.adjust_brightness_accumulative,
        kornia.enhance.adjust_contrast_with_mean_subtraction,
        kornia.enhance.adjust_saturation_with_gray_subtraction,
        kornia.enhance.adjust_hue,
    ]
    count = 4 if x.shape[1] == 3 else 2
    for place in range(4):
        for which in range(count):
            x = on_some(x, chosen & (order[:, place] == which), operations[which], factors[which])
    return x


def linear_colour(x: Tensor, brightness: Tensor, contrast: Tensor, saturation: Tensor, hue: Tensor) -> Tensor:
    """The same four changes as one 3×3 matrix and one offset a row: hue turns the chroma plane of YIQ.

    One product replaces four passes over the images and two conversions of colour space. For other than three channels
    brightness and contrast alone. hue in radians.
    """
    mean = x.mean((1, 2, 3))
    brightness, contrast = (t.to(x.device, non_blocking=True) for t in (brightness, contrast))
    gain, offset = brightness * contrast, mean * brightness * (1 - contrast)
    if x.shape[1] != 3:
        return (x * gain[:, None, None, None] + offset[:, None, None, None]).clamp(0, 1)
    to_yiq = torch.tensor([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])
    turn = torch.zeros(len(x), 3, 3)
    turn[:, 0, 0] = 1
    turn[:, 1, 1] = turn[:, 2, 2] = saturation * hue.cos()
    turn[:, 1, 2] = saturation * hue.sin()  # from red towards yellow, as in HSV
    turn[:, 2, 1] = -turn[:, 1, 2]
    matrix = (to_yiq.inverse() @ turn @ to_yiq).to(x.device, non_blocking=True) * gain[:, None, None]
    return torch.baddbmm(offset[:, None, None], matrix, x.flatten(2)).view_as(x).clamp(0, 1)


def grey(x: Tensor) -> Tensor:
    """The luma of (N, 3, H, W) in all three channels."""
    return kornia.color.rgb_to_grayscale(x).expand_as(x)


def blur(x: Tensor, sigma: Tensor, kernel: int) -> Tensor:
    """Gaussian blur, sigma (N,) in pixels, with a kernel of this many pixels."""
    return kornia.filters.gaussian_blur2d(x, (kernel, kernel), sigma[:, None].expand(-1, 2))


def odd(pixels: float) -> int:
    """The odd number next to `pixels`, at least 3."""
    return max(3, int(pixels) // 2 * 2 + 1)
