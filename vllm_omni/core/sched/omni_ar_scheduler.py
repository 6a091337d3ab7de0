"""``OmniARScheduler``: vLLM's scheduler for requests whose conditioning arrives while they run.

A later chunk comes as an ordinary request message with the id of the running request. It is kept here until the next
step and sent to the workers with that step. A request whose conditioning is streamed may run decode step ``i`` only
when the conditioning of step ``i`` has arrived, or when the last chunk said that no more will come.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request

from vllm_omni.core.sched.output import attach_late_chunks
from vllm_omni.core.sched.payload_keeper import PayloadKeeper
from vllm_omni.worker.payload import OmniPayload, payload_of


@dataclass
class _Stream:
    """Conditioning of one request."""

    steps: int
    """Decode steps that may run."""
    last: bool = False
    """Whether all of it has arrived."""
    pending: list[OmniPayload] = field(default_factory=list)
    """Chunks that the workers have not seen."""
    at_workers: bool = False
    """Whether the workers know the request."""


class _ChunkMixin:
    """What the synchronous and the asynchronous scheduler have in common."""

    give_up: Callable[[Iterable[bytes]], None]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._streams: dict[str, _Stream] = {}

    def add_request(self, request: Request) -> None:
        """Queue a request, or keep a chunk of one. A chunk for a request that is gone is dropped."""
        payload = payload_of(request)
        if payload.chunk == 0:
            super().add_request(request)  # type: ignore[misc]
            if not payload.last:
                self._streams[request.request_id] = _Stream(payload.steps)
            return
        stream = self._streams.get(request.request_id)
        if stream is None:
            self.give_up(payload.data)
            return
        stream.pending.append(payload)
        stream.steps += payload.steps
        stream.last = payload.last

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        """vLLM's step over the requests that may run; waiting chunks go with it."""
        if not self._streams:
            return super().schedule(*args, **kwargs)  # type: ignore[misc]
        for request in self.running:  # type: ignore[attr-defined]
            if self._gated(request):
                # The counter moves on at the start of a step and is compared after that: this skips one step.
                request.next_decode_eligible_step = max(request.next_decode_eligible_step, self.current_step + 2)  # type: ignore[attr-defined]
        output: SchedulerOutput = super().schedule(*args, **kwargs)  # type: ignore[misc]
        for new in output.scheduled_new_reqs:
            if new.req_id in self._streams:
                self._streams[new.req_id].at_workers = True
        chunks: list[tuple[str, OmniPayload]] = []
        for req_id, stream in self._streams.items():
            if stream.at_workers and stream.pending:
                chunks += [(req_id, payload) for payload in stream.pending]
                stream.pending = []
        if chunks:
            attach_late_chunks(output, chunks)
        return output

    def has_requests(self) -> bool:
        """Whether a step may have work. While every request waits for conditioning the engine waits for its next
        message; empty steps would take requests out of the workers' batch, and come a millisecond apart."""
        found: bool = super().has_requests()  # type: ignore[misc]
        if not (found and self._streams):
            return found
        running: list[Request] = self.running  # type: ignore[attr-defined]
        _, waiting = self.get_request_counts()  # type: ignore[attr-defined]
        if waiting or not running or self.has_finished_requests():  # type: ignore[attr-defined]
            return True
        return not all(self._gated(request) for request in running)

    def _gated(self, request: Request) -> bool:
        """Whether the next position of ``request`` needs conditioning that has not arrived."""
        stream = self._streams.get(request.request_id)
        if stream is None or stream.last:
            return False
        needed: int = request.num_tokens + request.num_output_placeholders - request.num_prompt_tokens
        return needed > stream.steps

    def _handle_blocked_waiting_request(self, request: Request) -> bool:
        """A preempted request is computed again up to its last token: it waits for that token's conditioning."""
        return not self._gated(request) and super()._handle_blocked_waiting_request(request)  # type: ignore[misc]

    def _free_request(self, request: Request, *args: Any, **kwargs: Any) -> Any:
        stream = self._streams.pop(request.request_id, None)
        if stream is not None:
            for payload in stream.pending:
                self.give_up(payload.data)
        return super()._free_request(request, *args, **kwargs)  # type: ignore[misc]


class OmniARScheduler(_ChunkMixin, PayloadKeeper, Scheduler):
    """Scheduler of an autoregressive stage."""


class OmniARAsyncScheduler(_ChunkMixin, PayloadKeeper, AsyncScheduler):
    """The same under asynchronous scheduling (vLLM's default on CUDA)."""
