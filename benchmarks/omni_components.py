"""Parts of Qwen3-Omni alone on a GPU, in full size with random weights; the median of ``--rounds`` rounds.

The code predictor of one frame as a CUDA graph, with this package's kernels (each starting before the one in front
ends, or not) and in PyTorch, for batches of 1, 8 and 32. A layer's experts, of talker and thinker, with this package's
kernels and with vLLM's, for as many rows as run on the former.

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

from moe_layers import TALKER, THINKER, Sizes, layers
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


def predictors(device: torch.device, rounds: int) -> dict[str, dict[str, float]]:
    """Milliseconds of a frame's code predictor, by batch."""
    from vllm_omni.model_executor.layers import overlap

    predictor = CodePredictor(SIZES).to(device, torch.bfloat16)
    fill(predictor)
    found: dict[str, dict[str, float]] = {"PyTorch": {}, "kernels": {}, "kernels, overlapped": {}}
    for name, figures in found.items():
        if name != "PyTorch":
            predictor.use_kernels()
            if not predictor.fused or (name == "kernels, overlapped" and not overlap.overlap(device)):
                continue
            if name == "kernels":
                overlap.set_overlap(device, overlap.OFF)
        for batch in (1, 8, 32):
            hidden = torch.randn(batch, SIZES.hidden_size, device=device, dtype=torch.bfloat16)
            greedy = torch.zeros(batch, dtype=torch.bool, device=device)
            noise = predictor.noise(batch, {}, device)
            graph, _ = record(functools.partial(predictor, hidden, hidden.clone(), greedy, noise))
            figures[str(batch)] = milliseconds(graph.replay, rounds)
        print(name, figures, flush=True)
    return found


def experts(sizes: Sizes, device: torch.device, rounds: int, count: int = 12) -> dict[str, dict[str, float]]:
    """Milliseconds of a layer with a sum and a norm behind it, by rows; ``count`` layers have weights of their own."""
    found: dict[str, dict[str, float]] = {"sum and norm": {}, "vLLM": {}, "kernels": {}}
    gains = torch.ones(sizes.hidden, device=device, dtype=torch.bfloat16)
    with layers(sizes, count, device) as blocks:

        def chain(x: torch.Tensor, alone: bool) -> torch.Tensor:
            for block in blocks:
                x = torch.nn.functional.rms_norm(x + (x if alone else block(x)), (sizes.hidden,), gains)
            return x

        few = blocks[0].experts.few_rows
        for rows in range(1, few + 1):
            x = torch.randn(rows, sizes.hidden, device=device, dtype=torch.bfloat16)
            for name, figures in found.items():
                for block in blocks:
                    block.experts.few_rows = few if name == "kernels" else 0
                graph, _ = record(functools.partial(chain, x, name == "sum and norm"))
                figures[str(rows)] = round(milliseconds(graph.replay, rounds) / count, 4)
        print(found, flush=True)
    return found


@torch.inference_mode()
def main() -> None:
    """Time them and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=20)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("this needs a GPU")
    device = torch.device("cuda", 0)
    found = {
        "talker's experts": experts(TALKER, device, args.rounds),
        "thinker's experts": experts(THINKER, device, args.rounds),
        "code predictor": predictors(device, args.rounds),
    }
    args.json.write_text(json.dumps({"gpu": torch.cuda.get_device_name(), "ms": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
