"""Where the time of FLUX.1 goes on a GPU, at full size with random weights.

python benchmarks/trace_flux.py omni      # a trace of Omni.generate: busy time, kernels by time, longest gaps
python benchmarks/trace_flux.py bursts    # forwards after idling, ours, diffusers and the floor, with clocks and power
"""

import argparse
import collections
import itertools
import json
import os
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dit_forward
import torch
from full_size import write_layout

FORWARDS = 28
IDLE_SECONDS = 4


def clocks() -> str:
    """Clock, power and throttle reason, as the driver's tool says."""
    query = "--query-gpu=clocks.sm,power.draw,clocks_event_reasons.active"
    return subprocess.run(["nvidia-smi", query, "--format=csv,noheader"], capture_output=True, text=True).stdout.strip()


def burst(call: Callable[[], Any]) -> dict[str, Any]:
    """Milliseconds of each of ``FORWARDS`` calls in a row after idling."""
    torch.cuda.synchronize()
    time.sleep(IDLE_SECONDS)
    events = [torch.cuda.Event(enable_timing=True) for _ in range(FORWARDS + 1)]
    events[0].record()
    for event in events[1:]:
        call()
        event.record()
    seen = clocks()
    torch.cuda.synchronize()
    times = [first.elapsed_time(last) for first, last in itertools.pairwise(events)]
    return {"second_ms": times[1], "mean_ms": sum(times) / len(times), "last_ms": times[-1], "clocks": seen}


@torch.no_grad()
def bursts() -> None:
    """The contenders of ``dit_forward.py``, each in bursts."""
    dit_forward.parallel_state.init_parallel(dit_forward.DiffusionParallelConfig(), backend="nccl")
    config = json.loads((dit_forward.LAYOUTS / "flux" / "transformer" / "config.json").read_text())
    case = dit_forward.Case("flux", config, (64, 64), 512, 1, torch.device("cuda"), torch.bfloat16)
    reference = dit_forward.build_reference(case)
    twin = dit_forward.share_reference(case, reference)
    twin.compile_repeated_blocks(fullgraph=True)
    ours = dit_forward.build_ours(case, reference, None)
    compiled = dit_forward.build_ours(case, reference, ours)
    for module in compiled.modules():
        if type(module).__name__ in compiled._repeated_blocks:
            module.compile()
    kwargs, inputs = case.reference_kwargs(), case.inputs(ours)
    calls = {
        "ours": lambda: compiled(inputs),
        "diffusers": lambda: twin(**kwargs)[0],
        "floor": dit_forward.floor(case),
    }
    for call in calls.values():
        for _ in range(3):
            call()
    for name in ("ours", "diffusers", "floor", "diffusers", "ours", "floor"):
        print(name, burst(calls[name]), flush=True)


def summarise(trace: Path) -> None:
    """Print what the GPU did in a Chrome trace."""
    events = json.loads(trace.read_text())["traceEvents"]
    kernels = [event for event in events if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    kernels.sort(key=lambda event: event["ts"])
    total: collections.Counter[str] = collections.Counter()
    count: collections.Counter[str] = collections.Counter()
    for event in kernels:
        total[event["name"][:70]] += event["dur"]
        count[event["name"][:70]] += 1
    span = kernels[-1]["ts"] + kernels[-1]["dur"] - kernels[0]["ts"]
    print(f"span {span / 1e3:.1f} ms, busy {sum(total.values()) / 1e3:.1f} ms, {len(kernels)} kernels")
    for name, microseconds in total.most_common(28):
        print(f"{microseconds / 1e3:9.2f} ms {count[name]:6d} {name}")
    pairs = itertools.pairwise(kernels)
    gaps = sorted(((b["ts"] - a["ts"] - a["dur"], a["name"][:50], b["name"][:50]) for a, b in pairs), reverse=True)
    for gap in gaps[:12]:
        print("gap in us", gap)


def omni() -> None:
    """One picture of 28 steps, timed, and a trace of one of 6 steps."""
    from vllm_omni import Omni, OmniDiffusionSamplingParams

    with tempfile.TemporaryDirectory() as temporary:
        folder = write_layout("flux", Path(temporary) / "flux")
        os.environ["VLLM_TORCH_PROFILER_DIR"] = str(Path(temporary) / "profiles")
        with Omni(model=str(folder), diffusion_load_format="dummy") as engine:

            def draw(steps: int) -> Any:
                params = OmniDiffusionSamplingParams(
                    height=1024, width=1024, num_inference_steps=steps, seed=0, guidance_scale=3.5
                )
                return engine.generate("a cup of coffee", params, use_tqdm=False)[0]

            draw(4)
            start = time.perf_counter()
            metrics = draw(28).metrics
            print(f"{time.perf_counter() - start:.3f} s", {k: v for k, v in metrics.items() if k.endswith("_s")})
            engine.start_profile()
            draw(6)
            for file in (file for files in engine.stop_profile().values() for file in files):
                summarise(Path(file))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("omni", "bursts"))
    (omni if parser.parse_args().part == "omni" else bursts)()
