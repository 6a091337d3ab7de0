"""Notices stages that hang, and gives them up: a stage that does not get on would keep its requests for ever.

A stage is given up when one of its processes has given no sign of life for ``heartbeat_timeout`` seconds, or when it
has work and this has not moved for ``stall_timeout`` seconds (``vllm_omni.pulse`` says how the two differ). Then its
requests end with a ``StageDeadError``, ``/health`` says so, and its processes are killed.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping

from vllm_omni.engine.stage_seam import StageClient, Vitals
from vllm_omni.errors import StageDeadError
from vllm_omni.logger import init_logger

logger = init_logger(__name__)

LONGEST_TICK_S = 1.0


class _Standstill:
    """For how long a number has not changed, as far as somebody was looking."""

    def __init__(self) -> None:
        self._value: int | None = None
        self.seconds = 0.0

    def look(self, value: int | None, passed: float) -> float:
        """Seconds for which ``value`` has stood still now; None is no value and always new."""
        self.seconds = self.seconds + passed if value is not None and value == self._value else 0.0
        self._value = value
        return self.seconds


class _StageWatch:
    """One stage's clocks."""

    def __init__(self) -> None:
        self._beats: dict[str, _Standstill] = {}
        self._work = _Standstill()

    def reason(self, vitals: Vitals, passed: float, heartbeat_timeout: float, stall_timeout: float) -> str | None:
        """Why the stage is to be given up."""
        silent = {
            name: self._beats.setdefault(name, _Standstill()).look(beat, passed) for name, beat in vitals.beats.items()
        }
        stalled = self._work.look(vitals.progress if vitals.busy else None, passed)
        for name, still in silent.items():
            if 0 < heartbeat_timeout <= still:
                return f"{name} hangs: no sign of life for {still:.1f} s (heartbeat_timeout={heartbeat_timeout:g})"
        if 0 < stall_timeout <= stalled:
            return f"its work hangs: it has not moved for {stalled:.1f} s (stall_timeout={stall_timeout:g})"
        return None


class Watch:
    """Looks at every stage a few times within the shorter time-out, in one event loop.

    Only time during which it looked counts: when this process was stopped itself, or the whole machine slept, the
    stages are not blamed for it.
    """

    def __init__(self, clients: Mapping[int, StageClient], heartbeat_timeout: float, stall_timeout: float) -> None:
        self._clients = clients
        self._heartbeat_timeout = heartbeat_timeout
        self._stall_timeout = stall_timeout
        self._stages = {stage_id: _StageWatch() for stage_id in clients}
        limits = [limit for limit in (heartbeat_timeout, stall_timeout) if limit > 0]
        self._tick_s = min(LONGEST_TICK_S, *(limit / 4 for limit in limits)) if limits else 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._looked = 0.0

    def start(self) -> None:
        """Look from now on, in the running loop."""
        self.stop()
        if self._tick_s:
            self._looked = time.monotonic()
            self._timer = asyncio.get_running_loop().call_later(self._tick_s, self._tick)

    def stop(self) -> None:
        """Look no more. Idempotent."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _tick(self) -> None:
        now = time.monotonic()
        passed, self._looked = min(now - self._looked, 2 * self._tick_s), now
        for stage_id in list(self._stages):
            vitals = self._clients[stage_id].vitals()
            if vitals is None:
                del self._stages[stage_id]  # it is dead, and its client has said so
                continue
            limits = self._heartbeat_timeout, self._stall_timeout
            reason = self._stages[stage_id].reason(vitals, passed, *limits)
            if reason is not None:
                del self._stages[stage_id]
                logger.error("stage %d is given up: %s", stage_id, reason)
                self._clients[stage_id].give_up(StageDeadError(f"stage {stage_id}: {reason}", stage_id=stage_id))
        self._timer = None
        if self._stages:
            self._timer = asyncio.get_running_loop().call_later(self._tick_s, self._tick)
