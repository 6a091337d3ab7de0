"""``/v1/chat/completions``."""

from __future__ import annotations

import base64
import json
import time
import uuid
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from fastapi import APIRouter, Request, Response

from vllm_omni.config.stage import StageConfig
from vllm_omni.entrypoints.openai.chat_pictures import chat_with_pictures
from vllm_omni.entrypoints.openai.chat_protocol import PICTURE_FIELDS, ChatCompletionRequest
from vllm_omni.entrypoints.openai.chat_render import check_listed, render, sampling_params, text_params
from vllm_omni.entrypoints.openai.health import service_of
from vllm_omni.entrypoints.openai.service import Service
from vllm_omni.entrypoints.openai.sound import encode_sound, pcm16, samples_of
from vllm_omni.entrypoints.openai.streaming import DONE, sse, streamed, while_connected
from vllm_omni.entrypoints.openai.voices import pick_voice
from vllm_omni.entrypoints.results import join
from vllm_omni.errors import RequestError
from vllm_omni.inputs.data import OmniDiffusionSamplingParams, OmniSamplingParams, OmniTextPrompt
from vllm_omni.outputs import OmniRequestOutput

router = APIRouter()
AUDIO_LIFE_S = 3600


@dataclass
class Chat:
    """One request to a model that makes text."""

    service: Service
    body: ChatCompletionRequest
    prompt: OmniTextPrompt
    params: list[OmniSamplingParams]
    id: str = field(default_factory=lambda: f"chatcmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def speaks(self) -> bool:
        """Whether the answer is spoken."""
        return self.body.modalities is not None and "audio" in self.body.modalities

    @property
    def modalities(self) -> list[str]:
        """What stages have to make; the text is an answer's transcript, too."""
        return ["text", "audio"] if self.speaks else ["text"]

    def head(self, kind: str) -> dict[str, Any]:
        """What every answer and chunk begins with."""
        return {"id": self.id, "object": kind, "created": self.created, "model": self.service.name}

    def times(self, metrics: Mapping[str, Any]) -> dict[str, Any]:
        """The times of the stages, for a request that asks for them."""
        return {"metrics": metrics} if self.body.return_stage_metrics else {}


@router.post("/v1/chat/completions")
async def completions(body: ChatCompletionRequest, request: Request) -> Response:
    """Answer a chat: with text, with speech, or with pictures, as the model makes them."""
    service = service_of(request)
    service.check_model(body.model)
    if body.stream_options is not None and not body.stream:
        raise RequestError("stream_options: needs stream=true", field="stream_options")
    if service.omni.renderer is None:
        return await chat_with_pictures(service, body, request)
    chat = await _checked(service, body)
    if body.stream:
        return await streamed(request, _chunks(chat), service.args.send_timeout)
    outputs = await while_connected(request.receive, service.collect(chat.prompt, chat.params, chat.modalities))
    return Response(await service.aside(_answer, chat, outputs), media_type="application/json")


async def _checked(service: Service, body: ChatCompletionRequest) -> Chat:
    """Raises ``RequestError`` for what the model does not make or read."""
    for name in PICTURE_FIELDS:
        if getattr(body, name) is not None:
            raise RequestError(f"{name}: {service.name} makes no pictures and does not read it", field=name)
    for kind in body.modalities or ():
        service.check_makes(kind, "modalities")
    chat = Chat(service, body, {"prompt": ""}, params_of(service, body))
    voice = None
    if body.audio is not None:
        if not chat.speaks:
            raise RequestError('audio: needs "audio" in modalities', field="audio")
        if body.stream and body.audio.format != "pcm16":
            raise RequestError("audio.format: a stream's is pcm16", field="audio.format")
        voice = pick_voice(body.audio.voice, service.voices, "audio.voice")
    elif chat.speaks and body.stream:
        raise RequestError("audio.format: is missing; a stream's is pcm16", field="audio.format")
    chat.prompt = await service.aside(render, service.omni.renderer, body.messages, service.args)
    if voice is not None:
        chat.prompt["additional_information"] = {"speaker": voice}
    return chat


def params_of(service: Service, body: ChatCompletionRequest) -> list[OmniSamplingParams]:
    """Each stage's parameters: its own, with those of ``sampling_params_list`` over them; the first stage's with the
    request's fields over that."""
    stages = service.omni.pipeline.stages
    rows: Sequence[Mapping[str, Any]] = body.sampling_params_list or [{}] * len(stages)
    if len(rows) != len(stages):
        raise RequestError(
            f"sampling_params_list has {len(rows)} entries; there are {len(stages)} stages",
            field="sampling_params_list",
        )
    out: list[OmniSamplingParams] = []
    for i, (stage, row) in enumerate(zip(stages, rows, strict=True)):
        out.append(_stage_params(i, stage, row, body))
    return out


def _stage_params(
    i: int, stage: StageConfig, row: Mapping[str, Any], body: ChatCompletionRequest
) -> OmniSamplingParams:
    where, defaults = f"sampling_params_list.{i}", stage.default_sampling_params
    if stage.stage_type == "diffusion":
        if row:
            raise RequestError(f"{where}: stage {stage.stage_id} makes pictures and takes none here", field=where)
        return OmniDiffusionSamplingParams.from_kwargs(defaults)
    check_listed(row, defaults, where)
    values = {**defaults, **row}
    if row.get("extra_args"):
        values["extra_args"] = {**defaults.get("extra_args", {}), **row["extra_args"]}
    params: OmniSamplingParams = (
        text_params(values, body) if i == 0 else sampling_params(values, stream=False, field=where)
    )
    return params


# ---------------------------------------------------------------- whole answers


def _answer(chat: Chat, outputs: Sequence[OmniRequestOutput]) -> bytes:
    whole = join(outputs)
    text = next(output for output in whole if output.final_output_type == "text")
    made = text.outputs[0]
    message: dict[str, Any] = {"role": "assistant", "content": made.text, "refusal": None}
    spoken = [output for output in whole if output.final_output_type == "audio" and output.multimodal_output]
    if chat.speaks:
        message |= {"content": None, "audio": _speech(chat, spoken, made.text)}
    choice = {
        "index": 0,
        "message": message,
        "finish_reason": made.finish_reason or "stop",
        "logprobs": _logprobs(chat, made),
    }
    usage = _usage(len(text.prompt_token_ids or ()), len(made.token_ids))
    answer = {**chat.head("chat.completion"), "choices": [choice], "usage": usage, **chat.times(outputs[-1].metrics)}
    return json.dumps(answer).encode()


def _speech(chat: Chat, outputs: Sequence[OmniRequestOutput], text: str) -> dict[str, Any]:
    """``message.audio``; an answer without a word has no sound."""
    form = chat.body.audio.format if chat.body.audio is not None else "wav"
    data = b""
    if outputs:
        samples, rate = samples_of(outputs[0].multimodal_output)
        data = encode_sound(samples, rate, form)
    return {
        "id": _audio_id(chat),
        "data": base64.b64encode(data).decode(),
        "expires_at": chat.created + AUDIO_LIFE_S,
        "transcript": text,
    }


def _audio_id(chat: Chat) -> str:
    return "audio_" + chat.id.removeprefix("chatcmpl-")


def _usage(prompt: int, completion: int) -> dict[str, int]:
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def _logprobs(chat: Chat, made: Any) -> dict[str, Any] | None:
    """OpenAI's form of the log probabilities of the tokens in ``made``."""
    if not chat.body.logprobs or not made.logprobs:
        return None
    rows = []
    for token_id, among in zip(made.token_ids, made.logprobs, strict=False):
        best = sorted(among.values(), key=lambda entry: entry.rank or 0)[: chat.body.top_logprobs or 0]
        rows.append({**_logprob(among[token_id]), "top_logprobs": [_logprob(entry) for entry in best]})
    return {"content": rows, "refusal": None}


def _logprob(entry: Any) -> dict[str, Any]:
    token = entry.decoded_token or ""
    return {"token": token, "logprob": max(entry.logprob, -9999.0), "bytes": list(token.encode("utf-8", "replace"))}


# ---------------------------------------------------------------- streams


async def _chunks(chat: Chat) -> AsyncGenerator[bytes, None]:
    """Text and sound as they are made."""
    finish, prompt, completion = "stop", 0, 0
    metrics: Mapping[str, Any] = {}

    def chunk(delta: Mapping[str, Any], finish: str | None = None, logprobs: Any = None, **more: Any) -> bytes:
        choice = {"index": 0, "delta": delta, "finish_reason": finish, "logprobs": logprobs}
        return sse({**chat.head("chat.completion.chunk"), "choices": [choice], **more})

    with chat.service.admitted():
        async with aclosing(chat.service.stream(chat.prompt, chat.params, chat.modalities)) as outputs:
            begun = False
            async for output in outputs:
                metrics = output.metrics
                if not begun:
                    yield chunk({"role": "assistant", "content": "" if not chat.speaks else None})
                    begun = True
                if output.final_output_type == "text" and output.outputs:
                    made = output.outputs[0]
                    prompt, completion = len(output.prompt_token_ids or ()) or prompt, completion + len(made.token_ids)
                    finish = made.finish_reason or finish
                    if made.text or made.logprobs:
                        yield chunk(_text_delta(chat, made.text), logprobs=_logprobs(chat, made))
                elif "audio" in output.multimodal_output:
                    data = base64.b64encode(pcm16(samples_of(output.multimodal_output)[0])).decode()
                    yield chunk({"audio": {"id": _audio_id(chat), "data": data}})
    if chat.speaks:
        yield chunk({"audio": {"id": _audio_id(chat), "expires_at": chat.created + AUDIO_LIFE_S}})
    yield chunk({}, finish, **chat.times(metrics))
    if chat.body.stream_options is not None and chat.body.stream_options.include_usage:
        yield sse({**chat.head("chat.completion.chunk"), "choices": [], "usage": _usage(prompt, completion)})
    yield DONE


def _text_delta(chat: Chat, text: str) -> dict[str, Any]:
    return {"audio": {"id": _audio_id(chat), "transcript": text}} if chat.speaks else {"content": text}
