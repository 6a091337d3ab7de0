"""Shared memory without names: pooled segments, leases, zero-copy reads.

A **segment** is a memfd of its owner. It has no name in any file system, so nothing can be left behind however the
processes end. Another process of the same user opens it through ``/proc/<pid>/fd/<n>``; the mapping is kept, so that a
reused segment costs no system call on either side.

A **lease** is one word in the segment's header. It says who may still read the content: 0 nobody, 1 whoever the
reference travels to, else a process id. Each lease has one writer at a time: the owner writes the first when it fills
the segment, a process that passes a reference on (``lend``) takes a fresh one for the receiver, and the reader clears
its own when the last view is gone. The owner reuses a segment when no lease is left; a lease of a dead process counts
as cleared. No locks, no messages.

::

    0    generation  u64   counts the fills; a reference to an older fill is refused
    8    retired     u64   1 once the owner has given the segment up: readers drop their mapping
    16   leases      60 x u32
    256  content
"""

from __future__ import annotations

import functools
import mmap
import os
import struct
import time
import weakref
from collections import defaultdict
from collections.abc import Callable
from typing import Any, NamedTuple

from vllm_omni.errors import ConnectorError

_CONTENT = 256
_LEASES = slice(16, 256)
_NO_LEASES = bytes(240)
_MAX_LEASES = 60
_IN_FLIGHT = 1
_SMALLEST = 64 * 1024
_DEAD_CHECK_SECONDS = 1.0
POOL_BYTES = 512 * 1024 * 1024


class Ref(NamedTuple):
    """Where a buffer lies; small and plain, so that it travels in messages."""

    pid: int
    fd: int
    inode: int
    generation: int
    lease: int
    nbytes: int


class _Segment:
    """One mapped memfd, as its owner or as a reader sees it."""

    __slots__ = ("fd", "inode", "lent", "lent_generation", "map", "size")

    def __init__(self, fd: int, size: int) -> None:
        self.fd = fd
        self.inode = os.fstat(fd).st_ino
        self.size = size
        self.map = mmap.mmap(fd, size)
        self.lent = 0
        self.lent_generation = 0

    @property
    def generation(self) -> int:
        return int.from_bytes(self.map[:8], "little")

    def begin(self, holder: int) -> int:
        """Start a new fill, leased to ``holder``; returns its generation."""
        generation = self.generation + 1
        struct.pack_into("<QQI", self.map, 0, generation, 0, holder)
        return generation

    def next_lease(self) -> int:
        """A lease of the present fill that was not handed out yet."""
        if self.lent_generation != self.generation:
            self.lent, self.lent_generation = 0, self.generation
        self.lent += 1
        if self.lent >= _MAX_LEASES:
            raise ConnectorError(f"a payload can be passed on {_MAX_LEASES - 1} times at most")
        return self.lent

    def lease(self, index: int) -> int:
        return int(struct.unpack_from("<I", self.map, 16 + 4 * index)[0])

    def set_lease(self, index: int, holder: int) -> None:
        struct.pack_into("<I", self.map, 16 + 4 * index, holder)

    def leased(self) -> bool:
        return self.map[_LEASES] != _NO_LEASES

    def holders(self) -> tuple[int, ...]:
        return struct.unpack_from(f"<{_MAX_LEASES}I", self.map, 16)

    def retire(self) -> None:
        struct.pack_into("<Q", self.map, 8, 1)
        os.close(self.fd)

    @property
    def retired(self) -> bool:
        return self.map[8] == 1


def _alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat", "rb") as stat:
            return stat.read().rpartition(b")")[2].split()[0] not in (b"Z", b"X")
    except FileNotFoundError:
        return False


class Arena:
    """The segments of this process, and its mappings of other processes' segments.

    Used from one thread. ``write`` may block for the copy alone; nothing else blocks.
    """

    def __init__(self, pool_bytes: int = POOL_BYTES) -> None:
        self._pid = os.getpid()
        self._pool_bytes = pool_bytes
        self._free: defaultdict[int, list[_Segment]] = defaultdict(list)
        self._busy: list[_Segment] = []
        self._own: dict[int, _Segment] = {}
        self._mapped: dict[tuple[int, int, int], _Segment] = {}
        self._closed = False
        self._looked_for_dead = time.monotonic()

    # ---------------------------------------------------------------- owner

    def write(self, nbytes: int, fill: Callable[[memoryview], None], holder: int = _IN_FLIGHT) -> Ref:
        """Let ``fill`` write ``nbytes`` into a free segment, leased to process ``holder``."""
        if self._closed:
            raise ConnectorError("the shared memory of this process is closed")
        segment = self._take(nbytes)
        generation = segment.begin(holder)
        self._busy.append(segment)
        with memoryview(segment.map) as whole, whole[_CONTENT : _CONTENT + nbytes] as content:
            fill(content)
        return Ref(self._pid, segment.fd, segment.inode, generation, 0, nbytes)

    def cancel(self, ref: Ref) -> None:
        """Take back a reference that nobody has opened yet (an aborted request)."""
        segment = self._find(ref)
        if segment is not None and segment.generation == ref.generation and segment.lease(ref.lease) == _IN_FLIGHT:
            segment.set_lease(ref.lease, 0)

    def held(self, ref: Ref) -> bool:
        """Whether the lease of ``ref`` still runs."""
        segment = self._find(ref)
        return segment is not None and segment.generation == ref.generation and segment.lease(ref.lease) != 0

    def reap(self) -> None:
        """Return segments without leases to the pool, and to the system what the pool may not keep."""
        self._drop_dead()
        self._collect()

    def _drop_dead(self) -> None:
        """Clear the leases of processes that are gone."""
        alive = functools.cache(_alive)
        for segment in self._busy:
            for index, holder in enumerate(segment.holders()):
                if holder > _IN_FLIGHT and not alive(holder):
                    segment.set_lease(index, 0)
        self._looked_for_dead = time.monotonic()

    def _collect(self) -> None:
        busy: list[_Segment] = []
        for segment in self._busy:
            (busy.append if segment.leased() else self._free[segment.size].append)(segment)
        self._busy = busy
        pooled = sum(size * len(segments) for size, segments in self._free.items())
        for size in sorted(self._free, reverse=True):
            while pooled > self._pool_bytes and self._free[size]:
                self._retire(self._free[size].pop(0))
                pooled -= size

    def _take(self, nbytes: int) -> _Segment:
        size = max(_SMALLEST, 1 << (nbytes + _CONTENT - 1).bit_length())
        if not self._free[size]:
            if time.monotonic() > self._looked_for_dead + _DEAD_CHECK_SECONDS:
                self._drop_dead()
            self._collect()
        if self._free[size]:
            return self._free[size].pop()
        try:
            fd = os.memfd_create("omni-payload", os.MFD_CLOEXEC)
            os.ftruncate(fd, size)
            self._own[fd] = _Segment(fd, size)
        except OSError as error:
            raise ConnectorError(f"no shared memory of {size} bytes: {error.strerror}", errno=error.errno) from error
        return self._own[fd]

    def _retire(self, segment: _Segment) -> None:
        del self._own[segment.fd]
        segment.retire()

    # ---------------------------------------------------------------- readers

    def open(self, ref: Ref) -> Any:
        """The content as a writable uint8 array over the shared pages; its lease ends with the last view of it.

        Raises:
            ConnectorError: the owner is gone or the content was given up.
        """
        import numpy as np

        segment = self._claim(ref)
        array = np.frombuffer(segment.map, np.uint8, ref.nbytes, _CONTENT)
        weakref.finalize(array, _end_lease, segment, ref)
        return array

    def lend(self, ref: Ref, holder: int) -> Ref:
        """A further reference to the same content, leased to process ``holder``. The caller keeps its own lease."""
        segment = self._claim(ref)
        index = segment.next_lease()
        segment.set_lease(index, holder)
        return ref._replace(lease=index)

    def release(self, ref: Ref) -> None:
        """Give up a reference without reading it."""
        segment = self._find(ref)
        if segment is not None:
            _end_lease(segment, ref)

    def _claim(self, ref: Ref) -> _Segment:
        segment = self._find(ref)
        if segment is None:
            raise ConnectorError(f"the process {ref.pid} that made the payload is gone", pid=ref.pid)
        if segment.generation != ref.generation or segment.lease(ref.lease) == 0:
            raise ConnectorError("the payload was already consumed or given up", pid=ref.pid)
        segment.set_lease(ref.lease, self._pid)
        return segment

    def _find(self, ref: Ref) -> _Segment | None:
        if ref.pid == self._pid and ref.fd in self._own:
            return self._own[ref.fd]
        key = (ref.pid, ref.fd, ref.inode)
        if key not in self._mapped:
            segment = self._map(ref)
            if segment is None:
                return None
            self._mapped[key] = segment
        return self._mapped[key]

    def _map(self, ref: Ref) -> _Segment | None:
        self._forget_stale()
        try:
            fd = os.open(f"/proc/{ref.pid}/fd/{ref.fd}", os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            return None
        try:
            stat = os.fstat(fd)
            return _Segment(fd, stat.st_size) if stat.st_ino == ref.inode else None
        finally:
            os.close(fd)

    def _forget_stale(self) -> None:
        for key, segment in list(self._mapped.items()):
            if segment.retired or not _alive(key[0]):
                self._mapped.pop(key, None)

    # ---------------------------------------------------------------- both

    def stats(self) -> dict[str, int]:
        """Counts for health reports and tests: segments in use, pooled, mapped from others, and bytes owned."""
        pooled = sum(len(segments) for segments in self._free.values())
        owned = sum(s.size for s in self._busy) + sum(size * len(v) for size, v in self._free.items())
        return {"busy": len(self._busy), "pooled": pooled, "mapped": len(self._mapped), "bytes": owned}

    def close(self) -> None:
        """Give every segment up. Views that others still hold stay valid. Idempotent."""
        self._closed = True
        for segment in [*self._busy, *(s for segments in self._free.values() for s in segments)]:
            self._retire(segment)
        self._busy = []
        self._free.clear()
        self._mapped.clear()


def _end_lease(segment: _Segment, ref: Ref) -> None:
    if segment.generation == ref.generation:
        segment.set_lease(ref.lease, 0)
