"""Clients that hold the server up: many at once, slow ones, broken ones. Others must not notice; in the end a stage
that hangs."""

from __future__ import annotations

import asyncio
import json
import os
import resource
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from tests.entrypoints.openai.server import Server, error_of, picture_stages
from vllm_omni.entrypoints.openai.args import ServeArgs
from vllm_omni.entrypoints.openai.connection import SPARE_FILES, limits_of
from vllm_omni.errors import ConfigError
from vllm_omni.process import WatchedProcess

PATH = "/v1/images/generations"
HEADER_S, SEND_S = 4.0, 1.5
CONNECTIONS = 1000


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Started with few open files allowed, as by a login shell; short time-outs."""
    path = picture_stages(tmp_path_factory.mktemp("robust"))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 4 * CONNECTIONS:
        pytest.skip(f"this system allows {hard} open files")
    resource.setrlimit(resource.RLIMIT_NOFILE, (512, hard))
    try:
        server = Server(
            *("--stage-configs-path", path, "--model", "none", "--max-queue", "64"),
            *("--header-timeout", str(HEADER_S), "--send-timeout", str(SEND_S), "--body-timeout", "2"),
            *("--max-connections", str(CONNECTIONS + 20), "--heartbeat-timeout", "3"),
        )
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 4 * CONNECTIONS), hard))
    yield server
    assert server.stop() == 0, server.log
    assert "Traceback" not in server.log, server.log


def port(server: Server) -> int:
    return int(server.url.rsplit(":", 1)[1])


def request(body: bytes, *more: str) -> bytes:
    head = [f"POST {PATH} HTTP/1.1", "Host: x", "Content-Type: application/json", f"Content-Length: {len(body)}", *more]
    return "\r\n".join([*head, "", ""]).encode() + body


def healthy(server: Server) -> float:
    """Seconds that another client waits for an answer."""
    begun = time.monotonic()
    assert httpx.get(server.url + "/health", timeout=10).status_code == 200
    assert httpx.post(server.url + PATH, json={"prompt": "x"}, timeout=10).status_code == 200
    return time.monotonic() - begun


async def test_a_thousand_connections(server: Server) -> None:
    """Most are idle, three hundred ask at once; one more than allowed is told so. Idle ones are closed in the end."""
    assert resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE)[0] >= CONNECTIONS + 20 + SPARE_FILES

    async def connect() -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection("127.0.0.1", port(server))

    clients = await asyncio.gather(*(connect() for _ in range(CONNECTIONS)))

    async def ask(number: int) -> int:
        reader, writer = clients[number]
        writer.write(request(b'{"prompt": "x"}', "Connection: close"))
        return int((await reader.read()).split()[1])

    statuses = await asyncio.gather(*(ask(number) for number in range(300)))
    assert set(statuses) <= {200, 429}
    assert statuses.count(200) >= 64
    await asyncio.to_thread(healthy, server)
    more = await asyncio.gather(*(connect() for _ in range(400)))
    refused = 0
    for reader, _ in more:
        answer = asyncio.ensure_future(reader.read(64))
        done, _ = await asyncio.wait({answer}, timeout=0.002)
        refused += bool(done) and answer.result().startswith(b"HTTP/1.1 503")
        answer.cancel()
    assert refused >= 50
    begun = time.monotonic()
    assert await clients[-1][0].read() == b"", "an idle connection is closed"
    assert time.monotonic() - begun < HEADER_S + 2
    for _, writer in (*clients, *more):
        writer.close()
    healthy(server)


def test_slow_and_endless_heads(server: Server) -> None:
    """A head that comes byte by byte gets 408; one without an end 431. Meanwhile others are served."""
    answers: list[bytes] = []

    def trickle() -> None:
        with socket.create_connection(("127.0.0.1", port(server)), 20) as sock:
            sock.settimeout(0.05)
            for byte in request(b"{}", *("X-Slow: 1" for _ in range(50))):
                try:
                    sock.sendall(bytes([byte]))
                    answers.append(sock.recv(4096))
                    return
                except TimeoutError:
                    continue

    slow = threading.Thread(target=trickle)
    slow.start()
    with socket.create_connection(("127.0.0.1", port(server)), 20) as sock:
        sock.sendall(b"GET / HTTP/1.1\r\n")
        line = b"X-Long: " + b"x" * 8000 + b"\r\n"
        answer = b""
        try:
            for _ in range(100):
                sock.sendall(line)
                time.sleep(0.001)
        except OSError:
            pass
        answer = sock.recv(4096)
    assert answer.startswith(b"HTTP/1.1 431 "), answer
    assert "larger than" in json.loads(answer.split(b"\r\n\r\n")[1])["error"]["message"]
    assert healthy(server) < 2
    slow.join(HEADER_S + 5)
    assert answers
    assert answers[0].startswith(b"HTTP/1.1 408 "), answers


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_does_not_read(server: Server, stream: bool) -> None:
    """It is cut off, the memory of its answer is given back, and nobody else waits."""
    process = psutil.Process(server.process.pid)
    before, lines = process.memory_info().rss, len(server.lines)
    body = json.dumps({"prompt": "noise", "size": "1024x1024", "n": 4, "stream": stream}).encode()
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.connect(("127.0.0.1", port(server)))
        sock.sendall(request(body))
        begun, longest = time.monotonic(), 0.0
        while not any("read nothing" in line for line in server.lines[lines:]):
            longest = max(longest, healthy(server))
            assert time.monotonic() - begun < 20, server.log
        assert longest < 3
    while httpx.get(server.url + "/health").json()["open_requests"]:
        assert time.monotonic() - begun < 30
    assert process.memory_info().rss - before < 200 * 2**20


@pytest.mark.parametrize("stream", [False, True])
def test_a_slow_reader_gets_its_answer(server: Server, stream: bool) -> None:
    """As long as it reads at all, for longer than the time-out; a stream's first event alone takes longer."""
    body = json.dumps({"prompt": "noise", "size": "1024x1024", "n": 2, "stream": stream}).encode()
    answer = bytearray()
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.connect(("127.0.0.1", port(server)))
        sock.settimeout(20)
        sock.sendall(request(body, "Connection: close"))
        begun = time.monotonic()
        while piece := sock.recv(2**20 if time.monotonic() - begun > 2.5 * SEND_S else 16384):
            answer += piece
            if time.monotonic() - begun < 2.5 * SEND_S:
                time.sleep(0.02)
    assert time.monotonic() - begun > 2 * SEND_S
    head, _, content = bytes(answer).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 ")
    if stream:
        assert content.count(b"event: image_generation.completed") == 2
        assert content.endswith(b"\r\n0\r\n\r\n")
    else:
        assert len(json.loads(content)["data"]) == 2


CHUNKED = ("Transfer-Encoding: chunked",)


@pytest.mark.parametrize(
    ("head", "body"),
    [
        (CHUNKED, b"ZZ\r\n{}\r\n0\r\n\r\n"),
        (CHUNKED, b"5\r\n{}\r\n0\r\n\r\n"),
        (CHUNKED, b"-1\r\n{}\r\n"),
        (CHUNKED, b"fffffffffffffffff\r\n{}"),
        ((*CHUNKED, "Content-Length: 2"), b"2\r\n{}\r\n0\r\n\r\n"),
        (("Content-Length: 2", "Content-Length: 3"), b"{}"),
        (("Content-Length: 99999999999999999999999"), b"{}"),
        (("Transfer-Encoding: gzip",), b"{}"),
    ],
    ids=["no number", "wrong length", "negative", "overflow", "two lengths", "two content lengths", "endless", "gzip"],
)
def test_broken_bodies(server: Server, head: tuple[str, ...], body: bytes) -> None:
    """What is no HTTP is refused and its connection closed; nothing hangs or falls."""
    lines = [head] if isinstance(head, str) else head
    raw = "\r\n".join([f"POST {PATH} HTTP/1.1", "Host: x", "Content-Type: application/json", *lines, "", ""]).encode()
    with socket.create_connection(("127.0.0.1", port(server)), 10) as sock:
        sock.sendall(raw + body)
        answer = b""
        while piece := sock.recv(4096):
            answer += piece
    assert answer.split()[1] in (b"400", b"413"), answer
    assert healthy(server) < 2


def test_a_body_that_breaks_off(server: Server) -> None:
    for how in (socket.SHUT_WR, socket.SHUT_RDWR):
        with socket.create_connection(("127.0.0.1", port(server)), 10) as sock:
            sock.sendall(request(b'{"prompt": "x"}')[:-4])
            sock.shutdown(how)
    assert healthy(server) < 2
    assert httpx.get(server.url + "/health").json()["open_requests"] == 0


def test_wrong_limits() -> None:
    with pytest.raises(ConfigError, match="max_connections"):
        limits_of(ServeArgs(max_connections=2**40))
    for name in ("max_connections", "header_timeout"):
        with pytest.raises(ConfigError, match=name):
            ServeArgs(**{name: 0})


def test_a_stage_that_hangs(server: Server, tmp_path: Path) -> None:
    """The last test of this server: its stage is frozen while a request runs."""
    (stage,) = [child for child in server.children() if child.name().startswith("omni-stage")]
    answers: list[httpx.Response] = []
    thread = threading.Thread(target=lambda: answers.append(server.post(PATH, {"prompt": "hang"})))
    thread.start()
    while httpx.get(server.url + "/health").json()["open_requests"] < 1:
        pass
    os.kill(stage.pid, signal.SIGSTOP)
    begun = time.monotonic()
    while (answer := httpx.get(server.url + "/health")).status_code == 200:
        assert time.monotonic() - begun < 8
    assert answer.status_code == 503
    assert "no sign of life" in error_of(answer)["message"]
    thread.join(10)
    assert (answers[0].status_code, error_of(answers[0])["type"]) == (503, "server_error")
    assert server.post(PATH, {"prompt": "x"}).status_code == 503
    assert not WatchedProcess(stage.pid).is_alive()
