"""What a stage's process reads from and writes to: the driver's socket, and lanes from and to its neighbours.

A lane is a socket pair between the processes of two stages. The source writes its chunks there (``messages.Output``);
the target has written its process id first, once. Neither waits for the other: what a slow target does not take yet is
kept by the source, as the driver keeps it otherwise. A neighbour that dies is the driver's to notice.
"""

from __future__ import annotations

import os
import select
import socket

from vllm_omni.engine import messages as m

Messages = list[tuple[m.Message, memoryview]]


class _Inlet:
    """A socket's messages. They are valid until the next come from it."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self._reader = m.FrameReader()
        self._buffer = memoryview(bytearray(m.RECEIVE_BYTES))  # one for all messages: a fresh one costs 30 us

    def read(self, flags: int = 0) -> Messages | None:
        """What has come; None: end of stream."""
        try:
            size = self.sock.recv_into(self._buffer, 0, flags)
        except BlockingIOError:
            return []
        except ConnectionResetError:
            return None  # it had not read all when it ended
        return self._reader.feed(self._buffer[:size]) if size else None


class LaneOut:
    """The source's end of a lane."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.unsent = bytearray()
        self._reader = 0

    @property
    def reader(self) -> int:
        """Process id of the target, which wrote it before it was ready."""
        if not self._reader:
            try:
                self._reader = int.from_bytes(self.sock.recv(4), "little")
            except ConnectionResetError:
                return 1  # it is gone
        return self._reader or 1

    def send(self, data: bytes) -> None:
        """Send now what the target takes, and the rest when it does."""
        if not self.unsent:
            data = data[self._sent(data) :]
        self.unsent += data

    def flush(self) -> None:
        """Send more of what is left."""
        del self.unsent[: self._sent(self.unsent)]

    def _sent(self, data: m.Buffer) -> int:
        try:
            return self.sock.send(data, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return 0
        except OSError:
            return len(data)  # the target is gone, and its requests with it


class Channel:
    """All that comes into the process of a stage, and its way out to the driver."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.lane_out: LaneOut | None = None
        self._driver = _Inlet(sock)
        self._lane_in: _Inlet | None = None
        self._poll = select.poll()
        self._poll.register(sock, select.POLLIN)
        self._driver_fd = sock.fileno()
        self._lane_fd = -1

    def open_lanes(self, lane_in: int, lane_out: int) -> None:
        """Use the inherited sockets with these numbers; -1 is none."""
        if lane_in >= 0:
            sock = _inherited(lane_in)
            sock.send(os.getpid().to_bytes(4, "little"))
            self._lane_in, self._lane_fd = _Inlet(sock), lane_in
            self._poll.register(sock, select.POLLIN)
        if lane_out >= 0:
            self.lane_out = LaneOut(_inherited(lane_out))

    def receive(self, wait: float | None) -> Messages | None:
        """Messages that have arrived, the driver's first; ``wait`` seconds for the first (None: as long as it takes).
        None: the driver's stream has ended."""
        out = self.lane_out
        if self._lane_in is not None or (out is not None and out.unsent):
            return self._receive_any(wait, out)
        if wait is None:
            return self._driver.read()
        if wait > 0 and not select.select([self.sock], [], [], wait)[0]:
            return []
        return self._driver.read(socket.MSG_DONTWAIT)

    def _receive_any(self, wait: float | None, out: LaneOut | None) -> Messages | None:
        if out is not None and out.unsent:
            self._poll.register(out.sock, select.POLLOUT)
        found: Messages = []
        for fd, _ in self._poll.poll(None if wait is None else wait * 1000):  # in the order of registration
            if fd == self._lane_fd:
                found = found + self._chunks() if found else self._chunks()
            elif fd == self._driver_fd:
                got = self._driver.read(socket.MSG_DONTWAIT)
                if got is None:
                    return None
                found = got
            elif out is not None:
                out.flush()
                if not out.unsent:
                    self._poll.unregister(out.sock)
        return found

    def _chunks(self) -> Messages:
        lane = self._lane_in
        assert lane is not None
        chunks = lane.read(socket.MSG_DONTWAIT)
        if chunks is None:
            self._poll.unregister(lane.sock)
            self._lane_in = None
            return []
        return chunks

    def more_from_driver(self) -> bool:
        """Whether something of the driver's waits to be read by ``receive_from_driver``."""
        return bool(select.select([self.sock], [], [], 0)[0])

    def receive_from_driver(self) -> Messages | None:
        """As ``receive``, without the lane and without waiting. Messages of the lane stay valid."""
        return self._driver.read(socket.MSG_DONTWAIT)

    def send(self, *frames: bytes) -> None:
        """Send to the driver."""
        self.sock.sendall(frames[0] if len(frames) == 1 else b"".join(frames))

    def close(self) -> None:
        """Close every socket."""
        self.sock.close()
        for lane in (self._lane_in, self.lane_out):
            if lane is not None:
                lane.sock.close()


def _inherited(number: int) -> socket.socket:
    sock = socket.socket(fileno=number)
    sock.set_inheritable(False)
    return sock
