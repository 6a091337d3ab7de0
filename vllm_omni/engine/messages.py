"""Every message between the driver and a stage process, and how they are framed.

The wire is one stream socket pair per stage. A frame is::

    u32 length of the rest | u32 length of the message | message (msgpack) | buffers of the payload

The message is one of the structs below. Its ``payload``, where it has one, is the tree of a ``Packed`` of
``omni_connectors.utils.serialization``: whoever encodes the message encodes the tree with it, at once; whoever decodes
the message finds the tree's bytes, so that a payload that cannot be read is the failure of one request. Times are
``time.monotonic()`` seconds: one clock for all processes of a host.

Life of a stage: driver sends ``Start``; the stage answers ``Ready`` or ``Failed`` and, after ``Ready``, takes
``Submit``, ``Expect``, ``Abort``, ``Call`` and ``Shutdown``; it sends ``Output``, ``Notes``, ``Progress``, ``Failure``,
``Skipped``, ``Returned``, and last ``Stopped`` or ``Failed``. End of the stream means that the other side is gone.

Two stage processes with a direct edge between them share one more socket pair, a lane, on which the source sends the
``Output``s of requests that were submitted to it as direct, and of which the target was told by ``Expect`` before. The
driver gets one ``Output`` without data of such a request, at its end in the source. Of a request that is traced it gets
``Notes``, too.
"""

from __future__ import annotations

import struct
from typing import Any

import msgspec

from vllm_omni.distributed.omni_connectors.utils.serialization import Packed
from vllm_omni.errors import OmniError, StageError, from_wire

Buffer = bytes | bytearray | memoryview

NOTHING = msgspec.Raw(b"\xc0")
"""An empty payload."""


class Edge(msgspec.Struct, array_like=True, frozen=True):
    """How a stage makes its input of what comes straight from its one source."""

    source: int
    function: str | None
    """Qualified name; None passes the outputs on."""
    window: int
    extra: dict[str, Any]


class Start(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """First message to a stage process. Payload: the engine's arguments, a dictionary."""

    stage_id: int
    engine_cls: str
    threshold: int
    batch_wait: float
    batch_size: int
    payload: msgspec.Raw
    edge: Edge | None = None
    lane_in: int = -1
    """Number of the inherited socket on which the source of ``edge`` sends."""
    lane_out: int = -1
    """Number of the inherited socket to the stage that this one is the source of."""


class Submit(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """A request, or one more chunk of it. Payload: ``[prompt, sampling_params]`` for chunk 0, ``[prompt]`` for others,
    whose parameters are the same."""

    request_id: str
    deadline: float | None
    chunk: int
    last: bool
    traced: bool
    payload: msgspec.Raw
    direct: bool = False
    """Whether the outputs go straight to the next stage. Of chunk 0."""


class Expect(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """A request whose chunks will come straight from the source. Payload: ``[prompt of the user, sampling_params]``."""

    request_id: str
    deadline: float | None
    direct: bool
    """As of ``Submit``."""
    payload: msgspec.Raw
    traced: bool = False


class Abort(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """Forget these requests."""

    request_ids: list[str]


class Call(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """Call a method of the engine; answered by ``Returned``. Payload: ``[args, kwargs]``."""

    call_id: int
    method: str
    payload: msgspec.Raw


class Shutdown(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """Close the engine and exit."""


class Ready(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """The engine is loaded. Payload: its facts."""

    name: str
    ranks: int
    pids: list[int]
    payload: msgspec.Raw


class WireError(msgspec.Struct, array_like=True, frozen=True):
    """An error in a message."""

    error: str
    message: str
    details: dict[str, Any]

    @classmethod
    def of(cls, error: BaseException, stage_id: int) -> WireError:
        """``error`` with the stage's id; an error that is not ours becomes a ``StageError``."""
        if not isinstance(error, OmniError):
            error = StageError(f"{type(error).__name__}: {error}")
        wire = error.to_wire()
        details = {"stage_id": stage_id, **{key: _plain(value) for key, value in wire["details"].items()}}
        return cls(wire["error"], wire["message"], details)

    def build(self) -> OmniError:
        """The error itself."""
        return from_wire({"error": self.error, "message": self.message, "details": self.details})


class Failed(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """The engine could not be loaded, or raised; the process exits."""

    error: WireError
    traceback: str


class Output(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """Output of a request. Payload: the named outputs."""

    request_id: str
    finished: bool
    received: float
    started: float
    sent: float
    shared: int
    payload: msgspec.Raw
    spans: list[tuple[str, float, float, dict[str, Any]]] = []
    came: float = 0.0
    """When the source sent the first chunk, where that came straight from it."""
    bytes_in: int = 0
    """Bytes that came straight from it so far."""


class Notes(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """What the driver does not see of a traced request whose chunks go past it, since the last notes of the stage."""

    request_id: str
    received: float
    started: float
    came: list[tuple[float, float, int, bool]]
    """Of each chunk that came straight from the source: when it was sent, when it was here, its bytes, and whether the
    engine got something now."""
    left: list[tuple[float, int]]
    """Of each output that went straight on: when it was sent, and its bytes."""
    spans: list[tuple[str, float, float, dict[str, Any]]]
    """As of ``Output``."""


class Skipped(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """The source has ended, and the edge function asked the stage for nothing."""

    request_id: str


class Progress(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """A request got one step further."""

    request_id: str
    step: int
    total: int


class Preview(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """What a request is going to become. Payload: the pictures, an array."""

    request_id: str
    step: int
    total: int
    size: tuple[int, int]
    payload: msgspec.Raw


class Failure(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """A request failed; the stage goes on."""

    request_id: str
    error: WireError


class Returned(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """Answer to ``Call``. Payload: the result, unless ``error``."""

    call_id: int
    error: WireError | None
    payload: msgspec.Raw = NOTHING


class Stopped(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """The engine is closed; the process exits."""


ToStage = Start | Submit | Expect | Abort | Call | Shutdown
ToDriver = Ready | Failed | Output | Notes | Skipped | Progress | Preview | Failure | Returned | Stopped
Message = ToStage | ToDriver

RECEIVE_BYTES = 256 * 1024
"""Size of the buffer that either side receives into."""

_ENCODER = msgspec.msgpack.Encoder()
_DECODER: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(Message)
_HEAD = struct.Struct("<II")


def _plain(value: Any) -> Any:
    if isinstance(value, (str, int, float, bool, type(None))):
        return value
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return repr(value)


def frame(message: Message, packed: Packed | None = None) -> bytes:
    """The bytes of one frame.

    Args:
        message: the message.
        packed: its payload, whose tree is in the message.

    Raises:
        RequestError: there is something in the payload that cannot travel.
    """
    if packed is None:
        body, buffers = _ENCODER.encode(message), None
    else:
        body, buffers = packed.encode(message), packed.buffers
    size = len(body)
    if not buffers:
        return _HEAD.pack(4 + size, size) + body
    return b"".join((_HEAD.pack(4 + size + sum(map(len, buffers)), size), body, *buffers))


class FrameReader:
    """Cuts a byte stream into messages."""

    def __init__(self) -> None:
        self._rest = bytearray()

    def feed(self, data: Buffer) -> list[tuple[Message, memoryview]]:
        """The messages that are complete with ``data``, each with its payload's buffers; a payload stays valid as long
        as ``data`` does."""
        if self._rest:
            self._rest += data
            if len(self._rest) < 4 or len(self._rest) < 4 + int.from_bytes(self._rest[:4], "little"):
                return []
            data, self._rest = self._rest, bytearray()
        view = memoryview(data)
        start, end = 0, len(view)
        found = []
        while end - start >= _HEAD.size:
            length, size = _HEAD.unpack_from(view, start)
            body, after = start + _HEAD.size, start + 4 + length
            if after > end:
                break
            found.append((_DECODER.decode(view[body : body + size]), view[body + size : after]))
            start = after
        if start < end:
            self._rest = bytearray(view[start:])
        return found
