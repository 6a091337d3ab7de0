"""Bodies of ``/v1/chat/completions``."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from vllm_omni.entrypoints.openai.images import Seed
from vllm_omni.entrypoints.openai.request_ids import PATTERN

MAX_TEXT = 1_000_000
MAX_INT = 2**31 - 1
"""Engines keep these numbers in 32 bits; a larger one would end them."""
MAX_LIST = 1024

Count = Annotated[int, Field(ge=0, le=MAX_INT)]
TokenIds = Annotated[list[Count], Field(max_length=MAX_LIST)]
Short = Annotated[str, Field(max_length=256)]
Name = Annotated[str, Field(min_length=1, max_length=256)]


class Body(BaseModel):
    """A part of a request: what it does not know is an error."""

    model_config = ConfigDict(extra="forbid", strict=True)


class CalledFunction(Body):
    """The function of a call that the model made."""

    name: Name
    arguments: Annotated[str, Field(max_length=MAX_TEXT)]


class ToolCall(Body):
    """A call that the model made in an earlier turn."""

    id: Name
    type: Literal["function"] = "function"
    function: CalledFunction


class Message(Body):
    """One turn."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[str, Field(max_length=MAX_TEXT)] | list[dict[str, Any]] | None = None
    name: Short | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=MAX_LIST)] | None = None
    tool_call_id: Short | None = None
    reasoning: Annotated[str, Field(max_length=MAX_TEXT)] | None = None
    refusal: Annotated[str, Field(max_length=MAX_TEXT)] | None = None
    audio: dict[str, Any] | None = None
    annotations: None = None
    function_call: None = None


class AudioOptions(Body):
    """How speech is returned."""

    voice: Short | None = None
    format: Literal["wav", "mp3", "flac", "opus", "pcm16"] = "wav"


class StreamOptions(Body):
    """What a stream tells beside the answer."""

    include_usage: bool = False
    continuous_usage_stats: bool = False


class JsonSchema(Body):
    """A schema that the answer keeps."""

    model_config = ConfigDict(populate_by_name=True)

    name: Name
    description: Short | None = None
    json_schema: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(Body):
    """Form of the text."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StructuredOutputs(Body):
    """What the text is bound to; one of these."""

    json_: dict[str, Any] | str | None = Field(None, alias="json")
    regex: Annotated[str, Field(max_length=4096)] | None = None
    choice: Annotated[list[str], Field(min_length=1, max_length=MAX_LIST)] | None = None
    grammar: Annotated[str, Field(max_length=65536)] | None = None
    json_object: bool | None = None
    structural_tag: Annotated[str, Field(max_length=65536)] | None = None


class Function(Body):
    """A function that the model may call."""

    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
    description: Annotated[str, Field(max_length=65536)] | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Body):
    """A tool; functions are the only ones."""

    type: Literal["function"]
    function: Function


class NamedFunction(Body):
    """Which function."""

    name: Name


class NamedTool(Body):
    """The one tool that the model has to call."""

    type: Literal["function"]
    function: NamedFunction


class SamplingBody(Body):
    """How text is sampled: fields of ``/v1/completions`` and of chats. The second half is not OpenAI's."""

    model: str | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=1, le=MAX_INT)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    stop: str | Annotated[list[str], Field(max_length=16)] | None = None
    seed: Seed | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = Field(None, max_length=MAX_LIST)
    n: int | None = Field(None, ge=1, le=64)
    response_format: ResponseFormat | None = None
    user: Short | None = None

    top_k: int | None = Field(None, ge=-1, le=MAX_INT)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0, le=2)
    min_tokens: Count | None = None
    ignore_eos: bool | None = None
    stop_token_ids: TokenIds | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    allowed_token_ids: TokenIds | None = None
    bad_words: Annotated[list[Short], Field(max_length=MAX_LIST)] | None = None
    prompt_logprobs: int | None = Field(None, ge=0, le=20)
    structured_outputs: StructuredOutputs | None = None
    truncate_prompt_tokens: int | None = Field(None, ge=-1, le=MAX_INT)
    truncation_side: Literal["left", "right"] | None = None
    add_special_tokens: bool | None = None
    echo: bool | None = None
    cache_salt: Name | None = None
    priority: int | None = Field(None, ge=-(2**63), le=2**63 - 1)
    request_id: Annotated[str, Field(pattern=PATTERN)] | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None


class ChatCompletionRequest(SamplingBody):
    """A chat. What is not given is the model's default; the last part is not OpenAI's."""

    messages: list[Message] = Field(min_length=1, max_length=4096)
    modalities: list[Literal["text", "audio", "image"]] | None = Field(None, min_length=1)
    audio: AudioOptions | None = None
    max_completion_tokens: int | None = Field(None, ge=1, le=MAX_INT)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=20)
    tools: Annotated[list[Tool], Field(min_length=1, max_length=MAX_LIST)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None

    include_reasoning: bool | None = None
    thinking_token_budget: Count | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    documents: Annotated[list[dict[str, str]], Field(max_length=MAX_LIST)] | None = None
    chat_template: Annotated[str, Field(max_length=MAX_TEXT)] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    mm_processor_kwargs: dict[str, Any] | None = None
    return_prompt_text: bool | None = None
    sampling_params_list: list[dict[str, Any]] | None = None
    size: str | None = Field(None, max_length=16)
    height: int | None = Field(None, ge=16, le=16384)
    width: int | None = Field(None, ge=16, le=16384)
    num_inference_steps: int | None = Field(None, ge=1, le=200)
    guidance_scale: float | None = Field(None, ge=0, le=20)
    true_cfg_scale: float | None = Field(None, ge=0, le=20)
    negative_prompt: str | None = Field(None, max_length=32_000)
    num_outputs_per_prompt: int | None = Field(None, ge=1, le=10)
    return_stage_metrics: bool = Field(False, description="Add times by stage to the answer; a stream's: to its end.")


PICTURE_FIELDS = (
    *("size", "height", "width", "num_inference_steps", "guidance_scale", "true_cfg_scale", "negative_prompt"),
    "num_outputs_per_prompt",
)
"""Fields that only a model that makes pictures reads."""
_COMMON = {
    *("messages", "model", "modalities", "stream", "stream_options", "seed", "user", "return_stage_metrics", "n"),
    "request_id",
}
TEXT_ONLY_FIELDS = tuple(
    name for name in ChatCompletionRequest.model_fields if name not in _COMMON and name not in PICTURE_FIELDS
)
"""Fields that only a model that makes text reads."""
_OURS = {"modalities", "audio", "sampling_params_list", "return_stage_metrics", "messages", "model", *PICTURE_FIELDS}


def vllm_fields(body: BaseModel) -> dict[str, Any]:
    """What of a body is vLLM's to read, by the same names; what was not given, or is null, is left out."""
    names = {name for name in body.model_fields_set if name not in _OURS and getattr(body, name) is not None}
    return body.model_dump(include=names, by_alias=True, exclude_unset=True)
