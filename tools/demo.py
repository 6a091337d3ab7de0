#!/usr/bin/env python3
"""Draw one picture and show it in the terminal, with the time each part took. Run by ``make demo``.

The checkpoint is a tiny one with random weights, written on the spot, so the picture is coloured noise. What it shows
is that everything works: the stage's process, text encoders, denoising steps, VAE, and the way back.
"""

import argparse
import logging
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"
logging.disable(logging.WARNING)


@contextmanager
def timed(what: str, seconds: dict[str, float]) -> Iterator[None]:
    """Say what is going on, and remember how long it took."""
    print(f"  {what} ...", end="", flush=True)
    start = time.perf_counter()
    yield
    seconds[what] = time.perf_counter() - start
    print(f" {seconds[what]:.1f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt", default="a cup of coffee on the table")
    parser.add_argument("--output", type=Path, default=Path("outputs/demo.png"))
    parser.add_argument("--size", type=int, default=128, help="height and width in pixels")
    parser.add_argument("--steps", type=int, default=8)
    args = parser.parse_args()

    seconds: dict[str, float] = {}
    print(f'Drawing "{args.prompt}", {args.size} x {args.size}, {args.steps} steps')
    with tempfile.TemporaryDirectory(prefix="vllm-omni-demo-") as folder:
        with timed("write a tiny checkpoint with random weights", seconds):
            from vllm_omni.entrypoints.cli.tiny_model import write_tiny_model

            write_tiny_model("flux", Path(folder), seed=0)
        with timed("start the stage and load the model", seconds):
            from vllm_omni import Omni, OmniDiffusionSamplingParams

            omni = Omni(model=folder)
        with omni:
            params = OmniDiffusionSamplingParams(
                height=args.size, width=args.size, num_inference_steps=args.steps, seed=0
            )
            with timed("draw", seconds):
                (output,) = omni.generate(args.prompt, params, use_tqdm=False)

    from vllm_omni.entrypoints.cli import terminal

    parts = {name: output.metrics[f"{name}_s"] for name in ("encode", "denoise", "decode")}
    print("    of which " + ", ".join(f"{name} {part:.2f} s" for name, part in parts.items()))
    args.output.parent.mkdir(parents=True, exist_ok=True)
    output.images[0].save(args.output)
    print()
    terminal.show(output.images[0], sys.stdout)
    print(f"\n{args.output}, in {sum(seconds.values()):.1f} s. The weights are random, so this is noise: a real")
    print("checkpoint draws what you ask for. docs/getting_started/quickstart.md says how to go on.")


if __name__ == "__main__":
    main()
