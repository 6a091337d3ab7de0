"""What travels with a request through vLLM's own messages: named tensors and plain values as one block of bytes.

Into a stage it is ``SamplingParams.extra_args["omni"]`` (``PoolingParams.extra_kwargs["omni"]`` for a generation
stage), out of a stage ``ModelRunnerOutput.pooler_output``, one uint8 tensor a request. vLLM's engine core and scheduler
forward both without looking inside. The bytes are in the one payload format of the package
(``omni_connectors.utils.serialization``): large tensors stand in shared memory, written by the worker that made them
and mapped by the worker that reads them; only a reference goes through the engine core and the driver.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from vllm.pooling_params import PoolingParams
from vllm.sampling_params import SamplingParams

from vllm_omni.distributed.omni_connectors.utils.serialization import Codec, leaf_refs
from vllm_omni.errors import ConnectorError

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import NewRequestData
    from vllm.v1.request import Request

KEY = "omni"
ANYONE = 1
"""Holder of a reference whose reader is not known: it lives until it is read or the writer ends."""


def pack_bytes(payload: Mapping[str, Any], codec: Codec, holder: int = ANYONE) -> bytes:
    """``payload`` as bytes, for process ``holder`` to read.

    Raises:
        RequestError: a value of a type that cannot travel.
    """
    return b"".join(codec.encode(dict(payload), holder))


def pack(payload: Mapping[str, Any], codec: Codec, holder: int = ANYONE) -> torch.Tensor:
    """``payload`` as one uint8 tensor, the form that ``pooler_output`` carries."""
    return torch.frombuffer(bytearray(pack_bytes(payload, codec, holder)), dtype=torch.uint8)


def pack_for_ranks(payload: Mapping[str, Any], codec: Codec, ranks: int, holder: int = ANYONE) -> list[bytes]:
    """``payload`` once for each of ``ranks`` readers: a reference to shared memory has one reader.

    Raises:
        RequestError: a value of a type that cannot travel.
    """
    if ranks > 1:
        for leaf in leaf_refs(payload):
            leaf.shared = True
    return [pack_bytes(payload, codec, holder) for _ in range(ranks)]


def unpack(block: bytes | torch.Tensor, codec: Codec, *, lazy: bool = False) -> dict[str, Any]:
    """The payload that ``pack`` or ``pack_bytes`` wrote. With ``lazy``, what lies in shared memory stays there.

    Raises:
        ConnectorError: ``block`` is damaged, or what it refers to is gone.
    """
    raw = memoryview(block.numpy()) if isinstance(block, torch.Tensor) else block
    try:
        payload = codec.decode(raw, lazy=lazy)
    except (AttributeError, IndexError, KeyError, TypeError, RuntimeError) as error:
        if isinstance(error, ConnectorError):
            raise
        raise ConnectorError(f"damaged payload of {len(raw)} bytes: {error}") from error
    if not isinstance(payload, dict):
        raise ConnectorError(f"damaged payload of {len(raw)} bytes: a {type(payload).__name__}")
    return payload


def discard(blocks: Iterable[bytes | torch.Tensor], codec: Codec) -> None:
    """Give up payloads that nobody will read, so that their shared memory can be used again."""
    for block in blocks:
        try:
            unpack(block, codec, lazy=True)
        except ConnectorError:
            continue  # what is gone or damaged holds nothing


@dataclass(frozen=True)
class OmniPayload:
    """What this package adds to one request, or to one later chunk of it."""

    data: Sequence[bytes] = ()
    """The payload as ``pack_for_ranks`` wrote it; empty when there is none."""
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
        wire = [list(self.data), self.chunk, self.steps, self.last, self.emit]
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
