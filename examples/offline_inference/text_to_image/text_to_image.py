"""Draw pictures from prompts.

vllm-omni tiny-model flux tiny-flux          # or the folder of a real checkpoint
python text_to_image.py --model tiny-flux --height 64 --width 64 --steps 4 "a cup of coffee" "a tree"
"""

import argparse
from pathlib import Path

from vllm_omni import Omni, OmniDiffusionSamplingParams


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompts", nargs="+", help="what to draw, one picture each")
    parser.add_argument("--model", required=True, help="folder of the checkpoint")
    parser.add_argument("--negative-prompt", help="what the pictures should not show")
    parser.add_argument("--height", type=int, help="pixels (default: the model's)")
    parser.add_argument("--width", type=int, help="pixels (default: the model's)")
    parser.add_argument("--steps", type=int, help="denoising steps (default: the model's)")
    parser.add_argument("--guidance-scale", type=float, help="strength of the guidance (default: the model's)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the noise")
    parser.add_argument("--tensor-parallel-size", type=int, default=1, help="ranks that share the model's weights")
    parser.add_argument("--output-dir", type=Path, default=Path("outputs"), help="where the pictures go")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    params = OmniDiffusionSamplingParams(
        height=args.height,
        width=args.width,
        num_inference_steps=args.steps,
        guidance_scale=args.guidance_scale,
        seed=args.seed,
    )
    prompts: list[str | dict[str, str]] = list(args.prompts)
    if args.negative_prompt is not None:
        prompts = [{"prompt": text, "negative_prompt": args.negative_prompt} for text in args.prompts]

    args.output_dir.mkdir(parents=True, exist_ok=True)
    with Omni(model=args.model, tensor_parallel_size=args.tensor_parallel_size) as omni:
        for number, output in enumerate(omni.generate(prompts, params)):
            path = args.output_dir / f"{number}.png"
            output.images[0].save(path)
            print(f"{path}: {args.prompts[number]}")


if __name__ == "__main__":
    main()
