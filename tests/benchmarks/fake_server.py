"""A server with known delays, in the test's own event loop; it notes when it got and sent what."""

from __future__ import annotations

import asyncio
import json
import ssl
import struct
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

RATE = 1000
"""Samples a second of its sound."""


def wav_head() -> bytes:
    """Of a mono 16-bit file without a length."""
    form = struct.pack("<4sIHHIIHH", b"fmt ", 16, 1, 1, RATE, RATE * 2, 2, 16)
    return b"RIFF\xff\xff\xff\xffWAVE" + form + b"data\xff\xff\xff\xff"


def delta(**fields: Any) -> bytes:
    """A chunk of a chat."""
    return b"data: " + json.dumps({"choices": [{"index": 0, "delta": fields}]}).encode() + b"\n\n"


@dataclass
class Seen:
    """One request to the server."""

    path: str
    body: Any
    headers: dict[str, str]
    arrived: float
    sent: list[float] = field(default_factory=list)
    """When each piece of the answer went out."""


Handler = Callable[["FakeServer", Seen, asyncio.StreamWriter], Awaitable[None]]


class FakeServer:
    """Answers ``/v1/models`` and what ``handlers`` holds by path."""

    def __init__(self, makes: list[str], handlers: dict[str, Handler]) -> None:
        self.models: Any = {"object": "list", "data": [{"id": "fake", "output_modalities": makes}]}
        self.handlers = handlers
        self.seen: list[Seen] = []
        self.open = 0
        self.most_open = 0
        self.url = ""

    def posts(self) -> list[Seen]:
        """Requests that are no look at the server."""
        return [seen for seen in self.seen if seen.body is not None]

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                await self._one(reader, writer)
        except (asyncio.IncompleteReadError, asyncio.CancelledError, ConnectionError):
            writer.close()

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode().strip().split("\r\n")
        headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
        body = await reader.readexactly(int(headers.get("content-length", "0")))
        seen = Seen(first.split()[1], json.loads(body) if body else None, headers, time.perf_counter())
        self.seen.append(seen)
        self.open += 1
        self.most_open = max(self.most_open, self.open)
        try:
            if seen.path == "/v1/models":
                await whole(self.models, writer)
            elif seen.path in self.handlers:
                await self.handlers[seen.path](self, seen, writer)
            else:
                await whole({"error": {"message": "no such endpoint"}}, writer, status="404 Not Found")
        finally:
            self.open -= 1

    @asynccontextmanager
    async def running(self, context: ssl.SSLContext | None = None) -> AsyncIterator[FakeServer]:
        """Listen on a free port."""
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=context)
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        try:
            yield self
        finally:
            server.close()


async def whole(body: Any, writer: asyncio.StreamWriter, status: str = "200 OK", **headers: str) -> None:
    """An answer in one piece."""
    data = json.dumps(body).encode()
    head = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items())
    writer.write(f"HTTP/1.1 {status}\r\n{head}content-length: {len(data)}\r\n\r\n".encode() + data)
    await writer.drain()


async def pieces(seen: Seen, writer: asyncio.StreamWriter, plan: list[tuple[float, bytes]], cut: bool = False) -> None:
    """A chunked answer; each piece goes out so many seconds after the one before."""
    writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
    for wait, piece in plan:
        if wait:
            await asyncio.sleep(wait)
        writer.write(b"%x\r\n%b\r\n" % (len(piece), piece))
        await writer.drain()
        seen.sent.append(time.perf_counter())
    if cut:
        writer.transport.abort()
        raise ConnectionError
    writer.write(b"0\r\n\r\n")
    await writer.drain()


async def picture(server: FakeServer, seen: Seen, writer: asyncio.StreamWriter) -> None:
    """A picture at once."""
    await whole({"created": 1, "data": [{"b64_json": "eA=="}] * seen.body.get("n", 1)}, writer)
