"""Parts of Qwen3-Omni's talker alone on a GPU, in full size with random weights: the code predictor of one frame.

As a CUDA graph, with this package's kernels (each starting before the one in front ends, or not) and in PyTorch, in one
run, for batches of 1, 8 and 32; milliseconds of the GPU, the median of ``--rounds`` rounds of 20 frames.

    python benchmarks/omni_components.py --json out.json
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from random_weights import fill

from vllm_omni.model_executor.layers.graphed import record
from vllm_omni.model_executor.models.qwen3_omni.code_predictor import CodePredictor

SIZES = SimpleNamespace(
    vocab_size=2048,
    hidden_size=1024,
    intermediate_size=3072,
    num_hidden_layers=5,
    num_attention_heads=16,
    num_key_value_heads=8,
    head_dim=128,
    num_code_groups=16,
    rms_norm_eps=1e-6,
    rope_parameters={"rope_theta": 1e6},
)


def milliseconds(run: Callable[[], object], rounds: int, frames: int = 20) -> float:
    """Of one call."""
    found = []
    for _ in range(rounds + 1):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(frames):
            run()
        end.record()
        end.synchronize()
        found.append(begin.elapsed_time(end) / frames)
    return round(statistics.median(found[1:]), 3)


@torch.inference_mode()
def main() -> None:
    """Time them and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=20)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("this needs a GPU")
    from vllm_omni.model_executor.layers import product_kernels

    device = torch.device("cuda", 0)
    predictor = CodePredictor(SIZES).to(device, torch.bfloat16)
    fill(predictor)
    found: dict[str, dict[str, float]] = {"PyTorch": {}, "kernels": {}, "kernels, overlapped": {}}
    for name, figures in found.items():
        if name != "PyTorch":
            predictor.use_kernels()
            if not predictor.fused or (name == "kernels, overlapped" and not product_kernels.overlap(device)):
                continue
            if name == "kernels":
                product_kernels.set_overlap(device, product_kernels.OFF)
        for batch in (1, 8, 32):
            hidden = torch.randn(batch, SIZES.hidden_size, device=device, dtype=torch.bfloat16)
            greedy = torch.zeros(batch, dtype=torch.bool, device=device)
            noise = predictor.noise(batch, {}, device)
            graph, _ = record(functools.partial(predictor, hidden, hidden.clone(), greedy, noise))
            figures[str(batch)] = milliseconds(graph.replay, args.rounds)
        print(name, figures, flush=True)
    args.json.write_text(json.dumps({"gpu": torch.cuda.get_device_name(), "ms": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
