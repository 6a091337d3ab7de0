"""The world draws what its captions say, always the same for a seed, and the judge tells right from wrong."""

from __future__ import annotations

import dataclasses
import random

import numpy as np
import pytest
import torch

from tools.default_model.captions import caption
from tools.default_model.judge import judge
from tools.default_model.scene import PALETTE, SHAPES, Ground, Item, Relation, Scene, background, primitives, readable
from tools.default_model.shapes import draw
from tools.default_model.world import CATEGORIES, FORMATS, held_out, sample

PER_CATEGORY = 12


def picture(scene: Scene) -> np.ndarray:
    """The scene as the generator draws it."""
    records = torch.from_numpy(primitives(scene.items))[None]
    grounds = torch.from_numpy(background(scene.ground))[None]
    image = draw(records, grounds, scene.height, scene.width)[0].permute(1, 2, 0).numpy()
    return np.round(image * 255).astype(np.uint8)


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    """Some scenes of every category and of both splits, a third of them not square."""
    rng = random.Random(7)
    out = []
    for category in CATEGORIES:
        for index in range(PER_CATEGORY):
            canvas = FORMATS[index % 6] if index % 6 < 3 else FORMATS[0]
            out.append(sample(rng, "test" if index % 2 else "train", *canvas, category=category))
    return out


def _other(name: str, names: tuple[str, ...], rng: random.Random) -> str:
    return rng.choice([candidate for candidate in names if candidate != name])


def _replace(scene: Scene, index: int, **changes: str) -> Scene:
    items = list(scene.items)
    items[index] = dataclasses.replace(items[index], **changes)
    return dataclasses.replace(scene, items=tuple(items))


def _wrong_relation(scene: Scene) -> Scene | None:
    first = scene.relations[0]
    keys = [item.key for item in scene.items]
    if first.name in ("left", "above") and keys[first.items[0]] != keys[first.items[1]]:
        turned = Relation(first.name, first.items[::-1])
        return dataclasses.replace(scene, relations=(turned, *scene.relations[1:]))
    if first.name == "between":
        middle, one, two = first.items
        return dataclasses.replace(scene, relations=(Relation("between", (one, middle, two)),))
    if first.name == "at":
        place = "bottom right" if "bottom" not in first.place and "right" not in first.place else "top left"
        return dataclasses.replace(scene, relations=(Relation("at", (0,), place),))
    return None


def wrong_scenes(scene: Scene, rng: random.Random) -> dict[str, Scene]:
    """Scenes that the picture of this one does not show, by what is changed."""
    last = len(scene.items) - 1
    item = scene.items[last]
    out = {"colour": _replace(scene, last, colour=_other(item.colour, tuple(PALETTE), rng))}
    if item.kind in SHAPES:
        out["shape"] = _replace(scene, last, kind=_other(item.kind, SHAPES, rng))
        out["size"] = _replace(scene, last, size="small" if item.size == "large" else "large")
        extra = dataclasses.replace(item, cx=0.0)
        if scene.category in ("single", "count", "texture"):
            out["more"] = dataclasses.replace(scene, items=(*scene.items, extra))
    if scene.category == "count":
        out["fewer"] = dataclasses.replace(scene, items=scene.items[1:])
    if item.texture != "plain":
        out["texture"] = _replace(
            scene, last, texture=_other(item.texture, ("plain", "striped", "dotted", "outlined"), rng)
        )
    if item.kind == "text":
        out["text"] = _replace(scene, last, text=("7" if item.text[0] != "7" else "3") + item.text[1:])
    if scene.relations and (turned := _wrong_relation(scene)) is not None:
        out["relation"] = turned
    dark = scene.ground.first in ("black", "dark blue", "gray")
    name = "light blue" if dark else "dark blue"
    out["background"] = dataclasses.replace(scene, ground=Ground("solid", name, name))
    return out


def test_same_seed_same_scene() -> None:
    first = [sample(random.Random(3)) for _ in range(2)]
    assert first[0] == first[1]
    assert np.array_equal(picture(first[0]), picture(first[1]))
    assert sample(random.Random(3)) != sample(random.Random(4))


def test_pictures_are_anti_aliased() -> None:
    item = Item("circle", "black", cx=64.3, cy=63.8, r=20)
    values = np.unique(picture(Scene(128, 128, "single", (item,)))[..., 0])
    assert len(values) > 20


def test_the_split_parts_structures(scenes: list[Scene]) -> None:
    rng = random.Random(11)
    train = [sample(rng, "train") for _ in range(400)]
    test = [sample(rng, "test") for _ in range(200)]
    assert not any(held_out(scene) for scene in train)
    assert all(held_out(scene) for scene in test)
    assert not {scene.key for scene in train} & {scene.key for scene in test}


def test_captions_name_every_object(scenes: list[Scene]) -> None:
    for scene in scenes:
        text = scene.caption.lower()
        for item in scene.items:
            if (item.kind, item.colour) not in (("tree", "green"), ("sun", "yellow")):
                assert item.colour in text, scene.caption
            if item.size != "medium" and scene.category != "inside":
                assert any(word in text for word in ("small", "little", "tiny", "large", "big", "huge")), scene.caption
            if item.kind == "text":
                assert item.text in scene.caption


def test_captions_vary() -> None:
    rng = random.Random(5)
    scene = sample(rng, category="relation")
    assert len({caption(scene, rng) for _ in range(50)}) > 15


def test_the_judge_accepts_what_the_generator_draws(scenes: list[Scene]) -> None:
    verdicts = [judge(picture(scene), scene) for scene in scenes]
    failures = [(s.caption, v.reasons) for s, v in zip(scenes, verdicts, strict=True) if not v.right]
    assert len(failures) <= len(scenes) // 100, failures


def test_the_judge_rejects_wrong_pictures(scenes: list[Scene]) -> None:
    rng = random.Random(13)
    passed, number = [], 0
    for scene in scenes[::2]:
        drawn = picture(scene)
        for what, other in wrong_scenes(scene, rng).items():
            number += 1
            if judge(drawn, other).right:
                passed.append((what, scene.caption))
    assert number > 150
    assert len(passed) <= number // 100, passed


def test_the_judge_is_not_misled_by_noise(scenes: list[Scene]) -> None:
    generator = np.random.default_rng(0)
    some = scenes[::5]
    noisy = [
        np.clip(picture(s) + generator.normal(0, 5, (s.height, s.width, 3)), 0, 255).astype(np.uint8) for s in some
    ]
    right = sum(judge(image, scene).right for image, scene in zip(noisy, some, strict=True))
    assert right >= len(some) - 1


def test_the_judge_refuses_another_size() -> None:
    scene = sample(random.Random(1))
    with pytest.raises(ValueError, match="shape"):
        judge(np.zeros((64, 64, 3), np.uint8), scene)


def test_objects_stand_out(scenes: list[Scene]) -> None:
    for scene in scenes:
        outer = scene.items[0]
        assert scene.category == "inside" or all(readable(item, scene.ground) for item in scene.items), scene.caption
        assert readable(outer, scene.ground)


def test_the_judge_takes_stripes_and_checks_in_either_order(scenes: list[Scene]) -> None:
    """A caption names the two colours, not which comes first; a gradient's caption does."""
    turned = {"striped": 0, "checkerboard": 0, "gradient": 0}
    accepted = dict(turned)
    for scene in scenes:
        ground = scene.ground
        if ground.pattern not in turned or not judge(picture(scene), scene).right:
            continue
        other = dataclasses.replace(scene, ground=dataclasses.replace(ground, first=ground.second, second=ground.first))
        turned[ground.pattern] += 1
        accepted[ground.pattern] += judge(picture(other), scene).right
        wrong = dataclasses.replace(scene, ground=dataclasses.replace(ground, first="gray"))
        assert not judge(picture(wrong), scene).right, scene.caption
    assert min(turned.values()) > 5
    assert accepted["striped"] == turned["striped"]
    assert accepted["checkerboard"] == turned["checkerboard"]
    assert accepted["gradient"] < turned["gradient"] / 2
