"""The shipped checkpoint: small, in the released layout, loaded by diffusers, and it draws what it is asked for."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import QwenImagePipeline
from safetensors import safe_open

from tools.default_model.evaluate import Draw, diffusers_draw
from tools.default_model.judge import judge
from tools.default_model.quality import omni_draw
from tools.default_model.scene import Ground, Item, Relation, Scene
from tools.default_model.world import CATEGORIES, sample

MODEL = Path(__file__).resolve().parents[2] / "vllm_omni" / "data" / "default_model"

SCENES = (
    Scene(
        128,
        128,
        "relation",
        (Item("circle", "red", "small"), Item("square", "blue", "large")),
        relations=(Relation("above", (0, 1)),),
        caption="a small red circle above a large blue square on a white background",
    ),
    Scene(
        128,
        128,
        "relation",
        (Item("heart", "red"), Item("circle", "blue")),
        Ground("solid", "light yellow", "light yellow"),
        (Relation("left", (0, 1)),),
        "a red heart to the left of a blue circle on a light yellow background",
    ),
)


@pytest.fixture(scope="module")
def draw() -> Iterator[Draw]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield diffusers_draw(MODEL, "cpu", batch=1)
    torch.set_num_threads(threads)


def test_it_is_small_and_complete() -> None:
    files = [path for path in MODEL.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 20_000_000
    assert max(path.stat().st_size for path in files) <= 16 * 2**20
    index = json.loads((MODEL / "model_index.json").read_text())
    assert index["_class_name"] == QwenImagePipeline.__name__
    assert all((MODEL / part).is_dir() for part in index if not part.startswith("_"))
    assert "licence" in (MODEL / "README.md").read_text().lower()


def test_weights_are_finite_bfloat16() -> None:
    for path in MODEL.rglob("*.safetensors"):
        with safe_open(path, "pt") as weights:
            for name in weights.keys():  # noqa: SIM118
                tensor = weights.get_tensor(name)
                assert tensor.dtype is torch.bfloat16, name
                assert tensor.isfinite().all(), name


@pytest.mark.parametrize("scene", SCENES, ids=lambda scene: scene.caption)
def test_diffusers_draws_what_is_asked(draw: Draw, scene: Scene) -> None:
    (picture,) = draw([scene.caption], [0], scene.width, scene.height, 20, 4.0)
    verdict = judge(picture, scene)
    assert verdict.right, verdict.reasons
    wrong = sample(random.Random(0), category=next(iter(CATEGORIES)))
    assert not judge(picture, wrong).right


def test_this_package_draws_what_diffusers_draws(draw: Draw) -> None:
    """At most 2 of 255 apart in any pixel: the two round at other places on their ways."""
    with omni_draw(MODEL, {}) as omni:
        for scene, (width, height) in zip(SCENES, ((128, 128), (160, 96)), strict=True):
            (ours,) = omni([scene.caption], [5], width, height, 4, 4.0)
            (theirs,) = draw([scene.caption], [5], width, height, 4, 4.0)
            assert np.abs(ours.astype(int) - theirs.astype(int)).max() <= 2
            assert ours.std() > 10
