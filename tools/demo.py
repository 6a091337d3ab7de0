#!/usr/bin/env python3
"""Draw a gallery with the model that comes with the package, and show it in the terminal. Run by ``make demo``.

Prints what each part took. The model is tiny (docs/user_guide/default_model.md): it knows simple shapes, colours,
counts and places, and gets more than nine of ten sentences fully right. What the demo shows is the whole way of a
picture: the stage's process, the text encoder, denoising steps shared by the requests, the VAE, and the way back.
"""

import argparse
import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"
logging.disable(logging.WARNING)

PROMPTS = [
    "a small red circle above a large blue square on a white background",
    "a green star on the left of a yellow moon on a white background",
    "a house below a yellow sun on a light green background",
    "a picture of two gray crosses on a light pink background",
    "a big striped green heart on a white background",
    "the word HI in red on a light blue background",
    "a black ring on the left of a black heart on a light yellow background",
    "a purple star above a green square on a pink background",
]


@contextmanager
def timed(what: str) -> Iterator[None]:
    """Say what is going on, and how long it took."""
    print(f"  {what} ...", end="", flush=True)
    start = time.perf_counter()
    yield
    print(f" {time.perf_counter() - start:.1f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompts", nargs="*", default=PROMPTS, help="what to draw (default: a gallery of eight)")
    parser.add_argument("--output", type=Path, default=Path("outputs/demo.png"))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seed", type=int, default=3)
    parser.add_argument("--columns", type=int, default=4)
    args = parser.parse_args()

    print(f"Drawing {len(args.prompts)} pictures, {args.steps} steps each")
    with timed("load the library"):
        from PIL import Image

        from vllm_omni import Omni, OmniDiffusionSamplingParams
        from vllm_omni.entrypoints.cli import terminal

    with timed("start the stage and load the model"):
        omni = Omni()
    with omni:
        params = OmniDiffusionSamplingParams(num_inference_steps=args.steps, seed=args.seed)
        started = time.perf_counter()
        outputs = list(omni.generate(args.prompts, params))
        seconds = time.perf_counter() - started
    first = outputs[0].images[0]
    rows = -(-len(outputs) // args.columns)
    sheet = Image.new("RGB", (min(len(outputs), args.columns) * first.width, rows * first.height), "white")
    for index, output in enumerate(outputs):
        place = ((index % args.columns) * first.width, (index // args.columns) * first.height)
        sheet.paste(output.images[0], place)
        print(f"  {output.metrics['total_s']:5.1f} s  {output.prompt}")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(args.output)
    print()
    terminal.show(sheet, sys.stdout)
    print(f"\n{args.output}: {len(outputs)} pictures in {seconds:.1f} s, drawn together.")
    print('Your own: .venv/bin/vllm-omni generate "a red star above a blue circle" --show')


if __name__ == "__main__":
    main()
