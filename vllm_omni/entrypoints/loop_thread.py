"""An event loop in a thread of its own, for callers that have none."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import CancelledError
from typing import Any, TypeVar

import uvloop

from vllm_omni.errors import StageDeadError

T = TypeVar("T")


class LoopThread:
    """Runs from construction to ``stop``. The loop is uvloop's: a fifth less time per message than asyncio's.

    Every method is for any thread. What comes after ``stop``, or is still under way then, raises ``StageDeadError``.
    """

    def __init__(self, name: str) -> None:
        self._loop: asyncio.AbstractEventLoop = uvloop.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name=name, daemon=True)
        self._thread.start()
        self._lock = threading.Lock()
        """Held to hand something to the loop: nothing comes after its end."""
        self._stopped = False

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run ``coroutine`` in the loop and wait for its result. Not to be called from the loop."""
        with self._lock:
            if self._stopped:
                coroutine.close()
                raise StageDeadError("the engine is closed")
            future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return future.result()
        except CancelledError as error:
            if not self._stopped:
                raise
            raise StageDeadError("the engine was closed") from error

    def call_soon(self, function: Callable[..., Any], *args: Any) -> None:
        """Call ``function`` in the loop; does not wait."""
        with self._lock:
            if self._stopped:
                raise StageDeadError("the engine is closed")
            self._loop.call_soon_threadsafe(function, *args)

    def stop(self, last: Callable[[], None] = lambda: None) -> None:
        """Run ``last`` in the loop's thread, cancel what is still under way, then end the loop and the thread."""
        if threading.current_thread() is self._thread:  # a finaliser, run by a garbage collection in the loop
            self._stopped = True
            last()
            self._loop.stop()
            return
        with self._lock:
            self._stopped = True
            ending = asyncio.run_coroutine_threadsafe(self._end(last), self._loop)
        try:
            ending.result()
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    async def _end(self, last: Callable[[], None]) -> None:
        try:
            last()
        finally:
            others = asyncio.all_tasks() - {asyncio.current_task()}
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)
