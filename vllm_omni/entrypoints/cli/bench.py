"""``vllm-omni bench``: load on a running server."""

from __future__ import annotations

from typing import Any

import typer

from vllm_omni.benchmarks.args import BenchArgs
from vllm_omni.config.schema import parse
from vllm_omni.entrypoints.cli.flags import FlagGroup, with_flags

BENCH = FlagGroup(BenchArgs, "Load test", {})


def bench_serve(**flags: Any) -> None:
    """Measure a running server: latencies, first text and first sound, throughput, goodput, errors.

    Requests are sent in a closed loop (--concurrency) or in an open one (--request-rate). Sound is timed at its first
    byte, and played by an imagined listener who starts then.
    """
    args = parse(BenchArgs, BENCH.given(flags), "bench serve")
    from vllm_omni.benchmarks.serve import run_bench

    run_bench(args)


COMMAND = with_flags(bench_serve, BENCH)


def register(app: typer.Typer) -> None:
    """Add the group."""
    group = typer.Typer(help="Measure a running server.", no_args_is_help=True)
    group.callback()(lambda: None)
    group.command("serve")(COMMAND)
    app.add_typer(group, name="bench")
