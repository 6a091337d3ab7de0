"""What travels with a request through vLLM's own messages: named tensors and plain values as one block of bytes.

Into a stage it is ``SamplingParams.extra_args["omni"]`` (``PoolingParams.extra_kwargs["omni"]`` for a generation
stage), out of a stage ``ModelRunnerOutput.pooler_output``, one uint8 tensor a request. vLLM's engine core and scheduler
forward both without looking inside.

Layout: 8 bytes little-endian length of the header, the header (msgpack), then the tensors' bytes, each at a multiple of
16 from the start. A tensor stands in the header as an extension value: (dtype, shape, offset).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import torch
from vllm.pooling_params import PoolingParams
from vllm.sampling_params import SamplingParams

from vllm_omni.errors import RequestError

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import NewRequestData
    from vllm.v1.request import Request

KEY = "omni"
_ALIGN = 16
_TENSOR = 1
_DTYPES: dict[str, torch.dtype] = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float64,
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.float8_e4m3fn,
        torch.float8_e5m2,
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.uint8,
        torch.bool,
        torch.complex64,
    )
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


def _aligned(size: int) -> int:
    return -(-size // _ALIGN) * _ALIGN


class _Tensors:
    """The tensors met while a header is encoded, and where each goes."""

    def __init__(self) -> None:
        self.buffers: list[Any] = []
        self.size = 0

    def add(self, value: Any) -> msgspec.msgpack.Ext:
        """``enc_hook``: place a tensor or array. Raises ``NotImplementedError`` for what cannot travel."""
        if isinstance(value, np.generic):
            value = np.asarray(value)
        if isinstance(value, np.ndarray):
            value = torch.from_numpy(np.ascontiguousarray(value))
        if not isinstance(value, torch.Tensor) or value.dtype not in _NAMES:
            raise NotImplementedError(f"cannot send a {type(value).__name__} to another stage")
        flat = value.detach().to("cpu").contiguous().reshape(-1)
        head = msgspec.msgpack.encode((_NAMES[value.dtype], tuple(value.shape), self.size))
        self.buffers.append(flat.view(torch.uint8).numpy())
        self.size += _aligned(flat.numel() * flat.element_size())
        return msgspec.msgpack.Ext(_TENSOR, head)


def pack_bytes(payload: Mapping[str, Any]) -> bytearray:
    """``payload`` (tensors, arrays, plain values, nested as liked) as bytes; ``unpack`` is the inverse.

    Raises:
        RequestError: a value of a type that cannot travel.
    """
    tensors = _Tensors()
    try:
        header = msgspec.msgpack.Encoder(enc_hook=tensors.add).encode(payload)
    except (NotImplementedError, TypeError, OverflowError) as error:
        raise RequestError(f"payload cannot be sent: {error}", field=KEY) from error
    start = _aligned(8 + len(header))
    out = bytearray(start + tensors.size)
    out[:8] = len(header).to_bytes(8, "little")
    out[8 : 8 + len(header)] = header
    view = memoryview(out)
    for buffer in tensors.buffers:
        view[start : start + buffer.nbytes] = buffer.data
        start += _aligned(buffer.nbytes)
    return out


def pack(payload: Mapping[str, Any]) -> torch.Tensor:
    """``payload`` as one uint8 tensor, the form that ``pooler_output`` carries."""
    return torch.frombuffer(pack_bytes(payload), dtype=torch.uint8)


def unpack(block: bytes | bytearray | memoryview | torch.Tensor) -> dict[str, Any]:
    """The payload that ``pack`` or ``pack_bytes`` wrote. Tensors are views of ``block``, or of a copy of bytes.

    Raises:
        RequestError: ``block`` is damaged.
    """
    if not isinstance(block, torch.Tensor):
        block = torch.frombuffer(bytearray(block), dtype=torch.uint8) if block else torch.empty(0, dtype=torch.uint8)
    elif block.storage_offset() % _ALIGN:
        block = block.clone()
    raw = memoryview(block.numpy())
    length = int.from_bytes(raw[:8], "little")
    start = _aligned(8 + length)
    if len(raw) < 8 or start > _aligned(len(raw)):
        raise RequestError(f"payload cannot be read: header of {length} in {len(raw)} bytes", field=KEY)

    def tensor(code: int, data: memoryview) -> torch.Tensor:
        if code != _TENSOR:
            raise ValueError(f"unknown extension {code}")
        name, shape, offset = msgspec.msgpack.decode(data, type=tuple[str, tuple[int, ...], int])
        dtype = _DTYPES[name]
        begin, count = start + offset, int(np.prod(shape, dtype=np.int64))
        end = begin + count * dtype.itemsize
        if end > len(raw) or min((0, *shape)) < 0:
            raise ValueError(f"tensor of shape {shape} reaches beyond the payload's end")
        return block[begin:end].view(dtype).reshape(shape)

    try:
        payload = msgspec.msgpack.Decoder(dict[str, Any], ext_hook=tensor).decode(raw[8 : 8 + length])
    except (msgspec.DecodeError, ValueError, KeyError) as error:
        raise RequestError(f"payload cannot be read: {error}", field=KEY) from error
    return payload


@dataclass(frozen=True)
class OmniPayload:
    """What this package adds to one request, or to one later chunk of it."""

    data: bytes | bytearray | None = None
    """The payload as ``pack_bytes`` wrote it."""
    chunk: int = 0
    """Number of the chunk; 0 opens the request."""
    steps: int = 0
    """Decode steps for which this chunk brings the conditioning."""
    last: bool = True
    """Whether no chunk follows."""
    emit: bool = True
    """Whether the stage sends its hidden states on."""

    def attach(self, params: SamplingParams | PoolingParams) -> None:
        """Put it into the sampling or pooling parameters of the request that it travels with."""
        wire = [None if self.data is None else bytes(self.data), self.chunk, self.steps, self.last, self.emit]
        if isinstance(params, SamplingParams):
            params.extra_args = {**(params.extra_args or {}), KEY: wire}
        else:
            params.extra_kwargs = {**(params.extra_kwargs or {}), KEY: wire}


DEFAULT = OmniPayload()


def payload_of(request: Request | NewRequestData) -> OmniPayload:
    """What ``OmniPayload.attach`` put into the parameters of ``request``; the default when there is nothing."""
    if request.sampling_params is not None:
        extra = request.sampling_params.extra_args
    else:
        extra = request.pooling_params.extra_kwargs if request.pooling_params is not None else None
    wire = (extra or {}).get(KEY)
    return DEFAULT if wire is None else OmniPayload(*wire)
