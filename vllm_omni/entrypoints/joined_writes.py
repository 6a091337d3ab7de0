"""A transport that sends what is written within one turn of the event loop in one system call."""

from __future__ import annotations

import asyncio
from typing import Any

MAX_KEPT = 64 * 1024
"""Bytes that wait for the end of the turn at most."""


class JoinedWrites(asyncio.Transport):
    """Puts the writes of one turn together.

    Each write that goes out at once wakes the reader's process; the wake-up costs more than a small message. An answer
    is two writes (head and body), and many requests are handed to a stage in the same turn.
    """

    def __init__(self, inner: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__()
        self._inner = inner
        self._loop = loop
        self._parts: list[Any] = []
        self._size = 0

    def write(self, data: Any) -> None:
        """Send ``data`` at the end of the turn, or now when much has come together."""
        if not self._parts:
            self._loop.call_soon(self._flush)
        self._parts.append(data)
        self._size += len(data)
        if self._size > MAX_KEPT:
            self._flush()

    def _flush(self) -> None:
        parts, self._parts, self._size = self._parts, [], 0
        if not parts or self._inner.is_closing():
            return
        if len(parts) == 1:
            self._inner.write(parts[0])
        else:
            self._inner.writelines(parts)

    def close(self) -> None:
        """Send what is left, then close."""
        self._flush()
        self._inner.close()

    def abort(self) -> None:
        """Close without sending what is left."""
        self._parts = []
        self._inner.abort()

    def is_closing(self) -> bool:
        return self._inner.is_closing()

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return self._inner.get_extra_info(name, default)

    def get_write_buffer_size(self) -> int:
        return self._size + self._inner.get_write_buffer_size()

    def pause_reading(self) -> None:
        self._inner.pause_reading()

    def resume_reading(self) -> None:
        self._inner.resume_reading()
