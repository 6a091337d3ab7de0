"""One client's connection: uvicorn's, with bounds on what a client may hold without saying or reading anything."""

from __future__ import annotations

import asyncio
import fcntl
import resource
import struct
import termios
import uuid
from dataclasses import dataclass
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from vllm_omni.entrypoints.joined_writes import JoinedWrites
from vllm_omni.entrypoints.openai.args import ServeArgs
from vllm_omni.entrypoints.openai.errors import error_body
from vllm_omni.errors import ConfigError
from vllm_omni.logger import init_logger

logger = init_logger(__name__)

MAX_HEAD = 64 * 1024
"""Bytes of a request's head at most (one network read more, where they come in one)."""
SPARE_FILES = 256
"""Open files that are kept for everything else than connections."""
_REASONS = {
    400: "Bad Request",
    408: "Request Timeout",
    431: "Request Header Fields Too Large",
    503: "Service Unavailable",
}


@dataclass(frozen=True)
class Limits:
    """What one server allows its clients."""

    header_timeout: float
    send_timeout: float
    connections: int
    request_ids: bool
    """Whether answers have the header x-request-id."""


def limits_of(args: ServeArgs) -> Limits:
    """The limits of a server; raises this process's limit of open files as far as they need.

    Raises:
        ConfigError: ``max_connections`` is more than the system allows.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = 2**20 if hard == resource.RLIM_INFINITY else hard
    wanted = most if args.max_connections is None else args.max_connections + SPARE_FILES
    if wanted > most:
        raise ConfigError(
            f"max_connections={args.max_connections}: this process may have {most} open files (ulimit -n), which is "
            f"enough for {most - SPARE_FILES} connections",
            field="max_connections",
        )
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return Limits(args.header_timeout, args.send_timeout, max(1, wanted - SPARE_FILES), args.enable_request_id_headers)


class Connection(HttpToolsProtocol):
    """A head must come whole within ``header_timeout`` and ``MAX_HEAD``, an answer must be read on without a pause of
    ``send_timeout``, and there are at most so many connections. An answer's head and body go out in one packet."""

    def __init__(self, *args: Any, limits: Limits, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._limits = limits
        self._head_timer: asyncio.TimerHandle | None = None
        self._head_bytes = 0
        self._in_head = True
        self._read_timer: asyncio.TimerHandle | None = None
        self._unread = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(JoinedWrites(transport, self.loop))
        if len(self.connections) > self._limits.connections:
            self._refuse(503, f"{self._limits.connections} connections are open, as many as may be")
        else:
            self._head_timer = self.loop.call_later(self._limits.header_timeout, self._head_is_late)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timers()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if not self._in_head or self.transport.is_closing():
            return
        self._head_bytes += len(data)
        if self._head_bytes > MAX_HEAD:
            self._refuse(431, f"the head of the request is larger than {MAX_HEAD} bytes")
        elif self._head_timer is None:
            self._head_timer = self.loop.call_later(self._limits.header_timeout, self._head_is_late)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head = True

    def on_headers_complete(self) -> None:
        self._in_head, self._head_bytes = False, 0
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None
        super().on_headers_complete()

    def _head_is_late(self) -> None:
        self._head_timer = None
        if self._head_bytes:
            self._refuse(408, f"the head of the request did not arrive within {self._limits.header_timeout:g} s")
        else:
            self.transport.close()

    def _refuse(self, status: int, message: str) -> None:
        body = error_body(message, status)
        head = (
            f"HTTP/1.1 {status} {_REASONS[status]}\r\ncontent-type: application/json\r\nretry-after: 1\r\n"
            f"content-length: {len(body)}\r\nconnection: close\r\n"
        )
        if self._limits.request_ids:
            head += f"x-request-id: {uuid.uuid4().hex}\r\n"
        head += "\r\n"
        self.transport.write(head.encode() + body)
        self.transport.close()

    def send_400_response(self, msg: str) -> None:
        """Called when what came is no HTTP."""
        self._refuse(400, msg)

    def pause_writing(self) -> None:
        """Called when the client does not take what it was sent."""
        super().pause_writing()
        self._unread = self._count_unread()
        self._read_timer = self.loop.call_later(self._limits.send_timeout, self._reading_is_late)

    def resume_writing(self) -> None:
        """Called when it has taken nearly all."""
        super().resume_writing()
        if self._read_timer is not None:
            self._read_timer.cancel()
            self._read_timer = None

    def _reading_is_late(self) -> None:
        """Give a client up that has read nothing; one that reads slowly gets more time."""
        unread, before = self._count_unread(), self._unread
        self._read_timer = None
        if unread >= before:
            logger.warning("a client read nothing for %g s and is cut off", self._limits.send_timeout)
            self.transport.abort()
            return
        self._unread = unread
        self._read_timer = self.loop.call_later(self._limits.send_timeout, self._reading_is_late)

    def _count_unread(self) -> int:
        """Bytes that the client has not taken yet: here, and in the kernel, which keeps megabytes."""
        queued = fcntl.ioctl(self.transport.get_extra_info("socket").fileno(), termios.TIOCOUTQ, bytes(4))
        return self.transport.get_write_buffer_size() + int(struct.unpack("i", queued)[0])

    def _stop_timers(self) -> None:
        for timer in (self._head_timer, self._read_timer):
            if timer is not None:
                timer.cancel()
        self._head_timer = self._read_timer = None
