"""``vllm-omni bench serve``: measure a running server."""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from vllm_omni import envs
from vllm_omni.benchmarks import plot
from vllm_omni.benchmarks.args import BenchArgs
from vllm_omni.benchmarks.http_client import HttpClient
from vllm_omni.benchmarks.load import Load, Run, run_load
from vllm_omni.benchmarks.machine import about
from vllm_omni.benchmarks.measure import Measured
from vllm_omni.benchmarks.server import find_target, stage_means, stage_sums
from vllm_omni.benchmarks.summary import rows, summarise
from vllm_omni.benchmarks.table import load_name, tables
from vllm_omni.benchmarks.workload import Target, calls
from vllm_omni.errors import ConfigError, OmniError

WAVES = 5
"""Requests of a closed loop for each of its places, when no number is given."""


async def measure(args: BenchArgs) -> tuple[dict[str, Any], list[Run]]:
    """All measurements of one command: (what goes into the JSON, what was seen).

    Raises:
        ConfigError: no server there, or it does not make what the workload asks for.
        DeadlineError: the server was not there in time.
        OmniError: no request succeeded.
    """
    key = args.api_key or envs.VLLM_API_KEY()
    async with HttpClient(args.base_url, key) as client:
        target = await find_target(client, args)
        next(calls(args, target))  # an unfit workload is refused before anything is sent
        results, runs = [], []
        with _without_old_garbage():
            for concurrency, rate in args.loads:
                load = _load(args, concurrency, rate)
                run, stages = await _one(client, target, load, args)
                results.append(summarise(run, load, args.objectives, stages))
                if args.detail:
                    results[-1]["detail"] = rows(run)
                runs.append(run)
    facts = about()
    if target.version is not None:
        facts["versions"]["server"] = target.version
    settings = {name: value for name, value in asdict(args).items() if name != "api_key"}
    return {**facts, "settings": settings, "model": target.model, "results": results}, runs


@contextmanager
def _without_old_garbage() -> Iterator[None]:
    """The collector looks at what is made from here on alone: at everything it would take milliseconds."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _load(args: BenchArgs, concurrency: int, rate: float) -> Load:
    count = args.num_requests
    if count is None and args.duration is None:
        count = WAVES * concurrency
    return Load(concurrency, rate, count, args.duration, args.timeout, args.retry_429, args.seed)


async def _one(
    client: HttpClient, target: Target, load: Load, args: BenchArgs
) -> tuple[Run, dict[str, dict[str, float]]]:
    warmup = (load.concurrency or 1) if args.warmup is None else args.warmup
    if warmup:
        places = min(warmup, load.concurrency or 1)
        warm = Load(places, 0.0, warmup, None, load.timeout, load.retry_429, load.seed)
        await run_load(client, calls(replace(args, seed=args.seed + 1), target), warm, lambda request: None)
    before = await stage_sums(client)
    with _Bar(load, args) as on_done:
        run = await run_load(client, calls(args, target), load, on_done)
    return run, stage_means(before, await stage_sums(client))


class _Bar:
    """A bar on stderr while a measurement runs; nothing where nobody looks."""

    def __init__(self, load: Load, args: BenchArgs) -> None:
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed} done, {task.fields[failed]} failed"),
            TimeElapsedColumn(),
            console=Console(file=sys.stderr),
            transient=True,
            disable=args.quiet or not sys.stderr.isatty(),
        )
        name = load_name({"concurrency": load.concurrency} if load.concurrency else {"request_rate": load.rate})
        self._failed = 0
        self._task = self._bars.add_task(name, total=load.count, failed=0)

    def __enter__(self) -> Callable[[Measured], None]:
        self._bars.start()
        return self._on_done if not self._bars.disable else lambda request: None

    def _on_done(self, request: Measured) -> None:
        self._failed += request.error is not None
        self._bars.update(self._task, advance=1, failed=self._failed)

    def __exit__(self, *exc: object) -> None:
        self._bars.stop()


def run_bench(args: BenchArgs) -> None:
    """Measure, print the tables, write the files.

    Raises:
        ConfigError: as ``measure``, or a file cannot be written.
        OmniError: no request succeeded.
    """
    import uvloop

    for name in ("json", "plot"):
        _check_writable(name, getattr(args, name))
    figures, runs = uvloop.run(measure(args))
    console = Console()
    for part in tables(figures["results"]):
        console.print(part, markup=False, highlight=False)
    if args.json is not None:
        Path(args.json).write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    if args.plot is not None:
        Path(args.plot).write_text(_picture(figures, runs), encoding="utf-8")
    _check_success(figures["results"])


def _picture(figures: dict[str, Any], runs: Sequence[Run]) -> str:
    names = [load_name(result["load"]) for result in figures["results"]]
    title = f"{figures['model']}: workload {figures['settings']['workload']}"
    return plot.draw(list(zip(names, runs, strict=True)), title)


def _check_writable(name: str, path: str | None) -> None:
    if path is not None and not Path(path).absolute().parent.is_dir():
        raise ConfigError(f"{name}={path!r}: no such folder", field=name)


def _check_success(results: Sequence[dict[str, Any]]) -> None:
    for result in results:
        if result["requests"] and not result["succeeded"]:
            kind, error = next(iter(result["errors"].items()))
            raise OmniError(f"no request succeeded ({load_name(result['load'])}): {kind}: {error['first']}")
