"""Draws scenes at random: what is in the picture, where, and how it is said. Seeded; with a held-out split."""

from __future__ import annotations

import dataclasses
import random
import zlib
from collections.abc import Callable

from tools.default_model.captions import PLACES, caption
from tools.default_model.scene import (
    GROUNDS,
    LIGHT_GROUNDS,
    PALETTE,
    RADII,
    SHAPES,
    Ground,
    Item,
    Relation,
    Scene,
    readable,
)

FORMATS = ((128, 128), (160, 96), (96, 160))
"""Width and height of the canvases; the first is the usual one."""

CATEGORIES = {
    "single": 0.10,
    "position": 0.09,
    "texture": 0.11,
    "count": 0.14,
    "relation": 0.24,
    "inside": 0.09,
    "between": 0.08,
    "things": 0.09,
    "text": 0.06,
}
"""Share of each kind of picture."""

WORDS = ("HI", "NO", "GO", "YES", "CAT", "SUN", "DOG", "TEA", "ICE", "UP", "LOL", "HAND")
THING_COLOURS = {
    "house": ("red", "blue", "yellow", "green", "orange", "pink", "purple"),
    "tree": ("green", "green", "green", "orange", "yellow"),
    "boat": ("red", "blue", "yellow", "green", "orange", "white", "purple"),
    "cat": ("orange", "gray", "black", "white", "pink"),
}
MARGIN = 3.0
"""Pixels between an object and the edge of the canvas."""

GAP = 5.0
"""Least pixels between two objects."""

HELD_OUT_IN = 10
"""One structure in this many is held out of training."""


class DoesNotFit(Exception):
    """The drawn objects have no room on the canvas; draw again."""


def held_out(scene: Scene) -> bool:
    """Whether the structure of the scene (objects, colours, relations) is kept out of training."""
    return zlib.crc32(scene.key.encode()) % HELD_OUT_IN == 0


def _ground(rng: random.Random) -> Ground:
    draw = rng.random()
    if draw < 0.3:
        return Ground()
    if draw < 0.76:
        name = rng.choice(tuple(GROUNDS))
        return Ground("solid", name, name)
    first, second = rng.sample(LIGHT_GROUNDS, 2)
    return Ground(rng.choice(("striped", "gradient", "checkerboard")), first, second)


def _radius(size: str, rng: random.Random) -> float:
    return rng.uniform(*RADII[size])


def _shape(rng: random.Random, sizes: tuple[str, ...] = ("small", "medium", "medium", "large")) -> Item:
    size = rng.choice(sizes)
    return Item(rng.choice(SHAPES), rng.choice(tuple(PALETTE)), size, r=_radius(size, rng))


def _thing(rng: random.Random, kinds: tuple[str, ...], size: str) -> Item:
    kind = rng.choice(kinds)
    return Item(kind, rng.choice(THING_COLOURS[kind]), size, r=_radius(size, rng))


def _textured(item: Item, rng: random.Random) -> Item:
    if item.kind in ("ring", "moon", "cross") or item.size == "small":
        return item
    return dataclasses.replace(item, texture=rng.choice(("striped", "dotted", "outlined")))


def _at(item: Item, cx: float, cy: float) -> Item:
    return dataclasses.replace(item, cx=cx, cy=cy)


def _middle(item: Item, width: int, height: int, rng: random.Random, jitter: float) -> Item:
    """The object near the middle of the canvas."""
    dx = min(jitter, width / 2 - item.half_width - MARGIN)
    dy = min(jitter, height / 2 - item.r - MARGIN)
    if dx < 0 or dy < 0:
        raise DoesNotFit
    return _at(item, width / 2 + rng.uniform(-dx, dx), height / 2 + rng.uniform(-dy, dy))


def _row(items: list[Item], length: int, across: int, rng: random.Random) -> list[tuple[float, float]]:
    """Places of the objects in a row: (along, across) in pixels, with even gaps and a little jitter."""
    free = length - 2 * MARGIN - sum(2 * item.half_width for item in items)
    steps = len(items) - 1
    if free < GAP * steps or any(item.r + MARGIN > across / 2 for item in items):
        raise DoesNotFit
    gap = rng.uniform(GAP, max(GAP, min(free / steps, 26.0)))
    slack = max(free - gap * steps, 0.0)
    along = MARGIN + slack / 2 + rng.uniform(-1, 1) * min(slack / 2, 8.0)
    places = []
    for item in items:
        swing = min(6.0, across / 2 - item.r - MARGIN)
        places.append((along + item.half_width, across / 2 + rng.uniform(-swing, swing)))
        along += 2 * item.half_width + gap
    return places


def _lined(items: list[Item], width: int, height: int, across: bool, rng: random.Random) -> list[Item]:
    """The objects in a row from left to right, or (across) in a column from top to bottom."""
    row = _row(items, height, width, rng) if across else _row(items, width, height, rng)
    places = [(y, x) for x, y in row] if across else row
    return [_at(item, x, y) for item, (x, y) in zip(items, places, strict=True)]


Parts = tuple[list[Item], tuple[Relation, ...]]


def _single(rng: random.Random, width: int, height: int) -> Parts:
    if rng.random() < 0.2:
        size = rng.choice(("medium", "large"))
        kinds = tuple(THING_COLOURS)
        return [_middle(_thing(rng, kinds, size), width, height, rng, 8.0)], ()
    return [_middle(_shape(rng), width, height, rng, 8.0)], ()


def _position(rng: random.Random, width: int, height: int) -> Parts:
    item = _shape(rng, ("small", "medium"))
    place = rng.choice(tuple(PLACES))
    near = MARGIN + item.r + rng.uniform(0, 8)
    cx = width / 2 + rng.uniform(-4, 4)
    cy = height / 2 + rng.uniform(-4, 4)
    if "left" in place:
        cx = near
    if "right" in place:
        cx = width - near
    if "top" in place:
        cy = near
    if "bottom" in place:
        cy = height - near
    return [_at(item, cx, cy)], (Relation("at", (0,), place),)


def _texture(rng: random.Random, width: int, height: int) -> Parts:
    item = _textured(_shape(rng, ("medium", "large", "large")), rng)
    if item.texture == "plain":
        raise DoesNotFit
    return [_middle(item, width, height, rng, 8.0)], ()


def _count(rng: random.Random, width: int, height: int) -> Parts:
    number = rng.choice((2, 2, 3, 3, 4, 4))
    first = _shape(rng, ("small", "medium"))
    items = [dataclasses.replace(first, r=_radius(first.size, rng)) for _ in range(number)]
    if number == 4 and rng.random() < 0.8:
        dx, dy = width / 4 + rng.uniform(-3, 3), height / 4 + rng.uniform(-1, 1)
        if min(dx, dy) < first.r + GAP / 2 or max(dx, dy) + first.r > max(width, height) / 2:
            raise DoesNotFit
        corners = ((-dx, -dy), (dx, -dy), (-dx, dy), (dx, dy))
        return [_at(i, width / 2 + x, height / 2 + y) for i, (x, y) in zip(items, corners, strict=True)], ()
    return _lined(items, width, height, height > width, rng), ()


def _two(rng: random.Random) -> list[Item]:
    first, second = _shape(rng), _shape(rng)
    if (first.kind, first.colour) == (second.kind, second.colour):
        raise DoesNotFit
    if rng.random() < 0.15:
        first = _textured(first, rng)
    return [first, second]


def _relation(rng: random.Random, width: int, height: int) -> Parts:
    items = _two(rng)
    if rng.random() < 0.1:
        items[0] = _thing(rng, ("boat", "tree", "house", "cat"), "medium")
    name = rng.choice(("left", "above"))
    return _lined(items, width, height, name == "above", rng), (Relation(name, (0, 1)),)


def _inside(rng: random.Random, width: int, height: int) -> Parts:
    kind = rng.choice(("circle", "square", "square", "ring", "heart"))
    hollow = kind == "ring"
    radius = rng.uniform(37.0, 41.0) if hollow else rng.uniform(33.0, 39.0)
    outer = Item(kind, rng.choice(tuple(PALETTE)), "large", r=radius)
    inner = _shape(rng, ("small",))
    inner = dataclasses.replace(inner, r=min(inner.r, 12.3)) if hollow else inner
    if not readable(inner, Ground("solid", outer.colour, outer.colour)) and not hollow:
        raise DoesNotFit
    outer = _middle(outer, width, height, rng, 6.0)
    swing = 1.0 if hollow else 3.0
    inner = _at(inner, outer.cx + rng.uniform(-swing, swing), outer.cy + rng.uniform(-swing, swing))
    return [outer, inner], (Relation("inside", (1, 0)),)


def _between(rng: random.Random, width: int, height: int) -> Parts:
    items = [_shape(rng, ("small", "medium")) for _ in range(3)]
    if len({(i.kind, i.colour) for i in items}) < 3:
        raise DoesNotFit
    across = rng.random() < (0.75 if height > width else 0.25)
    return _lined(items, width, height, across, rng), (Relation("between", (1, 0, 2)),)


def _things(rng: random.Random, width: int, height: int) -> Parts:
    number = rng.choice((1, 2, 2))
    lower = [_thing(rng, ("house", "tree", "boat"), "medium") for _ in range(number)]
    if number == 1 and rng.random() < 0.35:
        return [_middle(_thing(rng, ("house", "cat", "boat", "tree"), "large"), width, height, rng, 6.0)], ()
    with_sun = number == 1 or rng.random() < 0.6
    sun = Item("sun", rng.choice(("yellow", "yellow", "orange", "red")), "medium", r=rng.uniform(15.0, 18.0))
    low = height - MARGIN - 20.5 - (rng.uniform(0, 6) if with_sun else rng.uniform(10, height / 2 - 26))
    if with_sun and low - 20.5 - GAP < 2 * sun.r + MARGIN:
        raise DoesNotFit
    places = _row(lower, width, height, rng) if number == 2 else [(width / 2 + rng.uniform(-14, 14), 0.0)]
    items = [_at(item, x, low) for item, (x, _) in zip(lower, places, strict=True)]
    relations = [Relation("left", (0, 1))] if number == 2 else []
    if with_sun:
        x = rng.uniform(MARGIN + sun.r, width - MARGIN - sun.r)
        items.append(_at(sun, x, MARGIN + sun.r + rng.uniform(0, 3)))
        relations += [Relation("above", (number, i)) for i in range(number)]
    return items, tuple(relations)


def _text(rng: random.Random, width: int, height: int) -> Parts:
    draw = rng.random()
    text = rng.choice(WORDS) if draw < 0.5 else str(rng.randrange(10)) if draw < 0.8 else str(rng.randrange(10, 100))
    size = "medium"
    r = rng.uniform(15.0, 17.0) if len(text) > 2 else rng.uniform(17.5, 20.5)
    item = Item("text", rng.choice(tuple(PALETTE)), size, text=text, r=r)
    return [_middle(item, width, height, rng, 6.0)], ()


MAKERS: dict[str, Callable[[random.Random, int, int], Parts]] = {
    "single": _single,
    "position": _position,
    "texture": _texture,
    "count": _count,
    "relation": _relation,
    "inside": _inside,
    "between": _between,
    "things": _things,
    "text": _text,
}


def _attempt(rng: random.Random, category: str, width: int, height: int) -> Scene:
    ground = _ground(rng)
    items, relations = MAKERS[category](rng, width, height)
    if not all(readable(item, ground) for item in items if item.cx):
        outer = relations[0].items[1] if relations and relations[0].name == "inside" else None
        for index, item in enumerate(items):
            if not readable(item, ground) and (outer is None or index == outer or items[outer].kind == "ring"):
                raise DoesNotFit
    return Scene(width, height, category, tuple(items), ground, relations)


def sample(rng: random.Random, split: str = "train", width: int = 128, height: int = 128, category: str = "") -> Scene:
    """One scene with its caption.

    Args:
        rng: source of all randomness.
        split: "train" or "test"; the test split holds structures that training never sees.
        width: of the canvas.
        height: of the canvas.
        category: a name of CATEGORIES; drawn by their shares if empty.
    """
    chosen = category or rng.choices(tuple(CATEGORIES), tuple(CATEGORIES.values()))[0]
    while True:
        try:
            scene = _attempt(rng, chosen, width, height)
        except DoesNotFit:
            continue
        if held_out(scene) == (split == "test"):
            return dataclasses.replace(scene, caption=caption(scene, rng))
