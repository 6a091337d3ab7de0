"""What the orchestrator knows of an open request."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import Any

from vllm_omni.engine.inbox import Inbox
from vllm_omni.engine.messages import Notes
from vllm_omni.engine.stage_seam import StageOutput
from vllm_omni.entrypoints.sinks import RequestSink
from vllm_omni.entrypoints.tracing import RequestTrace, StageTrace
from vllm_omni.request import OmniRequest


@dataclass(slots=True)
class Visit:
    """One request in one stage."""

    targets: list[int]
    """Stages that read its outputs."""
    final: bool
    """Whether the caller gets them."""
    direct: bool = False
    """Whether its one target gets them straight from the stage's process, and not from the driver."""
    submitted: float = 0.0
    admitted: bool = False
    backlog: list[tuple[Any, bool]] = field(default_factory=list)
    finished: bool = False
    sent: int = 0
    times: dict[str, float] = field(default_factory=dict)
    bytes_in: int = 0
    bytes_out: int = 0
    trace: StageTrace | None = None
    held: StageOutput | None = None
    """Its last output, until its source has ended too."""

    @property
    def ahead(self) -> bool:
        """Whether a stage fed straight from here may have ended before the driver knows that this one has."""
        return self.direct and not self.finished


@dataclass(slots=True)
class Flow:
    """One open request."""

    key: str
    request: OmniRequest
    sink: RequestSink
    needed: frozenset[int]
    visits: dict[int, Visit] = field(default_factory=dict)
    inboxes: dict[int, Inbox] = field(default_factory=dict)
    timer: asyncio.TimerHandle | None = None
    opened: float = field(default_factory=time.monotonic)
    trace: RequestTrace | None = None

    def metrics(self) -> dict[str, Any]:
        """Times and bytes of each stage, by its id."""
        return {str(stage_id): dict(visit.times) for stage_id, visit in sorted(self.visits.items())}

    def note(self, stage_id: int, notes: Notes) -> None:
        """Put into the trace what a stage says of chunks that went past the driver.

        A stage that is fed straight enters the trace when its first chunk is sent; either end may tell of it first."""
        visit = self.visits.get(stage_id)
        if self.trace is None or visit is None:
            return  # the stage is left out
        if notes.came:
            self._enter_straight(stage_id, visit, notes.came[0][0])
        if notes.left and visit.direct:
            for target in visit.targets:
                if target in self.visits:
                    self._enter_straight(target, self.visits[target], notes.left[0][0])
        if visit.trace is not None:
            visit.trace.noted(notes)

    def _enter_straight(self, stage_id: int, visit: Visit, at: float) -> None:
        if visit.trace is None and self.trace is not None:
            visit.trace = self.trace.enter(stage_id, at)
            visit.trace.straight_from = next(i for i, source in self.visits.items() if stage_id in source.targets)

    def left_out(self, stage_id: int) -> Visit:
        """Forget a stage that gets nothing of the request after all."""
        visit = self.visits.pop(stage_id)
        if visit.trace is not None:
            visit.trace.left_out = True
        return visit

    def where(self) -> tuple[str, int | None]:
        """Phase and stage in which the request is now, for the deadline's error."""
        for stage_id, visit in sorted(self.visits.items()):
            if not visit.finished:
                return ("running in" if visit.admitted else "waiting for"), stage_id
        return "between stages", None
