"""What a picture of the world holds: objects, background and relations, and the primitives that draw them."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from tools.default_model.glyphs import GLYPHS
from tools.default_model.shapes import (
    BACKGROUND_FIELDS,
    BACKGROUNDS,
    KINDS,
    MAX_PRIMITIVES,
    PRIMITIVE_FIELDS,
    TEXTURES,
)

Colour = tuple[float, float, float]

PALETTE: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "orange": (245, 140, 30),
    "yellow": (250, 215, 40),
    "green": (45, 160, 65),
    "blue": (40, 90, 215),
    "purple": (140, 60, 180),
    "pink": (245, 130, 180),
    "brown": (125, 75, 40),
    "black": (25, 25, 25),
    "white": (250, 250, 250),
    "gray": (135, 135, 135),
}
"""Colours of objects."""

GROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (250, 250, 250),
    "black": (25, 25, 25),
    "gray": (135, 135, 135),
    "light blue": (190, 220, 250),
    "light green": (200, 240, 200),
    "light yellow": (255, 245, 190),
    "light pink": (255, 215, 228),
    "dark blue": (20, 30, 80),
}
"""Colours of backgrounds."""

LIGHT_GROUNDS = ("white", "light blue", "light green", "light yellow", "light pink")
"""Colours of which patterned backgrounds are made."""

SHAPES = ("circle", "square", "triangle", "star", "ring", "cross", "heart", "moon")
"""The plain shapes; each may have any colour and, apart from the ring and the moon, any texture."""

THINGS = ("house", "tree", "sun", "boat", "cat")
"""The things that are built from shapes."""

LETTER_STEP = 1.8
"""From letter to letter, in units of half a letter's height."""

RADII = {"small": (11.0, 13.5), "medium": (17.5, 20.5), "large": (25.5, 28.5)}
"""Radius in pixels per named size."""


@dataclass(frozen=True)
class Item:
    """One object of a picture."""

    kind: str
    """A name of SHAPES or THINGS, or "text"."""
    colour: str
    """A name of PALETTE."""
    size: str = "medium"
    """A name of RADII."""
    texture: str = "plain"
    """A name of TEXTURES."""
    text: str = ""
    """The letters, for the kind "text"."""
    cx: float = 0.0
    """Middle in pixels from the left."""
    cy: float = 0.0
    """Middle in pixels from the top."""
    r: float = 0.0
    """Radius in pixels; for text half the height of a letter."""

    @property
    def half_width(self) -> float:
        """Half the width of what is drawn, in pixels."""
        if self.kind == "text":
            return self.r * (0.72 + LETTER_STEP / 2 * (len(self.text) - 1))
        return self.r

    @property
    def key(self) -> str:
        """What the caption says of the object by itself, without place and size."""
        return f"{self.texture} {self.colour} {self.kind} {self.text}".strip()


@dataclass(frozen=True)
class Ground:
    """The background of a picture."""

    pattern: str = "solid"
    """A name of BACKGROUNDS."""
    first: str = "white"
    """A name of GROUNDS."""
    second: str = "white"
    """A name of GROUNDS; equal to the first for a solid one."""


@dataclass(frozen=True)
class Relation:
    """A fact about places: "left", "above" and "inside" relate two objects, "between" three, "at" one to the canvas."""

    name: str
    """left, above, inside, between or at."""
    items: tuple[int, ...]
    """Indices into the scene's objects; for between the middle one comes first."""
    place: str = ""
    """For at: the name of the place, for example "top left"."""


@dataclass(frozen=True)
class Scene:
    """One picture and its caption."""

    width: int
    """In pixels."""
    height: int
    """In pixels."""
    category: str
    """What is asked: single, position, texture, count, relation, inside, between, things or text."""
    items: tuple[Item, ...]
    """In painting order."""
    ground: Ground = field(default_factory=Ground)
    """Behind the objects."""
    relations: tuple[Relation, ...] = ()
    """All facts about places that the caption states."""
    caption: str = ""
    """One wording of all this."""

    @property
    def key(self) -> str:
        """The structure without sizes, wording and canvas, which decides the side of the held-out split."""
        facts = ",".join(f"{r.name}{r.items}{r.place}" for r in self.relations)
        return "|".join(item.key for item in self.items) + "#" + facts


def rgb(name: str) -> Colour:
    """Colour of an object or a background by name, 0..1."""
    red, green, blue = PALETTE[name] if name in PALETTE else GROUNDS[name]
    return red / 255, green / 255, blue / 255


def shade(name: str) -> Colour:
    """The second colour of a textured object: darker, or lighter where the colour is dark already."""
    red, green, blue = rgb(name)
    if 0.3 * red + 0.6 * green + 0.1 * blue > 0.38:
        return red * 0.5, green * 0.5, blue * 0.5
    return red * 0.4 + 0.6, green * 0.4 + 0.6, blue * 0.4 + 0.6


def colour_distance(first: Colour, second: Colour) -> float:
    """Largest difference of a channel, 0..1."""
    return max(abs(a - b) for a, b in zip(first, second, strict=True))


def readable(item: Item, ground: Ground) -> bool:
    """Whether every colour of the object stands out from every colour of the background."""
    colours = [rgb(item.colour)]
    if item.texture != "plain":
        colours.append(shade(item.colour))
    if item.kind in ("house", "tree", "boat"):
        colours.append(rgb("brown"))
    grounds = [rgb(ground.first), rgb(ground.second)]
    return all(colour_distance(c, g) > 0.34 for c in colours for g in grounds)


def _row(kind: str, cx: float, cy: float, r: float, colour: Colour, **more: float) -> list[float]:
    extra = {"hx": 1.0, "hy": 1.0, "texture": 0.0, "glyph": -1.0, **more}
    head = [float(KINDS.index(kind)), cx, cy, r, extra["hx"], extra["hy"], *colour]
    return [*head, *colour, extra["texture"], extra["glyph"]]


def _glyph(letter: str) -> float:
    return float(GLYPHS.index(letter))


def _thing_rows(item: Item) -> list[list[float]]:
    x, y, r = item.cx, item.cy, item.r
    main, brown, black = rgb(item.colour), rgb("brown"), rgb("black")
    if item.kind == "sun":
        return [_row("sun", x, y, r, main)]
    if item.kind == "tree":
        return [
            _row("box", x, y + 0.62 * r, r, brown, hx=0.16, hy=0.38),
            _row("circle", x, y - 0.33 * r, 0.67 * r, main),
        ]
    if item.kind == "house":
        return [
            _row("box", x, y + 0.42 * r, r, main, hx=0.74, hy=0.53),
            _row("roof", x, y - 0.53 * r, r, brown, hx=1.0, hy=0.45),
            _row("box", x, y + 0.63 * r, r, brown, hx=0.2, hy=0.32),
        ]
    if item.kind == "boat":
        return [
            _row("roof", x, y - 0.3 * r, r, main, hx=0.7, hy=0.66),
            _row("hull", x, y + 0.66 * r, r, brown, hx=1.0, hy=0.3),
        ]
    pupil = rgb("white") if item.colour == "black" else black
    return [
        _row("roof", x - 0.52 * r, y - 0.6 * r, r, main, hx=0.32, hy=0.4),
        _row("roof", x + 0.52 * r, y - 0.6 * r, r, main, hx=0.32, hy=0.4),
        _row("circle", x, y + 0.12 * r, 0.86 * r, main),
        _row("circle", x - 0.32 * r, y - 0.05 * r, 0.13 * r, pupil),
        _row("circle", x + 0.32 * r, y - 0.05 * r, 0.13 * r, pupil),
        _row("heart", x, y + 0.36 * r, 0.17 * r, pupil),
    ]


def _item_rows(item: Item) -> list[list[float]]:
    if item.kind in THINGS:
        return _thing_rows(item)
    if item.kind == "text":
        first = item.cx - item.r * LETTER_STEP / 2 * (len(item.text) - 1)
        return [
            _row("glyph", first + LETTER_STEP * item.r * i, item.cy, item.r, rgb(item.colour), glyph=_glyph(letter))
            for i, letter in enumerate(item.text)
        ]
    row = _row(item.kind, item.cx, item.cy, item.r, rgb(item.colour), texture=float(TEXTURES.index(item.texture)))
    row[9:12] = shade(item.colour)
    return [row]


def primitives(items: tuple[Item, ...]) -> np.ndarray:
    """The primitive records of the objects, (MAX_PRIMITIVES, PRIMITIVE_FIELDS), float32; unused rows have kind -1.

    Raises:
        ValueError: if the objects need more records than there are.
    """
    rows = [row for item in items for row in _item_rows(item)]
    if len(rows) > MAX_PRIMITIVES:
        raise ValueError(f"{len(rows)} primitives in a picture; allowed are {MAX_PRIMITIVES}")
    out = np.zeros((MAX_PRIMITIVES, PRIMITIVE_FIELDS), dtype=np.float32)
    out[:, 0] = -1.0
    out[:, 3] = 1.0
    out[:, 4:6] = 1.0
    if rows:
        out[: len(rows)] = np.asarray(rows, dtype=np.float32)
    return out


def background(ground: Ground) -> np.ndarray:
    """The background record, (BACKGROUND_FIELDS,), float32."""
    out = np.empty(BACKGROUND_FIELDS, dtype=np.float32)
    out[0] = BACKGROUNDS.index(ground.pattern)
    out[1:4] = rgb(ground.first)
    out[4:7] = rgb(ground.second)
    return out
