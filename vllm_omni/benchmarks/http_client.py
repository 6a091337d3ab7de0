"""A small HTTP/1.1 client for measuring: it notes when each piece of an answer arrived, and costs little itself.

A general client takes several times as long for a request, and would measure itself.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections import deque
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

import httptools

from vllm_omni.errors import ConfigError


class BrokenAnswer(OSError):
    """The connection ended, or what came is no HTTP, before the answer was whole."""


@dataclass(slots=True)
class Answer:
    """One answer, with the time at which each piece came."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    pieces: list[tuple[float, bytes]] = field(default_factory=list)
    """(``time.perf_counter()`` second, bytes) of the body, as they arrived."""
    end: float = 0.0
    """When it was whole."""

    @property
    def body(self) -> bytes:
        """The whole body."""
        return self.pieces[0][1] if len(self.pieces) == 1 else b"".join(piece for _, piece in self.pieces)


class _Connection(asyncio.Protocol):
    """One kept-alive connection with at most one request on it. Methods ``on_*`` are called by the parser."""

    def __init__(self) -> None:
        self.transport: Any = None
        self.closed = False
        self.heard = False
        """Whether anything came since the last request."""
        self._now = 0.0
        self._whole = False
        self._answer = Answer()
        self._future: asyncio.Future[Answer] | None = None

    async def ask(self, data: bytes) -> Answer:
        self._answer, self._whole, self.heard = Answer(), False, False
        self._parser = httptools.HttpResponseParser(self)
        self._future = asyncio.get_running_loop().create_future()
        self.transport.write(data)
        return await self._future

    @property
    def reusable(self) -> bool:
        """Whether another request can be sent."""
        return self._whole and not self.closed

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self._now, self.heard = time.perf_counter(), True
        if self._future is None or self._future.done():
            self.transport.close()  # nobody asked
            return
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._fail(f"no HTTP: {error}")

    def connection_lost(self, exc: Exception | None) -> None:
        self.closed = True
        self._fail("the server closed the connection" if exc is None else str(exc))

    def _fail(self, why: str) -> None:
        if self._future is not None and not self._future.done():
            self._future.set_exception(BrokenAnswer(f"{why}, {'after' if self._answer.status else 'before'} the head"))

    def on_header(self, name: bytes, value: bytes) -> None:
        self._answer.headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        self._answer.status = self._parser.get_status_code()

    def on_body(self, piece: bytes) -> None:
        self._answer.pieces.append((self._now, piece))

    def on_message_complete(self) -> None:
        if self._answer.status < 200:
            return  # 100 Continue
        self._answer.end, self._whole = self._now, True
        if not self._parser.should_keep_alive():
            self.transport.close()
        if self._future is not None and not self._future.done():
            self._future.set_result(self._answer)


class HttpClient:
    """Requests to one server over as many connections as are open at once.

    Args:
        base_url: ``http://host:port`` or https, with or without a path such as ``/v1`` behind it.
        api_key: goes into ``Authorization: Bearer``.

    Raises:
        ConfigError: the URL is none.
    """

    def __init__(self, base_url: str, api_key: str | None = None) -> None:
        parts = urlsplit(base_url)
        try:
            port = parts.port
        except ValueError:
            port = 0
        if parts.scheme not in ("http", "https") or not parts.hostname or port == 0 or parts.query:
            raise ConfigError(f"base_url={base_url!r}: expected http://HOST:PORT", field="base_url")
        self._host = parts.hostname
        self._port = port or (443 if parts.scheme == "https" else 80)
        self._ssl = ssl.create_default_context() if parts.scheme == "https" else None
        self._root = parts.path.rstrip("/").removesuffix("/v1")
        key = f"authorization: Bearer {api_key}\r\n" if api_key else ""
        self._head = f"host: {parts.netloc.rpartition('@')[2]}\r\naccept: */*\r\n{key}"
        self._idle: deque[_Connection] = deque()

    def prepare(self, method: str, path: str, body: bytes | None = None) -> bytes:
        """The bytes of a JSON request; made before the clock runs."""
        head = f"{method} {self._root}{path} HTTP/1.1\r\n{self._head}"
        if body is None:
            return f"{head}\r\n".encode()
        return f"{head}content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body

    async def send(self, data: bytes, timeout: float) -> Answer:
        """Send a prepared request; the answer when it is whole.

        Raises:
            TimeoutError: it is not within ``timeout`` seconds.
            OSError: the server cannot be reached, or went away.
        """
        async with asyncio.timeout(timeout):
            while self._idle:
                connection = self._idle.pop()
                if connection.closed:
                    continue
                try:
                    return await self._ask(connection, data)
                except BrokenAnswer:
                    if connection.heard:
                        raise
                    # the server closed an idle connection at the same moment; a fresh one tells what is the matter
            loop = asyncio.get_running_loop()
            _, fresh = await loop.create_connection(_Connection, self._host, self._port, ssl=self._ssl)
            return await self._ask(fresh, data)

    async def _ask(self, connection: _Connection, data: bytes) -> Answer:
        try:
            return await connection.ask(data)
        finally:
            if connection.reusable:
                self._idle.append(connection)
            else:
                connection.transport.abort()

    async def get(self, path: str, timeout: float = 10.0) -> Answer:
        """A GET."""
        return await self.send(self.prepare("GET", path), timeout)

    async def __aenter__(self) -> HttpClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        while self._idle:
            self._idle.pop().transport.close()
