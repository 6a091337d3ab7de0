"""Draws pictures from primitive records as signed distance functions, batched, with anti-aliasing.

A picture is a background record and a fixed number of primitive records that are painted in order. Every
function here works on whole batches in torch, so the same code draws on a CPU in the tests and on a GPU in training.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from tools.default_model.glyphs import ATLAS_SIZE, glyph_atlas

KINDS = (
    "circle",
    "square",
    "triangle",
    "star",
    "ring",
    "cross",
    "heart",
    "moon",
    "sun",
    "box",
    "roof",
    "hull",
    "glyph",
)
"""Names of the primitive kinds; the index is the number in a primitive record."""

TEXTURES = ("plain", "striped", "dotted", "outlined")
"""Names of the textures; the index is the number in a primitive record."""

BACKGROUNDS = ("solid", "striped", "gradient", "checkerboard")
"""Names of the background patterns; the index is the number in a background record."""

MAX_PRIMITIVES = 10
"""Primitive records per picture; unused ones have kind -1."""

PRIMITIVE_FIELDS = 14
"""kind, cx, cy, r, hx, hy, red, green, blue, shade red, shade green, shade blue, texture, glyph."""

BACKGROUND_FIELDS = 7
"""pattern, first colour (3), second colour (3)."""

STRIPE = 8.0
"""Width of a background stripe in pixels."""

CELL = 16.0
"""Side of a checkerboard cell in pixels."""


def _length(x: Tensor, y: Tensor) -> Tensor:
    return torch.sqrt(x * x + y * y + 1e-12)


def _box(x: Tensor, y: Tensor, hx: Tensor | float, hy: Tensor | float) -> Tensor:
    dx, dy = x.abs() - hx, y.abs() - hy
    return _length(dx.clamp(min=0), dy.clamp(min=0)) + torch.maximum(dx, dy).clamp(max=0)


def _half_planes(x: Tensor, y: Tensor, planes: list[tuple[float, float, float]]) -> Tensor:
    """Distance to a convex polygon given as unit normals and offsets (exact inside, a bound at the corners)."""
    distance = planes[0][0] * x + planes[0][1] * y - planes[0][2]
    for nx, ny, offset in planes[1:]:
        distance = torch.maximum(distance, nx * x + ny * y - offset)
    return distance


def _triangle(x: Tensor, y: Tensor) -> Tensor:
    side = math.hypot(1.75, 1.0)
    return _half_planes(x.abs(), y, [(0.0, 1.0, 0.8), (1.75 / side, -1.0 / side, 0.95 / side)])


def _star(x: Tensor, y: Tensor) -> Tensor:
    """Five points, the outer radius 1.05 and the inner 0.45, folded into one of ten sectors."""
    sector = math.pi / 5
    angle = torch.atan2(x, -y).abs()
    folded = (torch.remainder(angle + sector, 2 * sector) - sector).abs()
    radius = _length(x, y)
    px, py = radius * torch.sin(folded), radius * torch.cos(folded)
    tip_y, notch_x, notch_y = 1.05, 0.45 * math.sin(sector), 0.45 * math.cos(sector)
    nx, ny = tip_y - notch_y, notch_x
    norm = math.hypot(nx, ny)
    return (nx * px + ny * (py - tip_y)) / norm


def _heart(x: Tensor, y: Tensor) -> Tensor:
    """Two lobes and a point: the union of two discs and the wedge that touches them."""
    ax = x.abs()
    lobe = _length(ax - 0.48, y + 0.32) - 0.52
    wedge = torch.maximum(torch.maximum(0.766 * ax + 0.643 * y - 0.682, -(y + 0.32)), ax - 1.0)
    return torch.minimum(lobe, wedge)


def _sun(x: Tensor, y: Tensor) -> Tensor:
    """A disc with ten rounded rays."""
    angle = torch.atan2(y, x)
    return (_length(x, y) - 0.8 - 0.2 * torch.cos(10 * angle)) * 0.55


def _moon(x: Tensor, y: Tensor) -> Tensor:
    return torch.maximum(_length(x, y) - 1.0, 0.82 - _length(x - 0.5, y))


def _hull(x: Tensor, y: Tensor, hx: Tensor, hy: Tensor) -> Tensor:
    """A boat's hull: a trapezoid, wide at the top."""
    slope = 0.35 * hx / hy
    norm = torch.sqrt(1 + slope * slope)
    return torch.maximum(y.abs() - hy, (x.abs() - hx * 0.825 + slope * y * 0.5) / norm)


def _roof(x: Tensor, y: Tensor, hx: Tensor, hy: Tensor) -> Tensor:
    """An upright triangle that fills the box of half sizes hx and hy."""
    norm = torch.sqrt(4 * hy * hy + hx * hx)
    return torch.maximum(y - hy, (2 * hy * x.abs() - hx * (y + hy)) / norm)


def _glyph(x: Tensor, y: Tensor, index: Tensor, atlas: Tensor) -> Tensor:
    """Bilinear look-up of a letter's distance in the atlas; outside it the letter is far away."""
    scale = (ATLAS_SIZE - 1) / 2.6
    gx = ((x + 1.3) * scale).clamp(0, ATLAS_SIZE - 1.001)
    gy = ((y + 1.3) * scale).clamp(0, ATLAS_SIZE - 1.001)
    x0, y0 = gx.floor(), gy.floor()
    fx, fy = gx - x0, gy - y0
    base = (index.long() * ATLAS_SIZE + y0.long()) * ATLAS_SIZE + x0.long()
    flat = atlas.reshape(-1)
    top = flat[base] * (1 - fx) + flat[base + 1] * fx
    bottom = flat[base + ATLAS_SIZE] * (1 - fx) + flat[base + ATLAS_SIZE + 1] * fx
    return top * (1 - fy) + bottom * fy


Unit = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]

UNITS: tuple[Unit, ...] = (
    lambda x, y, hx, hy, glyph, atlas: _length(x, y) - 1.0,
    lambda x, y, hx, hy, glyph, atlas: _box(x, y, 0.88, 0.88),
    lambda x, y, hx, hy, glyph, atlas: _triangle(x, y),
    lambda x, y, hx, hy, glyph, atlas: _star(x, y),
    lambda x, y, hx, hy, glyph, atlas: (_length(x, y) - 0.76).abs() - 0.24,
    lambda x, y, hx, hy, glyph, atlas: torch.minimum(_box(x, y, 1.0, 0.34), _box(x, y, 0.34, 1.0)),
    lambda x, y, hx, hy, glyph, atlas: _heart(x, y),
    lambda x, y, hx, hy, glyph, atlas: _moon(x, y),
    lambda x, y, hx, hy, glyph, atlas: _sun(x, y),
    lambda x, y, hx, hy, glyph, atlas: _box(x, y, hx, hy),
    lambda x, y, hx, hy, glyph, atlas: _roof(x, y, hx, hy),
    lambda x, y, hx, hy, glyph, atlas: _hull(x, y, hx, hy),
    lambda x, y, hx, hy, glyph, atlas: _glyph(x, y, glyph.clamp(min=0), atlas),
)
"""Distance functions in the order of KINDS."""

EVERY_KIND = tuple(range(len(UNITS)))


def distance(
    kind: Tensor, x: Tensor, y: Tensor, hx: Tensor, hy: Tensor, glyph: Tensor, atlas: Tensor, present: tuple[int, ...]
) -> Tensor:
    """Signed distance in units of the primitive's radius.

    Args:
        kind: index into `KINDS`, (B, 1, 1); negative kinds are nowhere.
        x: unit coordinates (pixel offset over radius), (B, H, W), to the right.
        y: the same, downwards.
        hx: half width in units, (B, 1, 1); used by box, roof and hull.
        hy: half height in units.
        glyph: index into the atlas, (B, 1, 1).
        atlas: distances of the letters, (G, ATLAS_SIZE, ATLAS_SIZE).
        present: the kinds that may occur; the others are not computed.
    """
    result = torch.full_like(x, 9.0)
    for index in present:
        result = torch.where(kind == index, UNITS[index](x, y, hx, hy, glyph, atlas), result)
    return result


def texture_mask(texture: Tensor, sd: Tensor, x: Tensor, y: Tensor, r: Tensor) -> Tensor:
    """Share of the shade colour per pixel, 0..1, of the texture (B, 1, 1) at unit coordinates."""
    stripes = (0.5 + torch.sin(y * (2 * math.pi / 0.6)) * r * (0.6 / (2 * math.pi))).clamp(0, 1)
    period = 0.56
    dx = torch.remainder(x + period / 2, period) - period / 2
    dy = torch.remainder(y + period / 2, period) - period / 2
    dots = (0.5 - (_length(dx, dy) - 0.15) * r).clamp(0, 1)
    outline = (0.5 + (sd + 0.2) * r).clamp(0, 1)
    zero = torch.zeros_like(x)
    shade = torch.where(texture == 1, stripes, zero)
    shade = torch.where(texture == 2, dots, shade)
    return torch.where(texture == 3, outline, shade)


def paint(
    canvas: Tensor,
    primitive: Tensor,
    xs: Tensor,
    ys: Tensor,
    atlas: Tensor,
    present: tuple[int, ...] = EVERY_KIND,
) -> Tensor:
    """Paint one primitive of every picture over the canvas (B, 3, H, W); primitive is (B, PRIMITIVE_FIELDS)."""
    field = [primitive[:, i, None, None] for i in range(PRIMITIVE_FIELDS)]
    kind, cx, cy, r, hx, hy = field[:6]
    x, y = (xs - cx) / r, (ys - cy) / r
    sd = distance(kind, x, y, hx, hy, field[13], atlas, present)
    cover = (0.5 - sd * r).clamp(0, 1)
    shade = texture_mask(field[12], sd, x, y, r)
    out = []
    for channel in range(3):
        colour = field[6 + channel] * (1 - shade) + field[9 + channel] * shade
        out.append(canvas[:, channel] * (1 - cover) + colour * cover)
    return torch.stack(out, dim=1)


def paint_background(background: Tensor, xs: Tensor, ys: Tensor) -> Tensor:
    """The backgrounds (B, BACKGROUND_FIELDS) as a canvas (B, 3, H, W)."""
    pattern = background[:, 0, None, None]
    height = ys.max() + 0.5
    stripes = torch.remainder(torch.floor(xs / STRIPE), 2)
    cells = torch.remainder(torch.floor(xs / CELL) + torch.floor(ys / CELL), 2)
    zero = torch.zeros_like(xs * ys)
    mix = torch.where(pattern == 1, stripes + zero, zero)
    mix = torch.where(pattern == 2, ys / height + zero, mix)
    mix = torch.where(pattern == 3, cells + zero, mix)[:, None]
    return background[:, 1:4, None, None] * (1 - mix) + background[:, 4:7, None, None] * mix


@functools.cache
def _atlas(device: torch.device) -> Tensor:
    return glyph_atlas().to(device)


@functools.cache
def _compiled_paint() -> Callable[..., Tensor]:
    return torch.compile(paint, dynamic=True)


def draw(primitives: Tensor, background: Tensor, height: int, width: int, compiled: bool = False) -> Tensor:
    """Draw a batch of pictures.

    Args:
        primitives: (B, MAX_PRIMITIVES, PRIMITIVE_FIELDS), float32; colours 0..1, positions and radii in pixels.
        background: (B, BACKGROUND_FIELDS), float32.
        height: of the pictures in pixels.
        width: of the pictures in pixels.
        compiled: whether to paint with a compiled kernel (worth its start for large batches on a GPU only).

    Returns:
        Pictures (B, 3, H, W), float32, 0..1.
    """
    device = primitives.device
    xs = (torch.arange(width, device=device, dtype=torch.float32) + 0.5)[None, None, :]
    ys = (torch.arange(height, device=device, dtype=torch.float32) + 0.5)[None, :, None]
    atlas = _atlas(device)
    canvas = paint_background(background, xs, ys)
    for index in range(primitives.shape[1]):
        primitive = primitives[:, index].contiguous()
        if compiled:
            canvas = _compiled_paint()(canvas, primitive, xs, ys, atlas)
            continue
        present = tuple(int(kind) for kind in primitive[:, 0].unique() if kind >= 0)
        if present:
            canvas = paint(canvas, primitive, xs, ys, atlas, present)
    return canvas
