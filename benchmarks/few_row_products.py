"""Products of a few rows with weights of Qwen-Omni's sizes on a GPU: cuBLAS beside this package's kernels.

Microseconds a product, in a CUDA graph over weights that do not fit the cache together, the median of five rounds; both
sides in one run. The kernels are tried in a few cuts; ``worker/linear_method.py`` has the best of those that gain.

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

from vllm_omni.model_executor.layers.cuts import Plan
from vllm_omni.model_executor.layers.graphed import record

SIZES = {
    "qwen3": ((2560, 1024), (1024, 2048), (5120, 2048), (2048, 4096)),
    "qwen2_5": ((3584, 3584), (37888, 3584), (3584, 18944)),
}
"""Columns and row length: projections of Qwen3-Omni's talker and thinker; thinker of Qwen2.5-Omni-7B."""
VECTOR = ((4, 1, 256), (8, 8, 256), (16, 8, 256), (4, 4, 256), (8, 4, 512), (2, 4, 512))
SPLIT = ((8, 4, 128), (16, 4, 128), (8, 8, 64), (16, 8, 64))
"""Columns, warps and chunk of ``Plan``."""


def cuts(rows: int, length: int) -> list[Plan]:
    """What to try: tensor cores need more than two rows, and a weight has to fit the registers."""
    if rows <= 2:
        return [Plan("vector", *cut) for cut in VECTOR if length <= 4096 or cut[0] <= 4]
    return [Plan("split", *cut) for cut in SPLIT] if length <= 4096 else []


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
    parser.add_argument("--models", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 2, 4, 8])
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("this needs a GPU")
    from vllm_omni.model_executor.layers.overlap import EARLY, OFF, can_overlap, set_overlap
    from vllm_omni.model_executor.layers.product_kernels import product

    device = torch.device("cuda", 0)
    set_overlap(device, EARLY if can_overlap(device) else OFF)
    found: dict[str, dict[str, float]] = {}
    for columns, length in (size for model in args.models for size in SIZES[model]):
        count = max(2, 150_000_000 // (columns * length))
        weights = [torch.randn(columns, length, device=device).bfloat16() for _ in range(count)]
        for rows in args.rows:
            x = torch.randn(rows, length, device=device).bfloat16()
            figures = {"cuBLAS": microseconds(lambda: [F.linear(x, weight) for weight in weights], count)}  # noqa: B023
            for cut in cuts(rows, length):
                run = lambda: [product(x, weight, cut=cut) for weight in weights]  # noqa: B023, E731
                figures[f"{cut.kernel} {cut.columns} {cut.warps} {cut.chunk}"] = microseconds(run, count)
            found[f"{columns} x {length}, {rows} rows"] = figures
            print(columns, length, rows, figures, flush=True)
    args.json.write_text(json.dumps({"gpu": torch.cuda.get_device_name(), "us": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
