"""The served model as endpoints see it: names, admission, and one way to run a request."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

from vllm_omni.entrypoints.async_omni import AsyncOmni
from vllm_omni.entrypoints.openai.args import ServeArgs
from vllm_omni.entrypoints.openai.metrics import Metrics, RequestWatch
from vllm_omni.entrypoints.openai.request_ids import request_id
from vllm_omni.entrypoints.openai.trace_context import trace_headers
from vllm_omni.entrypoints.openai.video_jobs import VideoJobs
from vllm_omni.entrypoints.openai.voices import voices_of
from vllm_omni.errors import NotFoundError, OmniError, OverloadError, RequestError
from vllm_omni.inputs.data import OmniDiffusionSamplingParams, OmniPromptType, OmniSamplingParams
from vllm_omni.outputs import OmniRequestOutput, Preview

if TYPE_CHECKING:
    from vllm_omni.entrypoints.openai.text import Text

T = TypeVar("T")
ENCODER_THREADS = 4
MAX_RETRY_AFTER = 60.0


class Service:
    """One model behind the endpoints. Lives in the server's event loop.

    Args:
        omni: the running model.
        args: settings of the server.
        names: what requests may call the model; the first is shown.
    """

    def __init__(self, omni: AsyncOmni, args: ServeArgs, names: Sequence[str]) -> None:
        self.omni = omni
        self.args = args
        self.names = tuple(names)
        self.started = int(time.time())
        self.draining = False
        self.makes = frozenset(stage.final_output_type for stage in omni.pipeline.stages if stage.final_output)
        """Kinds of output: ``text``, ``image``, ``audio``, ..."""
        self.voices = voices_of(omni)
        self.reader = next(i for i, stage in enumerate(omni.pipeline.stages) if not stage.engine_input_source)
        """Place of the stage that reads the prompt."""
        self.reads = frozenset(omni.stage_infos[omni.pipeline.stages[self.reader].stage_id].facts.get("inputs", ()))
        """Media that a stage of ours reads beside the text: ``image``."""
        self.text: Text | None = None
        """vLLM's serving code, for models whose prompt an engine of vLLM's reads."""
        self.adapters: frozenset[str] = frozenset()
        """Names of adapters that requests may name as model."""
        self.videos = VideoJobs()
        self.profiling = False
        self.metrics = Metrics(lambda: self._open, lambda: omni.orchestrator.loads)
        self._pool = ThreadPoolExecutor(ENCODER_THREADS, thread_name_prefix="encode")
        self._open = 0
        self._mean_seconds = 1.0

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    # ---------------------------------------------------------------- state

    @property
    def open_requests(self) -> int:
        """Requests that are admitted and not answered yet."""
        return self._open

    @property
    def name(self) -> str:
        """The model's name in answers."""
        return self.names[0]

    def check_model(self, name: str | None) -> None:
        """Raises ``NotFoundError`` when a request names another model."""
        if name is not None and name not in self.names and name not in self.adapters:
            raise NotFoundError(
                f"model={name!r} is not served here; there is {', '.join(self.names)}",
                field="model",
                code="model_not_found",
            )

    def adapter(self, name: str | None) -> str | None:
        """The adapter that a request names as its model; None for the model itself."""
        return name if name in self.adapters else None

    def check_makes(self, kind: str, field: str | None = None) -> None:
        """Raises ``RequestError`` when the model does not make this kind of output."""
        if kind not in self.makes:
            raise RequestError(
                f"{self.name} makes {' and '.join(sorted(self.makes))}, not {kind}", field=field, code="not_supported"
            )

    # ---------------------------------------------------------------- requests

    @contextmanager
    def admitted(self, places: int = 1) -> Iterator[None]:
        """A place among the open requests, or several.

        Raises:
            OverloadError: there are not so many.
        """
        if self._open + places > self.args.max_queue:
            self.metrics.refused.inc()
            wait = min(MAX_RETRY_AFTER, self._mean_seconds * self._open / 2)
            raise OverloadError(
                f"{self._open} requests are open, of {self.args.max_queue} that may be; try again later",
                retry_after=wait,
                code="queue_full",
            )
        self._open += places
        begun = time.monotonic()
        try:
            yield
        finally:
            self._open -= places
            self._mean_seconds += 0.1 * (time.monotonic() - begun - self._mean_seconds)

    def params(self, diffusion: Mapping[str, Any]) -> list[OmniSamplingParams]:
        """Each stage's own parameters, with ``diffusion`` over those of diffusion stages.

        Raises:
            RequestError: names the field that is wrong.
        """
        out: list[OmniSamplingParams] = []
        for params in self.omni.default_sampling_params_list:
            if isinstance(params, OmniDiffusionSamplingParams):
                params = replace(params, **diffusion)
                params.validate()
            out.append(params)
        return out

    async def stream(
        self,
        prompt: OmniPromptType,
        params: Sequence[OmniSamplingParams],
        modalities: Sequence[str],
        on_progress: Callable[[int, int, int], None] | None = None,
        name: str | None = None,
        on_preview: Callable[[int, Preview], None] | None = None,
    ) -> AsyncGenerator[OmniRequestOutput, None]:
        """Run an admitted request; yields outputs as they come. Closing the generator aborts it.

        Raises:
            OmniError: what ``AsyncOmni.generate`` raises.
        """
        watch = RequestWatch(self.metrics)

        def progress(stage_id: int, step: int, total: int) -> None:
            watch.step(stage_id)
            if on_progress is not None:
                on_progress(stage_id, step, total)

        outputs = self.omni.generate(
            prompt,
            name or request_id(),
            params,
            output_modalities=modalities,
            timeout=self.args.request_timeout,
            on_progress=progress,
            on_preview=on_preview,
            trace_headers=trace_headers.get(),
        )
        outcome = "aborted"
        try:
            async with aclosing(outputs):
                async for output in outputs:
                    watch.output(output)
                    yield output
            outcome = "ok"
        except OmniError as error:
            outcome = type(error).__name__
            raise
        finally:
            watch.end(outcome)

    async def collect(
        self, prompt: OmniPromptType, params: Sequence[OmniSamplingParams], modalities: Sequence[str]
    ) -> list[OmniRequestOutput]:
        """Run a request to its end."""
        with self.admitted():
            async with aclosing(self.stream(prompt, params, modalities)) as outputs:
                return [output async for output in outputs]

    async def aside(self, work: Callable[..., T], *args: Any) -> T:
        """Run what takes the processor's time, such as encoding, beside the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, work, *args)

    def check_health(self) -> None:
        """Raises ``StageDeadError`` when a rank of a stage is gone."""
        self.omni.check_alive()

    def not_ready(self) -> str | None:
        """Why no further request should be sent here; None when all is well."""
        try:
            self.check_health()
        except OmniError as error:
            return error.message
        if self.draining:
            return "the server is shutting down"
        return "the queue is full" if self._open >= self.args.max_queue else None
