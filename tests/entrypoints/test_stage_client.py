"""What the client of a stage process writes: together, in order, and all of it however slowly it is read."""

import asyncio
import os
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_omni.distributed.omni_connectors.utils.serialization import Codec
from vllm_omni.engine import messages as m
from vllm_omni.entrypoints.stage_client import ProcessStageClient
from vllm_omni.errors import RequestError


class Listener:
    """Hears only of turns."""

    def __init__(self, client: ProcessStageClient) -> None:
        self.client = client

    def on_failure(self, stage_id: int, request_id: str, error: Exception) -> None:
        self.client.submit(request_id, "an answer", None, None, 1, True)

    def on_turn_end(self) -> None:
        self.client.flush()

    def on_dead(self, stage_id: int, error: Exception) -> None:
        raise AssertionError(error)


@asynccontextmanager
async def attached() -> AsyncIterator[tuple[ProcessStageClient, socket.socket]]:
    """A client, and the end of its socket that a stage would hold."""
    ours, theirs = socket.socketpair()
    handle: Any = SimpleNamespace(
        spec=SimpleNamespace(stage_id=0),
        info=None,
        sock=ours,
        reader=m.FrameReader(),
        process=SimpleNamespace(pid=os.getpid()),
    )
    client = ProcessStageClient(handle, Codec())
    await client.attach(Listener(client))  # type: ignore[arg-type]
    theirs.setblocking(False)
    with ours, theirs:
        yield client, theirs
        client.detach()
        await asyncio.sleep(0)


def submits(data: bytes) -> list[tuple[str, int, list[Any]]]:
    """Request, chunk and payload of each message."""
    found: list[Any] = m.FrameReader().feed(data)
    return [(message.request_id, message.chunk, Codec().unpack(message.payload, rest)) for message, rest in found]


async def test_what_is_written_in_a_turn_goes_out_together() -> None:
    async with attached() as (client, stage):
        for number in range(3):
            client.submit("r", f"chunk {number}", {"seed": 5}, None, number, number == 2)
        with pytest.raises(BlockingIOError):
            stage.recv(100_000)
        await asyncio.sleep(0)
        sent = [("r", 0, ["chunk 0", {"seed": 5}]), ("r", 1, ["chunk 1"]), ("r", 2, ["chunk 2"])]
        assert submits(stage.recv(100_000)) == sent, "the parameters travel with the first chunk alone"


async def test_what_an_event_leads_to_goes_out_with_it() -> None:
    async with attached() as (_, stage):
        stage.send(b"".join(m.frame(m.Failure(f"r{i}", m.WireError.of(RequestError("no"), 0))) for i in range(2)))
        data = await asyncio.get_running_loop().sock_recv(stage, 100_000)
        assert submits(data) == [("r0", 1, ["an answer"]), ("r1", 1, ["an answer"])]


async def test_a_slow_stage_gets_everything_in_order() -> None:
    loop = asyncio.get_running_loop()
    async with attached() as (client, stage):
        size = 0
        for number in range(40):
            size += client.submit("r", f"{number} " + "x" * 100_000, None, None, number, False)
            await asyncio.sleep(0)
        data = bytearray()
        while len(data) < size:
            data += await loop.sock_recv(stage, 2**20)
        assert [(chunk, words[0].split()[0]) for _, chunk, words in submits(data)] == [(i, str(i)) for i in range(40)]


async def test_a_refused_prompt_sends_nothing() -> None:
    async with attached() as (client, stage):
        for prompt in (object(), {"seed": 2**70}):
            with pytest.raises(RequestError):
                client.submit("r", prompt, None, None, 0, True)
        await asyncio.sleep(0)
        with pytest.raises(BlockingIOError):
            stage.recv(100_000)
