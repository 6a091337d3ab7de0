"""Every message between the driver and a stage process, and how they are framed.

The wire is one stream socket pair per stage. A frame is::

    u32 length of the rest | u32 length of the message | message (msgpack) | payload

The message is one of the structs below; the payload, where there is one, is in the format of
``omni_connectors.utils.serialization`` and is not looked at by the framing. Times are ``time.monotonic()`` seconds: one
clock for all processes of a host.

Life of a stage: driver sends ``Start``; the stage answers ``Ready`` or ``Failed`` and, after ``Ready``, takes
``Submit``, ``Abort``, ``Call`` and ``Shutdown``; it sends ``Output``, ``Progress``, ``Failure``, ``Returned``, and
last ``Stopped`` or ``Failed``. End of the stream means that the other side is gone.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any

import msgspec

from vllm_omni.errors import OmniError, StageError, from_wire

Buffer = bytes | bytearray | memoryview


class Start(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """First message to a stage process. Payload: the engine's arguments, a dictionary."""

    stage_id: int
    engine_cls: str
    threshold: int
    batch_wait: float
    batch_size: int


class Submit(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """A request, or one more chunk of it. Payload: ``(prompt, sampling_params)``."""

    request_id: str
    deadline: float | None
    chunk: int
    last: bool
    sent: float
    traced: bool = False


class Abort(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """Forget these requests."""

    request_ids: list[str]


class Call(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """Call a method of the engine; answered by ``Returned``. Payload: ``(args, kwargs)``."""

    call_id: int
    method: str


class Shutdown(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """Close the engine and exit."""


class Ready(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """The engine is loaded. Payload: its facts."""

    name: str
    ranks: int
    pids: list[int]


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
    nbytes: int
    spans: list[tuple[str, float, float, dict[str, Any]]] = []


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


class Failure(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """A request failed; the stage goes on."""

    request_id: str
    error: WireError


class Returned(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """Answer to ``Call``. Payload: the result, unless ``error``."""

    call_id: int
    error: WireError | None


class Stopped(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """The engine is closed; the process exits."""


ToStage = Start | Submit | Abort | Call | Shutdown
ToDriver = Ready | Failed | Output | Progress | Preview | Failure | Returned | Stopped
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


def frame(message: Message, payload: list[Buffer] | None = None) -> bytes:
    """The bytes of one frame."""
    body = _ENCODER.encode(message)
    parts = payload or []
    length = 4 + len(body) + sum(map(len, parts))
    return b"".join((_HEAD.pack(length, len(body)), body, *parts))


class FrameReader:
    """Cuts a byte stream into messages."""

    def __init__(self) -> None:
        self._rest = bytearray()

    def feed(self, data: Buffer) -> Iterator[tuple[Message, memoryview]]:
        """The messages that are complete with ``data``; a payload stays valid as long as ``data`` does."""
        if self._rest:
            self._rest += data
            if len(self._rest) < 4 or len(self._rest) < 4 + int.from_bytes(self._rest[:4], "little"):
                return
            data, self._rest = self._rest, bytearray()
        view = memoryview(data)
        start, end = 0, len(view)
        while end - start >= _HEAD.size:
            length, size = _HEAD.unpack_from(view, start)
            if start + 4 + length > end:
                break
            body = start + _HEAD.size
            yield _DECODER.decode(view[body : body + size]), view[body + size : start + 4 + length]
            start += 4 + length
        self._rest = bytearray(view[start:])
