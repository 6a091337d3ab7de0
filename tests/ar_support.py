"""Stages in the test's own process: an engine starts in a fraction of a second.

``Stage`` is one autoregressive or generation stage of a checkpoint, built by the package's own classes from arguments
to scheduler, worker and runner. ``StageSet`` starts them and shuts them down together: vLLM's engines of one process
share their process groups, so none may go before the others.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.sampling_params import SamplingParams
from vllm.v1.engine.core_client import InprocClient
from vllm.v1.executor import Executor

from vllm_omni.distributed.omni_connectors.utils.arena import Arena
from vllm_omni.distributed.omni_connectors.utils.serialization import Codec, resolve
from vllm_omni.engine.arg_utils import OmniEngineArgs
from vllm_omni.engine.input_processor import OmniInputProcessor, Target, chunk_request, generation_request
from vllm_omni.engine.output_processor import MultimodalOutputProcessor, take_payloads
from vllm_omni.errors import OmniError

SMALL: dict[str, Any] = {
    "dtype": "float32",
    "max_model_len": 256,
    "max_num_seqs": 8,
    "kv_cache_memory_bytes": 16 << 20,
    "enforce_eager": True,
    "skip_mm_profiling": True,
    "distributed_executor_backend": "uni",
}
if torch.cuda.is_available():
    SMALL["gpu_memory_utilization"] = 0.1  # vLLM wants that much to be free: several test processes share a GPU


@dataclass
class Result:
    """What came of one request."""

    tokens: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: Any = None
    prompt_logprobs: Any = None
    finish_reason: str | None = None
    stop_reason: Any = None
    payloads: list[dict[str, Any]] = field(default_factory=list)
    cached: int = 0
    error: OmniError | None = None
    finished: bool = False

    def rows(self, name: str) -> torch.Tensor:
        """All rows that came under ``name``, one after another; checks that they follow each other."""
        parts = [payload for payload in self.payloads if name in payload]
        position = parts[0]["start"]
        for part in parts:
            assert part["start"] == position
            position += len(part[name])
        return torch.cat([part[name] for part in parts])

    def steps(self, name: str) -> list[Any]:
        """Step outputs under ``name``, by step; checks that none is missing or double."""
        found = [payload for payload in self.payloads if name in payload]
        assert [payload["step"] for payload in found] == list(range(len(found)))
        return [payload[name] for payload in found]


class Stage:
    """One stage in this process."""

    def __init__(self, stage_type: Literal["ar", "generation"], engine_args: dict[str, Any]) -> None:
        args = {**SMALL, **engine_args}
        if stage_type == "generation":
            args.pop("enforce_eager")
        self.config = OmniEngineArgs.from_stage(args.pop("stage_id", 0), stage_type, args).create_engine_config()
        self.stage_type = stage_type
        self.client = InprocClient(self.config, Executor.get_class(self.config), log_stats=False)
        self.codec = Codec(Arena())
        self.target = Target(self.codec)
        self.inputs = OmniInputProcessor(self.config, self.target) if stage_type == "ar" else None
        tokenizer = self.inputs.tokenizer if self.inputs is not None else None
        self.outputs = MultimodalOutputProcessor(self.codec, tokenizer, log_stats=False)
        self.results: dict[str, Result] = {}
        self.num_steps = 0

    @property
    def runner(self) -> Any:
        """The model runner inside."""
        return self.client.engine_core.model_executor.driver_worker.worker.model_runner

    @property
    def model(self) -> Any:
        """The model inside."""
        return self.runner.get_model()

    @property
    def scheduler(self) -> Any:
        """The scheduler inside."""
        return self.client.engine_core.scheduler

    def add(
        self,
        request_id: str,
        prompt: Any,
        params: SamplingParams | None = None,
        *,
        last: bool = True,
        lora_request: Any = None,
    ) -> Result:
        """Queue a request; ``prompt`` as a stage of the graph gets it."""
        self.results[request_id] = Result()
        if self.inputs is None:
            self.client.add_request(generation_request(request_id, prompt, self.target))
        else:
            request, text = self.inputs.omni_request(request_id, prompt, params, last=last, lora_request=lora_request)
            self.outputs.add_request(request, text)
            self.client.add_request(request)
        return self.results[request_id]

    def chunk(self, request_id: str, prompt: Any, number: int, *, last: bool) -> None:
        """Send chunk ``number`` of a running request."""
        self.client.add_request(chunk_request(request_id, prompt, number, last=last, target=self.target))

    def abort(self, request_id: str) -> None:
        """Abort a request."""
        self.outputs.abort_requests([request_id], internal=True)
        self.client.abort_requests([request_id])

    def step(self) -> None:
        """One step of the engine; ``results`` grow."""
        out = self.client.get_output()
        self.num_steps += 1
        if self.inputs is None:
            taken = take_payloads(out.outputs, self.codec)
            for output in out.outputs:
                self.results[output.request_id].finished |= output.finished
        else:
            processed = self.outputs.process_outputs(list(out.outputs))
            self.client.abort_requests(processed.reqs_to_abort)
            taken = self.outputs.payloads
            for request_output in processed.request_outputs:
                result, completion = self.results[request_output.request_id], request_output.outputs[0]
                result.tokens, result.text = list(completion.token_ids), completion.text
                result.logprobs, result.stop_reason = completion.logprobs, completion.stop_reason
                result.prompt_logprobs = request_output.prompt_logprobs or result.prompt_logprobs
                result.cached = request_output.num_cached_tokens or 0
                result.finish_reason, result.finished = completion.finish_reason, request_output.finished
        for payload in taken:
            if payload.error is not None:
                self.results[payload.request_id].error = payload.error
                self.results[payload.request_id].finished = True
                self.abort(payload.request_id)
            else:
                self.results[payload.request_id].payloads.append(resolve(payload.data))

    def run(self, limit: int = 2000, until: Callable[[], bool] | None = None) -> dict[str, Result]:
        """Step until every request is finished (or ``until`` holds)."""
        for _ in range(limit):
            if until() if until is not None else not self.client.engine_core.scheduler.has_requests():
                return self.results
            self.step()
        raise AssertionError(f"not finished after {limit} steps")

    def ask(self, prompts: Sequence[Any], params: SamplingParams | None = None) -> list[Result]:
        """Run ``prompts`` together to their end."""
        results = [self.add(f"ask-{self.num_steps}-{i}", prompt, params) for i, prompt in enumerate(prompts)]
        self.run()
        return results


class StageSet:
    """Starts stages and ends them together."""

    def __init__(self) -> None:
        self.stages: list[Stage] = []

    def __call__(self, model: str, stage_type: Literal["ar", "generation"] = "ar", **engine_args: Any) -> Stage:
        """Start a stage of checkpoint ``model``; ``engine_args`` as in a stage configuration, over ``SMALL``."""
        gc.freeze()  # vLLM collects garbage several times at start: keep what is there out of it
        stage = Stage(stage_type, {"model": str(model), **engine_args})
        self.stages.append(stage)
        return stage

    def close(self) -> None:
        """Shut every stage down."""
        gc.freeze()  # each part of vLLM that ends collects garbage; one collection, at the end of all, is enough
        for stage in self.stages:
            core = stage.client.engine_core
            core.model_executor.shutdown()
            core.scheduler.shutdown()
        self.stages.clear()
        cleanup_dist_env_and_memory()  # which collects, everything
