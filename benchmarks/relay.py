"""The least that a chunk costs on its way from one process to another, straight or by way of a third: bare sockets, no
work."""

from __future__ import annotations

import asyncio
import os
import socket
import struct
import time

MESSAGE = 4096
"""Bytes of a chunk."""
WARM_UP = 20
"""Chunks that do not count: the processes are fresh, and copy their memory as they touch it."""
_TIMES = struct.Struct("<dd")


def _source(sock: socket.socket, count: int, pace: float) -> None:
    """Sends a chunk every ``pace`` seconds, with its time in it."""
    for _ in range(count):
        time.sleep(pace)
        sock.sendall(struct.pack("<d", time.monotonic()).ljust(MESSAGE, b"x"))


def _target(sock: socket.socket, answers: socket.socket) -> None:
    """Answers each chunk with when it was sent and when it came."""
    buffer = bytearray(MESSAGE)
    view = memoryview(buffer)
    while True:
        got = 0
        while got < MESSAGE:
            size = sock.recv_into(view[got:])
            if not size:
                return
            got += size
        answers.sendall(_TIMES.pack(struct.unpack_from("<d", buffer)[0], time.monotonic()))


class _Relay(asyncio.BufferedProtocol):
    """Writes to the target what comes from the source."""

    def __init__(self, target: asyncio.Transport) -> None:
        self._target = target
        self._buffer = memoryview(bytearray(MESSAGE))

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        self._target.write(bytes(self._buffer[:nbytes]))


def _child(work: object, *sockets: socket.socket) -> int:
    pid = os.fork()
    if pid == 0:
        try:
            work()  # type: ignore[operator]
        finally:
            os._exit(0)
    for sock in sockets:
        sock.close()
    return pid


async def relayed(count: int, pace: float, straight: bool = False) -> list[float]:
    """Seconds of each of ``count`` chunks from the source's hand to the target's: by way of this event loop, or
    ``straight`` through one socket pair."""
    here, source = socket.socketpair()
    there, target = (here.dup(), here) if straight else socket.socketpair()
    answers, told = socket.socketpair()
    children = [
        _child(lambda: _target(target, told), target, told),
        _child(lambda: _source(source, WARM_UP + count, pace), source),
    ]
    transports: list[asyncio.BaseTransport] = [] if straight else await _relay(here, there)
    reader, writer = await asyncio.open_connection(sock=answers)
    seconds = []
    for _ in range(WARM_UP + count):
        sent, came = _TIMES.unpack(await reader.readexactly(_TIMES.size))
        seconds.append(came - sent)
    for transport in transports:
        transport.close()
    writer.close()
    there.close()
    await asyncio.sleep(0)
    os.kill(children[0], 9)  # it still holds the other ends
    for pid in children:
        os.waitpid(pid, 0)
    return seconds[WARM_UP:]


async def _relay(here: socket.socket, there: socket.socket) -> list[asyncio.BaseTransport]:
    loop = asyncio.get_running_loop()
    out, _ = await loop.create_connection(asyncio.Protocol, sock=there)
    back, _ = await loop.create_connection(lambda: _Relay(out), sock=here)
    return [out, back]
