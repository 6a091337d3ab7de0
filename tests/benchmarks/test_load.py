"""Load on a server whose delays are known: the client's figures are the server's, the load is as asked."""

from __future__ import annotations

import asyncio
import itertools
import json
import ssl
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.benchmarks.fake_server import RATE, FakeServer, Handler, Seen, delta, picture, pieces, wav_head, whole
from vllm_omni.benchmarks.args import BenchArgs
from vllm_omni.benchmarks.http_client import HttpClient
from vllm_omni.benchmarks.load import Load, Run, run_load
from vllm_omni.benchmarks.measure import Measured
from vllm_omni.benchmarks.serve import measure
from vllm_omni.benchmarks.workload import PATHS, Call, Kind
from vllm_omni.errors import ConfigError, DeadlineError

SLACK = 3.0
"""Seconds by which a busy machine may be late: upper bounds are loose, lower ones exact (test_measure has figures)."""


async def against(handler: Handler, load: Load, kind: Kind = "image", body: Any = None) -> tuple[FakeServer, Run]:
    """One measurement with requests that are all alike."""
    same: Iterator[Call] = itertools.repeat(Call(kind, "x", {"n": 1} if body is None else body))
    server = FakeServer(["image"], {PATHS[kind]: handler})
    done: list[Measured] = []
    async with server.running(), HttpClient(server.url) as client:
        run = await run_load(client, same, load, done.append)
    assert len(done) == len(run.requests)
    return server, run


def closed(places: int, count: int | None, **more: Any) -> Load:
    return Load(**{"concurrency": places, "rate": 0.0, "count": count, "duration": None, "timeout": 30.0,
                   "retry_429": False, "seed": 0, **more})  # fmt: skip


async def test_closed_loop_keeps_its_places_full() -> None:
    server, run = await against(slow_picture, closed(3, 12))
    assert len(run.requests) == 12
    assert server.most_open == 3
    assert all(request.error is None and request.images == 1 for request in run.requests)
    for request in run.requests:
        assert 0.05 <= request.e2e < 0.05 + SLACK
    assert run.end - run.begun >= 4 * 0.05


async def slow_picture(server: FakeServer, seen: Seen, writer: Any) -> None:
    await asyncio.sleep(0.05)
    await picture(server, seen, writer)


async def test_duration_ends_a_closed_loop() -> None:
    _, run = await against(slow_picture, closed(2, None, duration=0.2))
    assert 2 <= len(run.requests) <= 10
    assert max(request.sent for request in run.requests) < run.begun + 0.2 + SLACK


async def test_open_loop_sends_whatever_the_server_does() -> None:
    """40 a second at a server that takes 0.5 s: no request waits for another one."""

    async def slow(server: FakeServer, seen: Seen, writer: Any) -> None:
        await asyncio.sleep(0.5)
        await picture(server, seen, writer)

    load = Load(0, 40.0, 20, None, 30.0, False, 3)
    server, run = await against(slow, load)
    assert server.most_open >= 10
    for request in run.requests:
        assert 0.5 <= request.e2e < 0.5 + SLACK
        assert 0 <= request.sent - request.due < SLACK
    _, again = await against(slow, load)
    dues = [[request.due - one.begun for request in one.requests] for one in (run, again)]
    assert dues[0] == pytest.approx(dues[1])
    gaps = [b - a for a, b in itertools.pairwise(dues[0])]
    assert len({round(gap, 4) for gap in gaps}) > 15
    assert 0.25 < dues[0][-1] < 1.0


async def test_latency_counts_from_when_the_request_was_due() -> None:
    """A client that falls behind must not make the server look good: here the loop is blocked for 0.2 s."""

    async def block(server: FakeServer, seen: Seen, writer: Any) -> None:
        if len(server.seen) == 1:
            import time

            time.sleep(0.2)
        await picture(server, seen, writer)

    _, run = await against(block, Load(0, 100.0, 10, None, 30.0, False, 1))
    behind = [request for request in run.requests if request.sent - request.due > 0.05]
    assert behind
    assert all(request.e2e >= request.sent - request.due for request in run.requests)


async def test_times_of_speech_are_the_servers() -> None:
    """The head at once, sound after 0.1 s, the next piece 0.5 s after the first one has been played."""
    second = bytes(2 * RATE)
    plan = [(0.0, wav_head()), (0.1, second[: RATE // 5]), (0.6, second), (0.0, second)]

    async def speak(server: FakeServer, seen: Seen, writer: Any) -> None:
        await pieces(seen, writer, plan)

    server, run = await against(speak, closed(1, 2), "speech")
    for request, seen in zip(run.requests, server.seen, strict=True):
        assert request.ttfp is not None
        assert 0 <= request.ttfp - (seen.sent[1] - seen.arrived) < SLACK
        assert request.ttfp >= 0.1
        assert request.audio_seconds == pytest.approx(2.1)
        served = seen.sent[2] - seen.sent[1] - 0.1
        assert request.underrun == pytest.approx(served, abs=SLACK)
        assert request.underrun is not None
        assert request.underrun > 0.05


async def test_times_of_text_are_the_servers() -> None:
    texts = [(0.1 if i == 0 else 0.03, delta(content=f"w{i}")) for i in range(5)]
    usage = b'data: {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 5}}\n\n'
    plan = [(0.0, delta(role="assistant", content="")), *texts, (0.0, usage + b"data: [DONE]\n\n")]

    async def write(server: FakeServer, seen: Seen, writer: Any) -> None:
        await pieces(seen, writer, plan)

    server, run = await against(write, closed(1, 1), "chat")
    (request,), (seen,) = run.requests, server.seen
    assert request.ttft is not None
    assert 0.1 <= request.ttft < 0.1 + SLACK
    assert request.tpot == pytest.approx((seen.sent[5] - seen.sent[1]) / 4, abs=SLACK / 4)
    assert request.itl == pytest.approx([b - a for a, b in itertools.pairwise(seen.sent[1:6])], abs=SLACK)
    assert request.text_tokens == 5


async def test_errors_by_kind() -> None:
    async def fail(server: FakeServer, seen: Seen, writer: Any) -> None:
        number = len(server.seen)
        if number == 1:
            await whole({"error": {"message": "told to"}}, writer, status="500 Internal Server Error")
        elif number == 2:
            await pieces(seen, writer, [(0.0, b'{"data": [')], cut=True)
        elif number == 3:
            await asyncio.sleep(5)
        elif number == 4:
            await whole({"data": []}, writer)
        elif number == 5:
            writer.write(b"SSH-2.0-OpenSSH\r\n")
        else:
            await picture(server, seen, writer)

    server, run = await against(fail, closed(1, 6, timeout=1.5))
    errors = [request.error for request in run.requests]
    assert errors == ["500", "connection", "timeout", "wrong answer", "connection", None]
    assert run.requests[0].message == "told to"
    assert "after the head" in run.requests[1].message
    assert 1.5 <= run.requests[2].e2e < 1.5 + SLACK
    assert len(server.seen) == 6


async def test_retry_after_is_waited_for() -> None:
    async def full(server: FakeServer, seen: Seen, writer: Any) -> None:
        if len(server.seen) % 3:
            await whole({"error": {"message": "full"}}, writer, status="429 Too Many Requests", retry_after="0.1")
        else:
            await picture(server, seen, writer)

    _, run = await against(full, closed(1, 2, retry_429=True))
    for request in run.requests:
        assert (request.error, request.retries) == (None, 2)
        assert 0.2 <= request.e2e < 0.2 + 2 * SLACK
    _, plain = await against(full, closed(1, 3))
    assert [request.error for request in plain.requests] == ["429", "429", None]


async def test_connections_are_kept_and_a_closed_one_is_replaced() -> None:
    connections = set()

    async def close_each_third(server: FakeServer, seen: Seen, writer: Any) -> None:
        connections.add(id(writer))
        await picture(server, seen, writer)
        if len(server.seen) % 3 == 0:
            writer.close()
            raise ConnectionError

    _, run = await against(close_each_third, closed(1, 7))
    assert all(request.error is None for request in run.requests)
    assert len(connections) <= 3


METRICS = """# TYPE vllm_omni_stage_seconds histogram
vllm_omni_stage_seconds_bucket{{stage="0",phase="run",le="+Inf"}} {count}
vllm_omni_stage_seconds_count{{stage="0",phase="run"}} {count}
vllm_omni_stage_seconds_sum{{stage="0",phase="run"}} {seconds}
"""


async def test_a_whole_measurement() -> None:
    """Key, model, warm-up, stage times between two looks, several loads, every request on demand."""

    async def metrics(server: FakeServer, seen: Seen, writer: Any) -> None:
        count = len(server.posts())
        data = METRICS.format(count=count, seconds=count * 0.5).encode()
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(data), data))

    server = FakeServer(["image"], {PATHS["image"]: picture, "/metrics": metrics})
    async with server.running():
        args = BenchArgs(
            base_url=server.url + "/v1", api_key="secret", concurrency=[1, 2], num_requests=4, detail=True, quiet=True,
            slo=["e2e=10"],
        )  # fmt: skip
        figures, runs = await measure(args)
    assert [len(run.requests) for run in runs] == [4, 4]
    assert len(server.posts()) == 4 + 4 + 1 + 2
    assert {seen.headers["authorization"] for seen in server.seen} == {"Bearer secret"}
    assert {seen.body["model"] for seen in server.posts()} == {"fake"}
    first, second = figures["results"]
    assert (first["load"], second["load"]) == ({"concurrency": 1}, {"concurrency": 2})
    assert first["stages"] == {"0": {"run": 0.5}}
    assert first["goodput"]["share"] == 1.0
    assert len(first["detail"]) == 4
    assert "secret" not in json.dumps(figures)
    prompts = [seen.body["prompt"] for seen in server.posts()]
    assert prompts[1:5] == prompts[7:11], "both measurements send the same requests"
    assert prompts[0] != prompts[1], "warm-up sends others"


async def test_no_server_there() -> None:
    server = FakeServer(["image"], {})
    async with server.running():
        pass
    with pytest.raises(ConfigError, match=r"no server at .*start one with: vllm-omni serve"):
        await measure(BenchArgs(base_url=server.url))
    with pytest.raises(DeadlineError, match=r"within 0\.3 s"):
        await measure(BenchArgs(base_url=server.url, wait=0.3))


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://x", "http://", "http://x:0", "http://x:port", "http://x?y=1"])
async def test_wrong_urls(url: str) -> None:
    with pytest.raises(ConfigError, match="expected http://HOST:PORT"):
        await measure(BenchArgs(base_url=url))


async def test_servers_that_cannot_be_measured() -> None:
    server = FakeServer(["text", "audio"], {})
    async with server.running():
        with pytest.raises(ConfigError, match="asks for image; fake makes audio and text"):
            await measure(BenchArgs(base_url=server.url, workload="t2i"))
        with pytest.raises(ConfigError, match="model='other' is not served; there is fake"):
            await measure(BenchArgs(base_url=server.url, model="other"))
        server.models = {"message": "hello"}
        with pytest.raises(ConfigError, match="no OpenAI-compatible server"):
            await measure(BenchArgs(base_url=server.url))
    assert not server.posts()


async def test_a_certificate_that_nobody_vouches_for(tmp_path: Path) -> None:
    """It is refused with a hint, and taken with the authority's file."""
    made = ("req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost")
    files = ("-keyout", str(tmp_path / "key.pem"), "-out", str(tmp_path / "cert.pem"))
    names = ("-addext", "subjectAltName=DNS:localhost")
    await asyncio.to_thread(subprocess.run, ["openssl", *made, *files, *names], check=True, capture_output=True)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(tmp_path / "cert.pem", tmp_path / "key.pem")
    server = FakeServer(["image"], {PATHS["image"]: picture})
    async with server.running(context):
        address = server.url.replace("http://127.0.0.1", "https://localhost")
        with pytest.raises(ConfigError, match="self-signed certificate; SSL_CERT_FILE names"):
            await measure(BenchArgs(base_url=address))
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("SSL_CERT_FILE", str(tmp_path / "cert.pem"))
            figures, _ = await measure(BenchArgs(base_url=address, num_requests=2, quiet=True))
    assert figures["results"][0]["succeeded"] == 2
