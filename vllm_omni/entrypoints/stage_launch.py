"""Start stage processes, wait until they are ready, and end them. Plain blocking code, used before and after any
loop."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vllm_omni.distributed.omni_connectors.utils.serialization import Codec
from vllm_omni.distributed.runtime_directory import child_environment
from vllm_omni.engine import messages as m
from vllm_omni.engine.stage_engine import StageInfo
from vllm_omni.errors import DeadlineError, OmniError, StageDeadError
from vllm_omni.logger import init_logger
from vllm_omni.pulse import PulsePage

logger = init_logger(__name__)

_BOOT = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[4]); "
    "from vllm_omni.engine.stage_process import main; main(sys.argv[1:4])"
)
GRACE = 5.0
"""Seconds that a stage has to close its engine before it is killed."""


@dataclass(frozen=True)
class StageSpec:
    """What a stage process is started with."""

    stage_id: int
    engine_cls: str
    """Qualified name of the ``StageEngine``."""
    engine_args: dict[str, Any]
    threshold: int = 65536
    """Leaves of its outputs above this many bytes go to shared memory."""
    batch_wait: float = 0.0
    """Seconds that an idle stage waits for more requests before its first step."""
    batch_size: int = 64
    """Requests at which it stops waiting."""
    env: Mapping[str, str] = field(default_factory=dict)
    """What its processes get in their environment beside the driver's."""
    edge: m.Edge | None = None
    """The direct edge that leads to it."""


@dataclass
class StageHandle:
    """A running stage process and the driver's end of its socket."""

    spec: StageSpec
    process: subprocess.Popen[bytes]
    sock: socket.socket
    pulse: PulsePage
    """Signs of life of its processes."""
    info: StageInfo = field(default_factory=lambda: StageInfo("starting"))
    reader: m.FrameReader = field(default_factory=m.FrameReader)


Lanes = Mapping[int, tuple[socket.socket, socket.socket]]
"""By source: both ends of the lane to the one stage that reads from it."""


def launch(spec: StageSpec, codec: Codec, lanes: Lanes) -> StageHandle:
    """Start the process of one stage; returns at once."""
    ours, theirs = socket.socketpair()
    lane_in = -1 if spec.edge is None else lanes[spec.edge.source][1].fileno()
    lane_out = lanes[spec.stage_id][0].fileno() if spec.stage_id in lanes else -1
    parent = os.getpid() if threading.current_thread() is threading.main_thread() else 0
    page = PulsePage()
    with theirs:
        numbers = [str(number) for number in (theirs.fileno(), parent, page.fd)]
        process = subprocess.Popen(
            [sys.executable, "-c", _BOOT, *numbers, json.dumps(sys.path)],
            pass_fds=[theirs.fileno(), page.fd, *(number for number in (lane_in, lane_out) if number >= 0)],
            stdin=subprocess.DEVNULL,
            env=child_environment(spec.env),
            process_group=0,
        )
    handle = StageHandle(spec, process, ours, page)
    try:
        args = codec.pack(spec.engine_args, process.pid)
        limits = spec.threshold, spec.batch_wait, spec.batch_size
        edge = spec.edge, lane_in, lane_out
        ours.sendall(m.frame(m.Start(spec.stage_id, spec.engine_cls, *limits, args.tree, *edge), args))
    except (OmniError, OSError):
        end([handle], grace=0.0)
        raise
    return handle


def launch_all(specs: Sequence[StageSpec], codec: Codec, stage_timeout: float, timeout: float) -> list[StageHandle]:
    """Start every stage, then wait for all of them.

    Raises:
        DeadlineError: a stage took longer than ``stage_timeout`` seconds, or all together longer than ``timeout``.
        OmniError: a stage said why it cannot run (``ConfigError``, ``StageError``, ...).
        StageDeadError: a stage's process ended without a word.
    """
    handles: list[StageHandle] = []
    began = time.monotonic()
    try:
        with contextlib.ExitStack() as ends:  # of lanes, which are the stages' alone
            lanes = {spec.edge.source: socket.socketpair() for spec in specs if spec.edge is not None}
            for end_of_lane in itertools.chain.from_iterable(lanes.values()):
                ends.enter_context(end_of_lane)
            for spec in specs:
                handles.append(launch(spec, codec, lanes))
        _wait_ready(handles, codec, began, stage_timeout, timeout)
    except BaseException:
        end(handles, grace=0.5)
        raise
    for handle in handles:
        seconds = time.monotonic() - began
        logger.info("stage %d ready: %s, pid %d", handle.spec.stage_id, handle.info.name, handle.process.pid)
    logger.info("%d stage(s) ready in %.1f s", len(handles), seconds)
    return handles


def _wait_ready(handles: list[StageHandle], codec: Codec, began: float, stage_timeout: float, timeout: float) -> None:
    limit = min(stage_timeout, timeout)
    with selectors.DefaultSelector() as selector:
        for handle in handles:
            selector.register(handle.sock, selectors.EVENT_READ, handle)
        while waiting := selector.get_map():
            left = began + limit - time.monotonic()
            if left <= 0:
                stage_ids = sorted(key.data.spec.stage_id for key in waiting.values())
                name = "init_timeout" if timeout <= stage_timeout else "stage_init_timeout"
                raise DeadlineError(
                    f"stage {stage_ids[0]} is not ready after {limit:g} s ({name}); waiting for stages {stage_ids}",
                    phase="start",
                    stage_id=stage_ids[0],
                )
            for key, _ in selector.select(left):
                if _read_ready(key.data, codec):
                    selector.unregister(key.fileobj)


def _read_ready(handle: StageHandle, codec: Codec) -> bool:
    try:
        data = handle.sock.recv(65536)
    except ConnectionResetError:
        data = b""
    if not data:
        raise dead_error(handle)
    for message, buffers in handle.reader.feed(data):
        if isinstance(message, m.Failed):
            error = message.error.build()
            error.details["traceback"] = message.traceback
            raise error
        assert isinstance(message, m.Ready)
        handle.info = StageInfo(message.name, message.ranks, message.pids, codec.unpack(message.payload, buffers))
        return True
    return False


def dead_error(handle: StageHandle, cause: str = "") -> StageDeadError:
    """The error for a stage whose socket has closed."""
    code = handle.process.poll()
    if code is None:
        try:
            code = handle.process.wait(0.2)
        except subprocess.TimeoutExpired:
            code = None
    how = f"ended with code {code}"
    if code is None:
        how = "closed its connection"
    elif code < 0:
        how = f"was killed by {signal.Signals(-code).name}"
    stage_id = handle.spec.stage_id
    text = f"the process of stage {stage_id} (pid {handle.process.pid}) {how}"
    return StageDeadError(f"{text}: {cause}" if cause else text, stage_id=stage_id, exit_code=code)


def end(handles: Sequence[StageHandle], grace: float = GRACE) -> None:
    """Ask every stage to close, then make sure that all are gone. Idempotent."""
    for handle in handles:
        if handle.sock.fileno() >= 0 and grace > 0:
            _send_quietly(handle, m.frame(m.Shutdown()))
    _wait_exit(handles, grace)
    for handle in handles:
        if handle.process.poll() is None:
            handle.process.terminate()
    _wait_exit(handles, min(grace, 1.0))
    for handle in handles:
        if handle.process.poll() is None:
            handle.process.kill()
        handle.process.wait()
        handle.sock.close()
        handle.pulse.close()


def _wait_exit(handles: Sequence[StageHandle], seconds: float) -> None:
    """Read and drop what the stages still send until each has closed its end, for ``seconds`` at most."""
    end_at = time.monotonic() + seconds
    with selectors.DefaultSelector() as selector:
        for handle in handles:
            if handle.sock.fileno() >= 0:
                selector.register(handle.sock, selectors.EVENT_READ, handle)
        while selector.get_map() and (left := end_at - time.monotonic()) > 0:
            for key, _ in selector.select(left):
                if not _receive_quietly(key.data):
                    selector.unregister(key.fileobj)
    for handle in handles:
        with contextlib.suppress(subprocess.TimeoutExpired):
            handle.process.wait(max(0.0, min(0.5, end_at - time.monotonic())))


def _receive_quietly(handle: StageHandle) -> bytes:
    try:
        return handle.sock.recv(65536)
    except BlockingIOError:
        return b"nothing yet"
    except OSError:
        return b""


def _send_quietly(handle: StageHandle, data: bytes) -> None:
    try:
        handle.sock.settimeout(1.0)
        handle.sock.sendall(data)
    except OSError:
        return
