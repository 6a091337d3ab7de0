"""The one orchestration: requests on a graph of stages, in one event loop.

Everything happens in callbacks of the loop: a stage's output arrives, is handed to the caller and to the edges that
leave the stage, and what the edges return is sent to the next stage before the callback returns. There is no task, no
queue and no timer per hop, and nothing polls. A request is one ``_Flow``; it ends once: with its last output, an
error, an abort or its deadline, and whatever stages still hold of it is aborted then.
"""

from __future__ import annotations

import asyncio
import itertools
import time
import traceback
import uuid
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from vllm_omni.distributed.omni_connectors.utils.serialization import leaf_refs
from vllm_omni.engine.stage_seam import StageLoad
from vllm_omni.entrypoints.results import shown_part
from vllm_omni.entrypoints.sinks import RequestSink
from vllm_omni.entrypoints.stage_client import StageClient, StageOutput
from vllm_omni.entrypoints.stage_graph import StageGraph, StageNode
from vllm_omni.entrypoints.tracing import RequestTrace, StageTrace, Tracing
from vllm_omni.errors import OmniError, RequestAborted, StageDeadError, StageError, from_wire
from vllm_omni.inputs.edge import EdgeInput
from vllm_omni.outputs import Preview
from vllm_omni.request import OmniRequest


@dataclass(slots=True)
class _Inbox:
    """The stream of chunks into one stage, for one request."""

    pending: dict[int, list[dict[str, Any]]]
    open_sources: set[int]
    calls: int = 0
    carry: dict[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class _Visit:
    """One request in one stage."""

    targets: list[int]
    """Stages that read its outputs."""
    final: bool
    """Whether the caller gets them."""
    submitted: float = 0.0
    admitted: bool = False
    backlog: list[tuple[Any, bool]] = field(default_factory=list)
    finished: bool = False
    sent: int = 0
    times: dict[str, float] = field(default_factory=dict)
    bytes_in: int = 0
    bytes_out: int = 0
    trace: StageTrace | None = None


@dataclass(slots=True)
class _Flow:
    """One open request."""

    key: str
    request: OmniRequest
    sink: RequestSink
    needed: frozenset[int]
    visits: dict[int, _Visit] = field(default_factory=dict)
    inboxes: dict[int, _Inbox] = field(default_factory=dict)
    timer: asyncio.TimerHandle | None = None
    opened: float = field(default_factory=time.monotonic)
    trace: RequestTrace | None = None

    def metrics(self) -> dict[str, Any]:
        return {str(stage_id): dict(visit.times) for stage_id, visit in sorted(self.visits.items())}

    def where(self) -> tuple[str, int | None]:
        """Phase and stage in which the request is now, for the deadline's error."""
        for stage_id, visit in sorted(self.visits.items()):
            if not visit.finished:
                return ("running in" if visit.admitted else "waiting for"), stage_id
        return "between stages", None


class Orchestrator:
    """Drives the requests over ``clients`` as ``graph`` says. Lives in one event loop; not thread-safe."""

    def __init__(self, graph: StageGraph, clients: Mapping[int, StageClient], tracing: Tracing | None = None) -> None:
        self._graph = graph
        self._clients = clients
        self._tracing = tracing
        self._flows: dict[str, _Flow] = {}
        self._by_user_id: dict[str, set[str]] = {}
        self._dead: dict[int, StageDeadError] = {}
        self._inflight: dict[int, int] = dict.fromkeys(clients, 0)
        self._waiting: dict[int, deque[_Flow]] = {stage_id: deque() for stage_id in clients}
        self._serial = itertools.count()
        self._salt = uuid.uuid4().hex[:8]

    async def attach(self) -> None:
        """Join the running loop."""
        await asyncio.gather(*(client.attach(self) for client in self._clients.values()))

    # ---------------------------------------------------------------- requests

    def open(self, request: OmniRequest, sink: RequestSink) -> str:
        """Start a request; returns the key to abort it with.

        Raises:
            RequestError: the prompt or its parameters are bad, or no stage makes what is asked for.
            StageDeadError: a stage that it needs is gone.
        """
        needed = self._graph.needed(request.output_modalities)
        for stage_id, error in self._dead.items():
            if stage_id in needed:
                raise StageDeadError(error.message, **error.details)
        flow = _Flow(f"{request.request_id}-{self._salt}{next(self._serial):x}", request, sink, needed)
        for stage_id in needed:
            sources = self._graph.node(stage_id).sources
            if sources:
                flow.inboxes[stage_id] = _Inbox({source: [] for source in sources}, set(sources))
        if self._tracing is not None:
            flow.trace = self._tracing.begin(request, flow.opened)
        self._flows[flow.key] = flow
        self._by_user_id.setdefault(request.request_id, set()).add(flow.key)
        if request.deadline is not None:
            delay = request.deadline.left()
            flow.timer = asyncio.get_running_loop().call_later(delay, self._expire, flow)
        try:
            for node in self._graph.roots:
                if node.stage_id in needed:
                    self._send(flow, node.stage_id, request.entry, last=True)
        except OmniError as error:
            self._forget(flow, error)
            _drop_frames(error)
            raise
        return flow.key

    def abort(self, request_id: str) -> int:
        """Abort every open request of this user id, or the one with this key; returns how many there were."""
        keys = self._by_user_id.get(request_id) or {request_id} & self._flows.keys()
        for key in list(keys):
            flow = self._flows[key]
            self._end(flow, RequestAborted(f"request {flow.request.request_id} was aborted"))
        return len(keys)

    def abort_all(self, error: OmniError) -> None:
        """End every open request with ``error``."""
        for flow in list(self._flows.values()):
            self._end(flow, from_wire(error.to_wire()))

    @property
    def open_requests(self) -> int:
        """Requests that have not ended."""
        return len(self._flows)

    @property
    def loads(self) -> dict[int, StageLoad]:
        """Each stage's requests."""
        out = {}
        for stage_id, client in self._clients.items():
            vitals = client.vitals()
            queued, running = (0, 0) if vitals is None else vitals.load or (0, self._inflight[stage_id])
            out[stage_id] = StageLoad(self._inflight[stage_id], len(self._waiting[stage_id]), queued, running)
        return out

    @property
    def dead_error(self) -> StageDeadError | None:
        """The first stage's death, if one has died."""
        return next(iter(self._dead.values()), None)

    def _expire(self, flow: _Flow) -> None:
        phase, stage_id = flow.where()
        assert flow.request.deadline is not None
        text = phase if stage_id is None else f"{phase} stage {stage_id}"
        self._end(flow, flow.request.deadline.error(text, stage_id))

    def _end(self, flow: _Flow, error: OmniError | None) -> None:
        """The one way a request ends."""
        if self._flows.get(flow.key) is not flow:
            return
        self._forget(flow, error)
        _drop_frames(error)
        flow.sink.on_end(error)

    def _forget(self, flow: _Flow, error: OmniError | None) -> None:
        del self._flows[flow.key]
        if flow.trace is not None:
            flow.trace.end(error)
        keys = self._by_user_id[flow.request.request_id]
        keys.discard(flow.key)
        if not keys:
            del self._by_user_id[flow.request.request_id]
        if flow.timer is not None:
            flow.timer.cancel()
        for stage_id, visit in flow.visits.items():
            if not visit.finished:
                if visit.admitted and stage_id not in self._dead:
                    self._clients[stage_id].abort([flow.key])
                self._leave(flow, stage_id, visit)

    # ---------------------------------------------------------------- into a stage

    def _send(self, flow: _Flow, stage_id: int, prompt: Any, last: bool) -> None:
        """Send a chunk to a stage, or keep it until the stage admits the request."""
        visit = flow.visits.get(stage_id)
        if visit is None:
            node = self._graph.node(stage_id)
            final = node.final_output and self._graph.wanted(node, flow.request.output_modalities)
            targets = [target for target in node.targets if target in flow.needed]
            visit = flow.visits[stage_id] = _Visit(targets, final, time.monotonic())
            visit.times["start_s"] = visit.submitted - flow.opened
            if flow.trace is not None:
                visit.trace = flow.trace.enter(stage_id, visit.submitted)
            if node.max_inflight is None or self._inflight[stage_id] < node.max_inflight:
                self._admit(flow, stage_id, visit)
            else:
                self._waiting[stage_id].append(flow)
        if visit.admitted:
            self._submit(flow, stage_id, visit, prompt, last)
        else:
            visit.backlog.append((prompt, last))

    def _admit(self, flow: _Flow, stage_id: int, visit: _Visit) -> None:
        self._inflight[stage_id] += 1
        visit.admitted = True
        now = time.monotonic()
        visit.times["wait_s"] = now - visit.submitted
        if visit.trace is not None:
            visit.trace.admitted = now

    def _flush(self, flow: _Flow, stage_id: int, visit: _Visit) -> None:
        backlog, visit.backlog = visit.backlog, []
        for prompt, last in backlog:
            self._submit(flow, stage_id, visit, prompt, last)

    def _submit(self, flow: _Flow, stage_id: int, visit: _Visit, prompt: Any, last: bool) -> None:
        at = None if flow.request.deadline is None else flow.request.deadline.at
        params = flow.request.sampling_params[stage_id]
        trace = visit.trace
        headers = None if trace is None else trace.headers
        read = bool(visit.targets)
        nbytes = self._clients[stage_id].submit(flow.key, prompt, params, at, visit.sent, last, read, headers)
        visit.sent += 1
        visit.bytes_in += nbytes
        if trace is not None:
            trace.sent(nbytes)

    def _leave(self, flow: _Flow, stage_id: int, visit: _Visit) -> None:
        """A request is done with a stage; the next one that waits may enter."""
        visit.finished = True
        if not visit.admitted:
            self._waiting[stage_id].remove(flow)
            return
        self._inflight[stage_id] -= 1
        if self._waiting[stage_id]:
            waiting = self._waiting[stage_id].popleft()
            entering = waiting.visits[stage_id]
            self._admit(waiting, stage_id, entering)
            self._guarded(waiting, stage_id, self._flush, waiting, stage_id, entering)

    # ---------------------------------------------------------------- out of a stage

    def on_output(self, stage_id: int, output: StageOutput) -> None:
        flow = self._flows.get(output.request_id)
        if flow is None:
            return  # aborted meanwhile; dropping the output frees its memory
        visit = flow.visits[stage_id]
        visit.bytes_out += output.nbytes
        if visit.trace is not None:
            visit.trace.got(output)
        if output.finished:
            self._note_times(visit, output)
            self._leave(flow, stage_id, visit)
        shown = shown_part(output.data, output.finished) if visit.final else None
        if len(visit.targets) + (shown is not None and any(leaf_refs(shown))) > 1:
            for leaf in leaf_refs(output.data):
                leaf.shared = True
        if shown is not None:
            flow.sink.on_output(stage_id, shown, output.finished, flow.metrics())
        for target in visit.targets:
            if flow.key in self._flows:
                self._feed(flow, stage_id, target, output)
        if (
            output.finished
            and all(flow.visits[i].finished for i in flow.needed if i in flow.visits)
            and self._complete(flow)
        ):
            self._end(flow, None)

    def on_progress(self, stage_id: int, request_id: str, step: int, total: int) -> None:
        flow = self._flows.get(request_id)
        if flow is not None:
            flow.sink.on_progress(stage_id, step, total)

    def on_preview(self, stage_id: int, request_id: str, preview: Preview) -> None:
        flow = self._flows.get(request_id)
        if flow is not None:
            flow.sink.on_preview(stage_id, preview)

    def on_failure(self, stage_id: int, request_id: str, error: OmniError) -> None:
        flow = self._flows.get(request_id)
        if flow is not None:
            self._leave(flow, stage_id, flow.visits[stage_id])
            self._end(flow, error)

    def on_dead(self, stage_id: int, error: StageDeadError) -> None:
        self._dead[stage_id] = error
        for flow in list(self._flows.values()):
            visit = flow.visits.get(stage_id)
            if stage_id in flow.needed and not (visit is not None and visit.finished):
                self._end(flow, StageDeadError(error.message, **error.details))

    def on_turn_end(self) -> None:
        for client in self._clients.values():
            client.flush()

    def _note_times(self, visit: _Visit, output: StageOutput) -> None:
        arriving = max(0.0, output.received - visit.submitted - visit.times["wait_s"])
        leaving = time.monotonic() - output.sent
        times = visit.times
        times["transfer_s"] = arriving + leaving
        times["transfer_in_s"], times["transfer_out_s"] = arriving, leaving
        times["bytes_in"], times["bytes_out"] = visit.bytes_in, visit.bytes_out
        times["queue_s"] = output.started - output.received
        times["run_s"] = output.sent - output.started

    def _complete(self, flow: _Flow) -> bool:
        """Whether no stage has anything to do for the request any more."""
        return all(stage_id in flow.visits or inbox.calls < 0 for stage_id, inbox in flow.inboxes.items())

    # ---------------------------------------------------------------- edges

    def _feed(self, flow: _Flow, source: int, target: int, output: StageOutput) -> None:
        """Put an output into a stage's inbox and call the edge function when there is enough."""
        node, inbox = self._graph.node(target), flow.inboxes[target]
        visit = flow.visits.get(target)
        if visit is not None and visit.finished:
            return
        inbox.pending[source].append(output.data)
        if output.finished:
            inbox.open_sources.discard(source)
        for origin in inbox.open_sources:
            if not 0 < node.windows[origin] <= len(inbox.pending[origin]):
                return
        self._guarded(flow, target, self._cross, flow, node, inbox, not inbox.open_sources)

    def _cross(self, flow: _Flow, node: StageNode, inbox: _Inbox, last: bool) -> None:
        outputs, inbox.pending = inbox.pending, {source: [] for source in inbox.pending}
        params = flow.request.sampling_params[node.stage_id]
        edge = EdgeInput(
            flow.key, outputs, flow.request.prompt, params, inbox.calls, last, inbox.carry, node.extra, node.config
        )
        prompt = node.process_input(edge)
        inbox.calls += 1
        if prompt is None and not (last and node.stage_id in flow.visits):
            if last:
                self._skip(flow, node.stage_id)
            return
        self._send(flow, node.stage_id, prompt, last)

    def _skip(self, flow: _Flow, stage_id: int) -> None:
        """An edge said that the stage, and so everything behind it alone, has nothing to do for this request."""
        flow.inboxes[stage_id].calls = -1
        for target in self._graph.node(stage_id).targets:
            if target not in flow.needed:
                continue
            inbox = flow.inboxes[target]
            inbox.open_sources.discard(stage_id)
            if inbox.open_sources:
                continue
            if any(inbox.pending.values()) or target in flow.visits:
                self._guarded(flow, target, self._cross, flow, self._graph.node(target), inbox, True)
            else:
                self._skip(flow, target)

    def _guarded(self, flow: _Flow, stage_id: int, action: Callable[..., None], *args: Any) -> None:
        """Run what may fail for this request alone; a failure ends the request, typed."""
        try:
            action(*args)
        except OmniError as error:
            error.details.setdefault("stage_id", stage_id)
            self._end(flow, error)
        except Exception as error:  # an edge function is foreign code: its error is the request's, not the loop's
            text = f"the input function of stage {stage_id} raised {type(error).__name__}: {error}"
            self._end(flow, StageError(text, stage_id=stage_id, cause=traceback.format_exc()))


def _drop_frames(error: BaseException | None) -> None:
    """Cut the tracebacks off, of what the error came from too.

    Their frames, and those of the loop behind them, hold what was on its way between the stages: shared memory that
    would stay in use for as long as the caller keeps the error. The caller's own frames join when it is raised there.
    """
    while error is not None:
        error.__traceback__ = None
        error = error.__cause__ or error.__context__
