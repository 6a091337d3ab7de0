"""Send requests: closed loop (so many at a time) or open loop (at random times, whatever the server does)."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import msgspec

from vllm_omni.benchmarks.http_client import Answer, HttpClient
from vllm_omni.benchmarks.measure import Measured, WrongAnswer, read_answer
from vllm_omni.benchmarks.workload import Call

MAX_RETRIES = 20
Done = Callable[[Measured], None]


@dataclass(frozen=True)
class Load:
    """How requests are sent; one of ``concurrency`` and ``rate`` is 0."""

    concurrency: int
    rate: float
    """Requests a second."""
    count: int | None
    """Requests in all; None means as many as come in ``duration``."""
    duration: float | None
    """Seconds in which requests are sent."""
    timeout: float
    retry_429: bool
    seed: int


@dataclass
class Run:
    """What came of it."""

    begun: float = 0.0
    """``time.perf_counter()`` second."""
    end: float = 0.0
    cpu_seconds: float = 0.0
    """Of this client."""
    requests: list[Measured] = field(default_factory=list)


async def run_load(client: HttpClient, calls: Iterator[Call], load: Load, on_done: Done) -> Run:
    """Send requests until ``count`` or ``duration`` is reached, and wait for all answers."""
    run = Run(begun=time.perf_counter())
    cpu = time.process_time()
    drive = _closed if load.concurrency else _open
    await drive(client, calls, load, run, on_done)
    run.cpu_seconds = time.process_time() - cpu
    run.end = max((request.end for request in run.requests), default=time.perf_counter())
    return run


async def _closed(client: HttpClient, calls: Iterator[Call], load: Load, run: Run, on_done: Done) -> None:
    last = None if load.duration is None else run.begun + load.duration
    started = 0

    async def worker() -> None:
        nonlocal started
        while (load.count is None or started < load.count) and (last is None or time.perf_counter() < last):
            started += 1
            call = next(calls)
            data = client.prepare("POST", call.path, call.encoded())
            request = Measured(call.label, due=time.perf_counter())
            run.requests.append(request)
            await _ask(client, call, data, load, request)
            on_done(request)

    async with asyncio.TaskGroup() as workers:
        for _ in range(load.concurrency):
            workers.create_task(worker())


async def _open(client: HttpClient, calls: Iterator[Call], load: Load, run: Run, on_done: Done) -> None:
    arrivals = random.Random(f"arrivals {load.seed}")
    due = run.begun

    async def one(call: Call, data: bytes, request: Measured) -> None:
        await _ask(client, call, data, load, request)
        on_done(request)

    async with asyncio.TaskGroup() as tasks:
        while load.count is None or len(run.requests) < load.count:
            due += arrivals.expovariate(load.rate)
            if load.duration is not None and due > run.begun + load.duration:
                break
            call = next(calls)
            data = client.prepare("POST", call.path, call.encoded())
            request = Measured(call.label, due=due)
            run.requests.append(request)
            wait = due - time.perf_counter()
            if wait > 0:
                await asyncio.sleep(wait)
            tasks.create_task(one(call, data, request))


async def _ask(client: HttpClient, call: Call, data: bytes, load: Load, out: Measured) -> None:
    """Send one request, again after 429 when that is wished; what happens is noted in ``out``."""
    out.sent = time.perf_counter()
    deadline = out.sent + load.timeout
    try:
        while True:
            answer = await client.send(data, max(0.0, deadline - time.perf_counter()))
            out.status, out.end = answer.status, answer.end
            if answer.status == 429:
                out.retry_after = retry_after(answer) if "retry-after" in answer.headers else None
            if answer.status != 429 or not load.retry_429 or out.retries >= MAX_RETRIES:
                break
            out.retries += 1
            await asyncio.sleep(min(retry_after(answer), max(0.0, deadline - time.perf_counter())))
        if answer.status == 200:
            read_answer(call, answer, out)
        else:
            out.error, out.message = str(answer.status), error_message(answer)
    except TimeoutError:
        out.error, out.message = "timeout", f"no whole answer within {load.timeout:g} s"
    except WrongAnswer as error:
        out.error, out.message = "wrong answer", str(error)
    except OSError as error:
        out.error, out.message = "connection", str(error)
    if out.error is not None and out.error != str(out.status):
        out.end = time.perf_counter()


def retry_after(answer: Answer) -> float:
    """Seconds that the server asks to wait; 1 when it does not say."""
    try:
        return max(0.0, float(answer.headers.get("retry-after", "1")))
    except ValueError:
        return 1.0


def error_message(answer: Answer) -> str:
    """What an error answer says."""
    try:
        body = msgspec.json.decode(answer.body)
        return str(body["error"]["message"])
    except (msgspec.DecodeError, KeyError, TypeError):
        return answer.body[:200].decode("utf-8", "replace")
