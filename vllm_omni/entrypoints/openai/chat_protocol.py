"""Bodies of ``/v1/chat/completions``."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from vllm_omni.entrypoints.openai.images import Seed

MAX_TEXT = 1_000_000
MAX_INT = 2**31 - 1
"""Engines keep these numbers in 32 bits; a larger one would end them."""


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Message(_Body):
    """One turn."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, Field(max_length=MAX_TEXT)] | list[dict[str, Any]]
    name: str | None = Field(None, max_length=256)


class AudioOptions(_Body):
    """How speech is returned."""

    voice: str | None = Field(None, max_length=256)
    format: Literal["wav", "mp3", "flac", "opus", "pcm16"] = "wav"


class StreamOptions(_Body):
    """What a stream tells beside the answer."""

    include_usage: bool = False


class JsonSchema(BaseModel):
    """A schema that the answer keeps."""

    model_config = ConfigDict(extra="ignore", strict=True, populate_by_name=True)

    name: str = "schema"
    json_schema: dict[str, Any] = Field(alias="schema")


class ResponseFormat(_Body):
    """Form of the text."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class ChatCompletionRequest(_Body):
    """A chat. Fields below the blank line of the class are not OpenAI's; what is not given is the model's default."""

    messages: list[Message] = Field(min_length=1, max_length=4096)
    model: str | None = None
    modalities: list[Literal["text", "audio", "image"]] | None = Field(None, min_length=1)
    audio: AudioOptions | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_completion_tokens: int | None = Field(None, ge=1, le=MAX_INT)
    max_tokens: int | None = Field(None, ge=1, le=MAX_INT)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    stop: str | Annotated[list[str], Field(max_length=16)] | None = None
    seed: Seed | None = None
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=20)
    response_format: ResponseFormat | None = None
    n: Literal[1] | None = None
    user: str | None = Field(None, max_length=256)

    top_k: int | None = Field(None, ge=-1, le=MAX_INT)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0, le=2)
    min_tokens: int | None = Field(None, ge=0, le=MAX_INT)
    ignore_eos: bool | None = None
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
TEXT_FIELDS = (
    *("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "frequency_penalty", "presence_penalty"),
    *("stop", "min_tokens", "ignore_eos"),
)
"""Fields that go to the text stage's sampling parameters by the same name."""
TEXT_ONLY_FIELDS = (
    *TEXT_FIELDS,
    *("max_completion_tokens", "max_tokens", "top_logprobs", "response_format", "audio"),
)
"""Fields that only a model that makes text reads."""
