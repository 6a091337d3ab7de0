"""What the orchestrator knows of an open request."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import Any

from vllm_omni.engine.inbox import Inbox
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

    def where(self) -> tuple[str, int | None]:
        """Phase and stage in which the request is now, for the deadline's error."""
        for stage_id, visit in sorted(self.visits.items()):
            if not visit.finished:
                return ("running in" if visit.admitted else "waiting for"), stage_id
        return "between stages", None
