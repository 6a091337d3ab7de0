"""The engine of a diffusion stage: takes requests, has the scheduler choose, has the ranks work, reports events.

One ``step`` is one unit of work: encode a few requests, one denoise step of a batch, or decode a few. Requests join and
leave between steps; so do cancels and deadlines. What goes wrong in a unit concerns the requests of that unit alone:

- input that the model does not take: ``RequestError``, for that request, before it costs anything;
- a unit of several requests that fails: each is tried again by itself, where their states are still untouched;
- out of memory: ``OutOfMemoryError`` after that, caches are freed, later batches are made smaller;
- any other exception in a unit: ``StageError`` with the traceback as ``cause``;
- a rank that is gone: ``StageDeadError`` out of ``step``, the end of the engine.
"""

from __future__ import annotations

import dataclasses
import math
import secrets
import time
from collections.abc import Mapping, Sequence
from typing import Any

from vllm_omni.config.schema import nearest
from vllm_omni.diffusion import registry
from vllm_omni.diffusion.data import OmniDiffusionConfig
from vllm_omni.diffusion.executor.abstract import create_executor
from vllm_omni.diffusion.ipc import Encoded, Output, StepPlan, StepResult, UnitError
from vllm_omni.diffusion.open_request import OpenRequest
from vllm_omni.diffusion.request import OmniDiffusionRequest
from vllm_omni.diffusion.scheduler import Phase, Scheduler, Unit, UnitKind
from vllm_omni.engine.stage_engine import (
    StageChunk,
    StageEngine,
    StageEvent,
    StageFailure,
    StageInfo,
    StageInput,
    StagePreview,
    StageProgress,
)
from vllm_omni.errors import DeadlineError, OmniError, OutOfMemoryError, RequestError, StageError, from_wire
from vllm_omni.inputs.data import OmniDiffusionSamplingParams, OmniTextPrompt

_SEED_BITS = 32


class DiffusionEngine(StageEngine):
    """Owns the scheduler and the executor of one diffusion stage. All methods are called from one thread."""

    def __init__(self, od_config: OmniDiffusionConfig, stage_id: int = 0) -> None:
        """Start the ranks and load the model.

        Raises:
            ConfigError: a setting that the model or the platform cannot honour.
            StageError: a rank failed while it started; ``details["cause"]`` holds its traceback.
        """
        self.od_config = od_config
        self.stage_id = stage_id
        registry.check_features(od_config)
        self._pre_process = registry.get_diffusion_pre_process_func(od_config)
        self._executor = create_executor(od_config)
        self._facts: dict[str, Any] = self._executor.facts()[0]
        self._scheduler = Scheduler(od_config.max_num_seqs, by_steps=bool(self._facts["by_steps"]))
        self._scheduler.token_limit = float(od_config.max_num_batched_tokens or math.inf)
        self._fit_limit = self._scheduler.token_limit
        self._oom_limit = math.inf
        self._open: dict[str, OpenRequest] = {}
        self._new: dict[str, OmniDiffusionRequest] = {}
        self._failures: dict[str, OmniError] = {}
        self._drop: list[str] = []
        self._pending = 0

    @classmethod
    def from_config(cls, stage_id: int, engine_args: dict[str, Any]) -> DiffusionEngine:
        """Build from the keyword arguments of ``OmniDiffusionConfig``."""
        return cls(OmniDiffusionConfig.from_kwargs(**engine_args), stage_id)

    def info(self) -> StageInfo:
        """Facts for the driver."""
        facts = self._executor.facts()
        return StageInfo(
            name=str(self._facts["pipeline"]), ranks=len(facts), pids=self._executor.pids(), facts=facts[0]
        )

    # ------------------------------------------------------------------------------------------ requests

    def add_request(self, request: StageInput) -> None:
        """Queue a request; what is wrong with it becomes a ``StageFailure`` of the next ``step``."""
        try:
            req = self._checked(request)
            if self._pre_process is not None:
                (req,) = self._pre_process([req])
        except RequestError as error:
            self._failures[request.request_id] = error
            return
        self._open[request.request_id] = OpenRequest(
            request.deadline,
            req.sampling_params.seed,
            steps=req.sampling_params.num_inference_steps,
            spans=[] if request.traced else None,
        )
        self._new[request.request_id] = req

    def _checked(self, request: StageInput) -> OmniDiffusionRequest:
        """The request as pipelines take it, with a seed. Raises ``RequestError``."""
        if request.chunk != 0 or not request.last:
            raise RequestError("a diffusion stage takes its input whole, not in chunks", field="chunk")
        if request.request_id in self._open:
            raise RequestError(f"request id {request.request_id!r} is in use", field="request_id")
        _check_prompt(request.prompt)
        params = request.sampling_params
        if params is None:
            params = OmniDiffusionSamplingParams()
        elif isinstance(params, Mapping):
            params = OmniDiffusionSamplingParams.from_kwargs(params)
        elif not isinstance(params, OmniDiffusionSamplingParams):
            raise RequestError(
                f"sampling parameters are {type(params).__name__}; a diffusion stage takes OmniDiffusionSamplingParams",
                field="sampling_params",
            )
        params.validate()
        if params.num_previews and not self._facts["previews"]:
            raise RequestError(f"num_previews: {self._facts['pipeline']} shows no previews", field="num_previews")
        params = params.clone()
        if params.seed is None and params.generator is None:
            default = self.od_config.default_seed
            params.seed = secrets.randbits(_SEED_BITS) if default is None else default
        return OmniDiffusionRequest([request.prompt], params, [request.request_id])

    def abort(self, request_ids: Sequence[str]) -> None:
        """Forget requests, in whatever phase; takes effect before the next unit."""
        for request_id in request_ids:
            self._failures.pop(request_id, None)
            if request_id in self._open:
                self._close_request(request_id)

    def _close_request(self, request_id: str) -> None:
        del self._open[request_id]
        self._scheduler.finish(request_id)
        if self._new.pop(request_id, None) is None:
            self._drop.append(request_id)

    def _fail(self, request_id: str, error: OmniError) -> StageFailure:
        self._close_request(request_id)
        error.details.setdefault("stage_id", self.stage_id)
        return StageFailure(request_id, error)

    def load(self) -> tuple[int, int]:
        """Requests that wait to be encoded, and requests under way."""
        waiting = len(self._new) + self._scheduler.num_waiting
        return waiting, len(self._open) - waiting

    # ------------------------------------------------------------------------------------------ steps

    def has_work(self) -> bool:
        """Whether ``step`` would do something."""
        return bool(self._open or self._failures or self._drop)

    def step(self) -> list[StageEvent]:
        """Do one unit of work.

        Raises:
            StageDeadError: a rank is gone.
        """
        events: list[StageEvent] = [StageFailure(*failure) for failure in self._failures.items()]
        self._failures.clear()
        self._expire(events)
        if self._new:
            self._admit(list(self._new), events)
        unit = self._scheduler.next_unit()
        if unit is not None:
            self._do(unit, events)
        elif self._pending or self._drop:
            self._take_outputs(self._executor.execute(self._plan(collect=True)), events)
        return events

    def _plan(self, **parts: Any) -> StepPlan:
        drop, self._drop = tuple(self._drop), []
        return StepPlan(drop=drop, **parts)

    def _expire(self, events: list[StageEvent]) -> None:
        now = time.monotonic()
        late = self._scheduler.expired(now)
        late += [(key, Phase.WAITING) for key in self._new if (self._open[key].deadline or math.inf) <= now]
        for request_id, phase in late:
            error = DeadlineError(f"the deadline passed in phase {phase.value}", phase=phase.value)
            events.append(self._fail(request_id, error))

    def _admit(self, request_ids: list[str], events: list[StageEvent]) -> None:
        """Hand new requests to the ranks, whose pipeline checks them; queue those that pass."""
        new = tuple(self._new[request_id] for request_id in request_ids)
        result = self._executor.execute(self._plan(new=new))
        if result.error is not None and len(new) > 1:
            for request_id in request_ids:
                self._admit([request_id], events)
            return
        for request_id in request_ids:
            del self._new[request_id]
            if result.error is not None:
                events.append(self._fail(request_id, _error_of(result.error, "check")))
            elif request_id in result.refused:
                events.append(self._fail(request_id, from_wire(result.refused[request_id])))
            else:
                self._scheduler.add(request_id, result.accepted[request_id].shape, self._open[request_id].deadline)
        self._take_outputs(result, events)

    def _do(self, unit: Unit, events: list[StageEvent]) -> None:
        started = time.monotonic()
        for request_id in unit.request_ids:
            self._open[request_id].started = self._open[request_id].started or started
        result = self._executor.execute(self._plan(kind=unit.kind.value, request_ids=unit.request_ids))
        ended = time.monotonic()
        for request_id in unit.request_ids:
            self._open[request_id].note(unit.kind.value, started, ended, len(unit.request_ids))
        if result.error is not None:
            self._unit_failed(unit, result.error, events)
        elif unit.kind is UnitKind.ENCODE:
            for request_id, encoded in result.encoded.items():
                self._encoded(request_id, encoded, events)
        elif unit.kind is UnitKind.DENOISE:
            self._stepped(unit, events)
        else:
            for request_id in unit.request_ids:
                self._scheduler.finish(request_id)
        self._take_outputs(result, events)

    def _encoded(self, request_id: str, encoded: Encoded, events: list[StageEvent]) -> None:
        request = self._open[request_id]
        request.encoded = time.monotonic()
        request.steps = encoded.steps
        if encoded.tokens > self._fit_limit:
            message = (
                f"{encoded.tokens} latent tokens do not fit: the stage has memory for {self._fit_limit:.0f} "
                "(max_num_batched_tokens, or what is left of the device); ask for a smaller picture or fewer of them"
            )
            events.append(self._fail(request_id, OutOfMemoryError(message, phase="encode")))
            return
        self._scheduler.encoded(request_id, encoded.bucket, encoded.steps, encoded.tokens)
        request.denoised = request.encoded

    def _stepped(self, unit: Unit, events: list[StageEvent]) -> None:
        now = time.monotonic()
        for request_id, done, total in self._scheduler.stepped(unit.request_ids):
            request = self._open[request_id]
            request.denoised = now
            request.batch_sizes.add(len(unit.request_ids))
            events.append(StageProgress(request_id, done, total))

    def _take_outputs(self, result: StepResult, events: list[StageEvent]) -> None:
        """Events of the outputs that have arrived, and what the ranks learnt about memory."""
        self._pending = result.pending
        if result.token_limits:
            self._fit_limit = result.token_limits["fit"]
            self._scheduler.token_limit = min(result.token_limits["denoise"], self._oom_limit)
            self._scheduler.decode_limit = result.token_limits["decode"]
        for preview in result.previews:
            request = self._open.get(preview.request_id)
            if request is not None and request.steps is not None:
                shown = preview.images, preview.size
                events.append(StagePreview(preview.request_id, preview.step, request.steps, *shown))
        for request_id, output in result.outputs.items():
            events.append(self._finished(request_id, output))

    def _finished(self, request_id: str, output: Output) -> StageChunk:
        request, now = self._open[request_id], time.monotonic()
        metrics = request.metrics(now)
        known = {key: value for key, value in metrics.items() if value is not None}
        data = {
            "images": output.images,
            "latents": output.latents,
            "metrics": {**output.metrics, **known},
            **output.extras,
        }
        self._close_request(request_id)
        return StageChunk(request_id, data, started=request.started, spans=request.finish(now))

    def _unit_failed(self, unit: Unit, error: UnitError, events: list[StageEvent]) -> None:
        if len(unit.request_ids) > 1 and error.untouched:
            if error.out_of_memory and unit.kind is UnitKind.DENOISE:
                # The next batch of this size would fail too, and cost its time again.
                self._oom_limit = min(self._oom_limit, self._scheduler.tokens_of(unit.request_ids) // 2)
                self._scheduler.token_limit = min(self._scheduler.token_limit, self._oom_limit)
            self._scheduler.run_alone(unit.request_ids)
            return
        for request_id in unit.request_ids:
            events.append(self._fail(request_id, _error_of(error, unit.kind.value)))

    # ------------------------------------------------------------------------------------------ the rest

    def generate(self, requests: Sequence[OmniDiffusionRequest]) -> list[StageChunk]:
        """Drain requests, prompt by prompt, for callers without a stage around the engine; outputs in order.

        Raises:
            OmniError: the first request that failed; the others are aborted.
        """
        ids: list[str] = []
        for req in requests:
            names = req.request_ids or [secrets.token_hex(8) for _ in req.prompts]
            for name, prompt in zip(names, req.prompts, strict=True):
                ids.append(name)
                self.add_request(StageInput(name, prompt, dataclasses.replace(req.sampling_params)))
        outputs: dict[str, StageChunk] = {}
        while len(outputs) < len(ids):
            for event in self.step():
                if isinstance(event, StageFailure) and event.request_id in ids:
                    self.abort(ids)
                    raise event.error
                if isinstance(event, StageChunk):
                    outputs[event.request_id] = event
        return [outputs[request_id] for request_id in ids]

    def check_health(self) -> None:
        """Raises ``StageDeadError`` when a rank is gone."""
        self._executor.check_health()

    def start_profile(self, folder: str) -> None:
        """Start a torch profiler trace of every rank in ``folder``."""
        self._executor.collective_rpc("start_profile", (folder,))

    def stop_profile(self) -> list[str]:
        """Stop the traces; returns their files (Chrome trace JSON), one a rank."""
        return self._executor.collective_rpc("stop_profile")

    def call(self, method: str, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None) -> list[Any]:
        """Call a method of the worker (or of its extension) on every rank; one result a rank.

        Raises:
            RequestError: no such method, or ``re_init_pipeline`` while requests are open.
        """
        if method != "re_init_pipeline":
            return self._executor.collective_rpc(method, args, kwargs)
        if self._open:
            raise RequestError(f"re_init_pipeline: {len(self._open)} requests are open", field="method")
        returned = self._executor.collective_rpc(method, args, kwargs)
        self._facts = self._executor.collective_rpc("facts")[0]
        self._scheduler.by_steps = bool(self._facts["by_steps"])
        return returned

    def close(self) -> None:
        """Stop the ranks and free their memory. Idempotent."""
        self._open.clear()
        self._new.clear()
        self._failures.clear()
        self._drop.clear()
        self._executor.close()


def _check_prompt(prompt: Any) -> None:
    """Raises ``RequestError`` for what is not text, nor a dictionary as ``OmniTextPrompt``."""
    if isinstance(prompt, str):
        return
    if not isinstance(prompt, Mapping):
        raise RequestError(
            f"prompt is {type(prompt).__name__}; expected text or a dictionary",
            field="prompt",
            allowed="OmniTextPrompt",
        )
    known = OmniTextPrompt.__annotations__
    for key in prompt:
        if key not in known:
            raise RequestError(f"prompt: unknown key {key!r}{nearest(str(key), known)}", field=f"prompt.{key}")
    for key in ("prompt", "negative_prompt"):
        if not isinstance(prompt.get(key, ""), str):
            raise RequestError(f"prompt: {key} is {type(prompt[key]).__name__}; expected text", field=f"prompt.{key}")


def _error_of(error: UnitError, phase: str) -> OmniError:
    """The typed error of a failed unit."""
    if error.out_of_memory:
        return OutOfMemoryError(f"out of memory in {phase}: {error.message}", phase=phase, cause=error.traceback)
    if error.error is not None:
        typed = from_wire(error.error)
        typed.details.setdefault("cause", error.traceback)
        return typed
    return StageError(f"{phase} failed: {error.message}", phase=phase, cause=error.traceback)
