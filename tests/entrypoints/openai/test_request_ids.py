"""``x-request-id``: of the client or fresh, on every answer, in the log and in ids."""

from __future__ import annotations

import re
import subprocess
import threading
import time
from typing import Any

import httpx
import openai
import pytest

from tests.entrypoints.openai.server import Server
from tests.entrypoints.openai.test_gate import raw
from vllm_omni.entrypoints.openai.request_ids import HEADER, RequestIds, request_id

PATH, CHAT = "/v1/images/generations", "/v1/chat/completions"
FRESH = re.compile(r"[0-9a-f]{32}")
NAME = "req-7.a:b=c+d@e~f"


def named(server: Server, path: str, body: Any, name: str = NAME) -> httpx.Response:
    """POST with a name."""
    return server.post(path, body, headers={"x-request-id": name})


def test_the_clients_name_is_kept(pictures: Server) -> None:
    """Of answers, errors, streams, and of what is refused before an endpoint."""
    for body in ({"prompt": "x"}, {"prompt": "oom"}, {"prompt": ""}, {"prompt": "x" * 200_000}):
        assert named(pictures, PATH, body).headers.get_list("x-request-id") == [NAME]
    assert named(pictures, "/nothing", {}).headers["x-request-id"] == NAME
    head = {"x-request-id": NAME}
    assert httpx.get(pictures.url + "/v1/models", headers=head).status_code == 401
    assert httpx.get(pictures.url + "/v1/models", headers=head).headers["x-request-id"] == NAME
    with pictures.http.stream("POST", PATH, json={"prompt": "x", "stream": True}, headers=head) as answer:
        assert answer.headers["x-request-id"] == NAME
        answer.read()


def test_a_fresh_name(pictures: Server) -> None:
    """None was given, or one that could do harm."""
    names = [pictures.http.get("/health").headers["x-request-id"]]
    for bad in ("", "a" * 129, "a b", "../x", 'a"b', "a\tb", b"\xff\xfe"):
        answer = pictures.http.get("/health", headers={"x-request-id": bad})  # type: ignore[dict-item]
        assert answer.status_code == 200
        names.append(answer.headers["x-request-id"])
    assert all(FRESH.fullmatch(name) for name in names), names
    assert len(set(names)) == len(names)
    refused = raw(pictures, b"\x16\x03\x01\x00\xa5garbage\r\n\r\n")
    assert b"\r\nx-request-id: " in refused
    assert b'"invalid_request_error"' in refused


def test_openai_and_curl(pictures: Server) -> None:
    answer = pictures.openai.images.generate(prompt="x", extra_headers={"X-Request-Id": "mine"})
    assert answer._request_id == "mine"
    with pytest.raises(openai.BadRequestError) as caught:
        pictures.openai.images.generate(prompt="fail")
    assert FRESH.fullmatch(caught.value.request_id or "")
    command = ["curl", "-sS", "-D", "-", "-o", "/dev/null", pictures.url + "/health", "-H", "X-Request-Id: by-curl"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    assert "x-request-id: by-curl" in done.stdout


def test_the_log_names_the_request(pictures: Server) -> None:
    """A line that says what went wrong, and the line of the answer."""
    assert named(pictures, PATH + "?a%0Ab", {"prompt": "oom"}, "in-log").status_code == 503
    begun = time.monotonic()
    while sum("[in-log]" in line for line in pictures.lines) < 2:
        assert time.monotonic() - begun < 10, pictures.log
    cause, answer = (line for line in pictures.lines if "[in-log]" in line)
    assert "[in-log] 503 no room" in cause
    assert re.search(rf"\[in-log\] 127\.0\.0\.1 POST {PATH} 503 0\.\d+ s$", answer)


def test_chats(omni_server: Server) -> None:
    """The answer's id holds it, as in vLLM's server; the header wins over the body's field, which wins over none."""
    body = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1}
    answer = named(omni_server, CHAT, {**body, "request_id": "in-body"})
    assert (answer.json()["id"], answer.headers["x-request-id"]) == (f"chatcmpl-{NAME}", NAME)
    answer = omni_server.post(CHAT, {**body, "request_id": "in-body"})
    assert (answer.json()["id"], answer.headers["x-request-id"]) == ("chatcmpl-in-body", "in-body")
    answer = omni_server.post(CHAT, body)
    assert answer.json()["id"] == "chatcmpl-" + answer.headers["x-request-id"]
    answer = named(omni_server, "/v1/completions", {"prompt": "x", "max_tokens": 1})
    assert answer.json()["id"] == f"cmpl-{NAME}"


def test_one_name_for_two_requests(omni_server: Server) -> None:
    """Names are the clients' own: nothing mixes requests up that have the same."""
    counts: dict[int, int] = {}

    def ask(length: int) -> None:
        body = {"messages": [{"role": "user", "content": "x"}], "max_tokens": length, "ignore_eos": True}
        with httpx.Client(base_url=omni_server.url, timeout=60) as client:
            answer = client.post(CHAT, json=body, headers={"x-request-id": "twin"}).json()
        counts[length] = answer["usage"]["completion_tokens"]

    threads = [threading.Thread(target=ask, args=(length,)) for length in (30, 40, 50)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert counts == {30: 30, 40: 40, 50: 50}


async def test_without_the_header() -> None:
    """``--no-enable-request-id-headers``: answers do not tell the name, but the endpoint has it."""
    seen: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append(request_id())
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def send(message: Any) -> None:
        seen.append(message["headers"])

    for tell in (False, True):
        await RequestIds(app, tell, False)({"type": "http", "headers": [(HEADER, b"mine")]}, None, send)  # type: ignore[arg-type]
    assert seen == ["mine", [], "mine", [(HEADER, b"mine")]]
