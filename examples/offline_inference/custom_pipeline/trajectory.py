"""Run Qwen-Image with the pipeline of ``custom_pipeline.py`` and print how the latents moved.

vllm-omni tiny-model qwen-image tiny-qwen    # or the folder of Qwen/Qwen-Image
python trajectory.py --model tiny-qwen --height 64 --width 64 --steps 5
"""

import argparse
from pathlib import Path

from vllm_omni import Omni, OmniDiffusionSamplingParams


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a Qwen-Image checkpoint")
    parser.add_argument("--prompt", default="a cup of coffee on the table")
    parser.add_argument("--height", type=int, help="pixels (default: the model's)")
    parser.add_argument("--width", type=int, help="pixels (default: the model's)")
    parser.add_argument("--steps", type=int, default=20, help="denoising steps")
    parser.add_argument("--output", type=Path, default=Path("outputs/trajectory.png"))
    args = parser.parse_args()

    args.output.parent.mkdir(parents=True, exist_ok=True)
    with Omni(
        model=args.model,
        diffusion_load_format="dummy",  # the class below loads the weights
        custom_pipeline_args={"pipeline_class": "custom_pipeline.TrajectoryPipeline"},
    ) as omni:
        params = OmniDiffusionSamplingParams(
            height=args.height, width=args.width, num_inference_steps=args.steps, seed=0
        )
        output = omni.generate(args.prompt, params)[0].request_output[0]

    print(f"timesteps: {[round(float(t)) for t in output.metrics['trajectory_timesteps']]}")
    print(f"latents:   {tuple(output.latents.shape)}")
    print(f"moves:     {output.metrics['moves']}")
    output.images[0].save(args.output)
    print(f"picture:   {args.output}")


if __name__ == "__main__":
    main()
