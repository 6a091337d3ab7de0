"""The trace that a request's caller began, handed on to the stages."""

from __future__ import annotations

from collections.abc import Mapping
from contextvars import ContextVar

from starlette.types import ASGIApp, Receive, Scope, Send

HEADERS = (b"traceparent", b"tracestate")
trace_headers: ContextVar[Mapping[str, str] | None] = ContextVar("trace_headers", default=None)
"""Headers of the request that is being answered, by W3C's Trace Context."""


class TraceContext:
    """Middleware that keeps the two headers; only there when somebody collects traces."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            found = {name.decode(): value.decode("latin-1") for name, value in scope["headers"] if name in HEADERS}
            trace_headers.set(found or None)
        await self._app(scope, receive, send)
