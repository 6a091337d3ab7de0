"""Quality against speed: how many held-out prompts come out right over steps, guidance and engine settings.

Writes a table (Markdown), the figures (JSON), a chart and the same prompts side by side for every setting (PNG):

    python -m tools.default_model.quality --out docs/assets/default_model --number 60
    python -m tools.default_model.quality --setting 'bfloat16={"dtype": "bfloat16"}' --setting 'plain={}'
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from tools.default_model.evaluate import Draw, diffusers_draw, draw_scenes, held_out_scenes, judge_all, table

MODEL = Path("vllm_omni/data/default_model")
GALLERY = (
    "a small red circle above a large blue square on a white background",
    "three yellow stars on a dark blue background",
    "a pink heart inside a large purple square",
    "a house and a tree under a yellow sun on a light blue background",
    "a large striped green circle",
    "an orange cat",
    "a black moon between a red star and a blue ring",
    "the word SUN in orange",
)
"""Prompts of the pictures that are shown side by side."""


@contextmanager
def omni_draw(model: Path, settings: dict[str, Any]) -> Iterator[Draw]:
    """A function that draws with this package's engine under the given engine settings."""
    from vllm_omni import Omni, OmniDiffusionSamplingParams

    with Omni(model=str(model), **settings) as omni:

        def run(prompts: list[str], seeds: list[int], width: int, height: int, steps: int, guidance: float) -> Any:
            pictures = []
            for prompt, seed in zip(prompts, seeds, strict=True):
                params = OmniDiffusionSamplingParams(
                    width=width, height=height, num_inference_steps=steps, true_cfg_scale=guidance, seed=seed
                )
                negative = " " if guidance > 1 else None
                (output,) = omni.generate(prompt, params, negative_prompts=negative, use_tqdm=False)
                pictures.append(np.asarray(output.images[0].convert("RGB")))
            return pictures

        yield run


@contextmanager
def open_draw(engine: str, model: Path, settings: dict[str, Any], device: str) -> Iterator[Draw]:
    """The drawing function of an engine, "omni" or "diffusers".

    Raises:
        SystemExit: if settings are given for diffusers, which has none of them.
    """
    if engine == "omni":
        with omni_draw(model, settings) as draw:
            yield draw
        return
    if settings:
        raise SystemExit(f"--setting is for the engine omni; diffusers takes none of {sorted(settings)}")
    yield diffusers_draw(model, device, batch=1)


def measure(draw: Draw, number: int, steps: int, guidance: float) -> dict[str, Any]:
    """Share of right pictures of a setting, the gallery, and the seconds of its fastest picture.

    The fastest, drawn alone: the mean would show what else the machine was doing.
    """
    scenes = held_out_scenes(number)
    pictures = draw_scenes(draw, scenes, steps, guidance)
    counts = table(scenes, judge_all(pictures, scenes))
    gallery, seconds = [], []
    for seed, prompt in enumerate(GALLERY):
        begun = time.monotonic()
        gallery += draw([prompt], [seed], 128, 128, steps, guidance)
        seconds.append(time.monotonic() - begun)
    right, total = counts["all"]
    return {
        "steps": steps,
        "guidance": guidance,
        "seconds": min(seconds),
        "right": right / total,
        "counts": counts,
        "gallery": gallery,
    }


def sheet(rows: list[dict[str, Any]], cell: int = 128, label: int = 190) -> Image.Image:
    """One row of the gallery's pictures per setting, with the setting and its figures before it."""
    canvas = Image.new("RGB", (label + cell * len(GALLERY), cell * len(rows)), (255, 255, 255))
    pen = ImageDraw.Draw(canvas)
    for index, row in enumerate(rows):
        words = f"{row['setting']}\n{row['steps']} steps\nguidance {row['guidance']:g}\n{row['right']:.0%} right"
        pen.multiline_text((8, index * cell + 24), f"{words}\n{row['seconds']:.2f} s a picture", fill=(0, 0, 0))
        for column, picture in enumerate(row["gallery"]):
            canvas.paste(Image.fromarray(picture), (label + column * cell, index * cell))
    return canvas


LINES = ((200, 60, 50), (40, 90, 215), (45, 150, 65), (140, 60, 180), (230, 130, 20), (70, 70, 70))
"""Colours of the chart's lines."""


def chart(rows: list[dict[str, Any]], width: int = 860, height: int = 460) -> Image.Image:
    """Right pictures over seconds a picture (on a logarithmic axis), a line per setting and guidance."""
    canvas = Image.new("RGB", (width, height), (255, 255, 255))
    pen = ImageDraw.Draw(canvas)
    left, top, right, bottom = 60, 20, width - 190, height - 50
    low, high = math.log10(min(r["seconds"] for r in rows) * 0.85), math.log10(max(r["seconds"] for r in rows) * 1.2)

    def place(seconds: float, share: float) -> tuple[float, float]:
        return left + (math.log10(seconds) - low) / (high - low) * (right - left), bottom - share * (bottom - top)

    for tenth in range(0, 11, 2):
        y = place(10**low, tenth / 10)[1]
        pen.line((left, y, right, y), fill=(225, 225, 225))
        pen.text((left - 40, y - 6), f"{tenth * 10} %", fill=(0, 0, 0))
    for tick in (a * 10.0**b for b in range(-3, 3) for a in (1, 2, 5)):
        if 10**low <= tick <= 10**high:
            x = place(tick, 0)[0]
            pen.line((x, bottom, x, bottom + 5), fill=(0, 0, 0))
            pen.text((x - 8, bottom + 8), f"{tick:g}", fill=(0, 0, 0))
    pen.rectangle((left, top, right, bottom), outline=(0, 0, 0))
    pen.text((left, bottom + 28), "seconds a picture; the numbers at the points are steps", fill=(0, 0, 0))
    groups = sorted({(row["setting"], row["guidance"]) for row in rows})
    for index, group in enumerate(groups):
        colour = LINES[index % len(LINES)]
        own = sorted((r for r in rows if (r["setting"], r["guidance"]) == group), key=lambda row: int(row["steps"]))
        points = [place(row["seconds"], row["right"]) for row in own]
        pen.line(points, fill=colour, width=2)
        for row, (x, y) in zip(own, points, strict=True):
            pen.ellipse((x - 4, y - 4, x + 4, y + 4), fill=colour)
            pen.text((x + 5, y + 4), str(row["steps"]), fill=colour)
        pen.text((right + 12, top + 18 * index), f"{group[0]}, guidance {group[1]:g}", fill=colour)
    return canvas


def markdown(rows: list[dict[str, Any]]) -> str:
    """The figures as a table."""
    lines = ["| setting | steps | guidance | right | seconds per picture |", "| --- | --- | --- | --- | --- |"]
    for row in rows:
        lines.append(
            f"| {row['setting']} | {row['steps']} | {row['guidance']:g} | {row['right']:.1%} | {row['seconds']:.2f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure all combinations, print the table, and write the figures and the pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--engine", choices=("omni", "diffusers"), default="omni")
    parser.add_argument("--device", default="cpu", help="for diffusers")
    parser.add_argument("--setting", action="append", default=[], help="NAME=JSON of engine arguments; may be repeated")
    parser.add_argument("--steps", type=int, nargs="+", default=[4, 8, 12, 20, 30])
    parser.add_argument("--guidance", type=float, nargs="+", default=[1.0, 4.0])
    parser.add_argument("--number", type=int, default=60, help="held-out prompts per combination")
    parser.add_argument("--out", type=Path, default=Path("outputs/quality"))
    args = parser.parse_args()
    settings = dict(text.split("=", 1) for text in args.setting) or {"plain": "{}"}
    rows = []
    for name, arguments in settings.items():
        with open_draw(args.engine, args.model, json.loads(arguments), args.device) as draw:
            for steps, guidance in itertools.product(args.steps, args.guidance):
                rows.append({"setting": name, **measure(draw, args.number, steps, guidance)})
                print(markdown(rows[-1:]).splitlines()[-1], flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    chart(rows).save(args.out / "quality.png")
    sheet(rows).save(args.out / "pictures.png")
    figures = [{key: value for key, value in row.items() if key != "gallery"} for row in rows]
    (args.out / "quality.json").write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
