"""The orchestrator's view of a stage, and the client of our own stage processes.

A client lives in the orchestrator's event loop. Calls return at once; what the stage does comes back through
``StageListener``, called from the loop. A client for vLLM's engine (``AsyncMPClient`` and a pump task) fits the same
two
classes: ``submit`` is its ``add_request_async``, its outputs become ``on_output``, its ``EngineDeadError`` ``on_dead``.
"""

from __future__ import annotations

import asyncio
import itertools
import socket
from collections.abc import Mapping, Sequence
from typing import Any, cast

from vllm_omni.distributed.omni_connectors.utils.serialization import Codec
from vllm_omni.engine import messages as m
from vllm_omni.engine.stage_seam import StageClient, StageListener, StageOutput, Vitals
from vllm_omni.entrypoints.stage_launch import StageHandle, dead_error
from vllm_omni.errors import DeadlineError, OmniError, StageDeadError
from vllm_omni.outputs import Preview
from vllm_omni.process import WatchedProcess
from vllm_omni.pulse import SLOTS

__all__ = ["ProcessStageClient", "StageClient", "StageListener", "StageOutput"]


class ProcessStageClient(StageClient, asyncio.BufferedProtocol):
    """Client of a stage process of this package, over its socket pair."""

    def __init__(self, handle: StageHandle, codec: Codec) -> None:
        self.stage_id = handle.spec.stage_id
        self.info = handle.info
        self._handle = handle
        self._codec = codec
        self._reader = handle.reader
        self._buffer = memoryview(bytearray(m.RECEIVE_BYTES))  # one for all messages: a fresh one costs 30 us
        self._calls: dict[int, asyncio.Future[Any]] = {}
        self._call_ids = itertools.count()
        self._last_words = ""
        self._listener: StageListener | None = None
        self._sock: socket.socket | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._transport: asyncio.Transport | None = None
        self._unsent: list[m.Buffer] = []
        self._dead: StageDeadError | None = None

    async def attach(self, listener: StageListener) -> None:
        self._listener = listener
        self._loop = asyncio.get_running_loop()
        if self._sock is not None:
            self._sock.close()  # of an event loop that was closed since
        self._transport = None
        self._sock = self._handle.sock.dup()
        self._sock.setblocking(False)
        await self._loop.create_unix_connection(lambda: self, sock=self._sock)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self.flush()

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        for message, buffers in self._reader.feed(self._buffer[:nbytes]):
            self._handle_message(message, buffers)
        if self._listener is not None:
            self._listener.on_turn_end()

    def _handle_message(self, message: m.Message, buffers: memoryview) -> None:
        listener = self._listener
        if listener is None:
            return
        if isinstance(message, m.Output):
            data = self._codec.unpack(message.payload, buffers, lazy=True)
            listener.on_output(
                self.stage_id,
                StageOutput(
                    message.request_id,
                    data,
                    message.finished,
                    message.received,
                    message.started,
                    message.sent,
                    memoryview(message.payload).nbytes + len(buffers) + message.shared,
                    message.spans,
                    message.came,
                    message.bytes_in,
                ),
            )
        elif isinstance(message, m.Notes):
            listener.on_notes(self.stage_id, message)
        elif isinstance(message, m.Skipped):
            listener.on_skipped(self.stage_id, message.request_id)
        elif isinstance(message, m.Progress):
            listener.on_progress(self.stage_id, message.request_id, message.step, message.total)
        elif isinstance(message, m.Preview):
            images = self._codec.unpack(message.payload, buffers)
            preview = Preview(message.step, message.total, images, message.size)
            listener.on_preview(self.stage_id, message.request_id, preview)
        elif isinstance(message, m.Failure):
            listener.on_failure(self.stage_id, message.request_id, message.error.build())
        elif isinstance(message, m.Returned):
            self._returned(message, buffers)
        elif isinstance(message, m.Failed):
            self._last_words = f"{message.error.message}\n{message.traceback}"

    def _returned(self, message: m.Returned, buffers: memoryview) -> None:
        future = self._calls.pop(message.call_id, None)
        if future is None or future.done():
            return
        if message.error is not None:
            future.set_exception(message.error.build())
        else:
            future.set_result(self._codec.unpack(message.payload, buffers))

    def connection_lost(self, exc: Exception | None) -> None:
        listener, self._listener = self._listener, None
        if listener is None:
            return
        self._die(listener, dead_error(self._handle, self._last_words))

    def _die(self, listener: StageListener, error: StageDeadError) -> None:
        self._dead = error
        for future in self._calls.values():
            if not future.done():
                future.set_exception(error)
        self._calls.clear()
        listener.on_dead(self.stage_id, error)

    def vitals(self) -> Vitals | None:
        if self._listener is None:
            return None
        found = self._handle.pulse.read()
        names = ["its process", *(f"rank {slot}" for slot in range(SLOTS))]
        beats = {f"{names[pulse.slot]} (pid {pulse.pid})": pulse.beat for pulse in found}
        engine = found[0]  # has beaten before it was ready
        return Vitals(beats, sum(p.progress for p in found), engine.busy, (engine.queued, engine.running))

    def give_up(self, error: StageDeadError) -> None:
        listener, self._listener = self._listener, None
        if listener is not None:
            for pulse in reversed(self._handle.pulse.read()):  # the ranks first
                WatchedProcess(pulse.pid).kill()
            self._die(listener, error)

    def _write(self, frame: bytes) -> None:
        assert self._loop is not None, "the client is not attached"
        if not self._unsent:
            self._loop.call_soon(self.flush)
        self._unsent.append(frame)

    def flush(self) -> None:
        transport = self._transport
        if not self._unsent or transport is None:
            return
        parts, self._unsent = self._unsent, []
        if transport.is_closing():
            return
        data = parts[0] if len(parts) == 1 else b"".join(parts)
        if transport.get_write_buffer_size() == 0:
            assert self._sock is not None
            try:
                sent = self._sock.send(data)
            except OSError:
                sent = 0  # full, or closed: the transport finds out
            if sent == len(data):
                return
            data = memoryview(data)[sent:]
        transport.write(data)

    def submit(
        self,
        request_id: str,
        prompt: Any,
        params: Any,
        deadline: float | None,
        chunk: int,
        last: bool,
        read: bool = True,
        trace: Mapping[str, str] | None = None,
        direct: bool = False,
    ) -> int:
        if self._dead is not None:
            raise self._dead
        packed = self._codec.pack([prompt] if chunk else [prompt, params], self._handle.process.pid)
        frame = m.frame(m.Submit(request_id, deadline, chunk, last, trace is not None, packed.tree, direct), packed)
        self._write(frame)
        return len(frame) + packed.shared

    def expect(
        self, request_id: str, prompt: Any, params: Any, deadline: float | None, direct: bool, traced: bool = False
    ) -> bool:
        if self._dead is not None:
            raise self._dead
        packed = self._codec.pack([prompt, params], self._handle.process.pid)
        self._write(m.frame(m.Expect(request_id, deadline, direct, packed.tree, traced), packed))
        self.flush()
        transport = self._transport
        return transport is not None and not self._unsent and transport.get_write_buffer_size() == 0

    def abort(self, request_ids: Sequence[str]) -> None:
        if self._dead is None and self._transport is not None:
            self._write(m.frame(m.Abort(list(request_ids))))

    async def call(self, method: str, *args: Any, timeout: float | None = None, **kwargs: Any) -> Any:
        if self._dead is not None:
            raise self._dead
        packed = self._codec.pack([args, kwargs], self._handle.process.pid)
        call_id = next(self._call_ids)
        self._write(m.frame(m.Call(call_id, method, packed.tree), packed))
        future = self._calls[call_id] = asyncio.get_running_loop().create_future()
        try:
            async with asyncio.timeout(timeout):
                return await future
        except TimeoutError as error:
            if isinstance(error, OmniError):
                raise
            raise DeadlineError(
                f"stage {self.stage_id} did not answer {method} within {timeout:g} s",
                phase=method,
                stage_id=self.stage_id,
            ) from error
        finally:
            self._calls.pop(call_id, None)

    def detach(self) -> None:
        self._listener = None
        if self._transport is not None:
            self._transport.abort()
            self._transport = None
