"""What stands before the endpoints: keys, bodies, hostile clients; driven by curl and raw sockets too."""

from __future__ import annotations

import json
import socket
import subprocess
import threading
from typing import Any

import httpx
import openai
import pytest

from tests.entrypoints.openai.server import Server, error_of

PATH = "/v1/images/generations"


def test_models(pictures: Server) -> None:
    names = [model.id for model in pictures.openai.models.list()]
    assert names == ["painter", "old-painter", "flux"]
    assert pictures.openai.models.retrieve("old-painter").owned_by == "vllm-omni"
    with pytest.raises(openai.NotFoundError):
        pictures.openai.models.retrieve("other")


@pytest.mark.parametrize("key", ["x", "wrong", "sk-secret-of-the-tes", "sk-secret-of-the-testt", "\u00fc"])
def test_wrong_key(pictures: Server, key: str) -> None:
    header = {"authorization": f"Bearer {key}".encode()}
    answer = httpx.post(pictures.url + PATH, json={"prompt": "x"}, headers=header)
    assert (answer.status_code, error_of(answer)["code"]) == (401, "invalid_api_key")
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=pictures.url + "/v1", api_key="no", max_retries=0).models.list()


def test_every_endpoint_but_the_open_ones_needs_the_key(pictures: Server) -> None:
    document = httpx.get(pictures.url + "/openapi.json").json()
    for path, methods in document["paths"].items():
        for method in methods:
            answer = httpx.request(method, pictures.url + path)
            is_open = path in ("/health", "/ready", "/metrics")
            assert (answer.status_code != 401) == is_open, path


def test_curl(pictures: Server) -> None:
    command = ["curl", "-sS", pictures.url + PATH, "-d", '{"prompt": "x"}', "-H", "content-type: application/json"]
    command += ["-H", f"Authorization: Bearer {pictures.api_key}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    assert json.loads(done.stdout)["size"] == "32x16"


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"", "application/json"),
        (b"{", "application/json"),
        (b"[]", "application/json"),
        (b"null", "application/json"),
        (b"3", "application/json"),
        (b'{"prompt": "x"', "application/json"),
        (b'{"prompt": "\\ud800"}', "application/json"),
        (b'{"prompt": "x", "guidance_scale": NaN}', "application/json"),
        (b'{"prompt": "x", "guidance_scale": Infinity}', "application/json"),
        (b'{"prompt": "x", "seed": ' + b"9" * 5000 + b"}", "application/json"),
        (b'{"a":' * 5000 + b"1" + b"}" * 5000, "application/json"),
        (b"\xff\xfe\x00", "application/json"),
        (b'{"prompt": "x"}', "text/plain"),
        (b"prompt=x", "application/x-www-form-urlencoded"),
        (b"--x\r\n\r\n--x--", "multipart/form-data; boundary=x"),
    ],
)
def test_no_json(pictures: Server, content: bytes, kind: str) -> None:
    answer = pictures.http.post(PATH, content=content, headers={"content-type": kind})
    assert answer.status_code == 400
    assert error_of(answer)["type"] == "invalid_request_error"


def test_a_large_body_is_refused(pictures: Server) -> None:
    answer = pictures.post(PATH, {"prompt": "x" * 100_000})
    assert (answer.status_code, error_of(answer)["code"]) == (413, "body_too_large")

    def pieces() -> Any:
        yield b'{"prompt": "'
        for _ in range(200):
            yield b"x" * 1000

    answer = pictures.http.post(PATH, content=pieces(), headers={"content-type": "application/json"})
    assert answer.status_code == 413


def raw(server: Server, request: bytes, timeout: float = 10) -> bytes:
    """What the server says to these bytes."""
    with socket.create_connection(("127.0.0.1", int(server.url.rsplit(":", 1)[1])), timeout) as sock:
        sock.sendall(request)
        answer = b""
        while piece := sock.recv(65536):
            answer += piece
            if b"\r\n\r\n" in answer and b'"code"' in answer:
                break
        return answer


def test_a_slow_body_is_refused(pictures: Server) -> None:
    head = f"POST {PATH} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {pictures.api_key}\r\nContent-Length: 90\r\n\r\n"
    assert b" 408 " in raw(pictures, head.encode() + b'{"prompt"').split(b"\r\n")[0]


def test_no_http(pictures: Server) -> None:
    assert b"400" in raw(pictures, b"\x16\x03\x01\x00\xa5garbage\r\n\r\n").split(b"\r\n")[0]
    head = b"POST /v1/images/generations HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n"
    assert b" 400 " in raw(pictures, head).split(b"\r\n")[0]


def test_wrong_paths_and_methods(pictures: Server) -> None:
    for path in ("/v1/nothing", "/v1/images/generations/", "/nothing", "/../../etc/passwd", "/v1/%2e%2e/health"):
        answer = pictures.http.get(path)
        assert answer.status_code == 404, path
        error_of(answer)
    answer = pictures.http.get(PATH)
    assert (answer.status_code, answer.headers["allow"]) == (405, "POST")
    error_of(answer)


def test_cors(pictures: Server) -> None:
    headers = {"origin": "http://page.example", "access-control-request-method": "POST"}
    answer = httpx.options(pictures.url + PATH, headers=headers)
    assert answer.headers["access-control-allow-origin"] == "http://page.example"
    answer = httpx.options(pictures.url + PATH, headers={**headers, "origin": "http://other.example"})
    assert "access-control-allow-origin" not in answer.headers


def test_many_connections(pictures: Server) -> None:
    """200 connections at once: each is answered, with a picture or with 429."""
    counts: dict[int, int] = {}
    lock, start = threading.Lock(), threading.Barrier(200)
    header = {"authorization": f"Bearer {pictures.api_key}"}

    def ask() -> None:
        with httpx.Client(base_url=pictures.url, headers=header, timeout=60) as client:
            start.wait(60)
            status = client.post(PATH, json={"prompt": "x"}).status_code
        with lock:
            counts[status] = counts.get(status, 0) + 1

    threads = [threading.Thread(target=ask) for _ in range(200)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(90)
    assert sum(counts.values()) == 200
    assert set(counts) <= {200, 429}
    assert counts[200] >= 8
    assert pictures.http.get("/health").json() == {"status": "ok", "open_requests": 0}
