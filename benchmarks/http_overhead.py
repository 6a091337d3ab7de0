#!/usr/bin/env python3
"""What HTTP costs (workload W8): requests for a 16x16 picture to a stage that computes nothing.

::

    python benchmarks/http_overhead.py --json out.json

Contenders, one server process each, measured in turn in every round so that what else the machine does hits all alike:

- ``server``: ``vllm-omni serve`` over one no-op stage;
- ``in process``: ``AsyncOmni`` over the same stage, without HTTP;
- ``asgi``: uvicorn with the smallest application, which returns an answer of the same size;
- ``fastapi``: uvicorn with FastAPI, which checks the same body and returns the same answer.

The client is that of ``vllm-omni bench serve``; its rate against ``asgi`` shows what it could do, and ``aiohttp`` and
``httpx`` what these clients do against the same server. A round's figures are medians of its requests; the table has
the best and the median round. CPU time is that of the contender's processes; of ``aiohttp`` and ``httpx`` the client's
own.
"""

import argparse
import asyncio
import importlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from vllm_omni.benchmarks.http_client import HttpClient  # noqa: E402
from vllm_omni.benchmarks.machine import about  # noqa: E402
from vllm_omni.benchmarks.summary import quantile  # noqa: E402

Ask = Callable[[], Awaitable[None]]
PROMPT = "x" * 100
BODY = json.dumps({"prompt": PROMPT, "size": "16x16", "seed": 1}).encode()
PATH = "/v1/images/generations"
ANSWER = (
    b'{"created": 1, "data": [{"b64_json": "%b", "revised_prompt": null}], "output_format": "png", "size": "16x16"}'
)
COLUMNS = (("p50", "p50_ms", 3, "ms"), ("p99", "p99_ms", 3, "ms"), ("", "per_s", 0, "/s"), ("cpu", "cpu_us", 0, "us"))
READY = "the anchor serves on port "


@dataclass
class Contender:
    """One way to get an answer."""

    ask: Ask
    processes: list[psutil.Process]
    """Whose CPU time counts."""
    rounds: dict[int, list[dict[str, float]]] = field(default_factory=dict)
    """By concurrency."""


def cpu_seconds(processes: list[psutil.Process]) -> float:
    """User and system time so far."""
    return sum(sum(process.cpu_times()[:2]) for process in processes)


async def one_round(contender: Contender, count: int, concurrency: int) -> dict[str, float]:
    """``count`` requests, ``concurrency`` at a time."""
    seconds: list[float] = []

    async def work() -> None:
        for _ in range(count // concurrency):
            begun = time.perf_counter()
            await contender.ask()
            seconds.append(time.perf_counter() - begun)

    cpu, begun = cpu_seconds(contender.processes), time.perf_counter()
    await asyncio.gather(*(work() for _ in range(concurrency)))
    wall = time.perf_counter() - begun
    ordered = sorted(seconds)
    return {
        "p50_ms": quantile(ordered, 0.5) * 1e3,
        "p99_ms": quantile(ordered, 0.99) * 1e3,
        "per_s": len(ordered) / wall,
        "cpu_us": (cpu_seconds(contender.processes) - cpu) / len(ordered) * 1e6,
    }


# ---------------------------------------------------------------- contenders


def over_http(client: HttpClient) -> Ask:
    """A request with the client of the package."""
    data = client.prepare("POST", PATH, BODY)

    async def ask() -> None:
        answer = await client.send(data, 60)
        assert answer.status == 200, answer.body

    return ask


def with_aiohttp(session: Any, url: str) -> Ask:
    """The same request with aiohttp, which vLLM brings along."""
    headers = {"content-type": "application/json"}

    async def ask() -> None:
        async with session.post(url, data=BODY, headers=headers) as answer:
            await answer.read()

    return ask


def with_httpx(client: Any, url: str) -> Ask:
    """The same request with httpx."""
    headers = {"content-type": "application/json"}

    async def ask() -> None:
        await client.post(url, content=BODY, headers=headers)

    return ask


def in_process(omni: Any) -> Ask:
    """The same request without HTTP."""
    from vllm_omni.inputs.data import OmniDiffusionSamplingParams

    async def ask() -> None:
        params = OmniDiffusionSamplingParams(width=16, height=16, seed=1)
        async for _ in omni.generate(PROMPT, params, output_modalities=["image"]):
            pass

    return ask


@contextmanager
def child(arguments: list[str], marker: str) -> Iterator[tuple[int, int]]:
    """A server in a process of its own: (process id, port), the number at the end of the line with ``marker``."""
    env = {**os.environ, "VLLM_LOGGING_LEVEL": "INFO", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, *arguments], cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        for line in process.stderr:
            if marker in line:
                yield process.pid, int(line.rsplit(":" if marker == " serving " else " ", 1)[1])
                return
        raise SystemExit(f"{arguments} did not start")
    finally:
        process.terminate()
        process.wait()


def anchor_asgi() -> Any:
    """The least that uvicorn can serve."""
    body = ANSWER % (b"x" * 120)
    head = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": head})
        await send({"type": "http.response.body", "body": body})

    return app


def anchor_fastapi() -> Any:
    """What FastAPI needs for a checked body and a JSON answer."""
    from fastapi import FastAPI

    # postponed annotations would hide the class from FastAPI, hence no `from __future__ import annotations` above
    body_class = importlib.import_module("vllm_omni.entrypoints.openai.images").ImageGenerationRequest
    app = FastAPI()
    answer = json.loads(ANSWER % (b"x" * 120))

    @app.post(PATH)
    async def generations(body: body_class) -> dict[str, Any]:  # type: ignore[valid-type]
        return answer  # type: ignore[no-any-return]

    return app


def serve_anchor(name: str) -> None:
    """Serve until SIGTERM; says its port on stderr."""
    import socket

    import uvicorn

    app = {"asgi": anchor_asgi, "fastapi": anchor_fastapi}[name]()
    sock = socket.socket()
    sock.bind(("127.0.0.1", 0))
    sock.listen(2048)
    print(f"{READY}{sock.getsockname()[1]}", file=sys.stderr, flush=True)
    config = uvicorn.Config(app, log_config=None, lifespan="off", ws="none", http="httptools", loop="uvloop")
    uvicorn.Server(config).run(sockets=[sock])


def own_processes(pid: int) -> list[psutil.Process]:
    """A process and its children."""
    process = psutil.Process(pid)
    return [process, *process.children(recursive=True)]


# ---------------------------------------------------------------- measuring


async def measure(count: int, repeats: int, concurrencies: list[int]) -> dict[str, Any]:
    """All contenders, interleaved."""
    import aiohttp
    import httpx

    from tests.entrypoints.openai.server import picture_stages
    from vllm_omni.entrypoints.async_omni import AsyncOmni

    with ExitStack() as stack:
        path = picture_stages(Path(stack.enter_context(tempfile.TemporaryDirectory())))
        serve = ["-m", "vllm_omni", "serve", "--port", "0", "--stage-configs-path", path, "--model", "x"]
        commands = {"server": (serve, " serving ")}
        commands |= {name: ([__file__, "--anchor", name], READY) for name in ("asgi", "fastapi")}
        contenders = {}
        for name, (arguments, marker) in commands.items():
            pid, port = stack.enter_context(child(arguments, marker))
            contenders[name] = Contender(over_http(HttpClient(f"http://127.0.0.1:{port}")), own_processes(pid))
            if name == "asgi":
                url = f"http://127.0.0.1:{port}{PATH}"
        before = psutil.Process().children()
        limits = httpx.Limits(max_connections=None)
        async with (
            AsyncOmni("x", stage_configs_path=path) as omni,
            aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session,
            httpx.AsyncClient(limits=limits, trust_env=False) as client,
        ):
            contenders["aiohttp"] = Contender(with_aiohttp(session, url), [psutil.Process()])
            contenders["httpx"] = Contender(with_httpx(client, url), [psutil.Process()])
            stages = [process for process in psutil.Process().children() if process not in before]
            mine = [psutil.Process(), *stages]
            contenders["in process"] = Contender(in_process(omni), mine)
            await interleaved(contenders, count, repeats, concurrencies)
    return {name: figures(contender) for name, contender in contenders.items()}


async def interleaved(contenders: dict[str, Contender], count: int, repeats: int, concurrencies: list[int]) -> None:
    """A round that does not count, then ``repeats`` in which the order changes."""
    order = random.Random(0)
    names = list(contenders)
    for concurrency in concurrencies:
        for name in names:
            await one_round(contenders[name], max(concurrency, count // 4), concurrency)
        for _ in range(repeats):
            order.shuffle(names)
            for name in names:
                row = await one_round(contenders[name], count, concurrency)
                contenders[name].rounds.setdefault(concurrency, []).append(row)


def figures(contender: Contender) -> dict[str, Any]:
    """Best and median round at each concurrency."""
    out = {}
    for concurrency, rows in contender.rounds.items():
        best = {key: (max if key == "per_s" else min)(row[key] for row in rows) for key in rows[0]}
        middle = {key: median(row[key] for row in rows) for key in rows[0]}
        out[f"c={concurrency}"] = {"best": best, "median": middle}
    return out


def compared(rows: dict[str, Any], concurrencies: list[int]) -> dict[str, Any]:
    """What is aimed at: HTTP over in process, and the server next to the anchors, by the best and the median round."""
    out: dict[str, Any] = {}
    first, last = f"c={concurrencies[0]}", f"c={concurrencies[-1]}"
    for kind in ("best", "median"):
        server = {key: rows["server"][key][kind] for key in (first, last)}
        fastapi, asgi = rows["fastapi"][last][kind], rows["asgi"][last][kind]
        out[kind] = {
            "http_over_in_process_p50_ms": server[first]["p50_ms"] - rows["in process"][first][kind]["p50_ms"],
            "requests_per_s": server[last]["per_s"],
            "of_fastapi_per_s": server[last]["per_s"] / fastapi["per_s"],
            "of_asgi_per_s": server[last]["per_s"] / asgi["per_s"],
            "client_against_asgi_over_server": asgi["per_s"] / server[last]["per_s"],
            "client_over_aiohttp": asgi["per_s"] / rows["aiohttp"][last][kind]["per_s"],
            "client_over_httpx": asgi["per_s"] / rows["httpx"][last][kind]["per_s"],
        }
    return out


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1000, help="requests of a round")
    parser.add_argument("--repeats", type=int, default=7, help="rounds")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--anchor", choices=("asgi", "fastapi"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.anchor:
        serve_anchor(args.anchor)
        return
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    import uvloop

    facts = about()
    facts["command"] = " ".join(["python", "benchmarks/http_overhead.py", *sys.argv[1:]])
    rows = uvloop.run(measure(args.count, args.repeats, args.concurrency))
    out = {**facts, "contenders": rows, "compared": compared(rows, args.concurrency)}
    for name, by_load in rows.items():
        for load, kinds in by_load.items():
            best, middle = kinds["best"], kinds["median"]
            cells = [
                f"{text} {best[key]:7.{digits}f} ({middle[key]:7.{digits}f}) {unit}"
                for text, key, digits, unit in COLUMNS
            ]
            print(f"{name:<11} {load:<5} {'  '.join(cells)}")
    print(json.dumps(out["compared"], indent=2))
    if args.json:
        args.json.write_text(json.dumps(out, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
