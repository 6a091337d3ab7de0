"""The client of a stage on vLLM's engine: ``AsyncMPClient``, a task that sends and a task that receives.

What a stage sends for one output is one mapping::

    token_ids          tokens that this output adds
    prompt_token_ids   with the first output
    request_output     vLLM's ``RequestOutput``, when the request's ``output_kind`` gives one now
    finish_reason      with the last output
    ...                the payload: ``hidden.<layer>`` with ``start``, and what the model's hooks gave

A generation stage sends the payload alone. A window of a streamed input is an independent request of the engine there;
outputs are handed on in the order of the windows.
"""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, EngineCoreRequest
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.metrics.stats import IterationStats

from vllm_omni.distributed.omni_connectors.utils.leaf_ref import nbytes_of
from vllm_omni.distributed.omni_connectors.utils.serialization import Codec
from vllm_omni.engine.adapters import Adapters
from vllm_omni.engine.ar_calls import EngineCalls
from vllm_omni.engine.ar_launch import ARStageHandle
from vllm_omni.engine.ar_requests import OpenRequest
from vllm_omni.engine.engine_pulse import EnginePulse
from vllm_omni.engine.input_processor import (
    OmniInputProcessor,
    StagePrompt,
    Target,
    chunk_request,
    generation_request,
)
from vllm_omni.engine.output_processor import MultimodalOutputProcessor, TakenPayload, take_payloads
from vllm_omni.engine.stage_seam import StageClient, StageListener, StageOutput, Vitals
from vllm_omni.errors import DeadlineError, OmniError, RequestError, StageDeadError, StageError


class ARStageClient(StageClient):
    """Client of one autoregressive or generation stage."""

    def __init__(self, handle: ARStageHandle, codec: Codec) -> None:
        self.stage_id = handle.spec.stage_id
        self.info = handle.info
        self._handle = handle
        self._client = handle.client
        self._codec = codec
        self._target = Target(codec, handle.config.parallel_config.tensor_parallel_size, handle.pid)
        self._generation = handle.spec.stage_type == "generation"
        self._inputs = None if self._generation else OmniInputProcessor(handle.config, self._target)
        self._calls = EngineCalls(handle)
        self._adapters = Adapters(handle.config.lora_config is not None, functools.partial(self.call, "add_lora"))
        tokenizer = None if self._inputs is None else self._inputs.tokenizer
        collected = handle.config.observability_config.otlp_traces_endpoint is not None
        self._outputs = MultimodalOutputProcessor(codec, tokenizer, log_stats=collected, tracing_enabled=collected)
        self._open: dict[str, OpenRequest] = {}
        self._owner: dict[str, tuple[str, int]] = {}
        self._listener: StageListener | None = None
        self._dead: StageDeadError | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._outbox: asyncio.Queue[EngineCoreRequest | list[str]] = asyncio.Queue()
        self._pulse = EnginePulse(handle.client, handle.info.pids)
        self._pool = ThreadPoolExecutor(1, thread_name_prefix=f"stage-{self.stage_id}-inputs")

    @property
    def renderer(self) -> Any | None:
        return None if self._inputs is None or self._inputs.tokenizer is None else self._inputs.renderer

    async def attach(self, listener: StageListener) -> None:
        self._listener = listener
        self._outbox = asyncio.Queue()
        reading = self._client.resources.output_queue_task
        if reading is None or reading.done() or reading.get_loop() is not asyncio.get_running_loop():
            # vLLM's client ties its queue and its reader to the loop that used it first; this is another one.
            self._client.outputs_queue = asyncio.Queue()
            self._client.resources.output_queue_task = None
        self._start(self._receive())
        self._start(self._send())

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._die(error)

    def _die(self, error: BaseException) -> None:
        """The engine is gone, or what it sends cannot be read: every open request has lost its stage."""
        listener, self._listener = self._listener, None
        if listener is None:
            return
        codes = [process.exitcode for process in self._handle.processes if process.exitcode is not None]
        how = f"ended with code {codes[0]}" if codes else f"failed: {type(error).__name__}: {error}"
        self._dead = StageDeadError(
            f"the engine of stage {self.stage_id} (pid {self._handle.pid}) {how}",
            stage_id=self.stage_id,
            exit_code=codes[0] if codes else None,
        )
        self._dead = error if isinstance(error, StageDeadError) else self._dead
        self._open.clear()
        self._owner.clear()
        listener.on_dead(self.stage_id, self._dead)

    def vitals(self) -> Vitals | None:
        return None if self._listener is None else self._pulse.vitals(bool(self._open))

    def give_up(self, error: StageDeadError) -> None:
        self._pulse.kill()
        self._die(error)

    # ---------------------------------------------------------------- in

    def submit(
        self,
        request_id: str,
        prompt: Any,
        params: Any,
        deadline: float | None,
        chunk: int,
        last: bool,
        read: bool = True,
        trace: Mapping[str, str] | None = None,
        direct: bool = False,
    ) -> int:
        assert not direct, "vLLM's engine sends its outputs to its client alone"
        if self._dead is not None:
            raise self._dead
        nbytes = nbytes_of(prompt)
        if self._inputs is None:
            self._submit_window(request_id, prompt, last, trace)
        elif chunk == 0:
            self._submit_first(self._inputs, request_id, prompt, params, last, read, trace)
        elif (request := self._open.get(request_id)) is not None:
            if request.begun:
                self._put(chunk_request(request_id, prompt, chunk, last=last, target=self._target))
            else:
                request.waiting.append((prompt, chunk, last))
        return nbytes

    def _put(self, message: EngineCoreRequest | list[str]) -> None:
        self._outbox.put_nowait(message)

    def _submit_first(
        self,
        inputs: OmniInputProcessor,
        request_id: str,
        prompt: Any,
        params: Any,
        last: bool,
        read: bool,
        trace: Mapping[str, str] | None,
    ) -> None:
        parts = StagePrompt.of(prompt)
        if self._handle.spec.final_output_type is None:
            params = params.clone()
            params.output_kind, params.detokenize = RequestOutputKind.FINAL_ONLY, bool(params.stop)
        if not read:
            parts = replace(parts, emit=False)
        request = OpenRequest.now(trace)
        if parts.is_rendered:
            made, text = inputs.prepare(request_id, parts, params, parts.lora_request)
            self._begin(inputs, request_id, request, parts, made, text, last)
        else:
            self._open[request_id] = request
            self._start(self._prepare(inputs, request_id, request, parts, params, last))

    async def _prepare(
        self,
        inputs: OmniInputProcessor,
        request_id: str,
        request: OpenRequest,
        parts: StagePrompt,
        params: Any,
        last: bool,
    ) -> None:
        """Load the adapter; tokenise and process media beside the loop. What a processor raises is this request's
        error."""
        if parts.lora_request is not None:
            try:
                await self._adapters.ready(parts.lora_request)
            except OmniError as refused:
                if self._open.get(request_id) is request:
                    self._fail(request_id, refused)
                return
        work = functools.partial(inputs.prepare, request_id, parts, params, parts.lora_request)
        prepared = asyncio.get_running_loop().run_in_executor(self._pool, work)
        await asyncio.wait({prepared})
        if self._open.get(request_id) is not request:
            return
        error = prepared.exception()
        if error is not None:
            wrong = f"the prompt cannot be processed: {type(error).__name__}: {error}"
            self._fail(request_id, error if isinstance(error, OmniError) else RequestError(wrong, field="prompt"))
            return
        try:
            self._begin(inputs, request_id, request, parts, *prepared.result(), last)
        except OmniError as refused:
            self._fail(request_id, refused)

    def _begin(
        self,
        inputs: OmniInputProcessor,
        request_id: str,
        request: OpenRequest,
        parts: StagePrompt,
        made: EngineCoreRequest,
        text: str | None,
        last: bool,
    ) -> None:
        inputs.attach(made, parts, last=last)
        made.trace_headers = request.trace or None
        request.prompt_token_ids = made.prompt_token_ids
        self._open[request_id] = request
        for message in self._outputs.open(made, text):
            self._put(message)
        request.begun = True
        for prompt, number, final in request.waiting:
            self._put(chunk_request(request_id, prompt, number, last=final, target=self._target))
        request.waiting.clear()

    def _submit_window(self, request_id: str, prompt: Any, last: bool, trace: Mapping[str, str] | None) -> None:
        request = self._open.get(request_id) or OpenRequest.now(trace)
        if prompt is not None:
            window = f"{request_id}#{request.windows}"
            made = generation_request(window, prompt, self._target)
            self._owner[window] = (request_id, request.windows)
            request.windows += 1
            self._put(made)
        self._open[request_id] = request
        request.closed = last
        if request.closed and request.handed_on == request.windows:
            self._hand_on(request_id, request, {}, time.monotonic(), finished=True)

    def abort(self, request_ids: Sequence[str]) -> None:
        known = [request_id for request_id in request_ids if request_id in self._open]
        if known and self._dead is None:
            self._forget(known)

    def _forget(self, request_ids: Sequence[str]) -> None:
        """Drop requests here and in the engine."""
        ids: list[str] = []
        for request_id in request_ids:
            request = self._open.pop(request_id)
            if self._generation:
                ids += [window for window, (owner, _) in self._owner.items() if owner == request_id]
            elif request.begun:
                ids.append(request_id)
        for window in ids:
            self._owner.pop(window, None)
        ids += set(self._outputs.abort_requests(ids, internal=True)).difference(ids)
        if ids:
            self._put(ids)

    async def _send(self) -> None:
        while True:
            message = await self._outbox.get()
            if isinstance(message, list):
                await self._client.abort_requests_async(message)
            else:
                await self._client.add_request_async(message)

    # ---------------------------------------------------------------- out

    async def _receive(self) -> None:
        while True:
            outputs = await self._client.get_output_async()
            self._pulse.advance(outputs.scheduler_stats)
            self._take_windows(outputs) if self._generation else self._take_tokens(outputs)

    def _take_tokens(self, outputs: EngineCoreOutputs) -> None:
        stats = IterationStats() if self._outputs.tracing_enabled else None
        processed = self._outputs.process_outputs(outputs.outputs, outputs.timestamp, stats)
        payloads = {taken.request_id: taken for taken in self._outputs.payloads}
        self._outputs.payloads = []  # what is not handed on is given up now, not with the next step
        rendered = {output.request_id: output for output in processed.request_outputs}
        if processed.reqs_to_abort:
            self._put(processed.reqs_to_abort)
        for output in outputs.outputs:
            self._take_output(output, payloads.get(output.request_id), rendered.get(output.request_id), outputs)

    def _take_output(
        self, output: EngineCoreOutput, payload: TakenPayload | None, rendered: Any, outputs: EngineCoreOutputs
    ) -> None:
        request_id = output.request_id
        request = self._open.get(request_id)
        if request is None:
            return  # aborted meanwhile; dropping the payload frees its memory
        request.note(output, outputs.timestamp)
        if payload is not None and payload.error is not None:
            self._fail(request_id, payload.error)
            return
        if output.finish_reason is not None and str(output.finish_reason) == "error":
            self._fail(request_id, StageError(f"stage {self.stage_id} failed on the request", stage_id=self.stage_id))
            return
        data: dict[str, Any] = {"token_ids": list(output.new_token_ids)}
        if request.prompt_token_ids is not None:
            data["prompt_token_ids"], request.prompt_token_ids = request.prompt_token_ids, None
        if payload is not None:
            data.update(payload.data)
        finished = output.finished
        if rendered is not None:
            for completion in rendered.outputs:  # vLLM's list goes on growing under who still holds it
                completion.token_ids = list(completion.token_ids)
            data["request_output"] = rendered
            finished = finished or rendered.finished
        if finished:
            data["finish_reason"] = rendered.outputs[0].finish_reason if rendered is not None else None
        self._hand_on(request_id, request, data, outputs.timestamp, finished)

    def _take_windows(self, outputs: EngineCoreOutputs) -> None:
        made = {output.request_id: output for output in outputs.outputs}
        for taken in take_payloads(outputs.outputs, self._codec):
            if taken.request_id not in self._owner:
                continue
            request_id, number = self._owner.pop(taken.request_id)
            request = self._open[request_id]
            request.note(made[taken.request_id], outputs.timestamp)
            if taken.error is not None:
                self._fail(request_id, taken.error)
                continue
            request.done[number] = (taken.data, outputs.timestamp)
            while request.handed_on in request.done:
                data, sent = request.done.pop(request.handed_on)
                request.handed_on += 1
                finished = request.closed and request.handed_on == request.windows
                self._hand_on(request_id, request, data, sent, finished)

    def _hand_on(
        self, request_id: str, request: OpenRequest, data: dict[str, Any], sent: float, finished: bool
    ) -> None:
        if finished:
            del self._open[request_id]
        if self._listener is not None:
            times = request.received, request.started or request.received, sent
            output = StageOutput(request_id, data, finished, *times, nbytes_of(data), request.take_spans())
            self._listener.on_output(self.stage_id, output)

    def _fail(self, request_id: str, error: OmniError) -> None:
        self._forget([request_id])
        if self._listener is not None:
            self._listener.on_failure(self.stage_id, request_id, error)

    # ---------------------------------------------------------------- calls and end

    async def call(self, method: str, *args: Any, timeout: float | None = None, **kwargs: Any) -> Any:
        if self._dead is not None:
            raise self._dead
        task = asyncio.ensure_future(self._calls.run(method, *args, **kwargs))
        done, _ = await asyncio.wait({task}, timeout=timeout)
        if not done:
            task.cancel()
            raise DeadlineError(
                f"stage {self.stage_id} did not answer {method} within {timeout:g} s",
                phase=method,
                stage_id=self.stage_id,
            )
        error = task.exception()
        if error is None:
            return task.result()
        if isinstance(error, OmniError):
            raise error
        if isinstance(error, EngineDeadError):
            raise StageDeadError(f"the engine of stage {self.stage_id} is gone", stage_id=self.stage_id) from error
        raise StageError(f"stage {self.stage_id}: {method}: {error}", stage_id=self.stage_id) from error

    def detach(self) -> None:
        self._listener = None
        self._pulse.stop()
        reading = self._client.resources.output_queue_task
        for task in (*self._tasks, *(() if reading is None else (reading,))):
            if not task.get_loop().is_closed():
                task.cancel()
        self._pool.shutdown(wait=False, cancel_futures=True)
