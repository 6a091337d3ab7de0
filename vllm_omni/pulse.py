"""Signs of life: one page of shared memory in which the processes of a stage say that they run and get on.

Two things are told apart, because a hang shows in different places:

- ``beat`` is counted up by a thread that does nothing else. It stands still when the process is frozen (SIGSTOP, a
  debugger, a call that never gives Python's lock back), however long the work is that the main thread does.
- ``progress`` is counted up by the work itself: at each turn of the engine's loop, and inside a step at each layer. It
  stands still in an endless loop or when a device does not answer, while the beat goes on. A step that takes minutes
  but works keeps counting.

Writing costs less than a microsecond and no system call; nobody is sent anything. The reader is
``entrypoints.watch.Watch``.

::

    slot of 64 bytes for each process: beat u64 | progress u64 | process id u64 | busy u64 | queued u64 | running u64
    slot 0 is the engine's, slot 1 + r that of rank r, where ranks are processes of their own
"""

from __future__ import annotations

import mmap
import os
import struct
import threading
import time
from dataclasses import dataclass

SLOTS = 64
INTERVAL_S = 0.25
"""Seconds between two beats."""
_SLOT = struct.Struct("<QQQQQQ")
_WORD = struct.Struct("<Q")
_SIZE = 64


@dataclass(frozen=True)
class Pulse:
    """What one process says of itself."""

    slot: int
    beat: int
    progress: int
    pid: int
    busy: bool
    queued: int
    running: int


class PulsePage:
    """The page, as the process sees it that made it and reads it."""

    def __init__(self) -> None:
        self.fd = os.memfd_create("omni-pulse")
        os.ftruncate(self.fd, SLOTS * _SIZE)
        self._memory = mmap.mmap(self.fd, SLOTS * _SIZE)

    def read(self) -> list[Pulse]:
        """Every process that has written so far, the engine first."""
        found = []
        for slot in range(SLOTS):
            beat, progress, pid, busy, queued, running = _SLOT.unpack_from(self._memory, slot * _SIZE)
            if pid:
                found.append(Pulse(slot, beat, progress, pid, bool(busy), queued, running))
        return found

    def close(self) -> None:
        """Give the page up; what was read last stays readable. Idempotent."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class _Writer:
    """This process's slot."""

    def __init__(self, memory: mmap.mmap, path: str, slot: int) -> None:
        self.path = path
        self._memory = memory
        self._at = slot * _SIZE
        self._progress = 0
        self._pid = os.getpid()
        _WORD.pack_into(memory, self._at + 16, self._pid)
        threading.Thread(target=self._beat, name="pulse", daemon=True).start()

    def _beat(self) -> None:
        count = 0
        while True:
            count += 1
            _WORD.pack_into(self._memory, self._at, count)
            time.sleep(INTERVAL_S)

    def advance(self) -> None:
        self._progress += 1
        _WORD.pack_into(self._memory, self._at + 8, self._progress)

    def state(self, busy: bool, queued: int, running: int) -> None:
        self._progress += busy
        _SLOT_STATE.pack_into(self._memory, self._at + 8, self._progress, self._pid, busy, queued, running)


_SLOT_STATE = struct.Struct("<QQQQQ")
_writer: _Writer | None = None
"""A process has one pulse; None where nobody listens (tests, a driver)."""


def start(page: int | str, slot: int) -> None:
    """Begin to beat.

    Args:
        page: number of the page's file in this process, or what ``path`` gave in another.
        slot: this process's place in the page.
    """
    global _writer
    path = f"/proc/{os.getpid()}/fd/{page}" if isinstance(page, int) else page
    with open(path, "r+b") as file:
        _writer = _Writer(mmap.mmap(file.fileno(), SLOTS * _SIZE), path, slot)


def path() -> str | None:
    """Where other processes find this one's page; None when it has none."""
    return None if _writer is None else _writer.path


def advance() -> None:
    """The work has got on a bit. Called often: a layer, a message, a turn of a loop."""
    if _writer is not None:
        _writer.advance()


def busy(queued: int, running: int) -> None:
    """This process works from now on; so many requests wait in it, and so many are at work."""
    if _writer is not None:
        _writer.state(True, queued, running)


def idle(queued: int, running: int) -> None:
    """This process waits for something to do, or does what has a time limit of its own."""
    if _writer is not None:
        _writer.state(False, queued, running)
