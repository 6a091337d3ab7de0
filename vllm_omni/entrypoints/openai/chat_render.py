"""From messages to a prompt: media are checked here, everything else is vLLM's renderer."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from typing import Any

from vllm_omni.config.schema import nearest
from vllm_omni.entrypoints.openai.args import ServeArgs
from vllm_omni.entrypoints.openai.chat_protocol import MAX_INT, MAX_TEXT, TEXT_FIELDS, ChatCompletionRequest, Message
from vllm_omni.entrypoints.openai.media import Kind, check_media, from_base64, load_media
from vllm_omni.errors import RequestError, TooLargeError
from vllm_omni.inputs.data import OmniTextPrompt

_URLS: dict[str, Kind] = {"image_url": "image", "audio_url": "audio", "video_url": "video"}
_TYPES = {"image": "image/png", "audio": "audio/wav", "video": "video/mp4"}
MAX_MEDIA = 64
"""Media of one request."""


def render(renderer: Any, messages: Sequence[Message], args: ServeArgs) -> OmniTextPrompt:
    """The prompt of a chat: ``prompt`` and ``multi_modal_data``. Reads and decodes media: not in the event loop.

    Raises:
        RequestError: a message or a medium is wrong.
    """
    from vllm.exceptions import VLLMClientError
    from vllm.renderers.params import ChatParams

    turns = _turns(messages, args)
    params = ChatParams(chat_template_kwargs={"add_generation_prompt": True, "tokenize": False})
    try:
        _, rendered = renderer.render_messages(turns, params)
    except (VLLMClientError, ValueError, TypeError, KeyError, OSError, ImportError, NotImplementedError) as error:
        raise RequestError(f"messages: {error}", field="messages") from error
    prompt: OmniTextPrompt = {"prompt": rendered["prompt"]}
    if "multi_modal_data" in rendered:
        prompt["multi_modal_data"] = rendered["multi_modal_data"]
    return prompt


def _text_length(message: Message) -> int:
    if isinstance(message.content, str):
        return len(message.content)
    return sum(len(part["text"]) for part in message.content if isinstance(part.get("text"), str))


def _turns(messages: Sequence[Message], args: ServeArgs) -> list[dict[str, Any]]:
    if sum(map(_text_length, messages)) > MAX_TEXT:
        raise TooLargeError(f"messages: more than {MAX_TEXT} characters of text", field="messages")
    turns, media = [], 0
    for i, message in enumerate(messages):
        turn: dict[str, Any] = {"role": message.role, "content": message.content}
        if message.name is not None:
            turn["name"] = message.name
        if not isinstance(message.content, str):
            where = f"messages.{i}.content"
            turn["content"] = [_part(part, f"{where}.{j}", args) for j, part in enumerate(message.content)]
            media += sum(part.get("type") != "text" for part in message.content)
        turns.append(turn)
    if media > MAX_MEDIA:
        raise RequestError(f"messages: {media} media; allowed are {MAX_MEDIA}", field="messages")
    return turns


def _part(part: Mapping[str, Any], field: str, args: ServeArgs) -> dict[str, Any]:
    """A part of a message in the one form that goes on: text, or a medium as a data URL that was checked."""
    kind = part.get("type")
    if kind == "text":
        if not isinstance(part.get("text"), str):
            raise RequestError(f"{field}.text: expected text", field=f"{field}.text")
        return {"type": "text", "text": part["text"]}
    if kind == "input_audio":
        inner = part.get("input_audio")
        if not isinstance(inner, Mapping) or not isinstance(inner.get("data"), str):
            raise RequestError(f"{field}.input_audio: expected data and format", field=f"{field}.input_audio")
        data = from_base64(inner["data"], f"{field}.input_audio.data", args.max_media_bytes)
        check_media(data, "audio", f"{field}.input_audio.data", args)
        return _as_url("audio_url", "audio", data)
    if kind not in _URLS:
        known = ", ".join(("text", "input_audio", *_URLS))
        raise RequestError(f"{field}.type={str(kind)[:40]!r}: known are {known}", field=f"{field}.type")
    inner = part.get(kind)
    url = inner.get("url") if isinstance(inner, Mapping) else inner
    return _as_url(kind, _URLS[kind], load_media(url, _URLS[kind], f"{field}.{kind}", args))


def _as_url(name: str, kind: Kind, data: bytes) -> dict[str, Any]:
    url = f"data:{_TYPES[kind]};base64,{base64.b64encode(data).decode()}"
    return {"type": name, name: {"url": url}}


def text_params(defaults: Mapping[str, Any], body: ChatCompletionRequest) -> Any:
    """The text stage's sampling parameters: the stage's own, what the request's list says, what its fields say.

    Raises:
        RequestError: a value is wrong.
    """
    given = {name: getattr(body, name) for name in (*TEXT_FIELDS, "seed") if getattr(body, name) is not None}
    limit = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
    if limit is not None:
        given["max_tokens"] = limit
    if body.top_logprobs is not None and not body.logprobs:
        raise RequestError("top_logprobs: needs logprobs=true", field="top_logprobs")
    if body.logprobs:
        given["logprobs"] = body.top_logprobs or 0
    structured = _structured(body)
    if structured is not None:
        given["structured_outputs"] = structured
    return sampling_params({**defaults, **given}, stream=body.stream)


_LISTED = frozenset({*TEXT_FIELDS, "max_tokens", "seed", "extra_args"})
"""What ``sampling_params_list`` may set: these and no other fields of vLLM's are for clients to decide."""


def check_listed(row: Mapping[str, Any], defaults: Mapping[str, Any], field: str) -> None:
    """Check an entry of ``sampling_params_list``. A wrong type must not reach an engine: it would end it.

    Raises:
        RequestError: an unknown name or a wrong type.
    """
    import msgspec
    from vllm.exceptions import VLLMClientError
    from vllm.sampling_params import SamplingParams

    for name in row:
        if name not in _LISTED:
            raise RequestError(f"{field}: {name}{nearest(name, _LISTED)}", field=field)
        if isinstance(row[name], int) and abs(row[name]) > (MAX_INT if name != "seed" else 2**63 - 1):
            raise RequestError(f"{field}: {name}: the number is too large", field=field)
    try:
        msgspec.convert(dict(row), SamplingParams)
    except (VLLMClientError, msgspec.ValidationError, TypeError, ValueError) as error:
        raise RequestError(f"{field}: {error}", field=field) from error
    known = defaults.get("extra_args") or {}
    for name, value in (row.get("extra_args") or {}).items():
        if name not in known:
            raise RequestError(f"{field}: extra_args: {name!r} is not read by the stage", field=field)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise RequestError(f"{field}: extra_args: {name}: expected a number", field=field)


def sampling_params(values: Mapping[str, Any], stream: bool, field: str = "sampling_params") -> Any:
    """vLLM's sampling parameters; text comes in pieces with ``stream``, else once.

    Raises:
        RequestError: a name or a value is wrong.
    """
    from vllm.exceptions import VLLMClientError
    from vllm.sampling_params import RequestOutputKind, SamplingParams

    kind = RequestOutputKind.DELTA if stream else RequestOutputKind.FINAL_ONLY
    try:
        return SamplingParams(**{**values, "output_kind": kind})
    except (VLLMClientError, TypeError, ValueError) as error:
        raise RequestError(f"{field}: {error}", field=field) from error


def _structured(body: ChatCompletionRequest) -> Any:
    from vllm.sampling_params import StructuredOutputsParams

    form = body.response_format
    if form is None or form.type == "text":
        return None
    if form.type == "json_object":
        return StructuredOutputsParams(json_object=True)
    if form.json_schema is None:
        raise RequestError("response_format.json_schema is missing", field="response_format.json_schema")
    return StructuredOutputsParams(json=json.dumps(form.json_schema.json_schema))
