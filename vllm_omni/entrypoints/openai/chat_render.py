"""What comes in with a chat, checked: messages, media and sampling parameters. Rendering them is vLLM's."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from typing import Any

from vllm_omni.config.schema import nearest
from vllm_omni.config.stage import StageConfig
from vllm_omni.entrypoints.openai.args import ServeArgs
from vllm_omni.entrypoints.openai.chat_protocol import MAX_INT, MAX_TEXT, Message
from vllm_omni.entrypoints.openai.media import Kind, check_media, from_base64, load_media
from vllm_omni.errors import RequestError, TooLargeError

_URLS: dict[str, Kind] = {"image_url": "image", "audio_url": "audio", "video_url": "video"}
_TYPES = {"image": "image/png", "audio": "audio/wav", "video": "video/mp4"}
MAX_MEDIA = 64
"""Media of one request."""


def checked_messages(messages: Sequence[Message], args: ServeArgs) -> list[dict[str, Any]]:
    """The messages as vLLM reads them; every medium is a data URL that was checked. Reads media: not in the event loop.

    Raises:
        RequestError: a message or a medium is wrong.
    """
    if sum(map(_text_length, messages)) > MAX_TEXT:
        raise TooLargeError(f"messages: more than {MAX_TEXT} characters of text", field="messages")
    turns, media = [], 0
    for i, message in enumerate(messages):
        turns.append(_turn(message, f"messages.{i}", args))
        if isinstance(message.content, list):
            media += sum(part.get("type") != "text" for part in message.content)
    if media > MAX_MEDIA:
        raise RequestError(f"messages: {media} media; allowed are {MAX_MEDIA}", field="messages")
    return turns


def _text_length(message: Message) -> int:
    called = sum(len(call.function.arguments) for call in message.tool_calls or ()) + len(message.reasoning or "")
    if not isinstance(message.content, list):
        return len(message.content or "") + called
    return called + sum(len(part["text"]) for part in message.content if isinstance(part.get("text"), str))


def _turn(message: Message, where: str, args: ServeArgs) -> dict[str, Any]:
    if message.audio is not None:
        raise RequestError(
            f"{where}.audio: sound of earlier answers is not kept; put its transcript into content",
            field=f"{where}.audio",
        )
    for name, role in (("tool_calls", "assistant"), ("reasoning", "assistant"), ("tool_call_id", "tool")):
        if getattr(message, name) is not None and message.role != role:
            raise RequestError(f"{where}.{name}: only for the role {role}", field=f"{where}.{name}")
    turn: dict[str, Any] = {"role": message.role, "content": message.content}
    for name in ("name", "tool_call_id", "reasoning"):
        if getattr(message, name) is not None:
            turn[name] = getattr(message, name)
    if message.tool_calls is not None:
        turn["tool_calls"] = [call.model_dump() for call in message.tool_calls]
    if message.content is None and not (message.tool_calls or message.refusal):
        raise RequestError(f"{where}.content is missing", field=f"{where}.content")
    if isinstance(message.content, list):
        field = f"{where}.content"
        turn["content"] = [_part(part, f"{field}.{j}", args) for j, part in enumerate(message.content)]
    elif message.content is None and message.refusal:
        turn["content"] = message.refusal
    return turn


def _part(part: Mapping[str, Any], field: str, args: ServeArgs) -> dict[str, Any]:
    """A part of a message in the one form that goes on: text, or a medium as a data URL that was checked."""
    kind = part.get("type")
    if kind in ("text", "refusal"):
        if not isinstance(part.get(kind), str):
            raise RequestError(f"{field}.{kind}: expected text", field=f"{field}.{kind}")
        return {"type": "text", "text": part[kind]}
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


# ---------------------------------------------------------------- sampling parameters


DEFAULTS = frozenset(
    {
        *("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "frequency_penalty", "presence_penalty"),
        *("max_tokens", "stop_token_ids"),
    }
)
"""Sampling parameters whose defaults vLLM's serving code takes apart from the request."""
_AS_GIVEN = frozenset({"stop", "min_tokens", "ignore_eos", "seed"})
_OF_REQUESTS = _AS_GIVEN | {
    *("include_stop_str_in_output", "skip_special_tokens", "spaces_between_special_tokens", "bad_words"),
    *("logit_bias", "allowed_token_ids"),
}
_LISTED = (DEFAULTS - {"stop_token_ids"}) | _AS_GIVEN | {"extra_args"}
"""What ``sampling_params_list`` may set: these and no other fields of vLLM's are for clients to decide."""
_OF_ONE_PASS = frozenset({"seed", "extra_args", "max_tokens", "temperature"})
"""The same of a stage that works in one pass and draws no tokens; ``params.check_read`` looks at the values."""


def merged(defaults: Mapping[str, Any], row: Mapping[str, Any]) -> dict[str, Any]:
    """A stage's own parameters with an entry of ``sampling_params_list`` over them."""
    values = {**defaults, **row}
    if row.get("extra_args"):
        values["extra_args"] = {**defaults.get("extra_args", {}), **row["extra_args"]}
    return values


def divided(values: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Parameters of the stage that reads the prompt: defaults of vLLM's serving code, fields of its requests, and what
    is set on the parameters that it makes."""
    defaults = {name: value for name, value in values.items() if name in DEFAULTS}
    fields = {name: value for name, value in values.items() if name in _OF_REQUESTS}
    rest = {name: value for name, value in values.items() if name not in DEFAULTS and name not in _OF_REQUESTS}
    return defaults, fields, rest


def check_listed(row: Mapping[str, Any], stage: StageConfig, field: str) -> None:
    """Check an entry of ``sampling_params_list``. A wrong type must not reach an engine: it would end it.

    Raises:
        RequestError: an unknown name or a wrong type.
    """
    import msgspec
    from vllm.exceptions import VLLMClientError
    from vllm.sampling_params import SamplingParams

    names = _OF_ONE_PASS if stage.stage_type == "generation" else _LISTED
    for name in row:
        if name not in names:
            raise RequestError(f"{field}: {name}{nearest(name, names)}", field=field)
        if isinstance(row[name], int) and abs(row[name]) > (MAX_INT if name != "seed" else 2**63 - 1):
            raise RequestError(f"{field}: {name}: the number is too large", field=field)
    try:
        msgspec.convert(dict(row), SamplingParams)
    except (VLLMClientError, msgspec.ValidationError, TypeError, ValueError) as error:
        raise RequestError(f"{field}: {error}", field=field) from error
    known = stage.default_sampling_params.get("extra_args") or {}
    for name, value in (row.get("extra_args") or {}).items():
        if name not in known:
            raise RequestError(f"{field}: extra_args: {name!r} is not read by the stage", field=field)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise RequestError(f"{field}: extra_args: {name}: expected a number", field=field)


def sampling_params(values: Mapping[str, Any], field: str) -> Any:
    """vLLM's sampling parameters of a later stage.

    Raises:
        RequestError: a name or a value is wrong.
    """
    from vllm.exceptions import VLLMClientError
    from vllm.sampling_params import RequestOutputKind, SamplingParams

    try:
        return SamplingParams(**{**values, "output_kind": RequestOutputKind.FINAL_ONLY})
    except (VLLMClientError, TypeError, ValueError) as error:
        raise RequestError(f"{field}: {error}", field=field) from error
