"""The one orchestration: requests on a graph of stages, in one event loop.

Everything happens in callbacks of the loop: a stage's output arrives, is handed to the caller and to the edges that
leave the stage, and what the edges return is sent to the next stage before the callback returns. There is no task, no
queue and no timer per hop, and nothing polls. A request is one ``Flow``; it ends once: with its last output, an
error, an abort or its deadline, and whatever stages still hold of it is aborted then.
"""

from __future__ import annotations

import asyncio
import itertools
import time
import uuid
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

from vllm_omni.distributed.omni_connectors.utils.serialization import leaf_refs
from vllm_omni.engine.inbox import Inbox, input_error
from vllm_omni.engine.messages import Notes
from vllm_omni.engine.stage_seam import StageLoad
from vllm_omni.entrypoints.flow import Flow, Visit
from vllm_omni.entrypoints.results import shown_part
from vllm_omni.entrypoints.sinks import RequestSink
from vllm_omni.entrypoints.stage_client import StageClient, StageOutput
from vllm_omni.entrypoints.stage_graph import StageGraph, StageNode
from vllm_omni.entrypoints.tracing import Tracing
from vllm_omni.errors import OmniError, RequestAborted, StageDeadError, from_wire
from vllm_omni.inputs.edge import pass_on
from vllm_omni.outputs import Preview
from vllm_omni.request import OmniRequest


class Orchestrator:
    """Drives the requests over ``clients`` as ``graph`` says. Lives in one event loop; not thread-safe."""

    def __init__(self, graph: StageGraph, clients: Mapping[int, StageClient], tracing: Tracing | None = None) -> None:
        self._graph = graph
        self._clients = clients
        self._tracing = tracing
        self._flows: dict[str, Flow] = {}
        self._by_user_id: dict[str, set[str]] = {}
        self._dead: dict[int, StageDeadError] = {}
        self._inflight: dict[int, int] = dict.fromkeys(clients, 0)
        self._waiting: dict[int, deque[Flow]] = {stage_id: deque() for stage_id in clients}
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
        flow = Flow(f"{request.request_id}-{self._salt}{next(self._serial):x}", request, sink, needed)
        for stage_id in needed:
            sources = self._graph.node(stage_id).sources
            if sources:
                flow.inboxes[stage_id] = Inbox(sources)
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

    def _expire(self, flow: Flow) -> None:
        phase, stage_id = flow.where()
        assert flow.request.deadline is not None
        text = phase if stage_id is None else f"{phase} stage {stage_id}"
        self._end(flow, flow.request.deadline.error(text, stage_id))

    def _end(self, flow: Flow, error: OmniError | None) -> None:
        """The one way a request ends."""
        if self._flows.get(flow.key) is not flow:
            return
        self._forget(flow, error)
        _drop_frames(error)
        flow.sink.on_end(error)

    def _forget(self, flow: Flow, error: OmniError | None) -> None:
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

    def _send(self, flow: Flow, stage_id: int, prompt: Any, last: bool) -> None:
        """Send a chunk to a stage, or keep it until the stage admits the request."""
        visit = flow.visits.get(stage_id)
        if visit is None:
            node = self._graph.node(stage_id)
            visit = self._enter(flow, node)
            if flow.trace is not None:
                visit.trace = flow.trace.enter(stage_id, visit.submitted)
            if node.max_inflight is None or self._inflight[stage_id] < node.max_inflight:
                self._admit(flow, stage_id, visit)
                visit.direct = self._expect_behind(flow, node)
            else:
                self._waiting[stage_id].append(flow)
        if visit.admitted:
            self._submit(flow, stage_id, visit, prompt, last)
        else:
            visit.backlog.append((prompt, last))

    def _enter(self, flow: Flow, node: StageNode) -> Visit:
        final = node.final_output and self._graph.wanted(node, flow.request.output_modalities)
        targets = [target for target in node.targets if target in flow.needed]
        visit = flow.visits[node.stage_id] = Visit(targets, final, submitted=time.monotonic())
        visit.times["start_s"] = visit.submitted - flow.opened
        return visit

    def _expect_behind(self, flow: Flow, source: StageNode) -> bool:
        """Tell the stage behind ``source`` of the request, if it can get its chunks straight from there.

        Returns whether it does."""
        if source.direct_target is None:
            return False
        node = self._graph.node(source.direct_target)
        visit = self._enter(flow, node)
        self._admit(flow, node.stage_id, visit)
        visit.direct = self._expect_behind(flow, node)
        request = flow.request
        at = None if request.deadline is None else request.deadline.at
        prompt = None if node.process_input is pass_on else request.prompt
        client, params = self._clients[node.stage_id], request.sampling_params[node.stage_id]
        if client.expect(flow.key, prompt, params, at, visit.direct, flow.trace is not None):
            return True
        self._expect_no_more(flow, node.stage_id)
        return False

    def _expect_no_more(self, flow: Flow, stage_id: int) -> None:
        """A stage that was told of a request gets nothing of it straight from its source, nor do those behind it."""
        visit = flow.left_out(stage_id)
        self._clients[stage_id].abort([flow.key])
        self._leave(flow, stage_id, visit)
        target = self._graph.node(stage_id).direct_target
        if visit.direct and target is not None:
            self._expect_no_more(flow, target)

    def _admit(self, flow: Flow, stage_id: int, visit: Visit) -> None:
        self._inflight[stage_id] += 1
        visit.admitted = True
        now = time.monotonic()
        visit.times["wait_s"] = now - visit.submitted
        if visit.trace is not None:
            visit.trace.admitted = now

    def _flush(self, flow: Flow, stage_id: int, visit: Visit) -> None:
        backlog, visit.backlog = visit.backlog, []
        for prompt, last in backlog:
            self._submit(flow, stage_id, visit, prompt, last)

    def _submit(self, flow: Flow, stage_id: int, visit: Visit, prompt: Any, last: bool) -> None:
        at = None if flow.request.deadline is None else flow.request.deadline.at
        params = flow.request.sampling_params[stage_id]
        trace = visit.trace
        headers = None if trace is None else trace.headers
        read = bool(visit.targets)
        words = flow.key, prompt, params, at, visit.sent, last, read, headers, visit.direct
        nbytes = self._clients[stage_id].submit(*words)
        visit.sent += 1
        visit.bytes_in += nbytes
        if trace is not None:
            trace.sent(nbytes)

    def _leave(self, flow: Flow, stage_id: int, visit: Visit) -> None:
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
        if output.finished and any(
            i in flow.visits and flow.visits[i].ahead for i in self._graph.node(stage_id).sources
        ):
            visit.held = output  # it overtook what its source says of its own end; times are reported in full
            return
        self._take(flow, stage_id, visit, output)

    def _take(self, flow: Flow, stage_id: int, visit: Visit, output: StageOutput) -> None:
        visit.bytes_out += output.nbytes
        if output.came:
            visit.submitted, visit.bytes_in = output.came, output.bytes_in
            visit.times["start_s"] = output.came - flow.opened
        if visit.trace is not None and not visit.direct:
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
        for target in () if visit.direct else visit.targets:
            if flow.key in self._flows:
                self._feed(flow, stage_id, target, output)
        if output.finished:
            self._finished(flow, visit)

    def _finished(self, flow: Flow, visit: Visit) -> None:
        """A stage has ended a request: what waited for that goes on."""
        for target in visit.targets if visit.direct else ():
            behind = flow.visits.get(target)
            if behind is not None and behind.held is not None:
                self._take(flow, target, behind, behind.held)
                return
        if self._complete(flow):
            self._end(flow, None)

    def on_notes(self, stage_id: int, notes: Notes) -> None:
        flow = self._flows.get(notes.request_id)
        if flow is not None:
            flow.note(stage_id, notes)

    def on_skipped(self, stage_id: int, request_id: str) -> None:
        flow = self._flows.get(request_id)
        if flow is not None:
            self._expect_no_more(flow, stage_id)
            self._skip(flow, stage_id)
            if self._complete(flow):
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

    def _note_times(self, visit: Visit, output: StageOutput) -> None:
        arriving = max(0.0, output.received - visit.submitted - visit.times["wait_s"])
        leaving = time.monotonic() - output.sent
        times = visit.times
        times["transfer_s"] = arriving + leaving
        times["transfer_in_s"], times["transfer_out_s"] = arriving, leaving
        times["bytes_in"], times["bytes_out"] = visit.bytes_in, visit.bytes_out
        times["queue_s"] = output.started - output.received
        times["run_s"] = output.sent - output.started

    def _complete(self, flow: Flow) -> bool:
        """Whether no stage has anything to do for the request any more."""
        if not all(visit.finished for visit in flow.visits.values()):
            return False
        return all(stage_id in flow.visits or inbox.calls < 0 for stage_id, inbox in flow.inboxes.items())

    # ---------------------------------------------------------------- edges

    def _feed(self, flow: Flow, source: int, target: int, output: StageOutput) -> None:
        """Put an output into a stage's inbox and call the edge function when there is enough."""
        node, inbox = self._graph.node(target), flow.inboxes[target]
        visit = flow.visits.get(target)
        if visit is not None and visit.finished:
            return
        if inbox.add(source, output.data, output.finished, node):
            self._guarded(flow, target, self._cross, flow, node, inbox)

    def _cross(self, flow: Flow, node: StageNode, inbox: Inbox) -> None:
        last = not inbox.open_sources
        prompt = inbox.call(node, flow.key, flow.request.prompt, flow.request.sampling_params[node.stage_id])
        if prompt is None and not (last and node.stage_id in flow.visits):
            if last:
                self._skip(flow, node.stage_id)
            return
        self._send(flow, node.stage_id, prompt, last)

    def _skip(self, flow: Flow, stage_id: int) -> None:
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
                self._guarded(flow, target, self._cross, flow, self._graph.node(target), inbox)
            else:
                self._skip(flow, target)

    def _guarded(self, flow: Flow, stage_id: int, action: Callable[..., None], *args: Any) -> None:
        """Run what may fail for this request alone; a failure ends the request, typed."""
        try:
            action(*args)
        except Exception as error:
            self._end(flow, input_error(error, stage_id))


def _drop_frames(error: BaseException | None) -> None:
    """Cut the tracebacks off, of what the error came from too.

    Their frames, and those of the loop behind them, hold what was on its way between the stages: shared memory that
    would stay in use for as long as the caller keeps the error. The caller's own frames join when it is raised there.
    """
    while error is not None:
        error.__traceback__ = None
        error = error.__cause__ or error.__context__
