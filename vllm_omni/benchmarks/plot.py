"""An SVG of the measurements, drawn without a library: latencies, throughput and open requests over time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import Any

from vllm_omni.benchmarks.load import Run

Point = tuple[float, float]
COLOURS = ("#2563eb", "#dc2626", "#059669", "#d97706", "#7c3aed", "#0891b2", "#be185d", "#4d7c0f")
WIDTH, HEIGHT, LEFT, TOP, GAP = 640, 200, 64, 40, 64
BINS = (8, 60)
"""Fewest and most intervals of the throughput."""
PER_BIN = 8
"""Answers that an interval should hold, so that it shows a rate and not single answers."""


def draw(named: Sequence[tuple[str, Run]], title: str) -> str:
    """The picture of several measurements, one colour each."""
    panels = (
        ("Latency of requests that succeeded (s)", "share", [_shares(run) for _, run in named], 1.0),
        ("Time since the beginning (s)", "answers a second", [_throughput(run) for _, run in named], None),
        ("Time since the beginning (s)", "open requests", [_open(run) for _, run in named], None),
    )
    parts = [
        _text(LEFT, 22, title, 'font-size="15" font-weight="600"'),
        *(_panel(number, *panel) for number, panel in enumerate(panels)),
        _legend([name for name, _ in named], TOP + len(panels) * (HEIGHT + GAP)),
    ]
    height = TOP + len(panels) * (HEIGHT + GAP) + 18 * len(named) + 12
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {LEFT + WIDTH + 24} {height}" '
    style = 'font-family="system-ui, sans-serif" font-size="11" fill="#334155"'
    background = '<rect width="100%" height="100%" fill="#ffffff"/>'
    return "\n".join([f"{head}{style}>", background, *parts, "</svg>"]) + "\n"


def _shares(run: Run) -> list[Point]:
    ordered = sorted(request.e2e for request in run.requests if request.error is None)
    return [(0.0, 0.0), *((value, (i + 1) / len(ordered)) for i, value in enumerate(ordered))]


def _throughput(run: Run) -> list[Point]:
    wall = max(run.end - run.begun, 1e-9)
    bins = min(BINS[1], max(BINS[0], len(run.requests) // PER_BIN))
    width = wall / bins
    counts = [0] * bins
    for request in run.requests:
        if request.error is None:
            counts[min(bins - 1, max(0, int((request.end - run.begun) / width)))] += 1
    return [(i * width + side * width, count / width) for i, count in enumerate(counts) for side in (0, 1)]


def _open(run: Run) -> list[Point]:
    """A step for every request that begins or ends."""
    changes = sorted(
        [(request.sent - run.begun, 1) for request in run.requests]
        + [(request.end - run.begun, -1) for request in run.requests]
    )
    points: list[Point] = [(0.0, 0.0)]
    now = 0
    for at, change in changes:
        points.append((at, now))
        now += change
        points.append((at, now))
    return points


def _panel(number: int, x_name: str, y_name: str, lines: list[list[Point]], highest: float | None) -> str:
    top = TOP + number * (HEIGHT + GAP)
    x_most = max((x for line in lines for x, _ in line), default=0.0) or 1.0
    y_most = highest or max((y for line in lines for _, y in line), default=0.0) or 1.0
    out = []
    for value in _ticks(y_most):
        y = top + HEIGHT - value / y_most * HEIGHT
        out.append(f'<path d="M{LEFT} {y:.1f}H{LEFT + WIDTH}" stroke="#e2e8f0"/>')
        out.append(_text(LEFT - 6, y + 4, f"{value:g}", 'text-anchor="end"'))
    for value in _ticks(x_most):
        x = LEFT + value / x_most * WIDTH
        out.append(_text(x, top + HEIGHT + 16, f"{value:g}", 'text-anchor="middle"'))
    for line, colour in zip(lines, _colours(len(lines)), strict=True):
        places = _thin([(LEFT + x / x_most * WIDTH, top + HEIGHT - y / y_most * HEIGHT) for x, y in line])
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
        out.append(f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
    out.append(_text(LEFT + WIDTH / 2, top + HEIGHT + 34, x_name, 'text-anchor="middle"'))
    middle = top + HEIGHT / 2
    out.append(_text(14, middle, y_name, f'text-anchor="middle" transform="rotate(-90 14 {middle})"'))
    return "\n".join(out)


def _ticks(most: float) -> list[float]:
    """Four to eight round numbers from 0 on."""
    raw = most / 5
    power = 10 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw)
    return [round(i * step, 12) for i in range(int(most / step + 1e-9) + 1)]


def _thin(points: list[Point]) -> list[Point]:
    """Without points that cannot be seen."""
    kept = points[:1]
    for point in points[1:]:
        if abs(point[0] - kept[-1][0]) >= 0.3 or abs(point[1] - kept[-1][1]) >= 0.3:
            kept.append(point)
    return kept


def _colours(count: int) -> list[str]:
    return [COLOURS[i % len(COLOURS)] for i in range(count)]


def _legend(names: Sequence[str], top: float) -> str:
    out = []
    for i, (name, colour) in enumerate(zip(names, _colours(len(names)), strict=True)):
        y = top + 18 * i
        out.append(f'<path d="M{LEFT} {y}h24" stroke="{colour}" stroke-width="3"/>')
        out.append(_text(LEFT + 32, y + 4, name, ""))
    return "\n".join(out)


def _text(x: float, y: float, text: Any, attributes: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" {attributes}>{escape(str(text))}</text>'
