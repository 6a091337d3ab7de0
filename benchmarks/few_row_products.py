"""Products of one or two rows with weights of Qwen3-Omni's sizes on a GPU: cuBLAS beside this package's kernel.

Microseconds a product, in a CUDA graph over weights that do not fit the cache together, the median of five rounds; both
sides in one run. The kernel's best cut of a few is named.

    python benchmarks/few_row_products.py --json out.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))

from vllm_omni.model_executor.layers.graphed import record

SIZES = ((2560, 1024), (1024, 2048), (3072, 1024), (5120, 2048), (2048, 4096))
"""Columns and row length: the talker's projections and head, then the thinker's projections."""
CUTS = ((4, 1, 256), (8, 8, 256), (16, 8, 256), (4, 4, 256), (8, 4, 512))
"""Columns, warps and chunk of ``product_kernels.Plan``."""


def microseconds(run: Callable[[], object], products: int) -> float:
    """Of one of ``products``."""
    graph, _ = record(run, None)
    found = []
    for _ in range(6):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(10):
            graph.replay()
        end.record()
        end.synchronize()
        found.append(1e3 * begin.elapsed_time(end) / 10 / products)
    return round(statistics.median(found[1:]), 2)


@torch.inference_mode()
def main() -> None:
    """Time them and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("this needs a GPU")
    from vllm_omni.model_executor.layers.overlap import EARLY, OFF, can_overlap, set_overlap
    from vllm_omni.model_executor.layers.product_kernels import Plan, product

    device = torch.device("cuda", 0)
    set_overlap(device, EARLY if can_overlap(device) else OFF)
    found: dict[str, dict[str, float]] = {}
    for columns, length in SIZES:
        count = 24 if columns * length < 6_000_000 else 12
        weights = [torch.randn(columns, length, device=device).bfloat16() for _ in range(count)]
        for rows in (1, 2):
            x = torch.randn(rows, length, device=device).bfloat16()
            figures = {"cuBLAS": microseconds(lambda: [F.linear(x, weight) for weight in weights], count)}  # noqa: B023
            for cut in CUTS:
                plan = Plan("vector", *cut)
                run = lambda: [product(x, weight, cut=plan) for weight in weights]  # noqa: B023, E731
                figures[str(cut)] = microseconds(run, count)
            found[f"{columns} x {length}, {rows} rows"] = figures
            print(columns, length, rows, figures, flush=True)
    args.json.write_text(json.dumps({"gpu": torch.cuda.get_device_name(), "us": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
