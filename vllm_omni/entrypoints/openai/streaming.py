"""Answers while the client is there: cancel what nobody waits for, and server-sent events."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping
from typing import Any, TypeVar

from fastapi import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from vllm_omni.entrypoints.openai.errors import describe, error_body
from vllm_omni.errors import OmniError, RequestAborted
from vllm_omni.logger import init_logger

logger = init_logger(__name__)
T = TypeVar("T")
DONE = b"data: [DONE]\n\n"


def sse(data: Mapping[str, Any], event: str | None = None) -> bytes:
    """One server-sent event."""
    return sse_raw(json.dumps(data, separators=(",", ":")).encode(), event)


def sse_raw(body: bytes, event: str | None = None) -> bytes:
    """One server-sent event whose data is JSON already."""
    head = b"" if event is None else b"event: " + event.encode() + b"\n"
    return head + b"data: " + body + b"\n\n"


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def while_connected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of ``work``, which runs in this task; when the client goes away, ``work`` is cancelled.

    Raises:
        RequestAborted: the client went away.
    """
    task = asyncio.current_task()
    assert task is not None
    gone = over = False

    def leave(watch: asyncio.Task[None]) -> None:
        nonlocal gone
        if not over and not watch.cancelled():
            gone = True
            task.cancel()

    watch = asyncio.ensure_future(_gone(receive))
    watch.add_done_callback(leave)
    try:
        return await work
    except asyncio.CancelledError:
        if gone and task.uncancel() == 0:
            raise RequestAborted("the client went away") from None
        raise
    finally:
        over = True  # the callback may be on its way already
        watch.cancel()


class StreamedResponse(Response):
    """An answer in pieces. Closes ``pieces`` when the client goes away; ``Connection`` cuts off one that reads nothing.

    Args:
        pieces: bytes to send, the first ones given apart.
        on_error: makes the last piece of an error that comes after the first one; None cuts the answer off there.
    """

    def __init__(
        self,
        first: bytes,
        pieces: AsyncGenerator[bytes, None],
        media_type: str,
        on_error: Callable[[OmniError], bytes] | None,
    ) -> None:
        super().__init__(None, 200, {"cache-control": "no-cache", "x-accel-buffering": "no"}, media_type)
        del self.headers["content-length"]
        self._first = first
        self._pieces = pieces
        self._on_error = on_error

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            with contextlib.suppress(RequestAborted):
                await while_connected(receive, self._send_all(send))
        finally:
            await self._pieces.aclose()

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        try:
            await self._put(send, self._first)
            async for piece in self._pieces:
                await self._put(send, piece)
        except OmniError as error:
            await self._report(send, error)
        else:
            await self._put(send, b"", more=False)

    async def _report(self, send: Send, error: OmniError) -> None:
        """Say it in the stream; one that cannot say it is cut off, so that nobody takes it for whole."""
        logger.error("a streamed answer failed: %s", error.message)
        if self._on_error is not None:
            await self._put(send, self._on_error(error))
            await self._put(send, b"", more=False)

    async def _put(self, send: Send, body: bytes, more: bool = True) -> None:
        await send({"type": "http.response.body", "body": body, "more_body": more})


def sse_error(error: OmniError) -> bytes:
    """The event that ends a stream that failed."""
    message, status, param, code = describe(error)
    return sse_raw(error_body(message, status, param, code), "error")


async def streamed(
    request: Request,
    pieces: AsyncGenerator[bytes, None],
    media_type: str = "text/event-stream",
    on_error: Callable[[OmniError], bytes] | None = sse_error,
) -> Response:
    """Answer with ``pieces``; an error before the first one is an ordinary answer with its status.

    Raises:
        OmniError: of the first piece.
    """

    async def first() -> bytes:
        return await anext(pieces)

    try:
        head = await while_connected(request.receive, first())
    except BaseException:
        await pieces.aclose()
        raise
    return StreamedResponse(head, pieces, media_type, on_error)
