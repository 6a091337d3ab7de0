"""Work that ends with its client: whichever comes first, nothing is left running and nobody else is cancelled."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from vllm_omni.entrypoints.openai.streaming import while_connected
from vllm_omni.errors import RequestAborted


class Client:
    """A client that is there until ``leave``."""

    def __init__(self) -> None:
        self.left = asyncio.Event()

    async def receive(self) -> dict[str, Any]:
        await self.left.wait()
        return {"type": "http.disconnect"}


async def nothing_runs() -> None:
    """What was cancelled gets its turn; then this task is alone."""
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_the_result() -> None:
    async def work() -> int:
        await asyncio.sleep(0)
        return 7

    assert await while_connected(Client().receive, work()) == 7
    await nothing_runs()


async def test_an_error_of_the_work() -> None:
    async def work() -> None:
        raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        await while_connected(Client().receive, work())
    await nothing_runs()


async def test_a_client_that_leaves_ends_the_work() -> None:
    client, ended = Client(), []

    async def work() -> None:
        client.left.set()
        try:
            await asyncio.sleep(60)
        finally:
            ended.append(True)

    with pytest.raises(RequestAborted):
        await while_connected(client.receive, work())
    assert ended == [True]
    assert asyncio.current_task().cancelling() == 0  # type: ignore[union-attr]
    await asyncio.sleep(0)  # a cancellation that is left over would come here
    await nothing_runs()


@pytest.mark.parametrize("turns", range(6))
async def test_leaving_at_any_moment_of_the_end(turns: int) -> None:
    """The work ends some turns after the client left: a result or an abort; what follows is never cancelled."""
    client = Client()

    async def work() -> int:
        client.left.set()
        for _ in range(turns):
            await asyncio.sleep(0)
        return 7

    try:
        assert await while_connected(client.receive, work()) == 7
    except RequestAborted:
        assert turns > 0
    assert asyncio.current_task().cancelling() == 0  # type: ignore[union-attr]
    await nothing_runs()


async def test_cancelling_from_outside_stays_a_cancellation() -> None:
    started, ended = asyncio.Event(), []

    async def work() -> None:
        started.set()
        try:
            await asyncio.sleep(60)
        finally:
            ended.append(True)

    task = asyncio.create_task(while_connected(Client().receive, work()))
    await started.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert ended == [True]
    await nothing_runs()
