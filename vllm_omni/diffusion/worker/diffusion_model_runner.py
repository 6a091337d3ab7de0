"""Runs a pipeline's verbs on one rank and keeps the state of every request between them."""

from __future__ import annotations

import gc
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from vllm_omni.diffusion.compile import compile_repeated_blocks
from vllm_omni.diffusion.data import DiffusionOutput, LoadFormat, OmniDiffusionConfig
from vllm_omni.diffusion.forward_context import set_forward_context
from vllm_omni.diffusion.ipc import Accepted, Encoded, StepPlan, StepResult
from vllm_omni.diffusion.model_loader.diffusers_loader import DiffusersPipelineLoader
from vllm_omni.diffusion.models.common.pipeline import DiTPipeline
from vllm_omni.diffusion.models.common.state import DenoiseState
from vllm_omni.diffusion.models.interface import (
    DiffusionPipeline,
    SupportImageInput,
    SupportsPreviews,
    SupportsStepExecution,
)
from vllm_omni.diffusion.registry import get_diffusion_post_process_func
from vllm_omni.diffusion.request import OmniDiffusionRequest
from vllm_omni.diffusion.worker.memory import MemoryMeter
from vllm_omni.diffusion.worker.outputs import PendingOutput, PendingPreview, PostProcess, start_images, to_host
from vllm_omni.diffusion.worker.vitals import report_progress
from vllm_omni.errors import ConfigError, RequestError, StageError
from vllm_omni.logger import init_logger

logger = init_logger(__name__)

RUN_AHEAD = 2
"""Units that the host may be ahead of the device: enough to keep it busy, so few that cancelling stays prompt."""


@dataclass
class _Request:
    """What a rank holds of one open request."""

    req: OmniDiffusionRequest
    generator_states: list[torch.Tensor]
    """States of the generators that came with the request, so that encoding it again draws the same noise."""
    state: DenoiseState | None = None
    step_before: int = 0
    """``state.step_index`` when the current unit began."""


class DiffusionModelRunner:
    """The model of one rank. Every rank is given the same plans and so holds the same requests (SPMD)."""

    def __init__(self, od_config: OmniDiffusionConfig, device: torch.device, *, rank: int = 0) -> None:
        self.od_config = od_config
        self.device = device
        self.rank = rank
        self.meter = MemoryMeter(od_config, device)
        self.facts: dict[str, object] = {}
        self.by_steps = True
        self._pipeline: DiffusionPipeline | None = None
        self._post_process: PostProcess | None = None
        self._requests: dict[str, _Request] = {}
        self._pending: dict[str, PendingOutput] = {}
        self._previews: deque[PendingPreview] = deque()
        self._buckets: dict[Hashable, int] = {}
        self._in_flight: deque[torch.cuda.Event] = deque()

    # ------------------------------------------------------------------------------------------ loading

    @property
    def pipeline(self) -> DiffusionPipeline:
        """The loaded pipeline. Raises ``ConfigError`` before ``load_model``."""
        if self._pipeline is None:
            raise ConfigError("no pipeline is loaded: call load_model first", field="diffusion_load_format")
        return self._pipeline

    def load_model(self, load_format: LoadFormat | None = None) -> None:
        """Load (or replace) the pipeline; one log line a phase with its seconds.

        Args:
            load_format: instead of ``od_config.diffusion_load_format``.
        """
        self.unload_model()
        od_config = self.od_config
        if load_format is not None:
            od_config = replace(od_config, diffusion_load_format=load_format)
        started = time.perf_counter()
        with set_forward_context(od_config, phase="load"):
            pipeline = DiffusersPipelineLoader(od_config).load_model(self.device)
        loaded = time.perf_counter()
        name = type(pipeline).__name__
        logger.info("rank %d: load: %s in %.2f s", self.rank, name, loaded - started)
        compiled = not od_config.enforce_eager and self.device.type == "cuda"
        report_progress(pipeline, compiled=compiled)
        if compiled:
            compile_repeated_blocks(pipeline, od_config)
            logger.info("rank %d: compile: prepared in %.2f s", self.rank, time.perf_counter() - loaded)
        self._pipeline = pipeline
        self._post_process = get_diffusion_post_process_func(od_config)
        self.by_steps = runs_by_steps(pipeline)
        self.facts = {
            "pipeline": name,
            "by_steps": self.by_steps,
            "inputs": ["image"] if isinstance(pipeline, SupportImageInput) and pipeline.support_image_input else [],
            "previews": self.by_steps and isinstance(pipeline, SupportsPreviews),
            "sampling": sampling_facts(pipeline),
            "information": [] if od_config.custom_pipeline_args is None else None,
            "load_s": round(loaded - started, 3),
            "weight_bytes": sum(p.numel() * p.element_size() for p in pipeline.parameters()),
            "memory_GiB": self.meter.loaded(),
        }

    def unload_model(self) -> None:
        """Forget the pipeline and every request, and give their memory back. Idempotent."""
        if self._pipeline is None:
            return
        self._pipeline = None
        self._post_process = None
        self._requests.clear()
        self._pending.clear()
        self._previews.clear()
        self.free_caches()

    def free_caches(self) -> None:
        """Give unused device memory back."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    # ------------------------------------------------------------------------------------------ plans

    def execute(self, plan: StepPlan) -> StepResult:
        """Carry out a plan.

        Raises:
            Exception: whatever the pipeline raises in a unit; the requests of other units are not touched.
        """
        result = StepResult()
        for request_id in plan.drop:
            self._requests.pop(request_id, None)
            self._pending.pop(request_id, None)
        for req in plan.new:
            self._accept(req, result)
        if plan.kind is not None:
            with torch.inference_mode():
                self._unit(plan.kind, plan.request_ids, result)
        self.collect(result, wait=plan.collect)
        return result

    def collect(self, result: StepResult, *, wait: bool = False) -> None:
        """Put outputs that have arrived on the host into ``result``, in the order of the units that made them."""
        while self._pending:
            request_id, pending = next(iter(self._pending.items()))
            if not pending.ready(wait):
                break
            del self._pending[request_id]
            result.outputs[request_id] = pending.output()
        while self._previews and self._previews[0].ready():
            result.previews.append(self._previews.popleft().preview())
        result.pending = len(self._pending)
        result.token_limits = {kind: self.meter.token_limit(kind) for kind in ("denoise", "decode")}
        result.token_limits["fit"] = self.meter.fit_limit()

    def untouched(self, plan: StepPlan) -> bool:
        """Whether the states of the plan's unit are as before it (asked after it failed)."""
        if plan.kind == "denoise":
            held = [self._requests[request_id] for request_id in plan.request_ids]
            return all(entry.state is not None and entry.state.step_index == entry.step_before for entry in held)
        return plan.kind in ("encode", "decode")

    def _accept(self, req: OmniDiffusionRequest, result: StepResult) -> None:
        (request_id,) = req.request_ids
        pipeline = self.pipeline
        if isinstance(pipeline, SupportsStepExecution):
            try:
                req = pipeline.check(req)
            except RequestError as error:
                result.refused[request_id] = error.to_wire()
                return
        params = req.sampling_params
        generators = params.generator if isinstance(params.generator, list) else [params.generator]
        states = [generator.get_state() for generator in generators if generator is not None]
        self._requests[request_id] = _Request(req, states)
        if self.rank == 0:
            size = (params.height, params.width, params.num_frames)
            result.accepted[request_id] = Accepted(shape=size)

    def _unit(self, kind: str, request_ids: Sequence[str], result: StepResult) -> None:
        held = [self._requests[request_id] for request_id in request_ids]
        if kind == "encode":
            for request_id, entry in zip(request_ids, held, strict=True):
                result.encoded[request_id] = self._encode(entry)
        elif kind == "denoise":
            self._denoise(held)
        elif kind == "decode":
            self._decode(held)
        elif kind == "run":
            for entry in held:
                self._run(entry)
        else:
            raise ConfigError(f"unknown kind of unit {kind!r}", field="kind")
        self._throttle()

    def _throttle(self) -> None:
        """Let the host run ahead of the device by ``RUN_AHEAD`` units at most, so that a cancel takes effect soon."""
        if self.device.type != "cuda":
            return
        event = torch.cuda.Event(blocking=True)
        event.record()
        self._in_flight.append(event)
        while len(self._in_flight) > RUN_AHEAD:
            self._in_flight.popleft().synchronize()

    # ------------------------------------------------------------------------------------------ units

    def _steps(self) -> SupportsStepExecution:
        pipeline = self.pipeline
        assert isinstance(pipeline, SupportsStepExecution)
        return pipeline

    def _encode(self, entry: _Request) -> Encoded:
        pipeline = self._steps()
        self._rewind_generators(entry)
        with set_forward_context(self.od_config, phase="encode"), self.meter.measure("encode", 1):
            state = pipeline.prepare(entry.req, pipeline.encode(entry.req))
        state.keep_trajectory = state.keep_trajectory or entry.req.sampling_params.return_trajectory_latents
        entry.state = state
        bucket = self._buckets.setdefault((state.batch_key(), state.size), len(self._buckets))
        return Encoded(bucket=bucket, steps=state.num_steps - state.step_index, tokens=_tokens(state))

    def _rewind_generators(self, entry: _Request) -> None:
        given = entry.req.sampling_params.generator
        generators = given if isinstance(given, list) else [given]
        present = [generator for generator in generators if generator is not None]
        for generator, saved in zip(present, entry.generator_states, strict=True):
            generator.set_state(saved)

    def _denoise(self, held: Sequence[_Request]) -> None:
        states = [_state(entry) for entry in held]
        for entry, state in zip(held, states, strict=True):
            entry.step_before = state.step_index
        indices = tuple(state.step_index for state in states)
        with (
            set_forward_context(self.od_config, phase="denoise", step_indices=indices),
            self.meter.measure("denoise", sum(_tokens(state) for state in states)),
        ):
            self._steps().denoise_step(states)
        if self.rank == 0:
            self._start_previews(states)

    def _start_previews(self, states: Sequence[DenoiseState]) -> None:
        """Show what the states that want it are going to become."""
        pipeline = self.pipeline
        for state in states:
            if state.step_index in state.preview_steps and isinstance(pipeline, SupportsPreviews):
                with set_forward_context(self.od_config, phase="decode"):
                    images_BCHW = pipeline.preview(state)
                if images_BCHW is not None:
                    pending = PendingPreview.start(images_BCHW, state.request_id, state.step_index, state.size)
                    self._previews.append(pending)

    def _decode(self, held: Sequence[_Request]) -> None:
        """Latents to pictures: one call for all of them (same shape), then one output each."""
        wanted = [_state(entry) for entry in held if entry.req.sampling_params.output_type != "latent"]
        decoded: list[DiffusionOutput] = []
        if wanted:
            merged = wanted[0]
            if len(wanted) > 1:
                # To the pipeline they are one request of several pictures.
                latents = torch.cat([state.latents for state in wanted])
                merged = replace(merged, latents=latents, keep_trajectory=False, trajectory=[])
            with (
                set_forward_context(self.od_config, phase="decode"),
                self.meter.measure("decode", _tokens(merged)),
            ):
                decoded = _split(self._steps().decode(merged), [len(state.latents) for state in wanted])
        outputs = iter(decoded)
        for entry in held:
            latent = entry.req.sampling_params.output_type == "latent"
            self._finish(entry, DiffusionOutput() if latent else next(outputs), _state(entry))

    def _run(self, entry: _Request) -> None:
        self._rewind_generators(entry)
        with set_forward_context(self.od_config, phase="forward"):
            out = self.pipeline.forward(entry.req)
        if out.error is not None:
            raise StageError(out.error)
        self._finish(entry, out, None)

    def _finish(self, entry: _Request, out: DiffusionOutput, state: DenoiseState | None) -> None:
        """Start the way of an output to the host; every rank made it, rank 0 hands it over."""
        if self.rank != 0:
            return
        (request_id,) = entry.req.request_ids
        params = entry.req.sampling_params
        metrics = dict(out.metrics)
        if state is not None:
            metrics |= state.token_counts()  # what was decoded together has the first one's
        latents, timesteps = out.trajectory_latents, out.trajectory_timesteps
        if state is not None and state.keep_trajectory and latents is None:
            latents, timesteps = torch.stack(state.trajectory), state.timesteps
        images: torch.Tensor | None = None
        finish: Callable[[torch.Tensor], list[Any]] = list
        if params.output_type == "latent":
            final = out.output if state is None else state.latents
            latents = final if latents is None else latents
        else:
            images, finish = start_images(out, params.output_type, self._post_process)
        if timesteps is not None:
            metrics["trajectory_timesteps"] = timesteps.detach().cpu()
        extras = {} if out.trajectory_decoded is None else {"trajectory_decoded": out.trajectory_decoded}
        host_latents = to_host(latents)
        event = None
        if self.device.type == "cuda":
            event = torch.cuda.Event(blocking=True)
            event.record()
        self._pending[request_id] = PendingOutput(event, images, finish, host_latents, metrics, extras)


def runs_by_steps(pipeline: DiffusionPipeline) -> bool:
    """Whether the engine may run the pipeline step by step: it has the verbs, and no ``forward`` of its own instead."""
    if not isinstance(pipeline, SupportsStepExecution):
        return False
    return not isinstance(pipeline, DiTPipeline) or type(pipeline).forward is DiTPipeline.forward


def sampling_facts(pipeline: DiffusionPipeline) -> dict[str, object] | None:
    """The pipeline's ``SamplingDefaults`` as plain values; None for one that has none."""
    if not isinstance(pipeline, DiTPipeline):
        return None
    facts = {**asdict(pipeline.defaults), "max_pixels": pipeline.max_pixels}
    return {name: sorted(value) if isinstance(value, frozenset) else value for name, value in facts.items()}


def _state(entry: _Request) -> DenoiseState:
    if entry.state is None:
        raise StageError(f"request {entry.req.request_ids[0]} was not encoded")
    return entry.state


def _tokens(state: DenoiseState) -> int:
    """Latent tokens of all pictures of a state ([B, S, C])."""
    return state.latents.shape[0] * state.latents.shape[1]


def _split(out: DiffusionOutput, sizes: Sequence[int]) -> list[DiffusionOutput]:
    """Cut a decoded batch into the outputs of its requests."""
    if len(sizes) == 1:
        return [out]
    if out.output is None:
        raise StageError("decode gave no pictures")
    return [replace(out, output=part, metrics=dict(out.metrics)) for part in out.output.split(list(sizes))]
