"""The figures of one measurement."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from vllm_omni.benchmarks.load import Load, Run
from vllm_omni.benchmarks.measure import Measured

SHARES = {"p50": 0.5, "p90": 0.9, "p95": 0.95, "p99": 0.99}
TIMES = ("e2e", "ttft", "tpot", "ttfp", "rtf", "underrun")
BUSY = 0.8
"""Share of a core above which the client may have been what was measured."""


def quantile(ordered: Sequence[float], share: float) -> float:
    """The smallest value that at least ``share`` of ``ordered`` are not above."""
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def spread(values: Sequence[float]) -> dict[str, float]:
    """Mean, quantiles and largest."""
    ordered = sorted(values)
    figures = {"mean": sum(ordered) / len(ordered)}
    figures.update({name: quantile(ordered, share) for name, share in SHARES.items()})
    return {**figures, "max": ordered[-1]}


def summarise(
    run: Run, load: Load, objectives: Mapping[str, float], stages: Mapping[str, Mapping[str, float]]
) -> dict[str, Any]:
    """Everything about one measurement, as plain values. Seconds throughout; rates are by second of ``wall_s``."""
    wall = max(run.end - run.begun, 1e-9)
    good = [request for request in run.requests if request.error is None]
    late = [request.sent - request.due for request in run.requests]
    out: dict[str, Any] = {
        "load": {"concurrency": load.concurrency} if load.concurrency else {"request_rate": load.rate},
        "requests": len(run.requests),
        "succeeded": len(good),
        "wall_s": wall,
        "requests_per_s": len(good) / wall,
        "errors": _errors(run.requests),
        "retries": sum(request.retries for request in run.requests),
        **_times(good),
        "client": {"cpu_share": run.cpu_seconds / wall, "max_late_s": max(late, default=0.0)},
    }
    out["client"]["limits"] = out["client"]["cpu_share"] > BUSY
    for name, total in (("images", sum(r.images for r in good)), ("audio_s", sum(r.audio_seconds for r in good))):
        if total:
            out[f"{name}_per_s"] = total / wall
    tokens = sum(request.text_tokens for request in good)
    if tokens:
        out["text_tokens_per_s"] = tokens / wall
        out["prompt_tokens"] = {"mean": sum(request.prompt_tokens for request in good) / len(good)}
    if objectives:
        kept = sum(request.meets(dict(objectives)) for request in run.requests)
        out["goodput"] = {
            "objectives": dict(objectives),
            "requests_per_s": kept / wall,
            "share": kept / max(1, len(run.requests)),
        }
    if stages:
        out["stages"] = {stage: dict(phases) for stage, phases in stages.items()}
    labels = sorted({request.label for request in run.requests})
    if len(labels) > 1:
        out["by_label"] = {label: _part(run.requests, label, objectives) for label in labels}
    return out


def _times(good: Sequence[Measured]) -> dict[str, dict[str, float]]:
    out = {}
    for name in TIMES:
        values = [value for request in good if (value := getattr(request, name)) is not None]
        if values:
            out[name] = spread(values)
    gaps = [gap for request in good for gap in request.itl]
    if gaps:
        out["itl"] = spread(gaps)
    starved = sum(bool(request.underrun) for request in good)
    if "underrun" in out:
        out["underrun"]["requests"] = starved
    return out


def _part(requests: Sequence[Measured], label: str, objectives: Mapping[str, float]) -> dict[str, Any]:
    chosen = [request for request in requests if request.label == label]
    good = [request for request in chosen if request.error is None]
    kept = sum(request.meets(dict(objectives)) for request in chosen)
    goodput = {"goodput_share": kept / len(chosen)} if objectives else {}
    return {"requests": len(chosen), "succeeded": len(good), **_times(good), **goodput}


def _errors(requests: Sequence[Measured]) -> dict[str, dict[str, Any]]:
    counts = Counter(request.error for request in requests if request.error is not None)
    first = {request.error: request.message for request in reversed(requests) if request.error is not None}
    out: dict[str, dict[str, Any]] = {}
    for kind, count in counts.most_common():
        out[str(kind)] = {"count": count, "first": first[kind]}
    waits = [request.retry_after for request in requests if request.error == "429" and request.retry_after is not None]
    if waits:
        out["429"]["retry_after_s"] = {"told": len(waits), **spread(waits)}
    return out


def rows(run: Run) -> list[dict[str, Any]]:
    """Every request, times from the beginning of the measurement."""
    out = []
    for request in sorted(run.requests, key=lambda one: one.due):
        row = {"label": request.label, "due_s": request.due - run.begun, "sent_s": request.sent - run.begun}
        row |= {"status": request.status, "error": request.error, "retries": request.retries}
        row |= {name: getattr(request, name) for name in TIMES if getattr(request, name) is not None}
        out.append(row)
    return out
