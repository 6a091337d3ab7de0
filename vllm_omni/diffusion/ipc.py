"""Messages between a diffusion engine and its ranks, and how they travel.

They go over a socket pair that only the engine and the rank hold. A message is one frame: a pickle of the dataclass
with the bytes of tensors and arrays beside it (pickle protocol 5, out of band), so that tensors are never pickled and
never copied on the way in. Both ends are the same package and the same user, so that pickle is safe here.
"""

from __future__ import annotations

import io
import pickle
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

import torch

from vllm_omni.diffusion.data import OmniDiffusionConfig
from vllm_omni.diffusion.request import OmniDiffusionRequest

# ---------------------------------------------------------------------------------------------- engine -> rank


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One unit of work, the same for every rank. Applied in the order of the fields."""

    drop: tuple[str, ...] = ()
    """Requests to forget."""
    new: tuple[OmniDiffusionRequest, ...] = ()
    """Requests (of one prompt each) to check and keep."""
    kind: str | None = None
    """``encode``, ``denoise``, ``decode``, ``run``, or None for no unit."""
    request_ids: tuple[str, ...] = ()
    """The requests of the unit."""
    collect: bool = False
    """Wait for outputs that the device still works on."""


@dataclass(frozen=True, slots=True)
class Call:
    """Call a method of the worker."""

    method: str
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Regroup:
    """Make the process groups sound again: a unit failed, perhaps in the middle of a collective.

    See ``DiffusionWorker.regroup``.
    """

    init_method: str


@dataclass(frozen=True, slots=True)
class Stop:
    """Free everything and exit."""


@dataclass(frozen=True, slots=True)
class RankSetup:
    """What a rank is started with."""

    rank: int
    local_rank: int
    od_config: OmniDiffusionConfig
    init_method: str
    parent_pid: int
    pulse: str | None = None
    """Where the rank gives signs of life; None when nobody listens."""


# ---------------------------------------------------------------------------------------------- rank -> engine


@dataclass(frozen=True, slots=True)
class Accepted:
    """A new request passed the pipeline's check."""

    shape: tuple[Any, ...]
    """Height, width and frames asked for: enough to take turns between sizes."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """A request is ready for its first denoise step."""

    bucket: int
    """Equal for requests that can share a forward."""
    steps: int
    tokens: int
    """Latent tokens of all its pictures."""


@dataclass(frozen=True, slots=True)
class Output:
    """What a request made."""

    images: list[Any]
    latents: torch.Tensor | None = None
    metrics: dict[str, Any] = field(default_factory=dict)
    extras: dict[str, Any] = field(default_factory=dict)
    """Further named outputs, such as the decoded trajectory."""


@dataclass(frozen=True, slots=True)
class Preview:
    """What a request is going to become, after one of its steps."""

    request_id: str
    step: int
    images: Any
    """[B, h, w, 3] uint8, a numpy array."""
    size: tuple[int, int]
    """Width and height of the pictures that are being made."""


@dataclass(frozen=True, slots=True)
class UnitError:
    """A unit failed on a rank; the rank goes on."""

    message: str
    out_of_memory: bool
    untouched: bool
    """Whether the states of the unit's requests are as before it, so that it can be tried again."""
    traceback: str
    error: dict[str, Any] | None = None
    """The typed error (``OmniError.to_wire``) when the pipeline raised one."""


@dataclass(slots=True)
class StepResult:
    """What came of a ``StepPlan``. Ranks other than 0 fill ``error`` only."""

    accepted: dict[str, Accepted] = field(default_factory=dict)
    refused: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Typed errors (``OmniError.to_wire``) of new requests that the pipeline's check refused."""
    encoded: dict[str, Encoded] = field(default_factory=dict)
    outputs: dict[str, Output] = field(default_factory=dict)
    """Requests whose output is on the host; perhaps of an earlier unit."""
    previews: list[Preview] = field(default_factory=list)
    """Previews that are on the host; perhaps of an earlier unit."""
    pending: int = 0
    """Outputs that the device still works on."""
    error: UnitError | None = None
    token_limits: dict[str, float] = field(default_factory=dict)
    """Latent tokens that memory allows, as measured so far: in one ``denoise`` unit, in one ``decode`` unit, and those
    of the largest request that can ``fit`` at all."""


@dataclass(frozen=True, slots=True)
class Ready:
    """The rank has loaded the model."""

    pid: int
    facts: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Failed:
    """The rank could not start, or a call failed."""

    error: dict[str, Any]
    """``OmniError.to_wire``, with the traceback among its details."""


@dataclass(frozen=True, slots=True)
class Returned:
    """Result of a ``Call``, a ``Regroup`` or a ``Stop``."""

    value: Any = None


# ---------------------------------------------------------------------------------------------- frames


def _generator(device: str, state: torch.Tensor) -> torch.Generator:
    generator = torch.Generator(device=device)
    generator.set_state(state)
    return generator


def _tensor(data: Any, dtype: torch.dtype, shape: torch.Size) -> torch.Tensor:
    if not len(data):
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(data, dtype=dtype).view(shape)


class _Pickler(pickle.Pickler):
    """Takes the bytes of tensors out of band. A tensor on a device arrives on the CPU."""

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, torch.Generator):
            # By kind of device: "cuda" is each rank's own.
            return _generator, (obj.device.type, obj.get_state())
        if type(obj) is torch.Tensor:
            host = obj.detach().contiguous().cpu()
            raw = host.view(-1).view(torch.uint8).numpy() if host.numel() else memoryview(b"")
            return _tensor, (pickle.PickleBuffer(raw), host.dtype, host.shape)
        return NotImplemented


def encode(message: Any) -> list[Any]:
    """A message as buffers: the pickle first, then the raw bytes of its tensors and arrays."""
    buffers: list[pickle.PickleBuffer] = []
    head = io.BytesIO()
    _Pickler(head, protocol=5, buffer_callback=buffers.append).dump(message)
    return [head.getbuffer(), *(buffer.raw() for buffer in buffers)]


def decode(parts: Sequence[Any]) -> Any:
    """The inverse of ``encode``; tensors share memory with ``parts``."""
    return pickle.loads(parts[0], buffers=parts[1:])


def send(connection: Connection, message: Any) -> None:
    """Raises ``OSError`` when the other side is gone."""
    parts = encode(message)
    connection.send_bytes(struct.pack(f"<{len(parts)}Q", *(part.nbytes for part in parts)))
    for part in parts:
        if part.nbytes:
            connection.send_bytes(part)


def receive(connection: Connection) -> Any:
    """Blocks for one message. Raises ``EOFError`` or ``OSError`` when the other side is gone."""
    header = connection.recv_bytes()
    parts: list[bytearray] = []
    for (size,) in struct.iter_unpack("<Q", header):
        part = bytearray(size)
        if size:
            connection.recv_bytes_into(part)
        parts.append(part)
    return decode(parts)
