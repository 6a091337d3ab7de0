"""What a stage writes down of a traced request whose chunks go past the driver, and when it tells.

The notes travel with what goes to the driver anyway. While nothing does, the driver gets them every ``EVERY`` seconds,
so that the trace of a request that ends in the middle lacks the last moments alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from vllm_omni.engine import messages as m
from vllm_omni.engine.stage_engine import Span

EVERY = 0.1
"""Seconds. More often would keep the driver busy beside the stages, which a request without a trace does not."""


@dataclass(slots=True)
class TraceNotes:
    """Of one request; lists as of ``messages.Notes``."""

    came: list[tuple[float, float, int, bool]] = field(default_factory=list)
    left: list[tuple[float, int]] = field(default_factory=list)
    spans: list[Span] = field(default_factory=list)
    nbytes: int = 0
    """Of all chunks that have come."""
    told: float = 0.0
    """When the driver heard of it last."""

    def chunk(self, sent: float, arrived: float, nbytes: int, given: bool) -> None:
        """A chunk came from the source.

        Args:
            sent: when the source sent it.
            arrived: when it was here.
            nbytes: bytes of it and all before it.
            given: whether the engine got something now.
        """
        self.came.append((sent, arrived, nbytes - self.nbytes, given))
        self.nbytes = nbytes

    def output(
        self,
        request_id: str,
        received: float,
        started: float,
        sent: float,
        nbytes: int,
        spans: Sequence[Span],
        finished: bool,
    ) -> bytes:
        """An output went straight on; returns what the driver is to hear now."""
        self.left.append((sent, nbytes))
        self.spans.extend(spans)
        if finished or sent - self.told >= EVERY:
            return self.frame(request_id, received, started, sent)
        return b""

    def frame(self, request_id: str, received: float, started: float, now: float) -> bytes:
        """All that was noted since the last time, for the driver."""
        notes = m.Notes(request_id, received, started, self.came, self.left, self.spans)
        self.came, self.left, self.spans, self.told = [], [], [], now
        return m.frame(notes)
