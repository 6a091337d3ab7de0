"""Text over HTTP: vLLM's own serving code over the stage that reads the prompt.

vLLM's ``OpenAIServingChat`` renders the messages, makes the sampling parameters, parses tools and reasoning out of the
text and writes answers and chunks. What it takes for its engine is a ``Turn``: one request's way through the stage
graph, which gives it vLLM's outputs and keeps what other stages make for who adds it to the answer.
"""

from __future__ import annotations

import asyncio
import copy
import re
from collections.abc import AsyncGenerator, Callable, Collection, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager
from typing import Any

from jinja2 import TemplateError
from pydantic import ValidationError
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion
from vllm.entrypoints.openai.models.protocol import BaseModelPath
from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.entrypoints.serve.tokenize.serving import ServingTokenization
from vllm.exceptions import VLLMClientError, VLLMNotFoundError, VLLMValidationError
from vllm.lora.request import LoRARequest
from vllm.renderers.online_renderer import OnlineRenderer

from vllm_omni.engine.media import check_processor_kwargs
from vllm_omni.entrypoints.openai.errors import field_path
from vllm_omni.entrypoints.openai.service import Service
from vllm_omni.entrypoints.openai.text_args import TextArgs
from vllm_omni.errors import ConfigError, NotFoundError, OmniError, RequestError, StageDeadError, StageError
from vllm_omni.inputs.data import OmniEnginePrompt, OmniSamplingParams
from vllm_omni.outputs import OmniRequestOutput

_PROMPTS = ("input_tokens", "input_text", "prompt")
"""vLLM's names of what was asked, whatever field it came in."""


_GRAMMARS = ("structured_outputs", "response_format", "tools")


def blamed(message: str, field: str, given: Collection[str]) -> str:
    """The field that a message without one is about: the first of ``given`` that it names, else ``field``."""
    text = message.lower()
    if "grammar" in text or "schema" in text:
        given = [name for name in _GRAMMARS if name in given] or given
        return next(iter(given)) if given and next(iter(given)) in _GRAMMARS else field
    found = {}
    for name in given:
        match = re.search(rf"\b({re.escape(name)}|{re.escape(name.replace('_', ' '))})\b", text)
        if match is not None:
            found[match.start()] = name
    return found[min(found)] if found else field


@contextmanager
def typed_errors(field: str, given: Collection[str] = ()) -> Iterator[None]:
    """What vLLM's code raises of a request as typed errors.

    Args:
        field: blamed when vLLM blames no field.
        given: fields of the request.

    Raises:
        RequestError: the request is wrong.
    """
    try:
        yield
    except OmniError:
        raise
    except ValidationError as error:
        raise _of_validation(error, field) from error
    except VLLMValidationError as error:
        name = error.parameter or blamed(str(error), field, given)
        raise RequestError(str(error.args[0]), field=field if name in _PROMPTS else name) from error
    except VLLMNotFoundError as error:
        raise NotFoundError(str(error), field=field) from error
    except (VLLMClientError, TemplateError, OSError, ImportError, ArithmeticError) as error:
        raise RequestError(str(error), field=blamed(str(error), field, given)) from error
    except (ValueError, TypeError, LookupError) as error:  # vLLM and the templates raise bare ones, too
        raise RequestError(str(error), field=blamed(str(error), field, given)) from error


def _of_validation(error: ValidationError, field: str) -> RequestError:
    first = error.errors(include_url=False)[0]
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, VLLMValidationError):
        return RequestError(str(cause.args[0]), field=cause.parameter or field)
    path = ".".join(field_path(first["loc"])) or field
    return RequestError(f"{path}: {first['msg']}", field=path)


def checked(answer: Any, field: str, given: Collection[str] = ()) -> Any:
    """An answer of vLLM's serving code; its errors are raised.

    Raises:
        RequestError: vLLM refuses the request.
        StageError: vLLM blames the server.
    """
    if not isinstance(answer, ErrorResponse):
        return answer
    error = answer.error
    name = error.param or blamed(error.message, field, given)
    if error.code == 404:
        raise NotFoundError(error.message, field=name)
    if error.code >= 500:
        raise StageError(error.message)
    raise RequestError(error.message, field=field if name in _PROMPTS else name)


class Engine:
    """What vLLM's serving code asks of its engine before there is a request."""

    def __init__(self, service: Service) -> None:
        renderer: Any = service.omni.renderer
        self._omni = service.omni
        self.renderer = renderer
        self.vllm_config = renderer.config
        self.model_config = renderer.model_config
        self.input_processor = None  # only beam search reads it

    @property
    def errored(self) -> bool:
        """Whether a stage has died."""
        return self._omni.errored

    @property
    def dead_error(self) -> StageDeadError:
        """Its death."""
        assert self._omni.dead_error is not None
        return self._omni.dead_error

    def check_admission(self, n: int = 1, request_id: str | None = None) -> None:
        """``Service.admitted`` has done that."""


class Turn(Engine):
    """One request.

    Args:
        service: the model.
        stages: parameters of all stages; those of the stage at ``index`` are vLLM's to make.
        index: place of the stage that reads the prompt.
        more: values of that stage's parameters that vLLM's requests have no field for.
        modalities: kinds of output wanted.
        information: what later stages read of the request.
        field: what of the request the prompt is, and
        given: all fields of it, for errors.
        on_media: gets every output that is not text.
    """

    def __init__(
        self,
        service: Service,
        stages: Sequence[OmniSamplingParams],
        index: int,
        more: Mapping[str, Any],
        modalities: Sequence[str],
        information: Mapping[str, Any] | None = None,
        field: str = "messages",
        given: Collection[str] = (),
        on_media: Callable[[OmniRequestOutput], None] | None = None,
    ) -> None:
        super().__init__(service)
        self._service = service
        self._stages = list(stages)
        self._index = index
        self._more = more
        self._modalities = modalities
        self._information = information
        self._field, self._given = field, given
        self.on_media = on_media
        self._runs: list[Any] = []
        self.made: tuple[OmniEnginePrompt, list[OmniSamplingParams]] = {"engine_input": {}}, []
        """Prompt and parameters, once vLLM has made them."""
        self.metrics: dict[str, Any] = {}
        self.error: OmniError | None = None
        self.cancelled = False

    def generate(
        self,
        prompt: Mapping[str, Any],
        sampling_params: Any,
        request_id: str,
        *,
        lora_request: Any = None,
        trace_headers: Mapping[str, str] | None = None,
        priority: int = 0,
        data_parallel_rank: int | None = None,
        session_id: str | None = None,
        reasoning_ended: bool | None = None,
        reasoning_parser_kwargs: dict[str, Any] | None = None,
    ) -> AsyncGenerator[Any, None]:
        """vLLM's outputs of the request. The routing arguments are those of requests that cannot name any here."""
        whole: OmniEnginePrompt = {"engine_input": prompt}
        if self._information:
            whole["additional_information"] = self._information
        if lora_request is not None:
            whole["lora_request"] = lora_request
        if priority:
            whole["priority"] = priority
        if reasoning_ended is not None:
            whole["reasoning_ended"] = reasoning_ended
        if reasoning_parser_kwargs is not None:
            whole["reasoning_parser_kwargs"] = reasoning_parser_kwargs
        for name, value in self._more.items():
            setattr(sampling_params, name, value)
        params = [*self._stages]
        params[self._index] = sampling_params
        self.made = whole, params
        run = self._run(whole, params, request_id)
        self._runs.append(run)
        return run

    async def _run(
        self, prompt: OmniEnginePrompt, params: Sequence[OmniSamplingParams], request_id: str
    ) -> AsyncGenerator[Any, None]:
        try:
            outputs = self._service.stream(prompt, params, self._modalities, name=request_id)
            async with aclosing(outputs):
                async for output in outputs:
                    self.metrics = output.metrics
                    if output.is_pipeline_output and output.final_output_type == "text":
                        yield output.request_output
                    elif self.on_media is not None and (output.images or output.multimodal_output):
                        self.on_media(output)
        except OmniError as error:
            if error.details.get("field") == "prompt":  # the stage's name for what vLLM blames nothing for
                error.details["field"] = blamed(error.message, self._field, self._given)
            self.error = error
            raise
        except asyncio.CancelledError:
            self.cancelled = True  # vLLM's code makes an answer of it
            raise

    async def aclose(self) -> None:
        """Abort what has not ended."""
        for run in self._runs:
            if not run.ag_running:  # else vLLM reads several at once in tasks, and has cancelled those
                await run.aclose()


class _Chat(OpenAIServingChat):
    """vLLM's chats. Media are rendered without the cache that the engine mirrors: a request that ends before it comes
    to the engine would leave the two different."""

    async def render_chat_request(self, request: ChatCompletionRequest) -> Any:
        self._preflight(request.n or 1)
        if request.mm_processor_kwargs:
            check_processor_kwargs(request.mm_processor_kwargs, self.renderer.mm_processor)
        return await self.online_renderer.render_chat(request, skip_mm_cache=True)


class _Completion(OpenAIServingCompletion):
    """vLLM's completions."""

    async def render_completion_request(self, request: CompletionRequest) -> Any:
        self._preflight(request.n or 1)
        return await self.online_renderer.render_completion(request, skip_mm_cache=True)


class Text:
    """vLLM's serving code for one model.

    Raises:
        ConfigError: a parser or the template does not fit the model.
    """

    def __init__(self, service: Service, args: TextArgs) -> None:
        engine = Engine(service)
        self.engine = engine
        self.max_model_len: int = engine.model_config.max_model_len
        paths = [BaseModelPath(name=name, model_path=engine.model_config.model) for name in service.names]
        self.models = OpenAIServingModels(engine, paths)
        self._name_adapters(args.adapters(), service.names)
        template = args.template()
        common: dict[str, Any] = {
            "chat_template": template,
            "chat_template_content_format": args.chat_template_content_format,
            "trust_request_chat_template": args.trust_request_chat_template,
            "default_chat_template_kwargs": dict(args.default_chat_template_kwargs),
            "request_logger": None,
        }
        parsers: dict[str, Any] = {
            "enable_auto_tools": args.enable_auto_tool_choice,
            "exclude_tools_when_tool_choice_none": args.exclude_tools_when_tool_choice_none,
            "tool_parser": args.tool_call_parser,
            "tool_strict_level": args.tool_strict_level,
            "reasoning_parser": engine.vllm_config.structured_outputs_config.reasoning_parser,
        }
        told: dict[str, Any] = {
            "return_tokens_as_token_ids": args.return_tokens_as_token_ids,
            "enable_prompt_tokens_details": args.enable_prompt_tokens_details,
            "enable_force_include_usage": args.enable_force_include_usage,
        }
        try:
            self.renderer = OnlineRenderer(
                engine.model_config,
                engine.renderer,
                trust_request_mm_kwargs=args.trust_request_mm_kwargs,
                **common,
                **parsers,
            )
            self._chat = _Chat(
                engine, self.models, args.response_role, online_renderer=self.renderer, **common, **parsers, **told
            )
        except (TypeError, ValueError, RuntimeError) as error:  # of a parser that misses its tokens
            raise ConfigError(f"the parsers do not fit the model: {error}", field="tool_call_parser") from error
        self._completion = _Completion(engine, self.models, online_renderer=self.renderer, request_logger=None, **told)
        self.tokenization = ServingTokenization(self.models, self.renderer, **common)

    def _name_adapters(self, paths: Mapping[str, str], taken: Collection[str]) -> None:
        """Adapters that requests may name as model; the engine loads one before the first request that does."""
        if paths and self.engine.vllm_config.lora_config is None:
            raise ConfigError("lora_modules: the stage takes no adapters; give --enable-lora", field="lora_modules")
        for number, (name, path) in enumerate(paths.items(), start=1):
            if name in taken:
                raise ConfigError(f"lora_modules: {name!r} is the model's own name", field="lora_modules")
            self.models.lora_requests[name] = LoRARequest(name, number, path)

    def chat(self, turn: Turn, defaults: Mapping[str, Any]) -> Any:
        """vLLM's chats over one request; ``defaults`` are the stage's sampling parameters."""
        return _over(self._chat, turn, defaults)

    def completion(self, turn: Turn, defaults: Mapping[str, Any]) -> Any:
        """vLLM's completions over one request."""
        return _over(self._completion, turn, defaults)


def _over(serving: Any, turn: Turn, defaults: Mapping[str, Any]) -> Any:
    """The same settings and parsers, another engine and other defaults."""
    one = copy.copy(serving)
    one.engine_client = turn
    one.default_sampling_params = {**serving.default_sampling_params, **defaults}
    return one
