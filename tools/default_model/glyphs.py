"""A stroke font of our own: digits and the letters of the short words, as distance tables."""

from __future__ import annotations

import functools
import itertools

import torch
from torch import Tensor

ATLAS_SIZE = 48
"""Samples per side of a letter's table; it spans -1.3..1.3 in both directions."""

STROKE = 0.17
"""Half the width of a stroke, in units of a letter's half height."""

STROKES: dict[str, str] = {
    "0": "00-20-24-04-00",
    "1": "01-10-14 04-24",
    "2": "00-20-22-02-04-24",
    "3": "00-20-24-04 02-22",
    "4": "00-02-22 20-24",
    "5": "20-00-02-22-24-04",
    "6": "20-00-04-24-22-02",
    "7": "00-20-14",
    "8": "00-20-24-04-00 02-22",
    "9": "22-02-00-20-24-04",
    "A": "04-10-24 03-23",
    "C": "20-00-04-24",
    "D": "00-10-21-23-14-04-00",
    "E": "20-00-04-24 02-22",
    "G": "20-00-04-24-22-12",
    "H": "00-04 20-24 02-22",
    "I": "10-14 00-20 04-24",
    "L": "00-04-24",
    "N": "04-00-24-20",
    "O": "00-20-24-04-00",
    "P": "04-00-20-22-02",
    "S": "20-00-02-22-24-04",
    "T": "00-20 10-14",
    "U": "00-04-24-20",
    "Y": "00-12-20 12-14",
}
"""Poly-lines on a grid of 3 columns and 5 rows: each point is column and row, strokes are parted by spaces."""

GLYPHS = "".join(STROKES)
"""All letters, in the order of the atlas."""

HALF_WIDTH = 0.55
"""Distance of the outer columns from the middle, in units of a letter's half height."""

HALF_HEIGHT = 0.83
"""Distance of the outer rows from the middle; with half a stroke it makes 1."""


def _segment_distance(points: Tensor, start: Tensor, end: Tensor) -> Tensor:
    along = end - start
    share = (((points - start) * along).sum(-1) / (along * along).sum()).clamp(0, 1)
    return (points - start - share[..., None] * along).norm(dim=-1)


def _grid_point(name: str) -> Tensor:
    return torch.tensor([(int(name[0]) - 1) * HALF_WIDTH, (int(name[1]) - 2) / 2 * HALF_HEIGHT])


@functools.cache
def glyph_atlas() -> Tensor:
    """Signed distances of all letters, (len(GLYPHS), ATLAS_SIZE, ATLAS_SIZE), in units of the half height."""
    axis = torch.linspace(-1.3, 1.3, ATLAS_SIZE)
    points = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), dim=-1)
    tables = []
    for strokes in STROKES.values():
        nearest = torch.full((ATLAS_SIZE, ATLAS_SIZE), 9.0)
        for line in strokes.split():
            names = line.split("-")
            for first, second in itertools.pairwise(names):
                nearest = torch.minimum(nearest, _segment_distance(points, _grid_point(first), _grid_point(second)))
        tables.append(nearest - STROKE)
    return torch.stack(tables)
