"""Where a request's outputs go: to a coroutine, or to another thread."""

from __future__ import annotations

import asyncio
import queue
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol, TypeAlias

from vllm_omni.errors import OmniError
from vllm_omni.outputs import Preview

Item: TypeAlias = tuple[int, dict[str, Any], bool, dict[str, Any]]
"""Stage, data, whether it is the stage's last, times."""
EventQueue: TypeAlias = "queue.SimpleQueue[tuple[int, str, Any]]"
"""(index of the prompt, ``output`` | ``progress`` | ``preview`` | ``end``, value)."""


class RequestSink(Protocol):
    """Who asked. Called from the event loop; must not block."""

    def on_output(self, stage_id: int, data: dict[str, Any], finished: bool, metrics: dict[str, Any]) -> None:
        """An output of a final stage. Large leaves are ``LeafRef``s."""

    def on_progress(self, stage_id: int, step: int, total: int) -> None:
        """A stage got one step further."""

    def on_preview(self, stage_id: int, preview: Preview) -> None:
        """What a stage is making, for requests that ask for it."""

    def on_end(self, error: OmniError | None) -> None:
        """The request has ended; the last call."""


class AsyncSink:
    """A request's sink whose outputs can be awaited, by one consumer.

    Args:
        on_progress: called with stage id, steps done and steps in all after every step.
        on_preview: called with stage id and preview, for requests that ask for previews.
    """

    def __init__(
        self,
        on_progress: Callable[[int, int, int], None] | None = None,
        on_preview: Callable[[int, Preview], None] | None = None,
    ) -> None:
        self._on_progress = on_progress
        self._on_preview = on_preview
        self._items: deque[Item] = deque()
        self._ended = False
        self._error: OmniError | None = None
        self._waiter: asyncio.Future[None] | None = None

    def on_output(self, stage_id: int, data: dict[str, Any], finished: bool, metrics: dict[str, Any]) -> None:
        """Kept until the consumer asks for it."""
        self._items.append((stage_id, data, finished, metrics))
        self._wake()

    def on_progress(self, stage_id: int, step: int, total: int) -> None:
        """Handed on as it is: the generator yields outputs alone."""
        if self._on_progress is not None:
            self._on_progress(stage_id, step, total)

    def on_preview(self, stage_id: int, preview: Preview) -> None:
        """Handed on as it is."""
        if self._on_preview is not None:
            self._on_preview(stage_id, preview)

    def on_end(self, error: OmniError | None) -> None:
        """The consumer gets what is left, then ``error`` or the end."""
        self._ended, self._error = True, error
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def __aiter__(self) -> AsyncSink:
        return self

    async def __anext__(self) -> Item:
        while not self._items:
            if self._error is not None:
                raise self._error
            if self._ended:
                raise StopAsyncIteration
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        return self._items.popleft()


class QueueSink:
    """Hands a request's events to the calling thread."""

    def __init__(self, index: int, events: EventQueue) -> None:
        self._index = index
        self._events = events

    def on_output(self, stage_id: int, data: dict[str, Any], finished: bool, metrics: dict[str, Any]) -> None:
        """Put into the queue, as every event is."""
        self._events.put((self._index, "output", (stage_id, data, finished, metrics)))

    def on_progress(self, stage_id: int, step: int, total: int) -> None:
        """Stage, steps done and steps in all."""
        self._events.put((self._index, "progress", (stage_id, step, total)))

    def on_preview(self, stage_id: int, preview: Preview) -> None:
        """Stage and preview."""
        self._events.put((self._index, "preview", (stage_id, preview)))

    def on_end(self, error: OmniError | None) -> None:
        """The request's last event: its error, or None."""
        self._events.put((self._index, "end", error))
