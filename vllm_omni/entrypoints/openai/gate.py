"""What a request must pass before its endpoint: the API key, the body's size, the time to send it."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
from collections.abc import Iterable

from prometheus_client import Counter
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vllm_omni.entrypoints.openai.errors import error_response

GUARDED = ("/v1", "/tokenize", "/detokenize", "/start_profile", "/stop_profile")
"""Prefixes of the paths that need the key."""


class Gate:
    """Plain ASGI, because a request passes it before anything is parsed.

    Bodies are read here, whole and bounded, and handed on in one piece.

    Args:
        key: what ``Authorization: Bearer`` must bring; None lets everyone in.
        max_body: bytes of one body.
        max_bodies: bytes of all bodies that are held at once.
        body_timeout: seconds for sending one.
        answers: counts answers by endpoint and status.
    """

    def __init__(
        self, app: ASGIApp, key: str | None, max_body: int, max_bodies: int, body_timeout: float, answers: Counter
    ) -> None:
        self._app = app
        self._answers = answers
        self._digest = None if key is None else _digest(key.encode())
        self._max_body = max_body
        self._max_bodies = max_bodies
        self._body_timeout = body_timeout
        self._held = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
        else:
            await self._pass(scope, receive, self._counted(scope, send))

    def _counted(self, scope: Scope, send: Send) -> Send:
        """``send`` that counts the answer; what is no endpoint is counted together."""

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                endpoint = scope["route"].path if "route" in scope else "other"
                self._answers.labels(endpoint, str(message["status"])).inc()
            await send(message)

        return counted

    async def _pass(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers: Iterable[tuple[bytes, bytes]] = scope["headers"]
        if self._digest is not None and scope["path"].startswith(GUARDED) and not self._has_key(headers):
            answer = error_response(
                "the API key is missing or wrong", 401, code="invalid_api_key", headers={"www-authenticate": "Bearer"}
            )
            await answer(scope, receive, send)
            return
        if scope["method"] in ("GET", "HEAD", "OPTIONS"):
            await self._app(scope, receive, send)
            return
        length = next((value for name, value in headers if name == b"content-length"), b"0")
        if int(length) > self._max_body:  # the parser has checked that it is a number
            await self._too_large(scope, receive, send)
            return
        await self._with_body(scope, receive, send)

    def _has_key(self, headers: Iterable[tuple[bytes, bytes]]) -> bool:
        given = next((value for name, value in headers if name == b"authorization"), b"")
        kind, _, key = given.partition(b" ")
        assert self._digest is not None
        return hmac.compare_digest(_digest(key.strip()), self._digest) and kind.lower() == b"bearer"

    async def _too_large(self, scope: Scope, receive: Receive, send: Send) -> None:
        answer = error_response(
            f"the body is larger than {self._max_body} bytes",
            413,
            code="body_too_large",
            headers={"connection": "close"},
        )
        await answer(scope, receive, send)

    async def _with_body(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = bytearray()
        try:
            async with asyncio.timeout(self._body_timeout):
                more = True
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return
                    chunk = message.get("body", b"")
                    body += chunk
                    self._held += len(chunk)
                    more = message.get("more_body", False)
                    if len(body) > self._max_body:
                        await self._too_large(scope, receive, send)
                        return
                    if self._held > self._max_bodies:
                        answer = error_response(
                            "too many large requests at once", 429, code="bodies", headers={"retry-after": "1"}
                        )
                        await answer(scope, receive, send)
                        return
            await self._app(scope, _replay(bytes(body), receive), send)
        except TimeoutError:
            answer = error_response(f"the body did not arrive within {self._body_timeout:g} s", 408)
            await answer(scope, receive, send)
        finally:
            self._held -= len(body)


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _replay(body: bytes, receive: Receive) -> Receive:
    """``receive`` of a request whose body has been read."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replayed() -> Message:
        return messages.pop() if messages else await receive()

    return replayed
