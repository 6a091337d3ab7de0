#!/usr/bin/env python3
"""What a server does with more requests than it can answer: open loops at shares and multiples of its capacity.

::

    python benchmarks/overload.py --json out.json --plot out.svg

Serves the model of the package with few steps and a short queue, measures its capacity in a closed loop, and then sends
requests at random times at 0.5, 1, 2 and 4 times that rate. What is to be seen: beyond the capacity the latency of the
requests that are accepted stays at what the queue allows, the throughput stays at the capacity, and all others are
refused at once with 429 and Retry-After.
"""

import argparse
import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from vllm_omni.benchmarks.args import BenchArgs  # noqa: E402
from vllm_omni.benchmarks.load import Run  # noqa: E402
from vllm_omni.benchmarks.plot import draw  # noqa: E402
from vllm_omni.benchmarks.serve import measure  # noqa: E402

MULTIPLES = (0.5, 1.0, 2.0, 4.0)
BATCH = 4
"""Pictures that are drawn together."""


@contextmanager
def server(max_queue: int, steps: int) -> Iterator[str]:
    """The model of the package behind HTTP; its address."""
    defaults = json.dumps({"0": {"num_inference_steps": steps}})
    command = [sys.executable, "-m", "vllm_omni", "serve", "--port", "0", "--max-queue", str(max_queue)]
    command += ["--served-model-name", "default", "--default-sampling-params", defaults, "--max-num-seqs", str(BATCH)]
    env = {**os.environ, "VLLM_LOGGING_LEVEL": "INFO", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        address = next((line.split()[-1] for line in process.stderr if " serving " in line), None)
        if address is None:
            raise SystemExit("the server did not start")
        yield address
    finally:
        process.terminate()
        process.wait()


async def measured(address: str, places: int, capacity_s: float, seconds: float) -> tuple[dict[str, Any], list[Run]]:
    """Capacity with a full queue, then the open loops."""
    closed = BenchArgs(base_url=address, concurrency=[places], duration=capacity_s, quiet=True)
    first, _ = await measure(closed)
    capacity = first["results"][0]["requests_per_s"]
    rates = [multiple * capacity for multiple in MULTIPLES]
    found, runs = await measure(BenchArgs(base_url=address, request_rate=rates, duration=seconds, quiet=True))
    for multiple, result in zip(MULTIPLES, found["results"], strict=True):
        result["load"]["of_capacity"] = multiple
    return {**found, "capacity": first["results"][0]}, runs


def table(out: dict[str, Any]) -> str:
    """The figures as markdown."""
    lines = [
        "| load | asked/s | answered/s | accepted: p50 s | p95 s | p99 s | max s | refused (429) | with Retry-After |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in out["results"]:
        times = (f"{row['e2e'][name]:.2f}" for name in ("p50", "p95", "p99", "max"))
        refused = row["errors"].get("429", {"count": 0})
        told = refused.get("retry_after_s", {"told": 0})["told"]
        share = f"{refused['count']} of {row['requests']}"
        rates = f"{row['load']['request_rate']:.2f} | {row['requests_per_s']:.2f}"
        lines.append(f"| {row['load']['of_capacity']:g}x | {rates} | {' | '.join(times)} | {share} | {told} |")
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--max-queue", type=int, default=16)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--capacity-seconds", type=float, default=15)
    parser.add_argument("--seconds", type=float, default=20, help="length of each open loop")
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--plot", type=Path, help="SVG file")
    args = parser.parse_args()
    with server(args.max_queue, args.steps) as address:
        out, runs = asyncio.run(measured(address, args.max_queue, args.capacity_seconds, args.seconds))
    out["command"] = " ".join(["python", "benchmarks/overload.py", *sys.argv[1:]])
    out["server"] = {"max_queue": args.max_queue, "steps": args.steps, "max_num_seqs": BATCH}
    print(f"capacity: {out['capacity']['requests_per_s']:.2f} requests/s\n\n{table(out)}")
    if args.json:
        args.json.write_text(json.dumps(out, indent=2) + "\n", encoding="utf-8")
    if args.plot:
        names = [f"{row['load']['of_capacity']:g} x capacity" for row in out["results"]]
        title = f"Overload: queue of {args.max_queue}, capacity {out['capacity']['requests_per_s']:.1f} requests/s"
        args.plot.write_text(draw(list(zip(names, runs, strict=True)), title), encoding="utf-8")


if __name__ == "__main__":
    main()
