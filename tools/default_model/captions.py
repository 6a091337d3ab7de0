"""Wordings: turns the facts of a scene into plain English, in many ways, drawn with a seeded generator."""

from __future__ import annotations

import random

from tools.default_model.scene import Ground, Item, Relation, Scene

SIZE_WORDS = {"small": ("small", "little", "tiny"), "large": ("large", "big", "huge"), "medium": ("",)}
COUNT_WORDS = {2: ("two", "2"), 3: ("three", "3"), 4: ("four", "4")}
NOUNS = {"moon": ("moon", "crescent"), "cross": ("cross", "plus sign"), "cat": ("cat", "cat face")}
PLURALS = {"cross": "crosses", "plus sign": "plus signs"}
TEXTURE_WORDS = {"striped": ("striped",), "dotted": ("dotted", "spotted"), "outlined": ("outlined",)}
TEXTURE_TAILS = {"striped": ("with stripes",), "dotted": ("with dots",), "outlined": ("with an outline",)}
LEFT = ("left of", "to the left of", "on the left of", "is left of", "is to the left of")
RIGHT = ("right of", "to the right of", "on the right of", "is right of", "is to the right of")
ABOVE = ("above", "over", "on top of", "is above")
BELOW = ("below", "under", "beneath", "is below")
INSIDE = ("inside", "in", "within", "is inside")
LEADS = ("", "", "", "", "a picture of ", "a drawing of ", "an image of ", "draw ", "there is ")
PLACES = {
    "top left": ("in the top left corner", "at the top left"),
    "top right": ("in the top right corner", "at the top right"),
    "bottom left": ("in the bottom left corner", "at the bottom left"),
    "bottom right": ("in the bottom right corner", "at the bottom right"),
    "top": ("at the top", "near the top"),
    "bottom": ("at the bottom", "near the bottom"),
    "left": ("on the left", "on the left side"),
    "right": ("on the right", "on the right side"),
    "middle": ("in the middle", "in the center"),
}
"""Wordings of the places on the canvas."""


def article(phrase: str) -> str:
    """The phrase with a or an before it."""
    return ("an " if phrase[0] in "aeiou" else "a ") + phrase


def _noun(item: Item, rng: random.Random) -> str:
    return rng.choice(NOUNS.get(item.kind, (item.kind,)))


def _says_colour(item: Item, rng: random.Random) -> bool:
    """Whether the colour is named: trees are green and suns are yellow unless something else is said."""
    if (item.kind, item.colour) in (("tree", "green"), ("sun", "yellow")):
        return rng.random() < 0.4
    return True


def _adjectives(item: Item, rng: random.Random, texture: str) -> str:
    words = [rng.choice(SIZE_WORDS[item.size])]
    if item.size == "medium" and rng.random() < 0.1:
        words = ["medium"]
    if texture:
        words.append(texture)
    if _says_colour(item, rng):
        words.append(item.colour)
    return " ".join(word for word in words if word)


def describe(item: Item, rng: random.Random, plural: bool = False) -> str:
    """The object as a noun phrase without an article; texts are quoted as "the word SUN" or "the number 7"."""
    if item.kind == "text":
        name = "number" if item.text.isdigit() else "word"
        if item.text.isdigit() and len(item.text) == 1 and rng.random() < 0.5:
            name = "digit"
        words = f"{name} {item.text}"
        size = rng.choice(SIZE_WORDS[item.size])
        if rng.random() < 0.5:
            return f"{words} in {item.colour}"
        return f"{size} {item.colour} {words}".strip()
    texture, tail = "", ""
    if item.texture != "plain":
        if rng.random() < 0.65:
            texture = rng.choice(TEXTURE_WORDS[item.texture])
        else:
            tail = " " + rng.choice(TEXTURE_TAILS[item.texture])
    noun = _noun(item, rng)
    if plural:
        noun = PLURALS.get(noun, noun + "s")
    return f"{_adjectives(item, rng, texture)} {noun}{tail}".strip()


def _one(item: Item, rng: random.Random) -> str:
    phrase = describe(item, rng)
    if item.kind == "text":
        return "the " + phrase
    if item.kind == "sun" and rng.random() < 0.3:
        return "the " + phrase
    return article(phrase)


def _ground_phrase(ground: Ground, rng: random.Random) -> str:
    first, second = ground.first, ground.second
    if ground.pattern == "solid":
        if first == "white" and rng.random() < 0.4:
            return ""
        lead = rng.choice(("on", "on", "against"))
        return f" {lead} {article(first)} background"
    if ground.pattern == "gradient":
        return f" on a background fading from {first} to {second}"
    pair = f"{first} and {second}"  # in the order of the picture, so that the words say which colour comes first
    rng.random()  # the order was drawn here once; every seed shall give the scenes that it gave then
    if ground.pattern == "striped":
        return rng.choice((f" on a striped {pair} background", f" on {pair} stripes"))
    return rng.choice((f" on a {pair} checkerboard", f" on a {pair} checkerboard background"))


def _relation_phrase(relation: Relation, items: tuple[Item, ...], rng: random.Random) -> str:
    named = [_one(items[i], rng) for i in relation.items]
    swap = rng.random() < 0.4
    if relation.name == "left":
        return f"{named[1]} {rng.choice(RIGHT)} {named[0]}" if swap else f"{named[0]} {rng.choice(LEFT)} {named[1]}"
    if relation.name == "above":
        return f"{named[1]} {rng.choice(BELOW)} {named[0]}" if swap else f"{named[0]} {rng.choice(ABOVE)} {named[1]}"
    if relation.name == "inside":
        return f"{named[1]} containing {named[0]}" if swap else f"{named[0]} {rng.choice(INSIDE)} {named[1]}"
    if swap:
        named[1], named[2] = named[2], named[1]
    return f"{named[0]} between {named[1]} and {named[2]}"


def _things_phrase(scene: Scene, rng: random.Random) -> str:
    """A landscape: things side by side, perhaps with a sun above them."""
    lower = [item for item in scene.items if item.kind != "sun"]
    suns = [item for item in scene.items if item.kind == "sun"]
    words = " and ".join(_one(item, rng) for item in lower)
    if len(lower) == 2 and rng.random() < 0.5:
        words = f"{_one(lower[0], rng)} {rng.choice(LEFT[:3])} {_one(lower[1], rng)}"
    if suns:
        words += f" {rng.choice(('under', 'below'))} {_one(suns[0], rng)}"
    return words


def _body(scene: Scene, rng: random.Random) -> str:
    first = scene.items[0]
    if scene.category == "things":
        return _things_phrase(scene, rng)
    if scene.category == "count":
        return f"{rng.choice(COUNT_WORDS[len(scene.items)])} {describe(first, rng, plural=True)}"
    if scene.category == "relation" and scene.relations[0].name == "left" and rng.random() < 0.15:
        return " and ".join(_one(item, rng) for item in scene.items)
    if scene.relations and scene.relations[0].name == "at":
        return f"{_one(first, rng)} {rng.choice(PLACES[scene.relations[0].place])}"
    if scene.relations:
        return _relation_phrase(scene.relations[0], scene.items, rng)
    return _one(first, rng)


def caption(scene: Scene, rng: random.Random) -> str:
    """One wording of the scene."""
    lead = rng.choice(LEADS)
    body = _body(scene, rng)
    if lead == "there is " and scene.category == "count":
        lead = ""
    text = lead + body + _ground_phrase(scene.ground, rng)
    style = rng.random()
    if style < 0.2:
        text = text[0].upper() + text[1:]
    if style < 0.12:
        text += "."
    return text
