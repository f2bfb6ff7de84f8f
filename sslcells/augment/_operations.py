"""Operations on (N, C, H, W) float images in 0..1, on their device, with separate parameters for each row.

Parameters are (N,) CPU tensors, so that selecting rows never waits for the device.
"""

import math
from collections.abc import Callable, Sequence

import kornia
import torch
from torch import Tensor
from torch.nn import functional as F


def on_some(x: Tensor, chosen: Tensor, operation: Callable[..., Tensor], *parameters: Tensor) -> Tensor:
    """Apply an operation to the chosen rows only: chosen (N,) bool and parameters (N, ...) on the CPU."""
    rows = chosen.nonzero()[:, 0]
    if len(rows) == 0:
        return x
    there = rows.to(x.device, non_blocking=True)
    changed = operation(x[there], *(p[rows].to(x.device, non_blocking=True) for p in parameters))
    return x.index_copy(0, there, changed.to(x.dtype))


def warp(x: Tensor, size: int, centre: Tensor, half: Tensor, angle: Tensor, flip: Tensor) -> Tensor:
    """Crop, rotate, flip and resize in one interpolation: (N, C, H, W) → (N, C, size, size).

    Coordinates are x then y, −1 to 1 over the image: the crop has its centre at centre (N, 2) and reaches half (N, 2)
    to each side; it is rotated by angle (N,), in radians, about its centre, and mirrored where flip (N, 2) is true.
    Outside the image, its reflection is sampled.

    Where a crop shrinks it is smoothed as `resized` smooths at that scale, so that a view keeps as much of fine detail
    and noise as an image that is evaluated; else a view is one bilinear sample. `resized` averages under a triangle
    that reaches s pixels to each side, s being the scale, with variance s²/6. A bilinear sample is such a mean too,
    with s = 1; the other (s² − 1)/6, along each axis of the crop, are left to a mean before it.
    """
    aspect = x.shape[-1] / x.shape[-2]
    reach = half * torch.where(flip, -1.0, 1.0)
    cos, sin = angle.cos(), angle.sin()
    first = torch.stack([cos * reach[:, 0], -sin * reach[:, 1] / aspect, centre[:, 0]], 1)
    second = torch.stack([sin * reach[:, 0] * aspect, cos * reach[:, 1], centre[:, 1]], 1)
    theta = torch.stack([first, second], 1)  # (N, 2, 3)
    scale = half * torch.tensor([x.shape[-1], x.shape[-2]]) / size  # (N, 2) pixels of the image in one of the view
    scale = torch.where(scale > _SHRINKS, scale, 1.0)
    if bool((scale == 1).all()):
        return _sampled(x, size, theta)
    before, slanted = _spread(scale, cos, sin)
    finer = torch.where((slanted | (scale > _FAR).any(1))[:, None], _finer(scale), 1)  # (N, 2) samples a pixel
    taps = torch.where((finer > 1).any(1), 0, before.amax(1).ceil().long() - 1)  # (N,) to each side
    kinds = torch.cat([finer, taps[:, None]], 1)
    out = x.new_empty(*x.shape[:2], size, size)
    for kind in kinds.unique(dim=0).tolist():  # type: ignore[no-untyped-call]
        *fine, most = kind
        at_once = max(1, _ROOM // (x.shape[1] * max(fine[0] * fine[1] * size**2, x.shape[2] * x.shape[3])))
        for rows in (kinds == torch.tensor(kind)).all(1).nonzero()[:, 0].split(at_once):  # type: ignore[no-untyped-call]
            there = rows.to(x.device, non_blocking=True)
            if fine != [1, 1]:
                views = _sampled_finely(x[there], size, theta[rows], scale[rows], fine)
            else:
                views = _sampled(_smoothed(x[there], before[rows], most), size, theta[rows])
            out.index_copy_(0, there, views)
    return out


_SHRINKS = 1.0001
"""pixels of the image in one of the view, from which on a crop is taken to shrink: beyond a float's rounding"""
_FAR = 4.0
"""pixels of the image in one of the view, from which on fine samples of the crop cost less than means of the image"""
_ROOM = 2**24
"""numbers that are held at a time, unless those of one image are more"""


def _sampled(x: Tensor, size: int, theta: Tensor) -> Tensor:
    """The image at the places that theta (N, 2, 3) takes the view's pixels to: (N, C, H, W) → (N, C, size, size)."""
    theta = theta.to(x.device, x.dtype, non_blocking=True)
    grid = F.affine_grid(theta, [len(x), x.shape[1], size, size], align_corners=False)
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="reflection", align_corners=False)


def _spread(scale: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """How far triangles along the image's own axes reach for a turned crop of scale (N, 2); and where they will not do.

    (N, 2) pixels, so that the variance along either axis is right; and (N,) bool where the crop shrinks so unevenly,
    and is so slanted, that what they leave out (the covariance) would take more than a twentieth of the noise.
    """
    along, across = ((scale.square() - 1) / 6).unbind(1)
    variance = torch.stack([cos**2 * along + sin**2 * across, sin**2 * along + cos**2 * across], 1)
    covariance = (along - across) * cos * sin
    return (1 + 6 * variance).sqrt(), covariance.square() > 0.1 * (variance + 1 / 6).prod(1)


def _smoothed(x: Tensor, reach: Tensor, taps: int) -> Tensor:
    """Means along x and y, under triangles that reach so many pixels (N, 2): at most `taps` others to each side.

    Beyond the image is its reflection.
    """
    if taps == 0:
        return x
    for axis, w in ((3, reach[:, 0]), (2, reach[:, 1])):
        weight = _triangle(w, taps).to(x.device, x.dtype, non_blocking=True)[..., None, None, None]
        length = x.shape[axis]
        out = weight[:, taps] * x
        for t in range(1, taps + 1):
            by = weight[:, taps + t]
            out.narrow(axis, t, length - t).addcmul_(by, x.narrow(axis, 0, length - t))
            out.narrow(axis, 0, length - t).addcmul_(by, x.narrow(axis, t, length - t))
            out.narrow(axis, 0, t).addcmul_(by, x.narrow(axis, 0, t).flip(axis))
            out.narrow(axis, length - t, t).addcmul_(by, x.narrow(axis, length - t, t).flip(axis))
        x = out
    return x


def _sampled_finely(x: Tensor, size: int, theta: Tensor, scale: Tensor, finer: Sequence[int]) -> Tensor:
    """`_sampled` on a grid `finer` times as fine in x and y, with a mean of the samples along each axis of the crop.

    With k samples a pixel, s/k pixels of the image apart, the mean's triangle reaches w of them: (w² − 1)/6 · (s/k)² =
    (s² − 1)/6.
    """
    reach = (1 + torch.tensor(finer) ** 2 * (1 - scale**-2)).sqrt()  # (N, 2) samples
    theta = theta.to(x.device, x.dtype, non_blocking=True)[..., None, None]
    u, v = (_places(size, k).to(x.device, x.dtype, non_blocking=True) for k in finer)
    grid = torch.stack([theta[:, i, 0] * u + (theta[:, i, 1] * v[:, None] + theta[:, i, 2]) for i in (0, 1)], 3)
    x = F.grid_sample(x, grid, mode="bilinear", padding_mode="reflection", align_corners=False)
    for axis, k, w in ((3, finer[0], reach[:, 0]), (2, finer[1], reach[:, 1])):
        if k > 1:
            x = _mean(x, axis, _triangle(w, k).to(x.device, x.dtype, non_blocking=True), k, size)
    return x


def _finer(scale: Tensor) -> Tensor:
    """How many samples are taken for one pixel of the view: 1, or an odd number, 0.8 for each pixel of the image.

    An odd number has one in the middle, so that the mean begins with nothing at scale 1.
    """
    return torch.where(scale > 1, ((0.8 * scale - 1) / 2).ceil().clamp_min(1) * 2 + 1, 1).long()


def _places(size: int, k: int) -> Tensor:
    """Where the samples are along an axis, −1 to 1 over the view: k a pixel, and those beyond that its ends average."""
    beyond = (k + 1) // 2 if k > 1 else 0
    return (2 * torch.arange(-beyond, k * size + beyond) + 1) / (k * size) - 1


def _triangle(reach: Tensor, taps: int) -> Tensor:
    """Weights of the places −taps … taps, of sum 1, for a mean of about a triangle's: (N,) → (N, 2·taps + 1).

    Weights 1 − |d|/m of whole d, and a bilinear sample after them, are the triangle that reaches a whole m exactly. For
    a reach s between m and n = m + 1 the two are mixed, by the share t that keeps of noise what the triangle keeps,
    2/(3s): (1 − t)² P + 2t(1 − t) C + t² Q with the integrals P, Q of their squares, and C of their product.
    """
    reach = reach[:, None]
    m, n = reach.floor(), reach.floor() + 1
    of_m, of_n, of_both = 2 / (3 * m), 2 / (3 * n), 1 / n - m / (3 * n * n)
    curve, drop = of_m - 2 * of_both + of_n, of_m - of_both
    t = (drop - (drop.square() - curve * (of_m - 2 / (3 * reach))).clamp_min(0).sqrt()) / curve
    place = torch.arange(-taps, taps + 1).abs()
    narrow, wide = ((1 - place / w).clamp_min(0) / w for w in (m, n))
    return narrow + t * (wide - narrow)


def _mean(x: Tensor, axis: int, weight: Tensor, stride: int, count: int) -> Tensor:
    """Weighted means along an axis, weight (N, T), of T neighbours each; `count` of them, `stride` apart."""
    weight = weight[:, :, None, None, None]
    taps = [x.narrow(axis, t, stride * (count - 1) + 1) for t in range(weight.shape[1])]
    taps = [t[..., ::stride] if axis == 3 else t[..., ::stride, :] for t in taps]
    out = weight[:, 0] * taps[0]
    for t in range(1, len(taps)):
        out.addcmul_(weight[:, t], taps[t])
    return out


def colour_jitter(x: Tensor, chosen: Tensor, order: Tensor, factors: Sequence[Tensor]) -> Tensor:
    """Change brightness, contrast, saturation and hue of the chosen rows, in the order (N, 4) of each; factors (N,).

    No change is 1 for the first three factors, and 0 for hue, in radians. Images that do not have three channels keep
    saturation and hue.
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
    """The same four changes as one 3×3 matrix and one offset per row; hue rotates the chroma plane of YIQ.

    One product replaces four passes over the images and two colour conversions. Images that do not have three channels
    change only brightness and contrast. hue is in radians.
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


def blur(x: Tensor, sigma: Tensor, largest: float) -> Tensor:
    """Gaussian blur, sigma (N,) in pixels and none above `largest`, which the kernel is made for: ±3 of it.

    So every sigma acts as it is, but for 1.4 % of the largest. A view is wider than ±3 sigma of any recipe.
    """
    kernel = 2 * math.ceil(3 * largest) + 1
    return kornia.filters.gaussian_blur2d(x, (kernel, kernel), sigma[:, None].expand(-1, 2))
