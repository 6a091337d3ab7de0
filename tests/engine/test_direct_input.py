"""What a stage's process does with chunks from its source: lanes, early and late chunks, memory."""

import os
import socket
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.entrypoints.noop_stage import NoopStage
from vllm_omni.distributed.omni_connectors.utils.arena import Arena
from vllm_omni.distributed.omni_connectors.utils.serialization import Codec
from vllm_omni.engine import messages as m
from vllm_omni.engine.channel import Channel
from vllm_omni.engine.stage_process import StageServer

EDGE = m.Edge(0, None, 1, {})


class Wired:
    """Stage 1, in this process, with the driver's and its source's ends of its sockets."""

    def __init__(self) -> None:
        self.driver, ours = socket.socketpair()
        self.source, lane = socket.socketpair()
        self.arena = Arena()
        self.codec = Codec(self.arena, threshold=100)
        channel = Channel(ours)
        channel.open_lanes(lane.detach(), -1)
        start = m.Start(1, "", 100, 0.0, 1, m.NOTHING, EDGE)
        self.engine = NoopStage(1, {})
        self.stage = StageServer(channel, start, self.codec, self.engine)

    def expect(self, request_id: str) -> None:
        packed = self.codec.pack([None, {"seed": 1}])
        self.driver.send(m.frame(m.Expect(request_id, None, False, packed.tree), packed))

    def chunk(self, request_id: str, data: Any, finished: bool = False) -> bytes:
        packed = self.codec.pack(data)
        now = time.monotonic()
        return m.frame(m.Output(request_id, finished, now, now, now, packed.shared, packed.tree), packed)

    def close(self) -> None:
        self.stage.channel.close()
        self.driver.close()
        self.source.close()
        self.arena.close()


@pytest.fixture
def wired() -> Iterator[Wired]:
    wired = Wired()
    yield wired
    wired.close()


def messages(data: bytes) -> list[tuple[m.Message, memoryview]]:
    return m.FrameReader().feed(data)


def test_the_source_learns_who_reads(wired: Wired) -> None:
    assert int.from_bytes(wired.source.recv(100), "little") == os.getpid()


def test_a_chunk_that_is_read_before_its_announcement(wired: Wired) -> None:
    """The driver wrote first, but the stage happens to read the lane first."""
    wired.expect("r")
    ((message, buffers),) = messages(wired.chunk("r", {"prompt": "early"}))
    wired.stage.handle(message, buffers)
    (given,) = wired.engine.queue
    assert (given.prompt, given.sampling_params, given.chunk, given.last) == (
        {"prompt": "early"},
        {"seed": 1},
        0,
        False,
    )


def test_chunks_of_requests_that_have_ended_leave_no_memory_behind(wired: Wired) -> None:
    wired.expect("r")
    wired.driver.send(m.frame(m.Abort(["r"])))
    for request_id in ("r", "never"):
        wired.source.send(wired.chunk(request_id, {"image": b"x" * 1000}))
    assert wired.arena.stats()["busy"] == 2
    while wired.arena.stats()["busy"]:
        wired.stage.take(0.0)
        wired.arena.reap()
    assert wired.engine.queue == []
    assert wired.engine.aborted == ["r"]


def test_a_source_that_dies_is_not_the_stage_s_business(wired: Wired) -> None:
    wired.expect("r")
    wired.source.send(wired.chunk("r", {"prompt": "last words"}))
    wired.source.close()
    while len(wired.engine.queue) < 1:
        wired.stage.take(0.0)
    for _ in range(3):
        wired.stage.take(0.0)
    assert wired.stage.running
    wired.driver.close()
    wired.stage.take(None)
    assert not wired.stage.running


def test_a_slow_target_holds_nobody_up_and_gets_everything() -> None:
    driver, ours = socket.socketpair()
    lane, target = socket.socketpair()
    channel = Channel(ours)
    channel.open_lanes(-1, lane.detach())
    assert channel.lane_out is not None
    data = [bytes([number]) * 70_000 for number in range(20)]
    for piece in data:
        channel.lane_out.send(piece)
    assert channel.lane_out.unsent, "more than a socket holds"
    driver.send(m.frame(m.Abort(["r"])))
    ((message, _),) = channel.receive(None) or []
    assert isinstance(message, m.Abort), "the driver is still heard"
    got = bytearray()
    while channel.lane_out.unsent:
        got += target.recv(2**20)
        assert channel.receive(None if channel.lane_out.unsent else 0.0) == []
    while len(got) < sum(map(len, data)):
        got += target.recv(2**20)
    assert bytes(got) == b"".join(data)
    target.close()
    channel.lane_out.send(b"x" * 10)
    assert not channel.lane_out.unsent, "a target that is gone gets nothing, and nothing is kept for it"
    channel.close()
    driver.close()
