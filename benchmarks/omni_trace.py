"""What a torch profiler trace says about a stage: kernels by time, how busy the GPU is, what the host does."""

from __future__ import annotations

import collections
import gzip
import json
from pathlib import Path
from typing import Any

_KERNELS = ("kernel", "gpu_memcpy", "gpu_memset")


def summarise(path: Path, rows: int = 25) -> str:
    """A table for reading."""
    data = path.read_bytes()
    trace = json.loads(gzip.decompress(data) if path.suffix == ".gz" else data)
    events = [event for event in trace["traceEvents"] if event.get("ph") == "X"]
    kernels = sorted((e for e in events if e.get("cat") in _KERNELS), key=lambda e: float(e["ts"]))
    lines = [path.name]
    if kernels:
        lines += _device(kernels, rows)
    for kind in ("cuda_runtime", "user_annotation", "cpu_op"):
        lines += _host([event for event in events if event.get("cat") == kind], kind, rows)
    return "\n".join(lines) + "\n"


def _device(kernels: list[dict[str, Any]], rows: int) -> list[str]:
    span = kernels[-1]["ts"] + kernels[-1]["dur"] - kernels[0]["ts"]
    busy, end = 0.0, 0.0
    gaps: collections.Counter[str] = collections.Counter()
    for before, kernel in zip([kernels[0], *kernels], kernels, strict=False):
        start, stop = kernel["ts"], kernel["ts"] + kernel["dur"]
        if end and start > end:
            gaps[f"{before['name'][:48]} -> {kernel['name'][:48]}"] += start - end
        busy += max(0.0, stop - max(start, end))
        end = max(end, stop)
    lines = [f"GPU: {span / 1e3:.1f} ms, busy {100 * busy / span:.1f} %, {len(kernels)} kernels and copies"]
    times: collections.Counter[str] = collections.Counter()
    counts: collections.Counter[str] = collections.Counter()
    for kernel in kernels:
        times[kernel["name"][:90]] += kernel["dur"]
        counts[kernel["name"][:90]] += 1
    lines += [f"{time / 1e3:9.2f} ms {counts[name]:7d}  {name}" for name, time in times.most_common(rows)]
    lines.append("gaps between kernels, summed by neighbours:")
    return lines + [f"{time / 1e3:9.2f} ms  {name}" for name, time in gaps.most_common(12)]


def _host(events: list[dict[str, Any]], kind: str, rows: int) -> list[str]:
    times: collections.Counter[str] = collections.Counter()
    counts: collections.Counter[str] = collections.Counter()
    for event in events:
        times[event["name"][:80]] += event["dur"]
        counts[event["name"][:80]] += 1
    lines = [f"host, {kind}: {len(events)} events"]
    return lines + [f"{time / 1e3:9.2f} ms {counts[name]:7d}  {name}" for name, time in times.most_common(rows)]
