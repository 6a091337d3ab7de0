"""``Omni``: the stage graph of one model, for ordinary programs. A shell over ``AsyncOmni`` with a loop in a thread."""

from __future__ import annotations

import queue
import uuid
import weakref
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from vllm_omni.entrypoints.async_omni import AsyncOmni, SamplingParamsArg
from vllm_omni.entrypoints.loop_thread import LoopThread
from vllm_omni.entrypoints.params import check_previews, each, whole_answers, with_negative
from vllm_omni.entrypoints.progress import Progress
from vllm_omni.entrypoints.results import join
from vllm_omni.entrypoints.sinks import EventQueue, QueueSink
from vllm_omni.errors import OmniError, RequestError, StageDeadError
from vllm_omni.inputs.data import OmniPromptType, OmniSamplingParams
from vllm_omni.outputs import OmniRequestOutput, Preview
from vllm_omni.request import OmniRequest

_ONE = (str, bytes, Mapping)
"""What could be iterated but is one prompt (bytes are none at all, which its check says)."""


class Omni:
    """A model that runs. ``Omni(model).generate("a cup of coffee")[0].images[0]``.

    Takes the arguments of ``AsyncOmni``. Ends its processes with ``close``, at the end of a ``with`` block, when it is
    dropped, or at the end of the program.
    """

    def __init__(self, model: str | None = None, **kwargs: Any) -> None:
        self._async = AsyncOmni(model, **kwargs)
        self._loop = LoopThread("omni-loop")
        self._finalizer = weakref.finalize(self, self._loop.stop, self._async.shutdown)
        self._loop.run(self._async.attach())

    def generate(
        self,
        prompts: OmniPromptType | Sequence[OmniPromptType],
        sampling_params_list: SamplingParamsArg = None,
        *,
        py_generator: bool = False,
        use_tqdm: bool | Callable[..., Any] = True,
        sampling_params: SamplingParamsArg = None,
        negative_prompts: str | Sequence[str | None] | None = None,
        output_modalities: Sequence[str] | None = None,
        timeout: float | None = None,
        on_preview: Callable[[int, int, Preview], None] | None = None,
        lora_request: Any = None,
        priority: int | Sequence[int] = 0,
        **loose: Any,
    ) -> list[OmniRequestOutput] | Generator[OmniRequestOutput, None, None]:
        """Run prompts; all at once, the stages batch them.

        Every prompt is a request of its own. When some fail, the others still finish: then the error of the first that
        failed is raised, and its ``outputs`` hold what the others made. The engine goes on.

        Args:
            prompts: one prompt or several (a list, or anything else that can be iterated).
            sampling_params_list: one set, or one per stage (see ``AsyncOmni.generate``); or ``sampling_params=``.
            py_generator: return a generator that yields outputs in the order in which they are made, pieces of text
                and sound included, instead of a list with one output a prompt and final stage.
            use_tqdm: show a progress bar: of steps for one prompt, of prompts for several; or a function to make one.
            negative_prompts: one for all prompts, or one each.
            output_modalities: kinds of output wanted, such as ``["text"]``. Default: all that the model makes.
            timeout: seconds for the whole call.
            on_preview: called with index of the prompt, stage id and preview (sampling parameter ``num_previews``).
            lora_request: adapter, one for all prompts or a list with one (or None) each.
            priority: one for all prompts, or a list (see ``AsyncOmni.generate``).
            **loose: fields of ``OmniDiffusionSamplingParams`` (``height=512``), set over the sampling parameters.

        Raises ``RequestError`` (bad input), ``DeadlineError`` (``timeout`` is over), ``StageError`` (a stage failed;
        ``StageDeadError`` when it is gone).
        """
        if sampling_params is not None and sampling_params_list is not None:
            raise RequestError(
                "sampling_params and sampling_params_list are the same; give one", field="sampling_params"
            )
        many = list(prompts) if isinstance(prompts, Iterable) and not isinstance(prompts, _ONE) else [prompts]
        params = sampling_params if sampling_params is not None else sampling_params_list
        adapters, priorities = each(lora_request, len(many), "lora_request"), each(priority, len(many), "priority")
        requests: list[OmniRequest | OmniError] = [
            self._request(prompt, i, params, loose, output_modalities, timeout, None, adapters[i], priorities[i])
            for i, prompt in enumerate(with_negative(many, negative_prompts))
        ]
        if not py_generator:
            requests = [_whole(request) for request in requests]
        for request in requests:
            if isinstance(request, OmniRequest):
                check_previews(request.sampling_params, on_preview)
        run = self._outputs(requests, Progress(use_tqdm, len(many)), on_preview)
        if py_generator:
            return (output for _, output in run)
        return _collected(run, len(many))

    def _request(self, prompt: Any, index: int, params: Any, *rest: Any) -> OmniRequest | OmniError:
        try:
            return self._async.make_request(prompt, f"{index}_{uuid.uuid4()}", params, *rest)
        except OmniError as error:
            return error

    def _outputs(
        self,
        requests: list[OmniRequest | OmniError],
        progress: Progress,
        on_preview: Callable[[int, int, Preview], None] | None,
    ) -> Generator[tuple[int, OmniRequestOutput], None, None]:
        """(index of the prompt, output) as they are made; raises the first error by index when all have ended."""
        events: EventQueue = queue.SimpleQueue()
        errors = {index: item for index, item in enumerate(requests) if isinstance(item, OmniError)}
        good = {index: item for index, item in enumerate(requests) if isinstance(item, OmniRequest)}
        running = set(good)
        if self._async.is_stopped:
            raise StageDeadError("the engine is closed")
        self._loop.call_soon(self._open, good, events)
        with progress:
            progress.ended(len(errors))
            try:
                while running:
                    index, kind, value = events.get()
                    if kind == "output":
                        try:
                            output = self._async.build(good[index], *value)
                        except OmniError as error:  # its maker died before it was read
                            errors[index] = error
                        else:
                            yield index, output
                            del output  # who keeps an error that comes later shall not keep this
                    elif kind == "progress":
                        progress.step(*value)
                    elif kind == "preview":
                        if on_preview is not None:
                            on_preview(index, *value)
                    else:
                        running.discard(index)
                        progress.ended(1)
                        if value is not None:
                            errors.setdefault(index, value)
            finally:
                for index in running:
                    self.abort(good[index].request_id)
        if errors:
            raise errors[min(errors)]

    def _open(self, requests: Mapping[int, OmniRequest], events: EventQueue) -> None:
        for index, request in requests.items():
            sink = QueueSink(index, events)
            try:
                self._async.orchestrator.open(request, sink)
            except OmniError as error:
                sink.on_end(error)

    def abort(self, request_id: str) -> None:
        """Abort every open request with this id (outputs carry it); from any thread. Idempotent."""
        if not self._async.is_stopped:
            self._loop.run(self._async.abort(request_id))

    def start_profile(self, stages: Sequence[int] | None = None) -> None:
        """Start a torch profiler trace in all stages, or in ``stages``."""
        self._loop.run(self._async.start_profile(stages))

    def stop_profile(self, stages: Sequence[int] | None = None) -> dict[int, list[str]]:
        """Stop the traces; returns the files written, by stage id."""
        return self._loop.run(self._async.stop_profile(stages))

    def check_health(self, timeout: float = 10.0) -> None:
        """As ``AsyncOmni.check_health``."""
        self._loop.run(self._async.check_health(timeout))

    def collective_rpc(self, method: str, *args: Any, **kwargs: Any) -> list[Any]:
        """As ``AsyncOmni.collective_rpc``."""
        return self._loop.run(self._async.collective_rpc(method, *args, **kwargs))

    @property
    def num_stages(self) -> int:
        """Number of stages."""
        return self._async.num_stages

    @property
    def default_sampling_params_list(self) -> list[OmniSamplingParams]:
        """Each stage's own sampling parameters."""
        return self._async.default_sampling_params_list

    @property
    def is_running(self) -> bool:
        """Whether every stage lives and ``close`` was not called."""
        return self._async.is_running

    @property
    def errored(self) -> bool:
        """Whether a stage has died."""
        return self._async.errored

    def close(self) -> None:
        """End every open request and every process. Idempotent."""
        self._finalizer()

    def __enter__(self) -> Omni:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _collected(run: Iterable[tuple[int, OmniRequestOutput]], count: int) -> list[OmniRequestOutput]:
    """What ``run`` gives, in the order of the ``count`` prompts and of the stages; its error holds the rest."""
    ordered: list[list[OmniRequestOutput]] = [[] for _ in range(count)]
    try:
        for index, output in run:
            ordered[index].append(output)
            del output
    except OmniError as error:
        error.outputs = [output for outputs in ordered for output in join(outputs)]
        ordered.clear()  # the error alone holds them: its traceback holds this list
        raise
    return [o for outputs in ordered for o in sorted(join(outputs), key=lambda output: output.stage_id or 0)]


def _whole(request: OmniRequest | OmniError) -> OmniRequest | OmniError:
    if isinstance(request, OmniError):
        return request
    return replace(request, sampling_params=whole_answers(request.sampling_params))
