"""Measures a checkpoint: draws held-out prompts with diffusers' pipeline and judges every picture."""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import random
import time
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import Executor, ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKLQwenImage, QwenImagePipeline
from PIL import Image

from tools.default_model.judge import Verdict, judge
from tools.default_model.scene import Scene, background, primitives
from tools.default_model.shapes import draw as draw_records
from tools.default_model.world import FORMATS, sample

SEED = 2026
"""Of the held-out prompts; picture i is drawn with the seed SEED + i. Choose between models with another one."""

Draw = Callable[[list[str], list[int], int, int, int, float], list[np.ndarray]]
"""(prompts, seeds, width, height, steps, guidance) to pictures (H, W, 3), uint8."""


def held_out_scenes(number: int, seed: int = SEED) -> list[Scene]:
    """Fixed held-out scenes: of ten, eight are square, one is wide and one is tall."""
    rng = random.Random(seed)
    canvases = [FORMATS[0]] * 8 + [FORMATS[1], FORMATS[2]]
    return [sample(rng, "test", *canvases[i % 10]) for i in range(number)]


def diffusers_draw(folder: Path, device: str, batch: int = 100) -> Draw:
    """A function that draws with diffusers' QwenImagePipeline in float32."""
    pipeline = QwenImagePipeline.from_pretrained(str(folder), torch_dtype=torch.float32).to(device)
    pipeline.set_progress_bar_config(disable=True)

    def run(prompts: list[str], seeds: list[int], width: int, height: int, steps: int, guidance: float) -> Any:
        out: list[np.ndarray] = []
        for start in range(0, len(prompts), batch):
            some = prompts[start : start + batch]
            generators = [torch.Generator("cpu").manual_seed(s) for s in seeds[start : start + batch]]
            negative = {"negative_prompt": [" "] * len(some)} if guidance > 1 else {}
            images = pipeline(
                some,
                width=width,
                height=height,
                num_inference_steps=steps,
                true_cfg_scale=guidance,
                generator=generators,
                output_type="np",
                **negative,
            ).images
            out += [np.round(image * 255).astype(np.uint8) for image in images]
        return out

    return run


@torch.no_grad()
def reconstruct(folder: Path, device: str, scenes: list[Scene]) -> list[np.ndarray]:
    """The generator's own pictures of the scenes after encoding and decoding: what the autoencoder alone can do."""
    vae = AutoencoderKLQwenImage.from_pretrained(folder / "vae", torch_dtype=torch.float32).to(device)
    out = []
    for scene in scenes:
        records, ground = torch.from_numpy(primitives(scene.items)), torch.from_numpy(background(scene.ground))
        image = draw_records(records[None], ground[None], scene.height, scene.width).to(device) * 2 - 1
        decoded = vae.decode(vae.encode(image.unsqueeze(2)).latent_dist.mode()).sample[0, :, 0]
        out.append(np.round((decoded.clamp(-1, 1) + 1).permute(1, 2, 0).cpu().numpy() * 127.5).astype(np.uint8))
    return out


def draw_scenes(draw: Draw, scenes: list[Scene], steps: int, guidance: float, seed: int = SEED) -> list[np.ndarray]:
    """The pictures of all scenes, in their order; the first is drawn with that seed, the next with the next."""
    pictures: dict[int, np.ndarray] = {}
    for width, height in FORMATS:
        chosen = [i for i, s in enumerate(scenes) if (s.width, s.height) == (width, height)]
        if chosen:
            prompts, seeds = [scenes[i].caption for i in chosen], [seed + i for i in chosen]
            pictures.update(zip(chosen, draw(prompts, seeds, width, height, steps, guidance), strict=True))
    return [pictures[i] for i in range(len(scenes))]


def judge_all(pictures: list[np.ndarray], scenes: list[Scene], pool: Executor | None = None) -> list[Verdict]:
    """Judge pictures, in the processes of a pool if there is one."""
    if pool is None:
        return [judge(picture, scene) for picture, scene in zip(pictures, scenes, strict=True)]
    return list(pool.map(judge, pictures, scenes, chunksize=10))


def table(scenes: list[Scene], verdicts: list[Verdict]) -> dict[str, tuple[int, int]]:
    """Right pictures and all pictures per category, and in "all"."""
    counts: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for scene, verdict in zip(scenes, verdicts, strict=True):
        for name in (scene.category, "all"):
            counts[name][0] += verdict.right
            counts[name][1] += 1
    return {name: (right, number) for name, (right, number) in sorted(counts.items())}


def grid(pictures: list[np.ndarray], columns: int, cell: int = 160) -> Image.Image:
    """Pictures side by side in square cells on gray."""
    rows = -(-len(pictures) // columns)
    canvas = Image.new("RGB", (columns * cell, rows * cell), (96, 96, 96))
    for index, picture in enumerate(pictures):
        left = index % columns * cell + (cell - picture.shape[1]) // 2
        top = index // columns * cell + (cell - picture.shape[0]) // 2
        canvas.paste(Image.fromarray(picture), (left, top))
    return canvas


def evaluate(
    draw: Draw, scenes: list[Scene], steps: int, guidance: float, pool: Executor | None = None, seed: int = SEED
) -> tuple[dict[str, Any], list[np.ndarray]]:
    """Draw, judge and count; returns the figures with the failures' reasons, and the pictures."""
    begun = time.monotonic()
    pictures = draw_scenes(draw, scenes, steps, guidance, seed)
    seconds = time.monotonic() - begun
    verdicts = judge_all(pictures, scenes, pool)
    wrong = [
        {"index": i, "caption": s.caption, "category": s.category, "reasons": list(v.reasons)}
        for i, (s, v) in enumerate(zip(scenes, verdicts, strict=True))
        if not v.right
    ]
    figures = {
        "steps": steps,
        "guidance": guidance,
        "seconds": seconds,
        "right": table(scenes, verdicts),
        "wrong": wrong,
    }
    return figures, pictures


def main() -> None:
    """Print the share of right pictures for each number of steps and guidance."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--number", type=int, default=300)
    parser.add_argument("--seed", type=int, default=SEED, help="of the prompts and of the first picture")
    parser.add_argument("--steps", type=int, nargs="+", default=[20])
    parser.add_argument("--guidance", type=float, nargs="+", default=[4.0])
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument("--reconstruct", action="store_true", help="measure the autoencoder alone, first")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--grid", type=Path, help="pictures of the first prompts of the last setting")
    parser.add_argument("--failures", type=Path, help="pictures that were judged wrong in the last setting")
    args = parser.parse_args()
    scenes = held_out_scenes(args.number, args.seed)
    results = []
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(args.workers, context, torch.set_num_threads, (1,)) as pool:
        pool.submit(int).result()  # fork before CUDA starts
        if args.reconstruct:
            counts = table(scenes, judge_all(reconstruct(args.model, args.device, scenes), scenes, pool))
            print("encoded and decoded: " + " ".join(f"{name} {r}/{n}" for name, (r, n) in counts.items()), flush=True)
        draw = diffusers_draw(args.model, args.device, args.batch)
        for steps, guidance in itertools.product(args.steps, args.guidance):
            figures, pictures = evaluate(draw, scenes, steps, guidance, pool, args.seed)
            right, number = figures["right"]["all"]
            share, seconds = right / number, figures["seconds"]
            print(f"steps {steps} guidance {guidance}: {right}/{number} = {share:.1%}, {seconds:.1f} s")
            print("  " + " ".join(f"{name} {r}/{n}" for name, (r, n) in figures["right"].items()), flush=True)
            results.append(figures)
    for failure in results[-1]["wrong"][:40]:
        print("  wrong:", failure["caption"], failure["reasons"])
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))
    if args.grid:
        grid(pictures[:100], 10).save(args.grid)
    if args.failures:
        chosen = [pictures[failure["index"]] for failure in results[-1]["wrong"]][:60]
        grid(chosen or pictures[:1], 10).save(args.failures)


if __name__ == "__main__":
    main()
