"""Synthetic Wright-Giemsa stained blood smears: one white cell amid red cells, drawn with numpy.

Positions are in micrometres on a field of fixed width, so a scene is the same at every pixel size. Cells
are painted as amounts of three absorbers; light passes them by Beer-Lambert's law, and then an imperfect
microscope. Arrays are float32, and those of images are indexed (row, column).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

CLASSES = ("neutrophil", "eosinophil", "basophil", "lymphocyte", "monocyte")
FIELD_UM = 24.0

# Shapes are drawn with soft edges, so 1.5 times as many pixels as on the sensor are enough.
_OVERSAMPLE = 1.5
# The lens resolves nothing finer than 1/6 µm, so pictures with more pixels are not drawn finer.
_FINEST_PIXELS = 144
# Absorbance in (red, green, blue). Romanowsky stains hold two dyes but show three colours: the thiazine
# alone is blue, eosin alone orange-pink, and where both bind to chromatin their complex is purple.
_ABSORBANCE = np.array([[0.80, 1.15, 0.42], [0.70, 0.44, 0.12], [0.06, 0.60, 0.68]], np.float32)

Array = NDArray[np.floating[Any]]
Window = tuple[slice, slice]
Range = tuple[float, float]
Dyes = tuple[float, float, float]
"""Amounts of (purple complex, blue thiazine, eosin)."""
Place = tuple[float, float, float]
"""A disc: (x, y, radius) in µm."""


@dataclass(frozen=True)
class _Granules:
    """Round inclusions of the cytoplasm; with pale dyes they are vacuoles."""

    count: Range
    radius_um: Range
    dyes: Dyes
    opacity: Range


@dataclass(frozen=True)
class _Look:
    """How one class of white cell looks. `nucleus` returns capsules in units of the cell's radius."""

    radius_um: Range
    raggedness_um: Range
    cytoplasm: Dyes
    chromatin: Range
    lace: Range
    nucleus: Callable[[Generator], Array]
    granules: tuple[_Granules, ...]
    granules_on_top: bool = False


def _joined(centres: Array, lobe_radius: Array, lobe_axis: Array, strand_radius: float) -> Array:
    """Oval lobes at `centres` (n, 2), half-axes (n, 2), joined in a row by strands: capsules (2n - 1, 5)."""
    lobes = np.column_stack([centres - lobe_axis, centres + lobe_axis, lobe_radius])
    strands = np.column_stack([centres[:-1], centres[1:], np.full(len(centres) - 1, strand_radius)])
    return np.concatenate([lobes, strands]).astype(np.float32)


def _on_arc(angle: Array, radius: Array | float) -> Array:
    """Points (n, 2) at `angle` (n,) in radians."""
    return np.stack([np.cos(angle) * radius, np.sin(angle) * radius], axis=-1).astype(np.float32)


def _segmented(rng: Generator) -> Array:
    """Three to five lobes on a string: neutrophil."""
    lobes = int(rng.choice([3, 4, 5], p=[0.45, 0.37, 0.18]))
    sweep = rng.uniform(1.2, 1.55) * math.pi
    angle = np.linspace(-0.5, 0.5, lobes) * sweep + rng.normal(0, 0.12, lobes)
    centres = _on_arc(angle, rng.uniform(0.45, 0.60, lobes))
    radius = (0.10 + 0.52 / lobes) * rng.uniform(0.85, 1.12, lobes)
    axis = _on_arc(rng.uniform(0, math.pi, lobes), rng.uniform(0.02, 0.14, lobes))
    return _joined(centres, radius, axis, rng.uniform(0.04, 0.08))


def _bilobed(rng: Generator) -> Array:
    """Two plump lobes, seldom three: eosinophil."""
    lobes = 2 if rng.random() < 0.88 else 3
    angle = np.linspace(-1, 1, lobes) * rng.uniform(0.85, 1.35) + rng.normal(0, 0.1, lobes)
    centres = _on_arc(angle, rng.uniform(0.42, 0.56, lobes))
    radius = (0.20 + 0.26 / lobes) * rng.uniform(0.85, 1.12, lobes)
    axis = _on_arc(angle + math.pi / 2 + rng.normal(0, 0.4, lobes), rng.uniform(0.05, 0.16, lobes))
    return _joined(centres, radius, axis, rng.uniform(0.06, 0.14))


def _folded(rng: Generator) -> Array:
    """A broad band bent into an S or a C: basophil."""
    bends = np.array([-1.0, 1.0, 1.0 if rng.random() < 0.5 else -1.0]) * rng.uniform(0.15, 0.4, 3)
    centres = np.column_stack([np.array([-0.42, 0.0, 0.42]), bends]).astype(np.float32)
    axis = _on_arc(rng.uniform(0, math.pi, 3), 0.08)
    return _joined(centres, rng.uniform(0.26, 0.40, 3), axis, rng.uniform(0.16, 0.28))


def _round(rng: Generator) -> Array:
    """One disc, a little oval, which nearly fills the cell: lymphocyte."""
    radius = rng.uniform(0.72, 0.86)
    axis = _on_arc(rng.uniform(0, math.pi, 1), rng.uniform(0.02, 0.10))
    centre = _on_arc(rng.uniform(0, math.tau, 1), (0.9 - radius) * rng.random())
    return np.column_stack([centre - axis, centre + axis, [radius]]).astype(np.float32)


def _horseshoe(rng: Generator) -> Array:
    """A thick arc, from a kidney to a horseshoe: monocyte."""
    bend = rng.uniform(1.3, 4.0)
    length = rng.uniform(0.95, 1.15) + 0.10 * bend
    arc_radius = length / bend
    angle = np.linspace(-0.5, 0.5, 7) * bend
    points = _on_arc(angle, arc_radius) - np.array([0.75 * arc_radius, 0], np.float32)
    thickness = (0.45 - 0.04 * bend) * rng.uniform(0.85, 1.12, 6)
    return np.column_stack([points[:-1], points[1:], thickness]).astype(np.float32)


_LOOKS = (
    _Look((5.8, 7.2), (0.15, 0.40), (0.05, 0.05, 0.20), (1.0, 1.5), (0.10, 0.25), _segmented,
          (_Granules((50, 160), (0.14, 0.26), (0.22, 0.02, 0.35), (0.4, 1.0)),)),
    _Look((6.0, 7.6), (0.15, 0.40), (0.02, 0.08, 0.25), (0.9, 1.4), (0.10, 0.25), _bilobed,
          (_Granules((120, 210), (0.36, 0.58), (0.10, 0.0, 1.30), (0.6, 1.0)),)),
    _Look((5.3, 6.8), (0.15, 0.45), (0.12, 0.10, 0.12), (0.45, 0.85), (0.10, 0.25), _folded,
          (_Granules((40, 95), (0.35, 0.72), (1.55, 0.75, 0.15), (0.7, 1.0)),), granules_on_top=True),
    _Look((4.1, 6.4), (0.10, 0.35), (0.03, 0.50, 0.0), (1.1, 1.6), (0.05, 0.18), _round,
          (_Granules((0, 6), (0.18, 0.30), (0.7, 0.1, 0.3), (0.5, 1.0)),)),
    _Look((6.9, 9.0), (0.45, 0.95), (0.08, 0.34, 0.04), (0.65, 1.05), (0.25, 0.45), _horseshoe,
          (_Granules((10, 60), (0.12, 0.22), (0.5, 0.1, 0.25), (0.3, 0.8)),
           _Granules((0, 7), (0.35, 0.80), (0.0, 0.05, 0.02), (0.6, 1.0)))),
)  # fmt: skip


@lru_cache(maxsize=32)
def _spline_weights(points: int, knots: int) -> Array:
    """Cubic B-spline weights (points, knots) of pixel centres spread evenly over the knots."""
    position = (np.arange(points) + 0.5) / points * (knots - 3) + 1
    distance = np.abs(position[:, None] - np.arange(knots))
    near = 2 / 3 - distance**2 + distance**3 / 2
    return np.where(distance < 1, near, np.clip(2 - distance, 0, None) ** 3 / 6).astype(np.float32)


@lru_cache(maxsize=8)
def _pixel_centres_um(pixels: int) -> Array:
    """Positions (pixels,) along one side of the field, whose middle is 0."""
    return ((np.arange(pixels) + 0.5) * (FIELD_UM / pixels) - FIELD_UM / 2).astype(np.float32)


def _smooth_noise(rng: Generator, pixels: int, grain_um: float) -> Array:
    """Noise (pixels, pixels) of about unit deviation, the same surface at any number of pixels."""
    knots = math.ceil(FIELD_UM / grain_um) + 3
    weights = _spline_weights(pixels, knots)
    # A spline through white noise keeps 0.48 of the deviation.
    heights = rng.standard_normal((knots, knots), np.float32) / np.float32(0.48)
    surface: Array = weights @ heights @ weights.T
    return surface


class _Canvas:
    """Dye amounts (3, pixels, pixels) over the field, and the noise that makes drawn shapes irregular."""

    def __init__(self, rng: Generator, pixels: int) -> None:
        self.pixel_um = FIELD_UM / pixels
        self.axis_um = _pixel_centres_um(pixels)
        self.warp = (_smooth_noise(rng, pixels, 3.0), _smooth_noise(rng, pixels, 3.0))
        self.texture = _smooth_noise(rng, pixels, 0.55)
        plasma = rng.uniform(0.0, 0.12, 3) * np.array([0.3, 0.6, 1.0])
        self.dyes = np.multiply.outer(plasma.astype(np.float32), 1 + 0.1 * self.warp[0])

    def window(self, place: Place, reach_um: float) -> Window:
        """The pixels at most `reach_um` from the middle of a place along either axis; may be empty."""

        def span(middle_um: float) -> slice:
            first = math.floor((middle_um - reach_um + FIELD_UM / 2) / self.pixel_um)
            last = math.ceil((middle_um + reach_um + FIELD_UM / 2) / self.pixel_um)
            return slice(max(first, 0), max(last, 0))

        return span(place[1]), span(place[0])

    def warped_um(self, window: Window, place: Place, amount_um: float) -> tuple[Array, Array]:
        """Coordinates (h, w) relative to the middle of a place, distorted so that shapes become irregular."""
        rows, columns = window
        x = amount_um * self.warp[0][window] + (self.axis_um[columns] - place[0])
        y = amount_um * self.warp[1][window] + (self.axis_um[rows, None] - place[1])
        return x, y

    def coverage(self, distance_um: Array, softness_um: float = 0.15) -> Array:
        """Share of each pixel inside a shape, from the signed distance to its outline (negative inside)."""
        ramp = max(self.pixel_um, softness_um)
        share: Array = distance_um * np.float32(-1 / ramp)
        share += np.float32(0.5)
        np.maximum(share, 0, out=share)
        np.minimum(share, 1, out=share)
        return share

    def stamps(self, middles_um: Array, reach_um: float) -> tuple[NDArray[np.intp], Array, Array]:
        """Square patches of pixels around n points (n, 2): flat index (n, p, p) of each pixel, and its x and y.

        x and y are relative to the point and broadcast to (n, p, p). A pixel outside of the field has the index one
        past the end.
        """
        pixels = len(self.axis_um)
        reach = math.ceil(reach_um / self.pixel_um)
        first = np.rint((middles_um - self.axis_um[0]) / self.pixel_um).astype(np.intp)
        index = first[:, :, None] + np.arange(-reach, reach + 1)
        from_middle = (index * self.pixel_um + self.axis_um[0] - middles_um[:, :, None]).astype(np.float32)
        inside = (index >= 0) & (index < pixels)
        flat = index[:, 1, :, None] * pixels + index[:, 0, None, :]
        flat[~(inside[:, 1, :, None] & inside[:, 0, None, :])] = pixels * pixels
        return flat, from_middle[:, 0, None, :], from_middle[:, 1, :, None]

    def replace(self, window: Window, coverage: Array, dyes: Dyes, shade: Array | float = 1.0) -> None:
        """Paint over the window: dyes and shade replace its amounts, as far as the coverage says."""
        for layer, dye in zip(self.dyes, dyes, strict=True):
            layer[window] += coverage * (np.float32(dye) * shade - layer[window])


def _ellipse(x: Array, y: Array, radius: float, stretch: float, angle: float) -> Array:
    """The quadratic form (h, w) of an ellipse about the origin: 1 on its outline, 0 in its middle."""
    mean, swing = (stretch + 1 / stretch) / 2, (stretch - 1 / stretch) / 2
    xx, yy = mean + swing * math.cos(angle), mean - swing * math.cos(angle)
    xy = 2 * swing * math.sin(angle)
    return (x * (x * xx + y * xy) + y * (y * yy)) * (1 / radius**2)


def _capsules_distance(x: Array, y: Array, capsules: Array, blend: float) -> Array:
    """Signed distance (h, w) to the union of capsules (k, 5: two ends and a radius), with rounded creases."""
    start, end, radius = capsules[:, :2], capsules[:, 2:4], capsules[:, 4, None, None]
    half = np.sqrt(((end - start) ** 2).sum(axis=1, keepdims=True)) / 2
    along = (end - start) / np.maximum(2 * half, 1e-6)
    across = along[:, ::-1] * np.array([-1, 1], np.float32)
    axes = np.concatenate([along, across])
    origin = (axes * np.tile((start + end) / 2, (2, 1))).sum(axis=1, keepdims=True)
    frames = (axes @ np.stack([x, y]).reshape(2, -1) - origin).reshape(2, len(capsules), *x.shape)
    beyond = np.maximum(np.abs(frames[0]) - half[:, :, None], 0)
    distance = np.sqrt(beyond * beyond + frames[1] * frames[1]) - radius
    # 1e-30 keeps the logarithm finite far from every capsule.
    smooth: Array = np.log(np.exp(distance / -blend).sum(axis=0) + 1e-30) * -blend
    return smooth


def _turned(capsules: Array, angle: float) -> Array:
    """The capsules, rotated about the origin."""
    turn = np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]], np.float32)
    return np.column_stack([capsules[:, :2] @ turn, capsules[:, 2:4] @ turn, capsules[:, 4]])


def _paint_red_cells(rng: Generator, canvas: _Canvas, white: Place) -> None:
    """Scatter red cells, but none where the white cell is."""
    typical_um, crowding = rng.normal(3.6, 0.15), rng.uniform(0.80, 1.1)
    pallor, dyes = rng.uniform(0.2, 0.75), (0.0, rng.uniform(0.0, 0.14), rng.uniform(0.40, 0.68))
    placed: list[tuple[float, float]] = []
    for x, y in rng.uniform(-15, 15, (int(rng.integers(6, 50)), 2)).tolist():
        clear = math.hypot(x - white[0], y - white[1]) > white[2] + typical_um * 0.92
        if clear and all(math.hypot(x - a, y - b) > 2 * typical_um * crowding for a, b in placed):
            placed.append((x, y))
    thickness = np.zeros_like(canvas.texture)
    for x, y in placed:
        _add_red_cell(rng, canvas, thickness, (x, y, typical_um * rng.uniform(0.92, 1.08)), pallor)
    canvas.dyes += np.multiply.outer(np.array(dyes, np.float32), thickness)


def _add_red_cell(rng: Generator, canvas: _Canvas, thickness: Array, cell: Place, pallor: float) -> None:
    """A biconcave disc: thickest in a ring, pale in its middle."""
    stretch, angle, depth = rng.uniform(0.85, 1.2), rng.uniform(0, math.tau), rng.uniform(0.85, 1.15)
    window = canvas.window(cell, 1.1 * cell[2] + 0.5)
    x, y = canvas.warped_um(window, cell, 0.22)
    squared = _ellipse(x, y, cell[2], stretch, angle)
    rim = np.minimum(squared * 1.9, 1)
    profile = rim * rim * (depth * pallor) + depth * (1 - pallor)
    thickness[window] += canvas.coverage((squared - 1) * (cell[2] / 2), 0.3) * profile


def _paint_platelets(rng: Generator, canvas: _Canvas) -> None:
    """A few small granular purple bodies anywhere."""
    for _ in range(int(rng.choice(4, p=[0.45, 0.3, 0.15, 0.1]))):
        x_um, y_um = rng.uniform(-12, 12, 2).tolist()
        platelet = (x_um, y_um, rng.uniform(0.7, 1.3))
        window = canvas.window(platelet, platelet[2] + 1)
        x, y = canvas.warped_um(window, platelet, 0.3)
        coverage = canvas.coverage(np.sqrt(x * x + y * y) - platelet[2], 0.5)
        speckle = np.clip(1 + 0.5 * canvas.texture[window], 0.2, 2)
        canvas.replace(window, coverage, (rng.uniform(0.35, 0.7), 0.1, 0.15), speckle)


def _granule_coverage(rng: Generator, canvas: _Canvas, kind: _Granules, cell: Place) -> Array:
    """Coverage (pixels, pixels) by granules scattered over the disc of a cell."""
    count = int(rng.uniform(kind.count[0], kind.count[1] + 1))
    spot = _on_arc(rng.uniform(0, math.tau, count), np.sqrt(rng.random(count)) * cell[2])
    radius = rng.uniform(*kind.radius_um, (count, 1, 1)).astype(np.float32)
    opacity = rng.uniform(*kind.opacity, (count, 1, 1)).astype(np.float32)
    pixel, x, y = canvas.stamps(spot + np.array(cell[:2], np.float32), kind.radius_um[1] + 0.15)
    covered = np.zeros(canvas.texture.size + 1, np.float32)
    value = canvas.coverage(np.sqrt(x * x + y * y) - radius) * opacity
    np.maximum.at(covered, pixel.ravel(), value.ravel())
    return covered[:-1].reshape(canvas.texture.shape)


def _paint_white_cell(rng: Generator, canvas: _Canvas, look: _Look, cell: Place) -> None:
    """Cytoplasm, nucleus and granules, in the order in which they hide each other."""
    radius_um = cell[2]
    ragged_um = rng.uniform(*look.raggedness_um)
    window = canvas.window(cell, 1.08 * radius_um + 2.5 * ragged_um)
    x, y = canvas.warped_um(window, cell, ragged_um)
    texture = canvas.texture[window]

    squared = _ellipse(x, y, radius_um, rng.uniform(0.85, 1.18), rng.uniform(0, math.tau))
    # Near the outline, half of (form − 1) is the distance in radii.
    body = canvas.coverage((squared - 1) * (radius_um / 2), 0.3)
    canvas.replace(window, body, look.cytoplasm, rng.uniform(0.75, 1.3) * (1 + 0.12 * texture))

    capsules = _turned(look.nucleus(rng), rng.uniform(0, math.tau)) * np.float32(radius_um)
    nucleus = canvas.coverage(_capsules_distance(x, y, capsules, 0.035 * radius_um), 0.25) * body
    chromatin = (rng.uniform(*look.chromatin), 0.12, 0.1)
    lace = np.clip(1 + rng.uniform(*look.lace) * texture, 0.3, 1.8)
    if look.granules_on_top:
        canvas.replace(window, nucleus, chromatin, lace)
    for kind in look.granules:
        canvas.replace(window, _granule_coverage(rng, canvas, kind, cell)[window] * body, kind.dyes)
    if not look.granules_on_top:
        canvas.replace(window, nucleus, chromatin, lace)


def _photograph(rng: Generator, dyes: Array, size: int) -> NDArray[np.uint8]:
    """The image (size, size, 3) of a sensor behind dye amounts (3, pixels, pixels)."""
    pixels = dyes.shape[1]
    thiazine, eosin = np.exp(rng.normal(0, 0.22)), np.exp(rng.normal(0, 0.22))
    strength = np.array([[thiazine], [thiazine * np.exp(rng.normal(0, 0.2))], [eosin]])
    stains = (_ABSORBANCE * strength * np.exp(rng.normal(0, 0.08, (3, 3)))).astype(np.float32)
    light = np.exp(-stains.T @ dyes.reshape(3, -1)).reshape(dyes.shape)

    axis = _pixel_centres_um(size)
    blur_um = math.hypot(rng.uniform(0.12, 0.45), 0.4 * FIELD_UM / size)
    lens = np.exp(-0.5 * ((axis[:, None] - _pixel_centres_um(pixels)) / np.float32(blur_um)) ** 2)
    lens /= lens.sum(axis=1, keepdims=True)
    image = lens @ light @ lens.T

    warmth, tint = rng.normal(0.01, 0.05), rng.normal(0, 0.02)
    lamp = rng.uniform(0.58, 1.0) * np.array([0.98 + warmth, 0.94 + tint, 0.94 - warmth])
    tilt_x, tilt_y, vignette = rng.normal(0, 0.09), rng.normal(0, 0.09), rng.uniform(0.0, 0.15)
    unit = axis / np.float32(FIELD_UM / 2)
    fall_x, fall_y = tilt_x * unit - vignette * unit**2, tilt_y * unit - vignette * unit**2
    image *= lamp.astype(np.float32)[:, None, None] * (1 + fall_y[:, None] + fall_x).astype(np.float32)
    flare, grain = np.float32(rng.uniform(0.0, 0.10)), np.float32(rng.uniform(0.004, 0.025))
    image += flare * (np.float32(0.9) - image)
    # Only this draw depends on the pixel size, so it comes last and changes no other.
    image += grain * rng.standard_normal(image.shape, np.float32)
    return np.ascontiguousarray((np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8).transpose(1, 2, 0))


def draw_smear(seed: int, index: int, label: int, size: int) -> NDArray[np.uint8]:
    """Draw one white cell of class `CLASSES[label]`: (size, size, 3) RGB of a field 24 µm wide.

    The picture depends only on the arguments; `size` changes its sharpness but not its scene.
    """
    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence((seed, index))))
    look = _LOOKS[label]
    canvas = _Canvas(rng, min(math.ceil(size * _OVERSAMPLE), _FINEST_PIXELS))
    x_um, y_um = rng.uniform(-3.5, 3.5, 2).tolist()
    cell = (x_um, y_um, rng.uniform(*look.radius_um))
    _paint_red_cells(rng, canvas, cell)
    _paint_platelets(rng, canvas)
    _paint_white_cell(rng, canvas, look, cell)
    return _photograph(rng, canvas.dyes, size)
