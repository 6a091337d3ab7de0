"""``AsyncOmni``: the stage graph of one model, for asyncio programs."""

from __future__ import annotations

import asyncio
import functools
import os
import uuid
import weakref
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from typing import Any, TypeAlias

from vllm_omni import envs
from vllm_omni.config.stage import PipelineConfig
from vllm_omni.distributed.omni_connectors.utils.arena import Arena
from vllm_omni.distributed.omni_connectors.utils.serialization import Codec
from vllm_omni.engine.stage_engine import StageInfo
from vllm_omni.entrypoints import omni_args
from vllm_omni.entrypoints.entry import check_information, entry_options, information_keys
from vllm_omni.entrypoints.orchestrator import Orchestrator
from vllm_omni.entrypoints.params import check_previews, default_params, params_for, read_params, text_stages
from vllm_omni.entrypoints.results import build_output
from vllm_omni.entrypoints.running_stages import RunningStages, start_stages
from vllm_omni.entrypoints.sinks import AsyncSink
from vllm_omni.entrypoints.stage_arguments import runs_on_vllm
from vllm_omni.entrypoints.stage_graph import StageGraph
from vllm_omni.entrypoints.tracing import Tracing, open_tracing
from vllm_omni.entrypoints.watch import Watch
from vllm_omni.errors import RequestError, StageDeadError
from vllm_omni.inputs.data import OmniPromptType, OmniSamplingParams
from vllm_omni.logger import init_logger
from vllm_omni.model_executor.voices import check_speaker, voices_of
from vllm_omni.outputs import OmniRequestOutput, Preview
from vllm_omni.process import WatchedProcess
from vllm_omni.request import Deadline, OmniRequest, check_prompt

logger = init_logger(__name__)

SamplingParamsArg: TypeAlias = "OmniSamplingParams | Sequence[OmniSamplingParams] | None"


class AsyncOmni:
    """A model that runs: its stages are processes, its requests are async generators.

    The constructor starts the stages and returns when all are ready. The object then belongs to the event loop in which
    it is first used. ``shutdown`` (or ``async with``, or the end of the program) ends the processes.

    Args:
        model: folder of the checkpoint, or a hub name that the local cache holds.
        **kwargs: arguments of ``entrypoints.omni_args.OmniArgs`` and of ``OmniDiffusionConfig``.

    Raises:
        ConfigError: an argument is unknown, wrong, or cannot be honoured.
        DeadlineError: the stages were not ready in time.
        StageDeadError: a stage's process ended while it started.
    """

    def __init__(self, model: str | None = None, **kwargs: Any) -> None:
        given = {"model": model, **kwargs} if model is not None else dict(kwargs)
        self._setup = omni_args.resolve(given)
        args, pipeline = self._setup.args, self._setup.pipeline
        _log_devices(pipeline)
        self._graph = StageGraph.from_config(pipeline)
        self._read = read_params(pipeline, self._graph.nodes)
        self._defaults = default_params(pipeline, self._read)
        self._text = text_stages(pipeline)
        self._reads_on_vllm = runs_on_vllm(pipeline.stages[0])
        self._arena = Arena()
        codec = Codec(self._arena, args.shm_threshold_bytes)
        tracing = open_tracing(args.trace, args.otlp_traces_endpoint, args.collect_detailed_traces)
        stages = start_stages(self._setup, codec)
        self._finalizer = weakref.finalize(self, _end_all, stages, self._arena, tracing)
        self._clients = stages.clients(codec)
        self._information = information_keys(self._graph.nodes, self.stage_infos)
        if tracing is not None:
            tracing.name_stages(self.stage_infos)
        self._ranks = {i: [WatchedProcess(pid) for pid in client.info.pids] for i, client in self._clients.items()}
        self._orchestrator = Orchestrator(self._graph, self._clients, tracing)
        self._watch = Watch(self._clients, args.heartbeat_timeout, args.stall_timeout)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._attaching: asyncio.Task[None] | None = None

    # ---------------------------------------------------------------- requests

    async def generate(
        self,
        prompt: OmniPromptType,
        request_id: str | SamplingParamsArg = None,
        sampling_params_list: str | SamplingParamsArg = None,
        *,
        sampling_params: SamplingParamsArg = None,
        output_modalities: Sequence[str] | None = None,
        timeout: float | None = None,
        on_progress: Callable[[int, int, int], None] | None = None,
        on_preview: Callable[[int, Preview], None] | None = None,
        trace_headers: Mapping[str, str] | None = None,
        lora_request: Any = None,
        priority: int = 0,
    ) -> AsyncGenerator[OmniRequestOutput, None]:
        """Run one request; yields the outputs of the final stages as they come.

        ``request_id`` and the sampling parameters may change places: they are told apart by type. Closing or cancelling
        the generator aborts the request.

        Args:
            prompt: text, or a dictionary (``OmniTextPrompt``, ``OmniTokensPrompt``).
            request_id: the caller's id; default: a fresh one.
            sampling_params_list: one set, or a list with one per stage. One set is for all stages of its class; vLLM's
                ``SamplingParams`` are for the stage that reads the prompt and writes text.
            sampling_params: the same, by another name.
            output_modalities: kinds of output wanted; stages that these do not need are not run. Default: all.
            timeout: seconds for the whole request.
            on_progress: called with stage id, steps done and steps in all after every step; must not block.
            on_preview: called with stage id and preview, when the sampling parameters ask for previews; must not block.
            trace_headers: ``traceparent`` and ``tracestate`` of the trace that the request's spans belong to.
            lora_request: adapter for the stage that reads the prompt (vLLM's ``LoRARequest``).
            priority: of that stage, when its ``scheduling_policy`` is ``priority``; smaller numbers run first.

        Raises:
            RequestError: the prompt or a parameter is wrong.
            RequestAborted: ``abort`` was called for it.
            DeadlineError: ``timeout`` is over; the error names the stage and the phase.
            StageError: a stage failed on it; ``StageDeadError`` when the stage is gone.
        """
        name, params = _sort_arguments(request_id, sampling_params_list, sampling_params)
        request = self.make_request(
            prompt, name, params, None, output_modalities, timeout, trace_headers, lora_request, priority
        )
        check_previews(request.sampling_params, on_preview)
        await self.attach()
        stream = AsyncSink(on_progress, on_preview)
        key = self._orchestrator.open(request, stream)
        try:
            async for stage_id, data, finished, times in stream:
                yield self.build(request, stage_id, data, finished, times)
                del data  # who keeps an error that comes later shall not keep this
        finally:
            self._orchestrator.abort(key)

    def make_request(
        self,
        prompt: OmniPromptType,
        request_id: str | None,
        params: SamplingParamsArg,
        loose: Mapping[str, Any] | None = None,
        output_modalities: Sequence[str] | None = None,
        timeout: float | None = None,
        trace_headers: Mapping[str, str] | None = None,
        lora_request: Any = None,
        priority: int = 0,
    ) -> OmniRequest:
        """Check one request; raises ``RequestError``."""
        check_prompt(prompt)
        check_information(prompt, self._information)
        check_speaker(prompt, self.voices)
        options, loose = entry_options(prompt, lora_request, priority, loose, self._reads_on_vllm)
        return OmniRequest(
            request_id or uuid.uuid4().hex,
            prompt,
            params_for(self._defaults, params, loose, self._text, self._read),
            output_modalities,
            Deadline.after(timeout) if timeout is not None else None,
            trace_headers=trace_headers,
            options=options,
        )

    def build(
        self, request: OmniRequest, stage_id: int, data: Mapping[str, Any], finished: bool, times: Mapping[str, Any]
    ) -> OmniRequestOutput:
        """The caller's view of an output that a sink got."""
        output = build_output(self._graph.node(stage_id), request, data, finished, times)
        if finished and self._setup.args.log_stats:
            logger.info("request %s: %s", request.request_id, output.metrics["stages"])
        return output

    async def abort(self, request_id: str) -> None:
        """Abort every open request with exactly this id; their generators raise ``RequestAborted``. Idempotent."""
        if self._loop is not None:
            self._orchestrator.abort(request_id)

    # ---------------------------------------------------------------- state

    @property
    def orchestrator(self) -> Orchestrator:
        """The orchestration itself, for ``Omni``; to be used in the event loop only."""
        return self._orchestrator

    @property
    def pipeline(self) -> PipelineConfig:
        """The stage configuration that is run."""
        return self._setup.pipeline

    @property
    def stage_infos(self) -> dict[int, StageInfo]:
        """What each stage said of itself when it was ready."""
        return {stage_id: client.info for stage_id, client in self._clients.items()}

    @property
    def collects_traces(self) -> bool:
        """Whether spans go to a collector, so that the callers' traces matter."""
        return self._setup.args.otlp_traces_endpoint is not None

    @property
    def renderer(self) -> Any | None:
        """vLLM's renderer of the stage that reads the prompt; None when that is a diffusion stage."""
        return self._clients[self._graph.roots[0].stage_id].renderer

    @property
    def checkpoint_config(self) -> Any | None:
        """What transformers reads of the checkpoint that several stages are parts of; None for other models."""
        return self._graph.roots[0].config

    @functools.cached_property
    def voices(self) -> tuple[str, ...]:
        """Names of the voices that the model can answer with; none for a model that does not speak."""
        config, stages = self.checkpoint_config, self.pipeline.stages
        if config is None or not any(stage.final_output and stage.final_output_type == "audio" for stage in stages):
            return ()
        args = stages[0].engine_args
        return voices_of(config, str(args["model"]), args.get("revision"))

    @property
    def num_stages(self) -> int:
        """Number of stages."""
        return len(self._clients)

    @property
    def default_sampling_params_list(self) -> list[OmniSamplingParams]:
        """Each stage's own sampling parameters."""
        return list(self._defaults.values())

    @property
    def is_running(self) -> bool:
        """Whether every stage lives and ``shutdown`` was not called."""
        return self._finalizer.alive and not self.errored

    @property
    def is_stopped(self) -> bool:
        """Whether ``shutdown`` was called."""
        return not self._finalizer.alive

    @property
    def errored(self) -> bool:
        """Whether a stage has died."""
        return self.dead_error is not None

    @property
    def dead_error(self) -> StageDeadError | None:
        """The death of the first stage that died."""
        return self._orchestrator.dead_error

    def check_alive(self) -> None:
        """Look for every stage's processes in the process table: answers at once, also while stages work.

        Raises:
            StageDeadError: a stage or a rank is gone.
        """
        if self.dead_error is not None:
            raise self.dead_error
        for stage_id, ranks in self._ranks.items():
            for rank in ranks:
                if not rank.is_alive():
                    raise StageDeadError(f"a rank of stage {stage_id} (pid {rank.pid}) is gone", stage_id=stage_id)

    async def check_health(self, timeout: float = 10.0) -> None:
        """Ask every stage, and through it every rank.

        Raises:
            StageDeadError: a stage or a rank is gone.
            DeadlineError: a stage does not answer within ``timeout`` seconds.
        """
        if self.dead_error is not None:
            raise self.dead_error
        await self._call_all(None, "check_health", timeout=timeout)

    async def collective_rpc(
        self,
        method: str,
        timeout: float | None = None,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
        stages: Sequence[int] | None = None,
    ) -> list[Any]:
        """Call a worker's method on every rank of every stage (or of ``stages``); the results in that order."""
        results = await self._call_all(stages, "call", method, list(args), dict(kwargs or {}), timeout=timeout)
        return [result for ranks in results.values() for result in ranks]

    async def start_profile(self, stages: Sequence[int] | None = None) -> None:
        """Start a torch profiler trace in all stages, or in ``stages``."""
        root = os.path.abspath(envs.VLLM_TORCH_PROFILER_DIR())
        for stage_id in self._stage_ids(stages):
            await self._call_all([stage_id], "start_profile", os.path.join(root, f"stage_{stage_id}"))

    async def stop_profile(self, stages: Sequence[int] | None = None) -> dict[int, list[str]]:
        """Stop the traces; returns the files written, by stage id."""
        return await self._call_all(stages, "stop_profile")

    def _stage_ids(self, stages: Sequence[int] | None) -> list[int]:
        for stage_id in stages or ():
            if stage_id not in self._clients:
                raise RequestError(f"stages: no stage {stage_id}; there are {sorted(self._clients)}", field="stages")
        return list(self._clients if stages is None else stages)

    async def _call_all(self, stages: Sequence[int] | None, method: str, *args: Any, **kwargs: Any) -> dict[int, Any]:
        stage_ids = self._stage_ids(stages)
        await self.attach()
        calls = (self._clients[stage_id].call(method, *args, **kwargs) for stage_id in stage_ids)
        return dict(zip(stage_ids, await asyncio.gather(*calls), strict=True))

    # ---------------------------------------------------------------- life

    async def attach(self) -> None:
        """Join the running event loop, unless that was done.

        Raises:
            StageDeadError: ``shutdown`` was called.
            RuntimeError: the object is in use in another loop.
        """
        loop = asyncio.get_running_loop()
        if self.is_stopped:
            raise StageDeadError("the engine is shut down")
        if self._attaching is None or self._loop is not loop:
            if self._loop is not None and not self._loop.is_closed():
                raise RuntimeError("an AsyncOmni belongs to the event loop in which it was first used")
            self._loop, self._attaching = loop, loop.create_task(self._attach())
        if not self._attaching.done():
            await asyncio.shield(self._attaching)

    async def _attach(self) -> None:
        await self._orchestrator.attach()
        self._watch.start()

    def shutdown(self) -> None:
        """End every open request and every stage process; returns when all are gone. Idempotent."""
        if self.is_stopped:
            return
        self._watch.stop()
        self._orchestrator.abort_all(StageDeadError("the engine was shut down"))
        for client in self._clients.values():
            client.detach()
        self._finalizer()

    async def __aenter__(self) -> AsyncOmni:
        await self.attach()
        return self

    async def __aexit__(self, *exc: object) -> None:
        self.shutdown()


def _sort_arguments(
    second: str | SamplingParamsArg, third: str | SamplingParamsArg, keyword: SamplingParamsArg
) -> tuple[str | None, SamplingParamsArg]:
    """(request id, sampling parameters), whichever way round they were given."""
    given = [value for value in (second, third, keyword) if value is not None and value != ""]
    names = [value for value in given if isinstance(value, str)]
    params = [value for value in given if not isinstance(value, str)]
    if len(names) > 1 or len(params) > 1:
        twice = "request_id" if len(names) > 1 else "sampling parameters"
        raise RequestError(f"{twice} given twice", field=twice)
    return (names[0] if names else None), (params[0] if params else None)


def _log_devices(pipeline: PipelineConfig) -> None:
    rows = omni_args.device_table(pipeline)
    if rows:
        lines = [f"{stage_id:>5}  {logical:<10}  {physical}" for stage_id, logical, physical in rows]
        logger.info("devices of the stages:\n%s", "\n".join(["stage  logical     CUDA_VISIBLE_DEVICES entry", *lines]))


def _end_all(stages: RunningStages, arena: Arena, tracing: Tracing | None) -> None:
    stages.close()
    arena.close()
    if tracing is not None:
        tracing.close()
