"""What the client of a stage on vLLM keeps of a request that the engine works on."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from vllm.v1.engine import EngineCoreEventType, EngineCoreOutput

from vllm_omni.engine.stage_engine import Span

BATCH = 16
"""Tokens that one span of a trace covers at least."""


@dataclass(eq=False)
class OpenRequest:
    """A request of a stage."""

    received: float
    """When the client had it; from the engine's first word on, when the engine had it."""
    started: float = 0.0
    """When the engine scheduled it first; 0 until it says so."""
    prompt_token_ids: list[int] | None = None
    """Sent with the first output."""
    begun: bool = False
    """Whether the engine has been told of it; chunks wait for that."""
    waiting: list[tuple[Any, int, bool]] = field(default_factory=list)
    """Chunks that came while the prompt was processed: (prompt, number, last)."""
    windows: int = 0
    """Generation stages: engine requests made."""
    closed: bool = False
    """Generation stages: whether no window follows."""
    handed_on: int = 0
    """Generation stages: windows whose output was handed on."""
    done: dict[int, tuple[dict[str, Any], float]] = field(default_factory=dict)
    """Generation stages: outputs that wait for an earlier window."""
    trace: Mapping[str, str] | None = None
    """Headers of the span that it belongs to; None for requests that are not traced."""
    spans: list[Span] | None = None
    """What the engine did for it and when; None for requests that are not traced."""
    _tokens: int = 0
    _since: float = 0.0

    @classmethod
    def now(cls, trace: Mapping[str, str] | None) -> OpenRequest:
        """A request that has just come."""
        return cls(time.monotonic(), trace=trace, spans=None if trace is None else [])

    def note(self, output: EngineCoreOutput, made: float) -> None:
        """Take times from an output that the engine made at ``made``."""
        scheduled = 0.0
        for event in output.events or ():
            if event.type == EngineCoreEventType.SCHEDULED:
                scheduled = event.timestamp
            if event.type == EngineCoreEventType.QUEUED and not self.started:
                self.received = event.timestamp
        self.started = self.started or scheduled
        if self.spans is None:
            return
        self._tokens += len(output.new_token_ids)
        if not self._tokens:
            name = "window"
        elif not self._since:
            name = "prefill"
        else:
            name = "decode"
            if self._tokens < BATCH and not output.finished:
                return
        begun = max(self._since, scheduled) or self.started or self.received
        self.spans.append((name, begun, max(begun, made), {"tokens": self._tokens} if self._tokens else {}))
        self._tokens, self._since = 0, made

    def take_spans(self) -> list[Span]:
        """The spans since the last call."""
        spans, self.spans = self.spans or [], None if self.spans is None else []
        return spans
