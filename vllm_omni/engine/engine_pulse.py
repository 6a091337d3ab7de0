"""Signs of life of an engine of vLLM's, which writes no pulse of its own.

Whether its processes run is asked of the kernel. Whether it gets on shows in its outputs and, while it makes none (a
long prompt), in its answers to a call that its main loop takes between two steps.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable
from typing import Any

from vllm.v1.engine.core_client import AsyncMPClient
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.metrics.stats import SchedulerStats

from vllm_omni.engine.stage_seam import Vitals
from vllm_omni.process import WatchedProcess

LOOK_FOR_RANKS_S = 5.0


class EnginePulse:
    """Watches one engine."""

    def __init__(self, client: AsyncMPClient, pids: Iterable[int]) -> None:
        self._client = client
        self._engines = [WatchedProcess(pid) for pid in pids]
        self._ranks: list[WatchedProcess] = []
        self._ranks_at = 0.0
        self._count = 0
        self._moved = 0
        self._load = (0, 0)
        self._ping: asyncio.Task[Any] | None = None

    def advance(self, stats: SchedulerStats | None) -> None:
        """The engine has made something."""
        self._moved += 1
        if stats is not None:
            self._load = stats.num_waiting_reqs, stats.num_running_reqs

    def vitals(self, busy: bool) -> Vitals:
        """Signs of life now; asks for one when there is work."""
        self._count += 1
        if self._ping is not None and self._ping.done():
            answered = not self._ping.cancelled() and self._ping.exception() is None
            self._ping = None
            self._moved += answered
        if busy and self._ping is None:
            self._ping = asyncio.ensure_future(self._ask())
        self._find_ranks()
        beats = {}
        for process in (*self._engines, *self._ranks):
            beats[f"process {process.pid}"] = 0 if process.is_stopped() else self._count
        return Vitals(beats, self._moved, busy, self._load if busy else (0, 0))

    def _find_ranks(self) -> None:
        """The processes that the engine has started itself."""
        now = time.monotonic()
        if now - self._ranks_at < LOOK_FOR_RANKS_S:
            return
        self._ranks_at = now
        pids = {child for process in self._engines for child in process.children()}
        self._ranks = [process for process in self._ranks if process.pid in pids]
        known = {process.pid for process in self._ranks}
        self._ranks += [WatchedProcess(pid) for pid in sorted(pids - known)]

    async def _ask(self) -> None:
        try:
            await self._client.call_utility_async("get_supported_tasks")
        except EngineDeadError:
            return  # whoever reads its outputs hears of it too

    def stop(self) -> None:
        """Ask no more."""
        if self._ping is not None and not self._ping.get_loop().is_closed():
            self._ping.cancel()
        self._ping = None

    def kill(self) -> None:
        """End the engine and what it has started."""
        self._ranks_at = 0.0
        self._find_ranks()
        for process in (*self._ranks, *self._engines):
            process.kill()
