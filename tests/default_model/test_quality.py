"""The measurement counts what is right, and the chart and the table show it."""

from __future__ import annotations

import numpy as np
import torch

from tools.default_model.evaluate import draw_scenes, evaluate, held_out_scenes
from tools.default_model.quality import GALLERY, chart, markdown, measure, sheet
from tools.default_model.scene import background, primitives
from tools.default_model.shapes import draw

SCENES = {scene.caption: scene for scene in held_out_scenes(12)}


def generator(
    prompts: list[str], seeds: list[int], width: int, height: int, steps: int, guidance: float
) -> list[np.ndarray]:
    """Draws the scenes themselves; with fewer than 3 steps, white pictures."""
    out = []
    for prompt in prompts:
        picture = np.full((height, width, 3), 255, np.uint8)
        if steps > 2 and prompt in SCENES:
            scene = SCENES[prompt]
            records, ground = torch.from_numpy(primitives(scene.items)), torch.from_numpy(background(scene.ground))
            image = draw(records[None], ground[None], height, width)[0].permute(1, 2, 0).numpy()
            picture = np.round(image * 255).astype(np.uint8)
        out.append(picture)
    return out


def test_all_canvases_are_drawn_in_their_order() -> None:
    scenes = list(SCENES.values())
    pictures = draw_scenes(generator, scenes, 20, 4.0)
    assert [picture.shape[:2] for picture in pictures] == [(scene.height, scene.width) for scene in scenes]
    figures, _ = evaluate(generator, scenes, 2, 4.0)
    assert figures["right"]["all"] == (0, len(scenes))
    assert len(figures["wrong"]) == len(scenes)


def test_the_figures_are_shown() -> None:
    rows = [{"setting": "plain", **measure(generator, 12, steps, 4.0)} for steps in (2, 20)]
    assert rows[0]["right"] == 0
    assert rows[1]["right"] >= 0.9
    lines = markdown(rows).splitlines()
    assert len(lines) == 4
    assert "| plain | 2 | 4 | 0.0% |" in lines[2]
    assert sheet(rows).size == (190 + 128 * len(GALLERY), 128 * 2)
    drawn = np.asarray(chart(rows))
    assert (drawn == (200, 60, 50)).all(-1).sum() > 100
