#!/usr/bin/env python3
"""What HTTP costs: requests for a 16x16 picture to a stage that computes nothing, over HTTP and in the process.

The client is a bare socket, so that the figures are the server's. The difference of the two medians is what routing,
checks, PNG and base64 take. Prints a table, and JSON with --json.
"""

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
BODY = json.dumps({"prompt": "x" * 100, "size": "16x16", "seed": 1}).encode()
HEAD = (
    b"POST /v1/images/generations HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
)


def summary(seconds: list[float], wall: float) -> dict[str, float]:
    """Milliseconds and rate."""
    ordered = sorted(seconds)
    return {
        "p50_ms": median(ordered) * 1e3,
        "p99_ms": ordered[int(len(ordered) * 0.99)] * 1e3,
        "per_s": len(ordered) / wall,
    }


async def closed_loop(ask: Any, count: int, concurrency: int) -> dict[str, float]:
    """``count`` requests, ``concurrency`` at a time; ``ask(worker)`` makes a function that does one."""
    seconds: list[float] = []

    async def work(worker: int) -> None:
        one = await ask(worker)
        for _ in range(count // concurrency):
            begun = time.perf_counter()
            await one()
            seconds.append(time.perf_counter() - begun)

    begun = time.perf_counter()
    await asyncio.gather(*(work(i) for i in range(concurrency)))
    return summary(seconds, time.perf_counter() - begun)


def http_client(port: int) -> Any:
    """A connection for each worker."""

    async def connect(worker: int) -> Any:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)

        async def one() -> None:
            writer.write(HEAD % len(BODY) + BODY)
            head = await reader.readuntil(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200"), head
            length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
            await reader.readexactly(length)

        return one

    return connect


def in_process_client(omni: Any) -> Any:
    """The same requests without HTTP."""
    from vllm_omni.inputs.data import OmniDiffusionSamplingParams

    async def connect(worker: int) -> Any:
        async def one() -> None:
            params = OmniDiffusionSamplingParams(width=16, height=16, seed=1)
            async for _ in omni.generate("x" * 100, params, output_modalities=["image"]):
                pass

        return one

    return connect


def start_server(path: str) -> tuple[subprocess.Popen[str], int]:
    """The server and its port."""
    command = [sys.executable, "-m", "vllm_omni", "serve", "--port", "0", "--stage-configs-path", path, "--model", "x"]
    env = {**os.environ, "VLLM_LOGGING_LEVEL": "INFO", "OMP_NUM_THREADS": "1"}
    server = subprocess.Popen(command, cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True)
    assert server.stderr is not None
    for line in server.stderr:
        if " serving " in line:
            return server, int(line.rsplit(":", 1)[1])
    raise SystemExit("the server did not start")


def measure(count: int, concurrencies: list[int]) -> dict[str, Any]:
    """Both ways, at every concurrency."""
    import uvloop

    from tests.entrypoints.openai.server import picture_stages
    from vllm_omni.entrypoints.async_omni import AsyncOmni

    out: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = picture_stages(Path(folder))
        server, port = start_server(path)
        try:
            for concurrency in concurrencies:
                uvloop.run(closed_loop(http_client(port), 100, concurrency))
                out[f"http c={concurrency}"] = uvloop.run(closed_loop(http_client(port), count, concurrency))
        finally:
            server.terminate()
            server.wait()

        async def in_process() -> None:
            async with AsyncOmni("x", stage_configs_path=path) as omni:
                for concurrency in concurrencies:
                    await closed_loop(in_process_client(omni), 100, concurrency)
                    row = await closed_loop(in_process_client(omni), count, concurrency)
                    out[f"in process c={concurrency}"] = row

        uvloop.run(in_process())
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=2000, help="requests of each measurement")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    rows = measure(args.count, args.concurrency)
    if args.json:
        print(json.dumps(rows, indent=2))
        return
    for name, row in rows.items():
        print(f"{name:<18} p50 {row['p50_ms']:7.3f} ms  p99 {row['p99_ms']:7.3f} ms  {row['per_s']:7.0f}/s")
    first = args.concurrency[0]
    extra = rows[f"http c={first}"]["p50_ms"] - rows[f"in process c={first}"]["p50_ms"]
    print(f"HTTP over in process, p50 at c={first}: {extra:.3f} ms")


if __name__ == "__main__":
    main()
