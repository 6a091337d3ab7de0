"""Text to image end to end at full size with random weights: ours next to diffusers, in one process tree and one run.

    python benchmarks/t2i_end_to_end.py --model flux --json out.json
    python benchmarks/t2i_end_to_end.py --model qwen-image --steps 20 --json out.json
    python benchmarks/t2i_end_to_end.py --model flux --tiny                 # a try on a CPU

Contenders: diffusers eager, diffusers with compile_repeated_blocks, ours (compiled as by default). Both read one
checkpoint, random weights saved by diffusers in the released layout (`--folder` puts it on a disk or tmpfs with
room: 36 GB for FLUX.1, 58 GB for Qwen-Image), and draw from the same noise; their latents are compared. After warm-up
the compiled ones are timed in turn (ABBA), the median over repeats is reported. The picture is 1024x1024 with true CFG
4.0 for Qwen-Image (two forwards a step) and embedded guidance 3.5 for FLUX.
"""

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from full_size import reference_pipeline, write_layout

PROMPT = "a photograph of a cup of coffee on a wooden table by a window, morning light, steam rising, a blue notebook"


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds that ``function`` takes, device work included, and its result."""
    start = time.perf_counter()
    result = function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start, result


def reference_call(pipe: Any, args: argparse.Namespace) -> Callable[..., Any]:
    """One picture by diffusers, from noise drawn on the CPU as ours is."""
    pipe.set_progress_bar_config(disable=True)
    common = {"height": args.size, "width": args.size, "num_inference_steps": args.steps, "prompt": PROMPT}
    if args.model == "flux":
        common |= {"guidance_scale": 3.5}
    else:
        common |= {"true_cfg_scale": 4.0, "negative_prompt": "blurry, low quality"}
    return lambda **more: pipe(**common, **more, generator=torch.Generator("cpu").manual_seed(0)).images[0]


def our_call(omni: Any, args: argparse.Namespace) -> Callable[..., Any]:
    """One picture by us."""
    from vllm_omni import OmniDiffusionSamplingParams

    params = OmniDiffusionSamplingParams(height=args.size, width=args.size, num_inference_steps=args.steps, seed=0)
    prompt: Any = PROMPT
    if args.model == "flux":
        params.guidance_scale = 3.5
    else:
        params.true_cfg_scale = 4.0
        prompt = {"prompt": PROMPT, "negative_prompt": "blurry, low quality"}
    return lambda **more: omni.generate(prompt, replace(params, **more), use_tqdm=False)[0]


def agreement(first: torch.Tensor, second: torch.Tensor) -> dict[str, float]:
    """How near the final latents of two runs from the same noise are; the error is relative to the second's norm."""
    a, b = (latents.double().flatten().cpu() for latents in (first, second))
    return {"cosine": float(a @ b / (a.norm() * b.norm())), "relative_error": float((a - b).norm() / b.norm())}


def summary(seconds: list[float]) -> dict[str, float]:
    """Median, least and greatest of the repeats."""
    return {"median_s": statistics.median(seconds), "min_s": min(seconds), "max_s": max(seconds), "n": len(seconds)}


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All contenders; see the module's docstring."""
    from vllm_omni import Omni

    cuda = torch.cuda.is_available()
    result: dict[str, Any] = {}
    build_s, pipe = timed(
        lambda: reference_pipeline(folder, torch.bfloat16 if cuda else torch.float32, "cuda" if cuda else "cpu")
    )
    for stale in folder.rglob("*.safetensors*"):
        stale.unlink()
    save_s, _ = timed(lambda: pipe.save_pretrained(folder))
    print(f"checkpoint made in {build_s:.1f} s, saved in {save_s:.1f} s", flush=True)
    theirs = reference_call(pipe, args)
    latents = theirs(output_type="latent")
    theirs()
    result["diffusers_eager"] = summary([timed(theirs)[0] for _ in range(args.repeats)])
    print("diffusers eager", result["diffusers_eager"], flush=True)

    parallel = {
        "tensor_parallel_size": args.tensor_parallel_size,
        "cfg_parallel_size": args.cfg_parallel_size,
    }
    start_s, omni = timed(
        lambda: Omni(model=str(folder), parallel_config=parallel, stage_init_timeout=500, init_timeout=550)
    )
    try:
        result["ours_start_s"] = start_s
        ours = our_call(omni, args)
        result["ours_first_s"] = timed(ours)[0]
        mine = ours(output_type="latent").latents
        result["agreement"] = {"ours_and_diffusers_eager": agreement(mine, latents)}
        print(f"ours: start {start_s:.1f} s, first picture {result['ours_first_s']:.1f} s", flush=True)
        if cuda:
            pipe.transformer.compile_repeated_blocks(fullgraph=True)
            result["diffusers_compile_first_s"] = timed(theirs)[0]
            compiled = theirs(output_type="latent")
            result["agreement"]["diffusers_compiled_and_eager"] = agreement(compiled, latents)
            print(f"diffusers: first compiled picture {result['diffusers_compile_first_s']:.1f} s", flush=True)
        ours()
        times: dict[str, list[float]] = {"ours": [], "diffusers": []}
        for name in ("ours", "diffusers", "diffusers", "ours") * ((args.repeats + 1) // 2):
            seconds, out = timed(ours if name == "ours" else theirs)
            times[name].append(seconds)
            if name == "ours":
                result["ours_metrics"] = {
                    k: v for k, v in out.metrics.items() if isinstance(v, (int, float, str, dict))
                }
        result["ours"] = summary(times["ours"])
        result["diffusers_compiled" if cuda else "diffusers_again"] = summary(times["diffusers"])
        result["speedup"] = statistics.median(times["diffusers"]) / statistics.median(times["ours"])
        result["speedup_over_eager"] = result["diffusers_eager"]["median_s"] / result["ours"]["median_s"]
    finally:
        omni.close()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("flux", "qwen-image"), default="flux")
    parser.add_argument("--size", type=int, default=1024, help="height and width in pixels")
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--tensor-parallel-size", type=int, default=1, help="GPUs that split the weights, ours")
    parser.add_argument("--cfg-parallel-size", type=int, default=1, help="GPUs that split the guidance pair, ours")
    parser.add_argument("--tiny", action="store_true", help="the tiny checkpoint in place of the full size")
    parser.add_argument("--folder", type=Path, help="where the checkpoint is written for the run")
    parser.add_argument("--json", type=Path, help="write the result here")
    args = parser.parse_args()
    if args.tiny:
        args.size, args.steps = min(args.size, 64), min(args.steps, 4)

    import diffusers

    with tempfile.TemporaryDirectory(dir=args.folder) as temporary:
        folder = Path(temporary) / args.model
        if args.tiny:
            from vllm_omni.diffusion.tiny_models import make_tiny_model

            make_tiny_model(args.model, folder)
        else:
            write_layout(args.model, folder)
        result = {
            "benchmark": "t2i_end_to_end",
            "config": {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()},
            "machine": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor(),
            "versions": {"torch": torch.__version__, "diffusers": diffusers.__version__},
            **measure(args, folder),
        }
    print(json.dumps(result, indent=1), flush=True)
    if args.json:
        args.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
