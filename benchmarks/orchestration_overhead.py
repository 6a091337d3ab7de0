"""What the orchestration costs: requests over stages that do nothing, each in its own process (workload W8).

::

    python benchmarks/orchestration_overhead.py --json out.json

Measures, for 1 and 3 stages and a 1 KB payload: milliseconds per request one after another and 64 at once, requests per
second, CPU time per request of driver and stages together; and for a stream of 100 chunks of 4 KB through three stages
the time from the end of a stage's work on a chunk to the begin of the next stage's (``--only-stream`` for this alone):
straight from process to process, as such a stream goes, and by way of the driver, as it goes where requests are held
back (``max_inflight``); each next to what bare sockets on the same way take, in turn in one run. A chunk comes every
millisecond, and every four: the longer a core has slept, the more of its caches it has lost. Every figure is the
best of ``--repeats`` rounds, because a round on a shared machine measures the others too; the median round is reported
beside it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeVar

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from relay import relayed  # noqa: E402

from vllm_omni.entrypoints.async_omni import AsyncOmni  # noqa: E402
from vllm_omni.entrypoints.loop_thread import LoopThread  # noqa: E402
from vllm_omni.entrypoints.omni import Omni  # noqa: E402

T = TypeVar("T")

PAYLOAD = "x" * 1024


def write_chain(folder: str, stages: int, stream: bool, straight: bool = True) -> str:
    """A stage configuration of ``stages`` no-op stages in a row."""
    engine = "chunk_stage.ChunkStage" if stream else "tests.entrypoints.noop_stage.NoopStage"
    lines = [f"async_chunk: {str(stream).lower()}", "stage_args:"]
    for stage in range(stages):
        lines += [
            f"  - stage_id: {stage}",
            "    stage_type: diffusion",
            f"    engine_args: {{engine_cls: {engine}}}",
        ]
        if stage:
            lines.append(f"    engine_input_source: [{stage - 1}]")
    lines += ["    final_output: true", "    final_output_type: text"]
    if not straight:
        lines += ["runtime: {defaults: {max_inflight: 1000}}"]
    path = Path(folder) / f"chain_{stages}_{stream}_{straight}.yaml"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def quantile(values: list[float], share: float) -> float:
    """The ``share`` quantile of ``values``."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def summary(rounds: list[list[float]], seconds: list[float]) -> dict[str, float]:
    """Best and median round, in milliseconds and requests a second."""
    p50 = [quantile(values, 0.5) * 1e3 for values in rounds]
    p99 = [quantile(values, 0.99) * 1e3 for values in rounds]
    rate = [len(values) / took for values, took in zip(rounds, seconds, strict=True)]
    return {
        "p50_ms": min(p50),
        "p99_ms": min(p99),
        "p50_ms_median_round": statistics.median(p50),
        "p99_ms_median_round": statistics.median(p99),
        "requests_per_s": max(rate),
    }


async def one(engine: AsyncOmni, prompt: Any, took: list[float]) -> None:
    """One request, timed."""
    began = time.perf_counter()
    async for _ in engine.generate(prompt):
        pass
    took.append(time.perf_counter() - began)


async def rounds_of(engine: AsyncOmni, count: int, at_once: int, repeats: int) -> dict[str, float]:
    """``count`` requests a round, ``at_once`` of them open at any time."""
    rounds, seconds = [], []
    for _ in range(repeats + 1):
        took: list[float] = []
        began = time.perf_counter()

        async def worker(share: int, took: list[float] = took) -> None:
            for _ in range(share):
                await one(engine, {"prompt": PAYLOAD}, took)

        await asyncio.gather(*(worker(count // at_once) for _ in range(at_once)))
        rounds.append(took)
        seconds.append(time.perf_counter() - began)
    return summary(rounds[1:], seconds[1:])


PACES = (0.001, 0.004)
"""Seconds that the first stage takes for a chunk."""


async def hops(engines: dict[str, AsyncOmni], chunks: int, pace: float, repeats: int) -> dict[str, Any]:
    """Time from the end of a stage's work on a chunk to the begin of the next stage's, in microseconds, in turn for
    each way and for bare sockets on the same way."""
    rounds: dict[str, list[list[float]]] = {f"{way}{kind}": [] for way in engines for kind in ("", " bare")}
    for _ in range(repeats + 1):
        for way, engine in engines.items():
            took: list[float] = []
            prompt: Any = {"prompt": PAYLOAD * 4, "additional_information": {"chunks": chunks, "pace": pace}}
            async for output in engine.generate(prompt):
                times = output.multimodal_output["times"]
                took += [(began - ended) * 1e6 for ended, began in zip(times[1::2], times[2::2], strict=False)]
            rounds[way].append(took)
            floor = await relayed(len(took), pace, straight=way == "straight")
            rounds[f"{way} bare"].append([seconds * 1e6 for seconds in floor])
    out: dict[str, Any] = {}
    for way in engines:
        ours, least = microseconds(rounds[way][1:]), microseconds(rounds[f"{way} bare"][1:])
        over = {f"{name}_over_bare_sockets_us": ours[f"{name}_us"] - least[f"{name}_us"] for name in QUANTILES}
        out[way] = {**ours, "bare_sockets": least, **over}
    return out


QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99}


def microseconds(rounds: list[list[float]]) -> dict[str, float]:
    """Best and median round."""
    out: dict[str, float] = {}
    for name, share in QUANTILES.items():
        of_rounds = [quantile(values, share) for values in rounds]
        out |= {f"{name}_us": min(of_rounds), f"{name}_us_median_round": statistics.median(of_rounds)}
    return out


def cpu_seconds() -> float:
    """CPU time of this process and of those of its children that have ended."""
    return sum(
        usage.ru_utime + usage.ru_stime
        for usage in (resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN))
    )


def measure_sync(path: str, count: int, repeats: int) -> dict[str, float]:
    """``Omni.generate`` with one prompt, call after call."""
    rounds, seconds = [], []
    with Omni(stage_configs_path=path) as omni:
        for _ in range(repeats + 1):
            took = []
            for _ in range(count):
                began = time.perf_counter()
                omni.generate({"prompt": PAYLOAD}, use_tqdm=False)
                took.append(time.perf_counter() - began)
            rounds.append(took)
            seconds.append(sum(took))
    return summary(rounds[1:], seconds[1:])


async def measure_async(path: str, count: int, repeats: int) -> dict[str, Any]:
    """``AsyncOmni.generate``: one after another and 64 at once, with the CPU time of the whole."""
    before = cpu_seconds()
    engine = AsyncOmni(stage_configs_path=path)
    sequential = await rounds_of(engine, count, 1, repeats)
    batch = count - count % 64 or 64
    concurrent = await rounds_of(engine, batch, 64, repeats)
    engine.shutdown()
    done = (repeats + 1) * (count + batch)
    return {
        "sequential": sequential,
        "concurrent_64": concurrent,
        "cpu_ms_per_request_with_start": (cpu_seconds() - before) / done * 1e3,
    }


async def measure_stream(paths: dict[str, str], repeats: int) -> dict[str, Any]:
    """100 chunks of 4 KB through three stages."""
    engines = {way: AsyncOmni(stage_configs_path=path) for way, path in paths.items()}
    result = {f"every {1e3 * pace:g} ms": await hops(engines, 100, pace, repeats) for pace in PACES}
    for engine in engines.values():
        engine.shutdown()
    return result


def run(coroutine: Coroutine[Any, Any, T]) -> T:
    """In the kind of loop that ``Omni`` and the HTTP server use."""
    loop = LoopThread("benchmark")
    try:
        return loop.run(coroutine)
    finally:
        loop.stop()


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=500, help="requests a round")
    parser.add_argument("--repeats", type=int, default=7, help="rounds, after one that does not count")
    parser.add_argument("--only-stream", action="store_true", help="the stream of chunks alone")
    parser.add_argument("--json", type=Path, help="file for the figures")
    args = parser.parse_args()
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    figures: dict[str, Any] = {
        "machine": {"cpus": os.cpu_count(), "load": os.getloadavg()[0], "python": platform.python_version()}
    }
    with tempfile.TemporaryDirectory() as folder:
        for stages in () if args.only_stream else (1, 3):
            path = write_chain(folder, stages, stream=False)
            figures[f"omni_{stages}_stages"] = measure_sync(path, args.requests, args.repeats)
            figures[f"async_omni_{stages}_stages"] = run(measure_async(path, args.requests, args.repeats))
        ways = {"straight": True, "by the driver": False}
        paths = {way: write_chain(folder, 3, stream=True, straight=straight) for way, straight in ways.items()}
        figures["chunk_hop"] = run(measure_stream(paths, args.repeats))
    print(json.dumps(figures, indent=2))
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
