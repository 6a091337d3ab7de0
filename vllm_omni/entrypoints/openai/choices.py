"""Several answers to one chat: a request to the model for each, side by side, put together."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Coroutine, Mapping, Sequence
from contextlib import aclosing
from typing import Any, TypeVar

from vllm_omni.errors import RequestError

T = TypeVar("T")
MAX_CHOICES = 10
"""Answers with sound or pictures at most. Of text alone vLLM makes more."""


def check_choices(n: int, places: int) -> None:
    """Refuse more answers than there may be.

    Args:
        places: requests that may be open at once.

    Raises:
        RequestError: names ``n``.
    """
    most = min(MAX_CHOICES, places)
    if n > most:
        raise RequestError(f"n={n}: with sound or pictures {most} at most", field="n", allowed=most)


async def all_of(works: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """The results of ``works``, which run side by side. The first error ends the others."""
    if len(works) == 1:
        return [await works[0]]
    tasks = [asyncio.create_task(work) for work in works]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


async def side_by_side(streams: Sequence[AsyncGenerator[T, None]]) -> AsyncGenerator[tuple[int, T], None]:
    """What ``streams`` give, as it comes, with the number of the stream. The first error ends the others."""
    if len(streams) == 1:
        async with aclosing(streams[0]) as only:
            async for item in only:
                yield 0, item
        return
    events: asyncio.Queue[tuple[int, T] | asyncio.Task[None]] = asyncio.Queue()

    async def pump(number: int, stream: AsyncGenerator[T, None]) -> None:
        async with aclosing(stream):
            async for item in stream:
                events.put_nowait((number, item))

    tasks = [asyncio.create_task(pump(number, stream)) for number, stream in enumerate(streams)]
    for task in tasks:
        task.add_done_callback(events.put_nowait)
    try:
        running = len(tasks)
        while running:
            event = await events.get()
            if isinstance(event, asyncio.Task):
                event.result()
                running -= 1
            else:
                yield event
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


def total_usage(usages: Sequence[Mapping[str, Any] | None]) -> dict[str, Any] | None:
    """The usage of all answers: the prompt counts once, what was made counts together. None where one is not known."""
    known = [usage for usage in usages if usage is not None]
    if not known or len(known) < len(usages):
        return None
    first = known[0]
    made = sum(usage.get("completion_tokens") or 0 for usage in known)
    total = {**first, "completion_tokens": made, "total_tokens": first["prompt_tokens"] + made}
    details = [usage["completion_tokens_details"] for usage in known if usage.get("completion_tokens_details")]
    if details:
        total["completion_tokens_details"] = {name: sum(one.get(name) or 0 for one in details) for name in details[0]}
    return total
