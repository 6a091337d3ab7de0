"""Messages between driver and stage: framing, and payloads inside of them."""

from typing import Any

import pytest

from vllm_omni.distributed.omni_connectors.utils.arena import Arena
from vllm_omni.distributed.omni_connectors.utils.serialization import Codec
from vllm_omni.engine import messages as m
from vllm_omni.errors import RequestError


def submit(codec: Codec, request_id: str, *words: Any) -> bytes:
    packed = codec.pack(list(words))
    return m.frame(m.Submit(request_id, None, 0, True, False, packed.tree), packed)


PROMPTS: list[Any] = [{"prompt": "tea"}, {"image": bytes(range(256)) * 2, "ids": (1, 2), "more": b"y" * 300}, "last"]


@pytest.mark.parametrize("piece", [1, 3, 7, 64, 10_000])
def test_a_stream_is_cut_into_its_messages_wherever_it_is_broken(piece: int) -> None:
    codec = Codec(threshold=16)  # longer bytes are buffers behind the message
    data = b"".join(submit(codec, f"r{i}", prompt, i) for i, prompt in enumerate(PROMPTS)) + m.frame(m.Shutdown())
    reader = m.FrameReader()
    found: list[Any] = []
    for start in range(0, len(data), piece):
        for message, buffers in reader.feed(memoryview(data)[start : start + piece]):
            assert isinstance(message, m.Submit | m.Shutdown)
            if isinstance(message, m.Submit):
                found.append((message.request_id, *codec.unpack(message.payload, buffers)))
    assert found == [(f"r{i}", prompt, i) for i, prompt in enumerate(PROMPTS)]


def test_a_payload_that_msgpack_refuses_is_named_and_gives_its_memory_back() -> None:
    arena = Arena()
    codec = Codec(arena, threshold=100)
    with pytest.raises(RequestError, match=r"0\.seed: cannot travel") as caught:
        submit(codec, "r", {"image": b"x" * 1000, "seed": 2**70})
    assert caught.value.details["field"] == "0.seed"
    arena.reap()
    assert arena.stats()["busy"] == 0
    arena.close()
