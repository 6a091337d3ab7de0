"""The process of a stage: ``stage_main`` is its one entry function.

The main thread owns the socket and drives the ``StageEngine``: it takes every message that has arrived (and waits in
the kernel when the engine has no work), hands them to the engine, lets it do one step and sends what came of it. A
second thread sleeps in the kernel until the driver's end of the socket closes and then ends the process, whatever the
main thread is doing (as ``process.watch_lifeline`` does, but without reading from the socket, which is the main
thread's to do); PR_SET_PDEATHSIG does the same where it can. Nothing polls.

The process is started by ``exec`` of a fresh interpreter, not by fork and not by ``multiprocessing``: a user's script
needs no ``__main__`` guard, and a stage without torch costs a tenth of a second.
"""

from __future__ import annotations

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
from multiprocessing import process
from typing import Any

from vllm_omni import pulse
from vllm_omni.distributed.omni_connectors.utils.arena import Arena
from vllm_omni.distributed.omni_connectors.utils.serialization import Codec
from vllm_omni.engine import messages as m
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


class _Channel:
    """The stage's end of the socket."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self._reader = m.FrameReader()
        self._buffer = memoryview(bytearray(m.RECEIVE_BYTES))  # one for all messages: a fresh one costs 30 us

    def receive(self, wait: float | None) -> list[tuple[m.Message, memoryview]] | None:
        """Messages that have arrived; ``wait`` seconds for the first (None: as long as it takes). None: end of
        stream."""
        if wait is None:
            size = self.sock.recv_into(self._buffer)
        else:
            if wait > 0 and not select.select([self.sock], [], [], wait)[0]:
                return []
            try:
                size = self.sock.recv_into(self._buffer, 0, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return []
        return list(self._reader.feed(self._buffer[:size])) if size else None

    def send(self, *frames: bytes) -> None:
        self.sock.sendall(b"".join(frames))


class _Stage:
    """One engine and its requests' times."""

    def __init__(self, channel: _Channel, start: m.Start, codec: Codec, engine: StageEngine) -> None:
        self.channel = channel
        self.start = start
        self.codec = codec
        self.engine = engine
        self.running = True
        self._times: dict[str, list[float]] = {}

    def serve(self) -> None:
        """Run until the driver says ``Shutdown``, closes the stream, or SIGTERM comes."""
        while self.running:
            idle = not self.engine.has_work()
            if idle:
                pulse.idle(*self._load())
            self._take(None if idle else 0.0)
            pulse.busy(*self._load())
            if idle and self.running and self.start.batch_wait > 0 and self.engine.has_work():
                self._gather()
            if self.running and self.engine.has_work():
                self._step()

    def _load(self) -> tuple[int, int]:
        return self.engine.load() or (0, len(self._times))

    def _take(self, wait: float | None) -> None:
        arrived = self.channel.receive(wait)
        if arrived is None:
            self.running = False
            return
        for message, payload in arrived:
            self._handle(message, payload)

    def _gather(self) -> None:
        """An idle stage waits ``batch_wait`` seconds for more requests before its first step, or until it is full."""
        end = time.monotonic() + self.start.batch_wait
        while self.running and len(self._times) < self.start.batch_size:
            left = end - time.monotonic()
            if left <= 0:
                return
            self._take(left)

    def _handle(self, message: m.Message, payload: memoryview) -> None:
        if isinstance(message, m.Submit):
            self._submit(message, payload)
        elif isinstance(message, m.Abort):
            for request_id in message.request_ids:
                self._times.pop(request_id, None)
            self.engine.abort(message.request_ids)
        elif isinstance(message, m.Call):
            self._call(message, payload)
        else:
            self.running = False

    def _submit(self, message: m.Submit, payload: memoryview) -> None:
        now = time.monotonic()
        try:
            prompt, params = self.codec.decode(payload)
        except OmniError as error:
            self.channel.send(m.frame(m.Failure(message.request_id, m.WireError.of(error, self.start.stage_id))))
            return
        self._times.setdefault(message.request_id, [now, 0.0])
        self.engine.add_request(
            StageInput(
                message.request_id, prompt, params, message.deadline, message.chunk, message.last, message.traced
            )
        )

    def _step(self) -> None:
        now = time.monotonic()
        for times in self._times.values():
            times[1] = times[1] or now
        frames = [self._frame(event) for event in self.engine.step()]
        if frames:
            self.channel.send(*frames)

    def _frame(self, event: StageEvent) -> bytes:
        if isinstance(event, StageProgress):
            return m.frame(m.Progress(event.request_id, event.step, event.total))
        if isinstance(event, StagePreview):
            payload = self.codec.encode(event.images, holder=os.getppid())
            return m.frame(m.Preview(event.request_id, event.step, event.total, event.size), payload)
        if isinstance(event, StageChunk):
            now = time.monotonic()
            times = self._times.get(event.request_id, [now, now])
            if event.finished:
                self._times.pop(event.request_id, None)
            try:
                payload = self.codec.encode(event.data, holder=os.getppid())
            except OmniError as error:
                return self._failure(event.request_id, StageError(f"output {error.message}"))
            started = times[1] if event.started is None else event.started
            spans = list(event.spans)
            output = m.Output(event.request_id, event.finished, times[0], started, now, payload.nbytes, spans)
            return m.frame(output, payload)
        return self._failure(event.request_id, event.error)

    def _failure(self, request_id: str, error: OmniError) -> bytes:
        self._times.pop(request_id, None)
        return m.frame(m.Failure(request_id, m.WireError.of(error, self.start.stage_id)))

    def _call(self, message: m.Call, payload: memoryview) -> None:
        stage_id = self.start.stage_id
        pulse.idle(*self._load())  # its caller decides how long it may take
        try:
            args, kwargs = self.codec.decode(payload)
            result = self.codec.encode(_METHODS[message.method](self.engine, *args, **kwargs), holder=os.getppid())
        except NotImplementedError:
            error: Exception = ConfigError(f"the engine of stage {stage_id} has no {message.method}")
            self.channel.send(m.frame(m.Returned(message.call_id, m.WireError.of(error, stage_id))))
        except Exception as failure:
            # The engine's own methods (worker extensions among them) may raise anything; the caller gets it, typed.
            self.channel.send(m.frame(m.Returned(message.call_id, m.WireError.of(failure, stage_id))))
        else:
            self.channel.send(m.frame(m.Returned(message.call_id, None), result))


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


def _load(start: m.Start, payload: memoryview, codec: Codec) -> StageEngine:
    cls = load_class(start.engine_cls)
    if not (isinstance(cls, type) and issubclass(cls, StageEngine)):
        raise ConfigError(f"{start.engine_cls} is not a StageEngine", field="engine_cls")
    return cls.from_config(start.stage_id, codec.decode(payload))


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
    channel = _Channel(sock)
    first = channel.receive(None)
    while first == []:
        first = channel.receive(None)
    if not first:
        return 1
    start, payload = first[0]
    assert isinstance(start, m.Start)
    name_process(f"omni-stage-{start.stage_id}")
    process.current_process().name = f"stage-{start.stage_id}"  # for log lines
    arena = Arena()
    codec = Codec(arena, start.threshold)

    def stop(signum: int, frame: Any) -> None:
        state["stopping"] = True
        sock.shutdown(socket.SHUT_RD)  # wakes the main thread out of recv

    engine: StageEngine | None = None
    try:
        engine = _load(start, payload, codec)
        info = engine.info()
        signal.signal(signal.SIGTERM, stop)
        channel.send(m.frame(m.Ready(info.name, info.ranks, info.pids), codec.encode(info.facts)))
        _Stage(channel, start, codec, engine).serve()
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


def _report(channel: _Channel, failed: m.Failed) -> None:
    try:
        channel.send(m.frame(failed))
    except OSError:
        print(failed.traceback, file=sys.stderr)


def main(argv: Sequence[str]) -> None:
    """``argv``: number of the socket, process id of the driver or 0, number of the pulse's page."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the driver's to handle
    code = stage_main(int(argv[0]), int(argv[1]), int(argv[2]))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code) if code else sys.exit(0)
