"""What happened to a request and when, across all stages: written to a trace file, sent to a collector, or both.

The driver notes when it sends something to a stage and when it gets something back; with its outputs a stage sends what
it did and when. All times are ``time.monotonic()`` seconds, one clock for all processes of a host. When the request
ends, ``RequestTrace.tree`` puts them together, and each recorder of ``Tracing`` gets the whole. So a trace costs the
stages nothing but the list that travels, and requests that are not traced cost one comparison here and there.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from vllm_omni.engine.messages import Notes
from vllm_omni.engine.stage_engine import Span, StageInfo
from vllm_omni.engine.stage_seam import StageOutput
from vllm_omni.errors import OmniError
from vllm_omni.request import OmniRequest


@dataclass(frozen=True)
class Slice:
    """A span of a request's trace with those inside it."""

    name: str
    begin: float
    end: float
    facts: Mapping[str, Any] = field(default_factory=dict)
    inner: tuple[Slice, ...] = ()
    is_transfer: bool = False
    """On its way between processes: may overlap what the stage does for the next chunk."""


class Transfer(NamedTuple):
    """A chunk on its way between two processes."""

    sent: float
    arrived: float
    nbytes: int

    def slice(self, name: str, number: int, arrived: float, facts: Mapping[str, Any]) -> Slice:
        """The same in a trace; a chunk that is on its way yet takes no time."""
        facts = {"bytes": self.nbytes, "chunk": number, **facts}
        return Slice(name, self.sent, max(self.sent, arrived), facts, is_transfer=True)


@dataclass(slots=True)
class StageTrace:
    """One request in one stage."""

    stage_id: int
    submitted: float
    """When the driver had something for the stage."""
    headers: Mapping[str, str]
    """What the stage's own spans belong to, as headers of a request."""
    admitted: float = 0.0
    sends: list[Transfer] = field(default_factory=list)
    """Of what the engine got."""
    outputs: list[Transfer] = field(default_factory=list)
    """Of those that came to the driver, or went straight to the next stage."""
    straight_from: int | None = None
    """The stage whose chunks come past the driver."""
    came: list[float] = field(default_factory=list)
    """When each of them was here."""
    nbytes: int = 0
    """Of those that the engine has got nothing of yet."""
    left_out: bool = False
    """Whether the request did not come here after all."""
    received: float = 0.0
    started: float = 0.0
    spans: list[Span] = field(default_factory=list)

    def sent(self, nbytes: int) -> None:
        """A chunk went to the stage."""
        at = time.monotonic()
        self.sends.append(Transfer(at, at, nbytes))

    def got(self, output: StageOutput) -> None:
        """An output came back."""
        self.received, self.started = output.received, output.started
        self.outputs.append(Transfer(output.sent, time.monotonic(), output.nbytes))
        self.spans.extend(output.spans)

    def noted(self, notes: Notes) -> None:
        """What the stage says of chunks that went past the driver."""
        for sent, arrived, nbytes, given in notes.came:
            self.came.append(arrived)
            self.nbytes += nbytes
            if given:
                self.sends.append(Transfer(sent, arrived, self.nbytes))
                self.nbytes = 0
        self.outputs.extend(Transfer(sent, 0.0, nbytes) for sent, nbytes in notes.left)
        self.received, self.started = notes.received, notes.started
        self.spans.extend(notes.spans)

    def slices(self, ended: float, target: StageTrace | None) -> Iterator[Slice]:
        """The stage's part of the trace.

        Args:
            ended: when the request did.
            target: the stage that gets the outputs past the driver.
        """
        straight = self.straight_from is not None
        if self.admitted - self.submitted > 1e-6:
            # Until something goes to the stage: those that are fed straight are told of the request before.
            yield Slice("wait", self.submitted, self.sends[0].sent if self.sends else self.admitted)
        if not (self.outputs and self.sends):
            if self.sends or straight:
                yield Slice("unfinished", self.sends[0].sent if self.sends else self.submitted, ended)
            return
        first = self.sends[0]
        for number, send in enumerate(self.sends):
            # By the driver only the first chunk's arrival is known; others are on their way while the stage works.
            arrived = self.received if number == 0 and not straight else send.arrived
            facts = {"from": self.straight_from} if straight else {}
            yield send.slice("to stage", number, arrived, facts)
        received = max(self.received, first.arrived)
        started, done = max(self.started, received), max(self.outputs[-1].sent, self.started)
        yield Slice("queue", received, started)
        yield Slice("run", started, done, {}, tuple(_nested(self.spans, started, done)))
        for number, output in enumerate(self.outputs):
            arrived, facts = output.arrived, {}
            if target is not None:
                arrived = target.came[number] if number < len(target.came) else output.sent
                facts = {"to": target.stage_id}
            yield output.slice("from stage", number, arrived, facts)


def _nested(spans: Sequence[Span], begin: float, end: float) -> Iterator[Slice]:
    """``spans`` in order, none outside of ``begin`` to ``end`` and none over another."""
    last = begin
    for name, start, stop, facts in sorted(spans, key=lambda span: span[1]):
        start = min(max(start, last), end)
        last = max(start, min(stop, end))
        yield Slice(name, start, last, facts)


class RequestTrace:
    """One request, from its first stage to its end."""

    def __init__(self, request: OmniRequest, opened: float, recorders: Sequence[Recorder]) -> None:
        self.request_id = request.request_id
        self.headers = request.trace_headers
        self.opened = opened
        self.ended = opened
        self.error: OmniError | None = None
        self.stages: dict[int, StageTrace] = {}
        self._recorders = recorders
        for recorder in recorders:
            recorder.begun(self)

    def enter(self, stage_id: int, at: float) -> StageTrace:
        """The request comes to a stage."""
        headers: dict[str, str] = {}
        for recorder in self._recorders:
            headers |= recorder.entered(self, stage_id, at)
        self.stages[stage_id] = StageTrace(stage_id, at, headers)
        return self.stages[stage_id]

    def end(self, error: OmniError | None) -> None:
        """The request is over; hands the trace to the recorders."""
        self.ended, self.error = time.monotonic(), error
        for recorder in self._recorders:
            recorder.record(self)

    def facts(self) -> dict[str, Any]:
        """Plain facts of the whole."""
        facts: dict[str, Any] = {"request_id": self.request_id}
        return facts if self.error is None else {**facts, "error": f"{type(self.error).__name__}: {self.error.message}"}

    def tree(self) -> dict[int, list[Slice]]:
        """By stage: what happened there, in order."""
        targets = {stage.straight_from: stage for stage in self.stages.values() if stage.straight_from is not None}
        return {
            stage_id: list(stage.slices(self.ended, targets.get(stage_id)))
            for stage_id, stage in sorted(self.stages.items())
            if not stage.left_out
        }


class Recorder(Protocol):
    """Where traces go. Called from the event loop; must not block."""

    def name_stages(self, names: Mapping[int, str]) -> None:
        """What the stages are called; once, before the first request."""

    def begun(self, trace: RequestTrace) -> None:
        """A request begins."""

    def entered(self, trace: RequestTrace, stage_id: int, at: float) -> Mapping[str, str]:
        """It comes to a stage; returns headers for the stage's own spans, or none."""

    def record(self, trace: RequestTrace) -> None:
        """It is over."""

    def close(self) -> None:
        """No more requests. Idempotent."""


class Tracing:
    """Every recorder of one engine."""

    def __init__(self, recorders: Sequence[Recorder]) -> None:
        self._recorders = tuple(recorders)

    def name_stages(self, infos: Mapping[int, StageInfo]) -> None:
        """Tell the recorders what the stages are, once they are ready."""
        names = {stage_id: f"stage {stage_id} ({info.name})" for stage_id, info in infos.items()}
        for recorder in self._recorders:
            recorder.name_stages(names)

    def begin(self, request: OmniRequest, opened: float) -> RequestTrace:
        """The trace of a request that begins."""
        return RequestTrace(request, opened, self._recorders)

    def close(self) -> None:
        """Finish what is written. Idempotent."""
        for recorder in self._recorders:
            recorder.close()


def open_tracing(path: str | None, otlp_endpoint: str | None, detailed_modules: Sequence[str]) -> Tracing | None:
    """The recorders that the settings ask for; None when they ask for none.

    Raises:
        ConfigError: the file cannot be written, or OpenTelemetry is not installed.
    """
    recorders: list[Recorder] = []
    if path is not None:
        from vllm_omni.entrypoints.trace_file import TraceFile

        recorders.append(TraceFile(path))
    if otlp_endpoint is not None:
        from vllm_omni.entrypoints.otel import OtelRecorder

        recorders.append(OtelRecorder(otlp_endpoint, bool(detailed_modules)))
    return Tracing(recorders) if recorders else None
