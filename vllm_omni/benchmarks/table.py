"""The figures of the measurements as a table for people."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from rich import box
from rich.table import Table

_TIMES = (
    ("e2e", "latency", 1e3, "ms"),
    ("ttft", "to the first text (TTFT)", 1e3, "ms"),
    ("tpot", "for each text token (TPOT)", 1e3, "ms"),
    ("itl", "between texts (ITL)", 1e3, "ms"),
    ("ttfp", "to the first sound (TTFP)", 1e3, "ms"),
    ("rtf", "real time factor (RTF)", 1.0, ""),
    ("underrun", "playback starved", 1e3, "ms"),
)
_QUANTILES = ("mean", "p50", "p90", "p95", "p99", "max")
_RATES = (
    ("requests_per_s", "requests/s"),
    ("images_per_s", "pictures/s"),
    ("audio_s_per_s", "seconds of sound/s"),
    ("text_tokens_per_s", "text tokens/s"),
)


def load_name(load: dict[str, Any]) -> str:
    """How requests were sent."""
    if "concurrency" in load:
        return f"{load['concurrency']} at a time"
    return f"{load['request_rate']:g} a second"


def tables(results: Sequence[dict[str, Any]]) -> Iterator[Table | str]:
    """For each measurement its times, and a line on everything else."""
    for result in results:
        times = Table(title=load_name(result["load"]), title_justify="left", box=box.SIMPLE_HEAD)
        times.add_column("")
        for name in _QUANTILES:
            times.add_column(name, justify="right")
        for key, text, factor, unit in _TIMES:
            if key in result:
                times.add_row(f"{text} {unit}".rstrip(), *_cells(result[key], factor))
        for label, part in result.get("by_label", {}).items():
            if "e2e" in part:
                times.add_row(f"latency of {label} ms", *_cells(part["e2e"], 1e3))
        for stage, phases in result.get("stages", {}).items():
            for phase, seconds in phases.items():
                times.add_row(f"stage {stage}, {phase} ms", _number(seconds * 1e3))
        yield times
        yield "\n".join(_lines(result))


def _lines(result: dict[str, Any]) -> Iterator[str]:
    rates = [f"{_number(result[key])} {text}" for key, text in _RATES if key in result]
    yield f"{result['succeeded']} of {result['requests']} succeeded in {result['wall_s']:.2f} s: {', '.join(rates)}"
    if "goodput" in result:
        goodput = result["goodput"]
        bounds = ", ".join(f"{name} <= {value:g}" for name, value in goodput["objectives"].items())
        yield f"goodput ({bounds}): {_number(goodput['requests_per_s'])} requests/s, {goodput['share']:.1%}"
    for kind, error in result["errors"].items():
        yield f"{error['count']} x {kind}: {error['first']}"
    if result["retries"]:
        yield f"{result['retries']} requests were sent again after 429"
    if result.get("underrun", {}).get("requests"):
        count = result["underrun"]["requests"]
        yield f"playback would have starved in {count} request{'' if count == 1 else 's'}"
    client = result["client"]
    if client["limits"]:
        yield f"this client was busy {client['cpu_share']:.0%} of the time: the server may be faster than that"


def _cells(figures: dict[str, float], factor: float) -> list[str]:
    return [_number(figures[name] * factor) for name in _QUANTILES]


def _number(value: float) -> str:
    """Three digits that count."""
    if value >= 100:
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.3g}"
