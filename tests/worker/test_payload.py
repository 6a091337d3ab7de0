"""The block of bytes that travels through vLLM's messages."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from vllm.pooling_params import PoolingParams
from vllm.sampling_params import SamplingParams
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

from vllm_omni.distributed.omni_connectors.utils.arena import Arena
from vllm_omni.distributed.omni_connectors.utils.serialization import Codec, LeafRef
from vllm_omni.errors import ConnectorError, RequestError
from vllm_omni.model_executor.models.interfaces import OmniRequestState
from vllm_omni.worker.payload import OmniPayload, discard, pack, pack_bytes, pack_for_ranks, unpack

PAYLOAD: dict[str, Any] = {
    "start": 7,
    "name": "a voice",
    "bf16": torch.randn(3, 5).bfloat16(),
    "empty": torch.zeros(0, 4),
    "scalar": torch.tensor(2.5),
    "nested": {"codes": [torch.arange(6).reshape(2, 3), None, True]},
}


def same(left: Any, right: Any) -> bool:
    if isinstance(left, torch.Tensor):
        return left.dtype == right.dtype and torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, list):
        return len(left) == len(right) and all(map(same, left, right))
    return bool(left == right)


def test_there_and_back() -> None:
    codec = Codec()
    block = pack(PAYLOAD, codec)
    assert block.dtype == torch.uint8
    assert same(unpack(block, codec), PAYLOAD)
    assert same(unpack(pack_bytes(PAYLOAD, codec), codec), PAYLOAD)


@pytest.mark.parametrize("kind", [SamplingParams, PoolingParams])
def test_rides_in_parameters(kind: Any) -> None:
    """Through vLLM's own message encoding and its copying of parameters, beside what the caller put there."""
    params = SamplingParams(extra_args={"mine": 1}) if kind is SamplingParams else PoolingParams(task="plugin")
    sent = OmniPayload([pack_bytes(PAYLOAD, Codec())], chunk=3, steps=2, last=False, emit=False)
    sent.attach(params)
    received = MsgpackDecoder(kind).decode(MsgpackEncoder().encode(params.clone()))
    extra = received.extra_args if kind is SamplingParams else received.extra_kwargs
    if kind is SamplingParams:
        assert extra["mine"] == 1
    payload = OmniPayload(*extra["omni"])
    assert (payload.chunk, payload.steps, payload.last, payload.emit) == (3, 2, False, False)
    assert same(unpack(payload.data[0], Codec()), PAYLOAD)


def test_large_tensors_stay_in_shared_memory() -> None:
    writer, reader = Codec(Arena(), 1024), Codec(Arena(), 1024)
    assert writer.arena is not None
    payload = {"big": torch.randn(64, 64), "small": torch.ones(3)}
    block = pack_bytes(payload, writer)
    assert len(block) < 1024
    lazy = unpack(block, reader, lazy=True)
    assert isinstance(lazy["big"], LeafRef)
    assert torch.equal(lazy["small"], payload["small"])
    passed_on = pack_bytes(lazy, reader)  # as a driver does
    del lazy
    arrived = unpack(passed_on, Codec(Arena()))
    assert torch.equal(arrived["big"], payload["big"])
    writer.arena.reap()
    assert writer.arena.stats()["busy"] == 1
    del arrived
    writer.arena.reap()
    assert writer.arena.stats()["busy"] == 0


def test_every_rank_reads_its_own() -> None:
    maker, driver = Codec(Arena(), 1024), Codec(Arena(), 1024)
    assert maker.arena is not None
    made = torch.randn(64, 64)
    seen = unpack(pack_bytes({"big": made, "n": 1}, maker), driver, lazy=True)
    blocks = pack_for_ranks(seen, driver, ranks=2)
    del seen
    first = unpack(blocks[0], Codec(Arena()))
    first["big"].zero_()
    second = unpack(blocks[1], Codec(Arena()))
    assert torch.equal(second["big"], made)
    del first, second
    maker.arena.reap()
    assert maker.arena.stats()["busy"] == 0


def test_given_up() -> None:
    codec = Codec(Arena(), 1024)
    assert codec.arena is not None
    blocks = [pack(PAYLOAD | {"big": torch.zeros(4096)}, codec) for _ in range(3)]
    assert codec.arena.stats()["busy"] == 3
    discard([*blocks, b"damaged"], Codec(Arena()))
    codec.arena.reap()
    assert codec.arena.stats()["busy"] == 0


@pytest.mark.parametrize("block", [b"", b"abc", b"\xff\xff\xff\x7f" + bytes(50), pack_bytes(PAYLOAD, Codec())[:-40]])
def test_damaged(block: bytes) -> None:
    with pytest.raises(ConnectorError, match="damaged payload"):
        unpack(block, Codec())


def test_cannot_travel() -> None:
    with pytest.raises(RequestError, match=r"inner\.0"):
        pack({"inner": [object()]}, Codec())


@pytest.mark.parametrize(
    ("name", "shape", "words"),
    [
        ("missing", None, "no 'missing'; it has codes, word"),
        ("word", None, "is a str, expected a tensor"),
        ("codes", (2, 4), r"shape \(2, 3\), expected \(2, 4\)"),
        ("codes", (None,), "shape"),
    ],
)
def test_checked_tensor(name: str, shape: Any, words: str) -> None:
    state = OmniRequestState("r", 4, {"codes": torch.zeros(2, 3), "word": "x"})
    assert state.tensor("codes", (None, 3)).shape == (2, 3)
    with pytest.raises(RequestError, match=words):
        state.tensor(name, shape)
