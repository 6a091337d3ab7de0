"""``OmniInputProcessor``: requests of a stage, with what earlier stages sent."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from vllm.config import VllmConfig
from vllm.exceptions import VLLMClientError, VLLMValidationError
from vllm.inputs import TokensPrompt
from vllm.platforms import current_platform
from vllm.pooling_params import PoolingParams
from vllm.renderers.inputs.preprocess import parse_model_prompt
from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.engine.input_processor import InputProcessor

from vllm_omni.config.model import OmniModelConfig
from vllm_omni.config.schema import nearest
from vllm_omni.distributed.omni_connectors.utils.serialization import Codec
from vllm_omni.engine.media import check_media, check_places, check_processor_kwargs
from vllm_omni.errors import RequestError
from vllm_omni.worker.gpu_generation_model_runner import TASK
from vllm_omni.worker.payload import ANYONE, OmniPayload, pack_for_ranks

OmniEngineCoreRequest = EngineCoreRequest
"""vLLM's own: the payload rides in its sampling or pooling parameters (``OmniPayload.attach``)."""

_PROMPT_KEYS = {
    "prompt",
    "prompt_token_ids",
    "multi_modal_data",
    "multi_modal_uuids",
    "mm_processor_kwargs",
    "cache_salt",
    "additional_information",
    "conditioning_steps",
    "emit",
    "engine_input",
    "lora_request",
    "negative_prompt",
    "priority",
    "reasoning_ended",
    "reasoning_parser_kwargs",
}
_OURS = (
    *("additional_information", "conditioning_steps", "emit", "lora_request", "negative_prompt"),
    *("priority", "reasoning_ended", "reasoning_parser_kwargs"),
)


@dataclass(frozen=True)
class StagePrompt:
    """A prompt in its parts: vLLM's own, and ours."""

    prompt: Any
    """What vLLM renders: a text, token ids, media."""
    information: Mapping[str, Any]
    """Named tensors and values for the model."""
    steps: int = 0
    """Decode steps that ``information`` conditions, of a prompt whose conditioning is streamed."""
    emit: bool = True
    """Whether the stage sends its hidden states on."""
    lora_request: Any = None
    """Adapter to use."""
    priority: int = 0
    """Of a stage with ``scheduling_policy: priority``; smaller numbers run first."""
    reasoning: Mapping[str, Any] = field(default_factory=dict)
    """What the engine has to know of the reasoning before an answer that is bound to a grammar: fields of vLLM's
    ``EngineCoreRequest``."""

    @property
    def is_rendered(self) -> bool:
        """Whether nothing is left to load, tokenise or process."""
        return self.lora_request is None and set(self.prompt) in ({"prompt_token_ids"}, {"engine_input"})

    @classmethod
    def of(cls, prompt: Any) -> StagePrompt:
        """Split what an edge function or the caller gave; None, which closes a stream, is a prompt without anything.

        Raises:
            RequestError: not a text, token ids or mapping; a key that is not known.
        """
        if prompt is None:
            return cls({}, {})
        if isinstance(prompt, str):
            return cls({"prompt": prompt}, {})
        if isinstance(prompt, list) and prompt and all(isinstance(token, int) for token in prompt):
            return cls({"prompt_token_ids": prompt}, {})
        if not isinstance(prompt, Mapping):
            raise RequestError(
                f"prompt is a {type(prompt).__name__}; allowed are a text, token ids, or a mapping", field="prompt"
            )
        for key in prompt:
            if key not in _PROMPT_KEYS:
                raise RequestError(f"prompt has an unknown key {key!r}{nearest(key, _PROMPT_KEYS)}", field=key)
        if prompt.get("negative_prompt"):
            raise RequestError("negative_prompt is for diffusion stages", field="negative_prompt")
        reasoning = ("reasoning_ended", "reasoning_parser_kwargs")
        return cls(
            {key: value for key, value in prompt.items() if key not in _OURS and value is not None},
            prompt.get("additional_information") or {},
            prompt.get("conditioning_steps", 0),
            prompt.get("emit", True),
            prompt.get("lora_request"),
            prompt.get("priority", 0),
            {key: prompt[key] for key in reasoning if prompt.get(key) is not None},
        )


@dataclass(frozen=True)
class Target:
    """The workers that will read a payload."""

    codec: Codec
    ranks: int = 1
    """Tensor-parallel ranks of the stage."""
    pid: int = ANYONE
    """Process of the stage's engine."""

    def pack(self, information: Mapping[str, Any]) -> list[bytes]:
        """``information`` once for each rank; nothing when there is none."""
        return pack_for_ranks(information, self.codec, self.ranks, self.pid) if information else []


class OmniInputProcessor(InputProcessor):
    """Makes vLLM's ``EngineCoreRequest`` of a stage's prompt."""

    def __init__(self, vllm_config: VllmConfig, target: Target) -> None:
        super().__init__(vllm_config)
        self.target = target
        self._media_ids = _media_ids(self.model_config) if self.model_config.is_multimodal_model else {}

    def omni_request(
        self,
        request_id: str,
        prompt: Any,
        params: SamplingParams | None,
        *,
        last: bool = True,
        lora_request: Any = None,
    ) -> tuple[EngineCoreRequest, str | None]:
        """Request of an autoregressive stage, and the prompt's text if it has one: ``prepare`` and ``attach``."""
        parts = StagePrompt.of(prompt)
        request, text = self.prepare(request_id, parts, params, lora_request)
        self.attach(request, parts, last=last)
        return request, text

    def prepare(
        self, request_id: str, parts: StagePrompt, params: SamplingParams | None, lora_request: Any = None
    ) -> tuple[EngineCoreRequest, str | None]:
        """Tokenise, process media and check parameters; may take long, and may run in another thread.

        Raises:
            RequestError: the prompt or the parameters are wrong.
        """
        params = SamplingParams() if params is None else params
        if self.lora_config is not None and params.prompt_logprobs is not None and current_platform.is_cpu():
            raise RequestError("prompt_logprobs: vLLM has none on CPU with enable_lora", field="prompt_logprobs")
        self._check_priority(parts.priority)
        try:
            rendered = self._render(parts.prompt)
            request = self.process_inputs(
                request_id, rendered, params, ("generate",), lora_request=lora_request, priority=parts.priority
            )
        except RequestError:
            raise
        except VLLMClientError as error:
            named = error.parameter if isinstance(error, VLLMValidationError) else None
            field = "prompt" if named in (None, "input_tokens", "input_text") else named
            raise RequestError(str(error.args[0] if error.args else error), field=field) from error
        except (ValueError, TypeError, KeyError, OSError, ImportError, NotImplementedError) as error:
            raise RequestError(_reason(error), field="prompt") from error
        except AssertionError as error:  # of vLLM's, which finds no place for a medium
            check_places(parts.prompt, self._media_ids, self.tokenizer)
            raise RequestError(_reason(error), field="prompt") from error
        self._check_media(request)
        request.external_req_id = request_id
        for name, value in parts.reasoning.items():
            setattr(request, name, value)
        return request, rendered.get("prompt")

    def _check_media(self, request: EngineCoreRequest) -> None:
        """vLLM reads a placeholder without its medium as a word."""
        tokens = request.prompt_token_ids or []
        if self._media_ids.keys().isdisjoint(tokens):
            return
        open_places = np.isin(tokens, list(self._media_ids))
        for feature in request.mm_features or ():
            place = feature.mm_position
            open_places[place.offset : place.offset + place.length] = False
        if open_places.any():
            name = self._media_ids[tokens[int(open_places.argmax())]]
            raise RequestError(f"the prompt has a place for {name} that was not given", field="multi_modal_data")

    def _check_priority(self, priority: Any) -> None:
        if isinstance(priority, bool) or not isinstance(priority, int) or not -(2**63) <= priority < 2**63:
            raise RequestError(f"priority={priority!r}: a whole number is needed", field="priority")
        policy = self.vllm_config.scheduler_config.policy
        if priority != 0 and policy != "priority":
            raise RequestError(
                f"priority={priority}: the stage serves requests as they come; set scheduling_policy: priority in its "
                "engine_args",
                field="priority",
            )

    def attach(self, request: EngineCoreRequest, parts: StagePrompt, *, last: bool) -> None:
        """Add the payload.

        A request that carries one gets a prefix-cache salt of its own, since its token ids do not say what it computes;
        one whose hidden states are sent on computes its whole prompt.

        Raises:
            RequestError: the prompt's information cannot be sent.
        """
        config: OmniModelConfig = self.model_config
        params = request.sampling_params
        if params.n > 1 and (parts.emit or not last or config.takes_payload):
            raise RequestError(
                f'n={params.n}: several answers are for text alone (output_modalities=["text"])', field="n"
            )
        data = self.target.pack(parts.information) if config.takes_payload else []
        emit = parts.emit and (config.hidden_rows == "all" or bool(request.mm_features))
        OmniPayload(data, steps=parts.steps, last=last, emit=emit).attach(params)
        if emit and config.hidden_layers:
            params.skip_reading_prefix_cache = True
        if data or not last:
            request.cache_salt = request.request_id

    def _render(self, prompt: Any) -> Any:
        """Tokenise and process media; token ids alone, and what is rendered already, need neither.

        Media go past the cache that the engine mirrors: a request that is refused before it comes to the engine would
        leave the two different.
        """
        if "engine_input" in prompt:
            return prompt["engine_input"]
        if set(prompt) == {"prompt_token_ids"}:
            return {"type": "token", "prompt_token_ids": list(prompt["prompt_token_ids"]), "arrival_time": time.time()}
        check_media(prompt.get("multi_modal_data", {}), prompt.get("multi_modal_uuids", ()))
        if prompt.get("mm_processor_kwargs"):
            check_processor_kwargs(prompt["mm_processor_kwargs"], self.renderer.mm_processor)
        if "prompt_token_ids" in prompt:
            prompt = TokensPrompt(**prompt)
        renderer = self.renderer
        (rendered,) = renderer.render_cmpl(
            [parse_model_prompt(self.model_config, prompt)], renderer.default_cmpl_tok_params, skip_mm_cache=True
        )
        return rendered


def _reason(error: BaseException) -> str:
    """What went wrong first: errors raised from it repeat the caller's media."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {str(error)[:500]}"


def _media_ids(config: Any) -> dict[int, str]:
    """Placeholder tokens of a model's configuration -> what stands for them."""
    values = config.hf_config.to_dict()
    values = values.get("thinker_config", values)
    names = {f"{kind}_token_{end}": kind for kind in ("image", "audio", "video") for end in ("id", "index")}
    return {values[name]: kind for name, kind in names.items() if isinstance(values.get(name), int)}


def chunk_request(request_id: str, prompt: Any, number: int, *, last: bool, target: Target) -> EngineCoreRequest:
    """Chunk ``number`` (from 1) of a running request of an autoregressive stage. Only its payload is read.

    Raises:
        RequestError: the prompt's information cannot be sent.
    """
    parts = StagePrompt.of(prompt)
    params = SamplingParams(max_tokens=1)
    OmniPayload(target.pack(parts.information), chunk=number, steps=parts.steps, last=last).attach(params)
    return _bare_request(request_id, params, None)


def generation_request(request_id: str, prompt: Any, target: Target) -> EngineCoreRequest:
    """Request of a generation stage: one placeholder token and the payload.

    Raises:
        RequestError: the prompt's information cannot be sent.
    """
    params = PoolingParams(task=TASK)
    OmniPayload(target.pack(StagePrompt.of(prompt).information)).attach(params)
    return _bare_request(request_id, None, params)


def _bare_request(
    request_id: str, sampling_params: SamplingParams | None, pooling_params: PoolingParams | None
) -> EngineCoreRequest:
    return EngineCoreRequest(
        request_id=request_id,
        prompt_token_ids=[0],
        mm_features=None,
        sampling_params=sampling_params,
        pooling_params=pooling_params,
        arrival_time=time.time(),
        lora_request=None,
        cache_salt=None,
        data_parallel_rank=None,
        external_req_id=request_id,
    )
