"""The commands of the page on benchmarking are settings that the benchmark takes."""

from __future__ import annotations

import itertools
import shlex
from pathlib import Path

import typer

from vllm_omni.benchmarks.args import BenchArgs
from vllm_omni.benchmarks.workload import Target, calls
from vllm_omni.config.schema import parse
from vllm_omni.entrypoints.cli.bench import BENCH
from vllm_omni.entrypoints.cli.main import build_app

PAGE = Path(__file__).parents[2] / "docs" / "user_guide" / "benchmarking.md"
EVERYTHING = Target("any", frozenset({"text", "image", "audio"}), 3)


def test_commands_of_the_page() -> None:
    command = typer.main.get_command(build_app("bench")).commands["bench"].commands["serve"]  # type: ignore[attr-defined]
    lines = [line for line in PAGE.read_text().splitlines() if line.startswith("vllm-omni bench serve")]
    assert len(lines) >= 6
    seen = set()
    for line in lines:
        context = command.make_context("serve", shlex.split(line)[3:])
        args = parse(BenchArgs, BENCH.given(context.params), line)
        assert len(list(itertools.islice(calls(args, EVERYTHING), 3))) == 3
        seen.add(args.workload)
    assert seen == {"small", "t2i", "mixed", "tts", "omni"}
    for field in ("`" + name + "`" for name in ("e2e", "ttft", "tpot", "ttfp", "rtf", "underrun", "goodput")):
        assert field in PAGE.read_text()
