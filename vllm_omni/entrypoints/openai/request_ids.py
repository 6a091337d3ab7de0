"""``x-request-id``: the name of a request, its client's or a fresh one, in the answer, the log and the traces."""

from __future__ import annotations

import logging
import re
import secrets
import time
from contextvars import ContextVar

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vllm_omni.logger import init_logger

logger = init_logger(__name__)

HEADER = b"x-request-id"
PATTERN = r"^[A-Za-z0-9_.:=+@~-]{1,128}$"
"""What a request may be called: what is safe in a header, in a log, and in a name that an engine makes of it."""
_VALID = re.compile(PATTERN)


class _Name:
    """The name of the request that is being answered."""

    __slots__ = ("is_given", "text")

    def __init__(self, headers: list[tuple[bytes, bytes]]) -> None:
        given = next((value for name, value in headers if name == HEADER), b"").decode("latin-1")
        self.is_given = _VALID.match(given) is not None
        self.text = given if self.is_given else secrets.token_hex(16)


_current: ContextVar[_Name | None] = ContextVar("request", default=None)


def request_id(in_body: str | None = None) -> str:
    """The name of the request that is being answered: the header's, else ``in_body``, else a fresh one."""
    name = _current.get()
    if name is None:
        return in_body or secrets.token_hex(16)
    if in_body is not None and not name.is_given:
        name.text = in_body
    return name.text


class RequestIds:
    """The outermost layer: also what is refused before an endpoint, and what fails without a reason, has its name.

    A name that is not well formed is not the request's fault (gateways make them); it is replaced, as if there were
    none.

    Args:
        tell: whether answers have the header.
        log_answers: whether each answer is a line of the log.
    """

    def __init__(self, app: ASGIApp, tell: bool, log_answers: bool) -> None:
        self._app = app
        self._tell = tell
        self._log_answers = log_answers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        name = _Name(scope["headers"])
        _current.set(name)
        begun, status = time.monotonic(), 0

        async def named(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if self._tell:
                    message["headers"] = [*message["headers"], (HEADER, name.text.encode())]
            await send(message)

        try:
            await self._app(scope, receive, named)
        finally:
            if self._log_answers:
                client = (scope["client"] or ("-",))[0]
                path = scope["raw_path"].decode("ascii", "replace")  # not decoded: no line breaks
                logger.info("%s %s %s %d %.3f s", client, scope["method"], path, status, time.monotonic() - begun)


class _InLog(logging.Filter):
    """Names the request that a line of the log is about."""

    def filter(self, record: logging.LogRecord) -> bool:
        name = _current.get()
        record.request = "" if name is None else f"[{name.text}] "
        return True


def name_in_log() -> None:
    """From now on lines of the package's log that are about a request begin with its name."""
    for handler in logging.getLogger("vllm_omni").handlers:
        handler.addFilter(_InLog())
