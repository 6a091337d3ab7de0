"""The process of a stage: ``stage_main`` is its one entry function.

The main thread owns the sockets and drives the ``StageEngine``: it takes every message that has arrived (and waits in
the kernel when the engine has no work), hands them to the engine, lets it do one step and sends what came of it. A
second thread sleeps in the kernel until the driver's end of the socket closes and then ends the process, whatever the
main thread is doing (as ``process.watch_lifeline`` does, but without reading from the socket, which is the main
thread's to do); PR_SET_PDEATHSIG does the same where it can. Nothing polls.

The process is started by ``exec`` of a fresh interpreter, not by fork and not by ``multiprocessing``: a user's script
needs no ``__main__`` guard, and a stage without torch costs a tenth of a second.
"""

from __future__ import annotations

import gc
import importlib
import os
import select
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing import process
from typing import Any, NoReturn

from vllm_omni import pulse
from vllm_omni.distributed.omni_connectors.utils.arena import Arena
from vllm_omni.distributed.omni_connectors.utils.serialization import Codec
from vllm_omni.engine import messages as m
from vllm_omni.engine.channel import Channel, Messages
from vllm_omni.engine.direct_input import DirectInput
from vllm_omni.engine.inbox import input_error
from vllm_omni.engine.notes import TraceNotes
from vllm_omni.engine.stage_engine import (
    StageChunk,
    StageEngine,
    StageEvent,
    StageInput,
    StagePreview,
    StageProgress,
)
from vllm_omni.errors import ConfigError, OmniError, StageError
from vllm_omni.process import die_with_parent, name_process


@dataclass(slots=True)
class _Open:
    """What the process knows of a request in its engine."""

    received: float
    params: Any
    started: float = 0.0
    direct: bool = False
    """Whether its outputs go straight to the next stage."""
    bytes_out: int = 0
    """Of those that did."""
    came: float = 0.0
    bytes_in: int = 0
    """As of ``messages.Output``."""
    notes: TraceNotes | None = None
    """Of a request that is traced, where chunks of it come or go past the driver."""


class StageServer:
    """One engine and its requests."""

    def __init__(self, channel: Channel, start: m.Start, codec: Codec, engine: StageEngine) -> None:
        self.channel = channel
        self.start = start
        self.codec = codec
        self.engine = engine
        self.running = True
        self._driver = os.getppid()
        self._open: dict[str, _Open] = {}
        self._direct = None if start.edge is None else DirectInput(start.edge, codec)

    def serve(self) -> None:
        """Run until the driver says ``Shutdown``, closes the stream, or SIGTERM comes."""
        working = self.engine.has_work()
        while self.running:
            if working:
                self.take(0.0)
            else:
                pulse.idle(*self._load())
                self.take(None)
                if self.start.batch_wait > 0 and self.engine.has_work():
                    self._gather()
            working = self.running and self.engine.has_work()
            if working:
                pulse.busy(*self._load())
                self._step()
                working = self.engine.has_work()

    def _load(self) -> tuple[int, int]:
        return self.engine.load() or (0, len(self._open))

    def take(self, wait: float | None) -> None:
        """Handle what has arrived; ``wait`` seconds for the first message, or as long as it takes."""
        self._handle_all(self.channel.receive(wait))

    def _handle_all(self, arrived: Messages | None) -> None:
        if arrived is None:
            self.running = False
            return
        for message, buffers in arrived:
            self.handle(message, buffers)

    def _gather(self) -> None:
        """An idle stage waits ``batch_wait`` seconds for more requests before its first step, or until it is full."""
        end = time.monotonic() + self.start.batch_wait
        while self.running and len(self._open) < self.start.batch_size:
            left = end - time.monotonic()
            if left <= 0:
                return
            self.take(left)

    def handle(self, message: m.Message, buffers: memoryview) -> None:
        """One message, of the driver or of the source."""
        if isinstance(message, m.Output):
            self._chunk(message, buffers)
        elif isinstance(message, m.Submit):
            self._submit(message, buffers)
        elif isinstance(message, m.Expect):
            self._expect(message, buffers)
        elif isinstance(message, m.Abort):
            self._abort(message.request_ids)
        elif isinstance(message, m.Call):
            self._call(message, buffers)
        else:
            self.running = False

    def _abort(self, request_ids: list[str]) -> None:
        for request_id in request_ids:
            self._forget(request_id)
        self.engine.abort(request_ids)

    def _forget(self, request_id: str) -> None:
        self._open.pop(request_id, None)
        if self._direct is not None:
            self._direct.streams.pop(request_id, None)

    def _submit(self, message: m.Submit, buffers: memoryview) -> None:
        now = time.monotonic()
        request_id, chunk = message.request_id, message.chunk
        try:
            words = self.codec.unpack(message.payload, buffers)
        except OmniError as error:
            self._refuse(request_id, error)
            return
        if chunk == 0:
            notes = TraceNotes() if message.traced and message.direct else None
            self._open[request_id] = _Open(now, words[1], direct=message.direct, notes=notes)
        elif request_id not in self._open:
            return  # it has ended here since the driver sent this
        params = self._open[request_id].params
        self.engine.add_request(
            StageInput(request_id, words[0], params, message.deadline, chunk, message.last, message.traced)
        )

    def _refuse(self, request_id: str, error: OmniError) -> None:
        failure = self._failure(request_id, error)
        self.engine.abort([request_id])  # of its earlier chunks
        self.channel.send(failure)

    def _expect(self, message: m.Expect, buffers: memoryview) -> None:
        assert self._direct is not None
        try:
            self._direct.expect(message, buffers)
        except OmniError as error:
            self._refuse(message.request_id, error)

    def _chunk(self, message: m.Output, buffers: memoryview) -> None:
        """What the source sent straight."""
        direct, request_id = self._direct, message.request_id
        assert direct is not None
        stream = direct.streams.get(request_id)
        if stream is None:
            while self.running and self.channel.more_from_driver():
                self._handle_all(self.channel.receive_from_driver())
            stream = direct.streams.get(request_id)
            if stream is None:
                direct.drop(message, buffers)
                return
        notes = stream.notes
        arrived = 0.0 if notes is None else time.monotonic()
        try:
            made = direct.take(stream, message, buffers)
        except Exception as error:
            self._refuse(request_id, input_error(error, self.start.stage_id))
            return
        if notes is not None:
            notes.chunk(message.sent, arrived, stream.nbytes, made is not None)
        if made is not None:
            request = self._open.get(request_id)
            if request is None:
                request = _Open(stream.received, stream.params, direct=stream.direct, came=stream.came, notes=notes)
                self._open[request_id] = request
            request.bytes_in = stream.nbytes
            self.engine.add_request(made)
        elif message.finished:
            skipped = m.frame(m.Skipped(request_id))
            self.channel.send(skipped if notes is None else notes.frame(request_id, arrived, 0.0, arrived) + skipped)

    def _step(self) -> None:
        now = time.monotonic()
        for request in self._open.values():
            request.started = request.started or now
        frames = [frame for event in self.engine.step() if (frame := self._frame(event))]
        if frames:
            self.channel.send(*frames)

    def _frame(self, event: StageEvent) -> bytes:
        """What the driver is to hear of it."""
        if isinstance(event, StageChunk):
            try:
                return self._output(event)
            except OmniError as error:
                return self._failure(event.request_id, StageError(f"output {error.message}"))
        if isinstance(event, StageProgress):
            return m.frame(m.Progress(event.request_id, event.step, event.total))
        if isinstance(event, StagePreview):
            packed = self.codec.pack(event.images, self._driver)
            return m.frame(m.Preview(event.request_id, event.step, event.total, event.size, packed.tree), packed)
        return self._failure(event.request_id, event.error)

    def _output(self, event: StageChunk) -> bytes:
        now = time.monotonic()
        request_id, finished = event.request_id, event.finished
        request = self._open.get(request_id) or _Open(now, None, now)
        if finished:
            self._forget(request_id)
        lane = self.channel.lane_out if request.direct else None
        packed = self.codec.pack(event.data, self._driver if lane is None else lane.reader)
        started = request.started if event.started is None else event.started
        times = request.received, started, now
        notes = request.notes
        if lane is None:
            facts = list(event.spans), request.came, request.bytes_in
            frame = m.frame(m.Output(request_id, finished, *times, packed.shared, packed.tree, *facts), packed)
            return frame if notes is None else notes.frame(request_id, *times) + frame
        frame = m.frame(m.Output(request_id, finished, *times, packed.shared, packed.tree), packed)
        lane.send(frame)
        size = len(frame) + packed.shared
        request.bytes_out += size
        told = b"" if notes is None else notes.output(request_id, *times, size, event.spans, finished)
        if not finished:
            return told
        nothing = self.codec.pack({})
        facts = [], request.came, request.bytes_in
        return told + m.frame(m.Output(request_id, True, *times, request.bytes_out, nothing.tree, *facts), nothing)

    def _failure(self, request_id: str, error: OmniError) -> bytes:
        failure = m.frame(m.Failure(request_id, m.WireError.of(error, self.start.stage_id)))
        request = self._open.get(request_id)
        self._forget(request_id)
        if request is None or request.notes is None:
            return failure
        return request.notes.frame(request_id, request.received, request.started, 0.0) + failure

    def _call(self, message: m.Call, buffers: memoryview) -> None:
        stage_id = self.start.stage_id
        pulse.idle(*self._load())  # its caller decides how long it may take
        try:
            args, kwargs = self.codec.unpack(message.payload, buffers)
            packed = self.codec.pack(_METHODS[message.method](self.engine, *args, **kwargs), self._driver)
            answer = m.frame(m.Returned(message.call_id, None, packed.tree), packed)
        except NotImplementedError:
            error: Exception = ConfigError(f"the engine of stage {stage_id} has no {message.method}")
            self.channel.send(m.frame(m.Returned(message.call_id, m.WireError.of(error, stage_id))))
        except Exception as failure:
            # The engine's own methods (worker extensions among them) may raise anything; the caller gets it, typed.
            self.channel.send(m.frame(m.Returned(message.call_id, m.WireError.of(failure, stage_id))))
        else:
            self.channel.send(answer)


_METHODS: dict[str, Callable[..., Any]] = {
    "check_health": lambda engine: engine.check_health(),
    "start_profile": lambda engine, folder: engine.start_profile(folder),
    "stop_profile": lambda engine: engine.stop_profile(),
    "call": lambda engine, method, args, kwargs: engine.call(method, args, kwargs),
}


def _watch_driver(sock: socket.socket, state: dict[str, bool]) -> None:
    """End this process when the driver's end of the socket closes, unless it is stopping anyway."""

    def watch() -> None:
        poll = select.poll()
        poll.register(sock.fileno(), select.POLLRDHUP | select.POLLHUP)
        poll.poll()
        if not state["stopping"]:
            os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="driver-watch", daemon=True).start()


def load_class(qualified_name: str) -> Any:
    """The class named ``module.Class``.

    Raises:
        ConfigError: there is no such module or class.
    """
    module, _, name = qualified_name.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"cannot load {qualified_name!r}: {error}", field=qualified_name) from error


def _load(start: m.Start, buffers: memoryview, codec: Codec) -> StageEngine:
    cls = load_class(start.engine_cls)
    if not (isinstance(cls, type) and issubclass(cls, StageEngine)):
        raise ConfigError(f"{start.engine_cls} is not a StageEngine", field="engine_cls")
    return cls.from_config(start.stage_id, codec.unpack(start.payload, buffers))


def stage_main(fd: int, parent_pid: int, page: int) -> int:
    """Serve one stage on socket ``fd`` until it ends; returns the exit code.

    Args:
        fd: number of the inherited socket.
        page: number of the inherited file in which the processes of the stage give signs of life.
        parent_pid: the driver, where the kernel can tell of its death; 0 where it cannot, because not the driver's main
            thread started this process (the kernel's signal follows that thread, which may end before the driver).
    """
    if parent_pid:
        die_with_parent(parent_pid)
    pulse.start(page, slot=0)
    state = {"stopping": False}
    sock = socket.socket(fileno=fd)
    sock.set_inheritable(False)
    _watch_driver(sock, state)
    channel = Channel(sock)
    first = channel.receive(None)
    while first == []:
        first = channel.receive(None)
    if not first:
        return 1
    start, buffers = first[0]
    assert isinstance(start, m.Start)
    channel.open_lanes(start.lane_in, start.lane_out)
    name_process(f"omni-stage-{start.stage_id}")
    process.current_process().name = f"stage-{start.stage_id}"  # for log lines
    arena = Arena()
    codec = Codec(arena, start.threshold)

    def stop(signum: int, frame: Any) -> None:
        state["stopping"] = True
        sock.shutdown(socket.SHUT_RD)  # wakes the main thread out of recv

    engine: StageEngine | None = None
    try:
        engine = _load(start, buffers, codec)
        info = engine.info()
        signal.signal(signal.SIGTERM, stop)
        gc.freeze()  # what is loaded stays: no collection need look at it
        facts = codec.pack(info.facts)
        channel.send(m.frame(m.Ready(info.name, info.ranks, info.pids, facts.tree), facts))
        StageServer(channel, start, codec, engine).serve()
        state["stopping"] = True
        engine.close()
        channel.send(m.frame(m.Stopped()))
        return 0
    except Exception as error:  # the process main: everything becomes a message, then the process ends
        state["stopping"] = True
        failed = m.Failed(m.WireError.of(error, start.stage_id), traceback.format_exc())
        _report(channel, failed)
        if engine is not None:
            engine.close()
        return 1
    finally:
        arena.close()


def _report(channel: Channel, failed: m.Failed) -> None:
    try:
        channel.send(m.frame(failed))
    except OSError:
        print(failed.traceback, file=sys.stderr)


def main(argv: Sequence[str]) -> NoReturn:
    """``argv``: number of the socket, process id of the driver or 0, number of the pulse's page."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the driver's to handle
    code = stage_main(int(argv[0]), int(argv[1]), int(argv[2]))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # everything is closed; the interpreter would only take down what is loaded, for a second or more
