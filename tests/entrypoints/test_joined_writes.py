"""Writes of one turn go out together, in order, and none is lost."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from vllm_omni.entrypoints.joined_writes import MAX_KEPT, JoinedWrites


class Wire(asyncio.Transport):
    """Notes each call."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[bytes] = []
        self.closed = ""

    def write(self, data: Any) -> None:
        self.calls.append(bytes(data))

    def writelines(self, parts: Any) -> None:
        self.calls.append(b"".join(parts))

    def is_closing(self) -> bool:
        return bool(self.closed)

    def close(self) -> None:
        self.closed = "close"

    def abort(self) -> None:
        self.closed = "abort"

    def get_write_buffer_size(self) -> int:
        return 5


def joined() -> tuple[Wire, JoinedWrites]:
    wire = Wire()
    return wire, JoinedWrites(wire, asyncio.get_running_loop())


async def test_one_call_a_turn() -> None:
    wire, transport = joined()
    for part in (b"head ", b"and ", b"body"):
        transport.write(part)
    assert wire.calls == []
    assert transport.get_write_buffer_size() == 13 + 5
    await asyncio.sleep(0)
    assert wire.calls == [b"head and body"]
    transport.write(b"next")
    await asyncio.sleep(0)
    assert wire.calls == [b"head and body", b"next"]
    await asyncio.sleep(0)
    assert len(wire.calls) == 2


async def test_much_does_not_wait() -> None:
    """A producer that never pauses cannot fill the memory: the transport below sees the bytes, and its limits apply."""
    wire, transport = joined()
    transport.write(b"a")
    transport.write(b"b" * MAX_KEPT)
    assert [len(call) for call in wire.calls] == [MAX_KEPT + 1]
    transport.write(b"c")
    await asyncio.sleep(0)
    assert wire.calls[1:] == [b"c"]


async def test_closing_sends_what_is_left_and_aborting_does_not() -> None:
    wire, transport = joined()
    transport.write(b"last words")
    transport.close()
    assert (wire.calls, wire.closed) == ([b"last words"], "close")
    transport.write(b"too late")
    await asyncio.sleep(0)
    assert wire.calls == [b"last words"]
    other, transport = joined()
    transport.write(b"never")
    transport.abort()
    await asyncio.sleep(0)
    assert (other.calls, other.closed) == ([], "abort")


@asynccontextmanager
async def pair() -> AsyncIterator[tuple[JoinedWrites, asyncio.StreamReader, list[str]]]:
    """A real connection, and what its protocol was told."""
    told: list[str] = []

    class Told(asyncio.Protocol):
        def pause_writing(self) -> None:
            told.append("pause")

        def resume_writing(self) -> None:
            told.append("resume")

    ours, theirs = socket.socketpair()
    loop = asyncio.get_running_loop()
    inner, _ = await loop.create_connection(Told, sock=ours)
    reader, writer = await asyncio.open_connection(sock=theirs)
    try:
        yield JoinedWrites(inner, loop), reader, told
    finally:
        inner.abort()
        writer.close()


async def test_a_slow_reader_is_noticed() -> None:
    async with pair() as (transport, reader, told):
        sent = 0
        while told == []:
            transport.write(b"x" * 4096)
            sent += 4096
            assert sent < 64 * 2**20
            await asyncio.sleep(0)
        assert told == ["pause"]
        await reader.readexactly(sent)
        while len(told) < 2:
            await asyncio.sleep(0)
        assert told == ["pause", "resume"]
