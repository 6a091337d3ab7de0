"""Says by code whether a picture shows its scene: every object, shape, colour, size, texture, place and no more.

Pixels that differ from the expected background are the foreground; its connected parts must be the objects. Each
part is compared with every shape drawn at its place and size (intersection over union), with every colour of the
palette and with every texture; places are compared through the bounding boxes.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from tools.default_model.glyphs import GLYPHS, STROKES
from tools.default_model.scene import (
    PALETTE,
    SHAPES,
    THINGS,
    Ground,
    Item,
    Relation,
    Scene,
    background,
    primitives,
    rgb,
    shade,
)
from tools.default_model.shapes import BACKGROUND_FIELDS, TEXTURES, draw

FOREGROUND = 0.17
"""Difference of a channel from the background (0..1) from which a pixel belongs to an object."""

SPECK = 12
"""Parts of fewer pixels are noise, not objects."""

SAME_SHAPE = 0.75
"""Least intersection over union with the expected shape."""

SAME_COLOUR = 0.22
"""Largest difference of a channel from the expected colour."""

SIZE_RANGES = {"small": (0.0, 15.8), "medium": (14.0, 23.5), "large": (22.5, 99.0)}
"""Radius in pixels that passes for a named size."""


@dataclass(frozen=True)
class Verdict:
    """What the judge found."""

    right: bool
    """Whether the picture shows its scene fully."""
    reasons: tuple[str, ...] = ()
    """What is wrong."""


@dataclass(frozen=True)
class Part:
    """A connected part of the foreground."""

    mask: np.ndarray
    """Its pixels, (H, W), bool."""
    box: tuple[float, float, float, float]
    """Left, top, right and bottom in pixels."""

    @property
    def middle(self) -> tuple[float, float]:
        """Middle of the box."""
        return (self.box[0] + self.box[2]) / 2, (self.box[1] + self.box[3]) / 2


def _part(mask: np.ndarray) -> Part:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return Part(mask, (float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)))


def parts(mask: np.ndarray) -> list[Part]:
    """The connected parts (8 neighbours) of a mask (H, W) with at least SPECK pixels, from left to right."""
    inside = torch.from_numpy(mask).float()[None, None]
    labels = torch.arange(1, mask.size + 1, dtype=torch.float32).reshape(inside.shape) * inside
    while True:
        grown = functional.max_pool2d(labels, 3, 1, 1) * inside
        for _ in range(7):
            grown = functional.max_pool2d(grown, 3, 1, 1) * inside
        if torch.equal(grown, labels):
            break
        labels = grown
    found = labels[0, 0].numpy()
    names, counts = np.unique(found[found > 0], return_counts=True)
    result = [_part(found == name) for name, count in zip(names, counts, strict=True) if count >= SPECK]
    return sorted(result, key=lambda part: part.box[0])


def _shrink(mask: np.ndarray, by: int = 1) -> np.ndarray:
    """The mask without its border, or the mask itself where nothing would be left."""
    grown = functional.max_pool2d(1 - torch.from_numpy(mask).float()[None, None], 2 * by + 1, 1, by)[0, 0].numpy()
    return (grown < 0.5) if (grown < 0.5).sum() >= 4 else mask


def _filled(mask: np.ndarray) -> np.ndarray:
    """The mask with its holes closed."""
    height, width = mask.shape
    outside = np.zeros_like(mask)
    for part in parts(~np.pad(mask, 1)):
        if part.box[0] == 0:
            outside |= part.mask[1 : height + 1, 1 : width + 1]
    return ~outside


def _silhouettes(items: list[Item], height: int, width: int) -> Tensor:
    """The drawn area of each item alone, (N, H, W), bool."""
    records = torch.from_numpy(np.stack([primitives((item,)) for item in items]))
    records[:, :, 6:12] = 1.0
    black = torch.zeros(len(items), BACKGROUND_FIELDS)
    return draw(records, black, height, width)[:, 0] > 0.5


@functools.cache
def _unit_box(kind: str, text: str) -> tuple[float, float, float, float]:
    """Left, top, right and bottom of a kind of radius 1 around its middle."""
    size, r = 256, 90.0
    item = Item(kind, "white", text=text, cx=size / 2, cy=size / 2, r=r)
    box = _part(_silhouettes([item], size, size)[0].numpy()).box
    left, top, right, bottom = ((edge - size / 2) / r for edge in box)
    return left, top, right, bottom


def fit(part: Part, kind: str, text: str = "") -> Item:
    """An item of that kind (colour white) that fills the part's box."""
    left, top, right, bottom = _unit_box(kind, text)
    x0, y0, x1, y1 = part.box
    r = ((x1 - x0) / (right - left) + (y1 - y0) / (bottom - top)) / 2
    if text:
        r = (y1 - y0) / (bottom - top)
    cx = (x0 + x1) / 2 - r * (left + right) / 2
    cy = (y0 + y1) / 2 - r * (top + bottom) / 2
    return Item(kind, "white", text=text, cx=cx, cy=cy, r=max(r, 1.0))


def _overlaps(part: Part, items: list[Item]) -> np.ndarray:
    """Intersection over union of the part with each item, computed in the part's box and a border of 3 pixels."""
    height, width = part.mask.shape
    left, top = max(int(part.box[0]) - 3, 0), max(int(part.box[1]) - 3, 0)
    right, bottom = min(int(part.box[2]) + 3, width), min(int(part.box[3]) + 3, height)
    moved = [dataclasses.replace(item, cx=item.cx - left, cy=item.cy - top) for item in items]
    drawn = _silhouettes(moved, bottom - top, right - left).numpy()
    mask = part.mask[top:bottom, left:right]
    both = (drawn & mask).sum((1, 2))
    return np.asarray(both / (drawn | mask).sum((1, 2)))


Seen = tuple[str, Item, float]


def shape_of(part: Part) -> Seen:
    """The kind of shape or thing that covers the part best, the fitted item and their intersection over union."""
    kinds = (*SHAPES, *THINGS)
    items = [fit(part, kind) for kind in kinds]
    scores = _overlaps(part, items)
    best = int(scores.argmax())
    return kinds[best], items[best], float(scores[best])


def letter_of(part: Part) -> Seen:
    """The letter that covers the part best, the fitted item and their intersection over union."""
    items = [fit(part, "text", letter) for letter in GLYPHS]
    scores = _overlaps(part, items)
    best = int(scores.argmax())
    return GLYPHS[best], items[best], float(scores[best])


def _distance(pixels: np.ndarray, colour: tuple[float, float, float]) -> np.ndarray:
    """Largest difference of a channel per pixel; pixels are (..., 3)."""
    return np.asarray(np.abs(pixels - np.asarray(colour, dtype=np.float32)).max(-1))


def _nearest_colour(pixel: np.ndarray) -> str:
    return min(PALETTE, key=lambda name: float(((pixel - np.asarray(rgb(name))) ** 2).sum()))


def _plain_colour(image: np.ndarray, mask: np.ndarray, colour: str) -> list[str]:
    """Whether the mask has one colour, and that one."""
    pixels = image[_shrink(mask)]
    middle = np.median(pixels, axis=0)
    if _nearest_colour(middle) != colour or _distance(middle, rgb(colour)) > SAME_COLOUR:
        return [f"colour {_nearest_colour(middle)}, not {colour}"]
    if (_distance(pixels, rgb(colour)) < 0.25).mean() < 0.88:
        return [f"not one {colour} area"]
    return []


def _textured(image: np.ndarray, part: Part, item: Item, fitted: Item) -> list[str]:
    """Whether the part has the item's texture and colour."""
    area = _shrink(part.mask)
    dark = (_distance(image, shade(item.colour)) < _distance(image, rgb(item.colour))) & area
    share = dark.sum() / area.sum()
    if item.texture == "plain" or not 0.06 < share < 0.94:
        return _plain_colour(image, part.mask, item.colour) if item.texture == "plain" else ["no texture"]
    scores = {}
    for texture in TEXTURES[1:]:
        records = primitives((dataclasses.replace(fitted, texture=texture),))
        records[:, 6:9], records[:, 9:12] = 0.0, 1.0
        drawn = draw(torch.from_numpy(records)[None], torch.zeros(1, BACKGROUND_FIELDS), *part.mask.shape)
        expected = (drawn[0, 0].numpy() > 0.5) & area
        scores[texture] = (expected & dark).sum() / max((expected | dark).sum(), 1)
    best = max(scores, key=lambda name: float(scores[name]))
    if best != item.texture or scores[best] < 0.4:
        return [f"texture {best} ({scores[best]:.2f}), not {item.texture}"]
    bright = area & ~dark
    wrong = _nearest_colour(np.median(image[bright], axis=0))
    return [] if wrong == item.colour else [f"colour {wrong}, not {item.colour}"]


def _thing_colours(image: np.ndarray, part: Part, item: Item, fitted: Item) -> list[str]:
    """Whether a thing is painted as it should be, its details too."""
    area = _shrink(part.mask)
    shares = {}
    candidates = [c for c in PALETTE if c == item.colour or (_distance(image[area], rgb(c)) < 0.25).mean() > 0.2]
    for colour in candidates:
        records = torch.from_numpy(primitives((dataclasses.replace(fitted, colour=colour),)))[None]
        drawn = draw(records, torch.zeros(1, BACKGROUND_FIELDS), *part.mask.shape)[0].permute(1, 2, 0).numpy()
        close = np.abs(drawn - image).max(-1) < 0.25
        detail = (_distance(drawn, rgb(colour)) > 0.3) & area
        shares[colour] = float(close[area].mean()), float(close[detail].mean()) if detail.sum() > 3 else 1.0
    best = max(shares, key=lambda name: shares[name][0])
    if best != item.colour:
        return [f"colour {best}, not {item.colour}"]
    whole, detail_share = shares[best]
    if whole < 0.75 or detail_share < 0.45:
        return [f"{item.kind} badly painted ({whole:.2f}, {detail_share:.2f})"]
    return []


def _size(item: Item, r: float) -> list[str]:
    low, high = SIZE_RANGES[item.size]
    return [] if low <= r <= high else [f"radius {r:.1f} is not {item.size}"]


def _object(image: np.ndarray, part: Part, item: Item, seen: Seen | None = None, hollow: bool = False) -> list[str]:
    """What is wrong with a part that should be that item; hollow leaves its inside to another object."""
    kind, fitted, score = seen or shape_of(part)
    if kind != item.kind or score < SAME_SHAPE:
        return [f"shape {kind} ({score:.2f}), not {item.kind}"]
    wrong = _size(item, fitted.r)
    if hollow:
        return wrong
    if item.kind in THINGS:
        return wrong + _thing_colours(image, part, item, fitted)
    return wrong + _textured(image, part, item, fitted)


def _related(relation: Relation, places: list[Part], width: int, height: int) -> bool:
    boxes = [places[i].box for i in relation.items]
    if relation.name == "left":
        return boxes[0][2] <= boxes[1][0] + 2
    if relation.name == "above":
        return boxes[0][3] <= boxes[1][1] + 2
    if relation.name == "between":
        middle, first, second = (places[i].middle for i in relation.items)
        axis = int(abs(first[1] - second[1]) > abs(first[0] - second[0]))
        low, high = sorted((first[axis], second[axis]))
        return low + 6 < middle[axis] < high - 6
    x, y = places[relation.items[0]].middle
    horizontal = "left" if x < 0.4 * width else "right" if x > 0.6 * width else ""
    vertical = "top" if y < 0.4 * height else "bottom" if y > 0.6 * height else ""
    return (f"{vertical} {horizontal}".strip() or "middle") == relation.place


def _judge_inside(image: np.ndarray, found: list[Part], scene: Scene) -> list[str]:
    outer, inner = scene.items
    biggest = max(found, key=lambda part: int(part.mask.sum()))
    if outer.kind == "ring":
        others = [part for part in found if part is not biggest]
        if len(others) != 1:
            return [f"{len(others)} objects in the ring"]
        wrong = _object(image, biggest, outer) + _object(image, others[0], inner)
        (x0, y0, x1, y1), (x, y) = biggest.box, others[0].middle
        return wrong if x0 < x < x1 and y0 < y < y1 else [*wrong, "not inside"]
    if len(found) != 1:
        return [f"{len(found)} separate objects"]
    whole = _part(_filled(biggest.mask))
    wrong = _object(image, whole, outer, hollow=True)
    area = _shrink(whole.mask, 2)
    closer = (_distance(image, rgb(inner.colour)) < _distance(image, rgb(outer.colour))) & area
    within = parts(closer)
    if len(within) != 1:
        return [*wrong, f"{len(within)} {inner.colour} areas inside"]
    wrong += _object(image, within[0], inner)
    return wrong + _plain_colour(image, area & ~closer, outer.colour)


def _judge_text(image: np.ndarray, found: list[Part], item: Item) -> list[str]:
    if len(found) != len(item.text):
        return [f"{len(found)} letters, not {len(item.text)}"]
    wrong = []
    for part, letter in zip(found, item.text, strict=True):
        name, _, score = letter_of(part)
        if STROKES[name] != STROKES[letter] or score < 0.5:
            wrong.append(f"letter {name} ({score:.2f}), not {letter}")
        wrong += _plain_colour(image, part.mask, item.colour)
    return wrong


def _judge_objects(image: np.ndarray, found: list[Part], scene: Scene) -> list[str]:
    items = scene.items
    if len(found) != len(items):
        return [f"{len(found)} objects, not {len(items)}"]
    known = [shape_of(part) for part in found]
    table = [[_object(image, part, item, seen) for item in items] for part, seen in zip(found, known, strict=True)]
    best: list[str] | None = None
    for order in itertools.permutations(range(len(found))):
        wrong = [reason for i, p in enumerate(order) for reason in table[p][i]]
        places = [found[p] for p in order]
        wrong += [
            f"not {relation.name} {relation.place}".strip()
            for relation in scene.relations
            if not _related(relation, places, scene.width, scene.height)
        ]
        if best is None or len(wrong) < len(best):
            best = wrong
    return best or []


def _grounds(ground: Ground) -> tuple[Ground, ...]:
    """The backgrounds that a caption of ``ground`` describes.

    "White and green stripes" does not say which colour comes first; a gradient's wording does.
    """
    if ground.pattern in ("striped", "checkerboard"):
        return ground, dataclasses.replace(ground, first=ground.second, second=ground.first)
    return (ground,)


def judge(image: np.ndarray, scene: Scene) -> Verdict:
    """Judge a picture.

    Args:
        image: (H, W, 3), uint8 or float 0..1.
        scene: what it should show; only what the caption says is looked at, so no places and radii of its items, and
            not which colour of stripes or checks comes first.

    Raises:
        ValueError: if the picture has another size than the scene.
    """
    if image.shape != (scene.height, scene.width, 3):
        raise ValueError(f"picture of shape {image.shape}; the scene is {(scene.height, scene.width, 3)}")
    pixels = image.astype(np.float32) / (255.0 if image.dtype == np.uint8 else 1.0)
    verdicts = [_judge_on(pixels, scene, ground) for ground in _grounds(scene.ground)]
    return next((verdict for verdict in verdicts if verdict.right), verdicts[0])


def _judge_on(pixels: np.ndarray, scene: Scene, over: Ground) -> Verdict:
    """Judge the objects before the background ``over``."""
    empty = torch.full((1, 0, 14), -1.0)
    ground = draw(empty, torch.from_numpy(background(over))[None], scene.height, scene.width)
    foreground = np.abs(pixels - ground[0].permute(1, 2, 0).numpy()).max(-1) > FOREGROUND
    found = parts(foreground)
    if not found or foreground.mean() > 0.8:
        return Verdict(False, ("no objects" if not found else "another background",))
    if scene.category == "inside":
        wrong = _judge_inside(pixels, found, scene)
    elif scene.items[0].kind == "text":
        wrong = _judge_text(pixels, found, scene.items[0])
    else:
        wrong = _judge_objects(pixels, found, scene)
    return Verdict(not wrong, tuple(wrong))
