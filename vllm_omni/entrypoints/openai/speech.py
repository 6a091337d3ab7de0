"""``/v1/audio/speech`` and ``/v1/audio/voices``.

A model that answers in speech is asked to read the text aloud. It is no text-to-speech model: what it says is what it
makes of that.
"""

from __future__ import annotations

import base64
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any, Literal

from fastapi import APIRouter, Request, Response
from pydantic import AliasChoices, BaseModel, ConfigDict, Field

from vllm_omni.entrypoints.openai.body_route import BodyRoute
from vllm_omni.entrypoints.openai.chat import Chat, begin
from vllm_omni.entrypoints.openai.chat_protocol import MAX_INT, ChatCompletionRequest
from vllm_omni.entrypoints.openai.health import service_of
from vllm_omni.entrypoints.openai.images import Seed
from vllm_omni.entrypoints.openai.request_ids import request_id
from vllm_omni.entrypoints.openai.service import Service
from vllm_omni.entrypoints.openai.sound import CONTENT_TYPES, encode_sound, pcm16, samples_of, wav_head
from vllm_omni.entrypoints.openai.streaming import sse, streamed, while_connected
from vllm_omni.entrypoints.openai.voices import pick_voice
from vllm_omni.entrypoints.results import join
from vllm_omni.errors import RequestError
from vllm_omni.outputs import OmniRequestOutput

router = APIRouter(route_class=BodyRoute)
MAX_INPUT = 4096
INSTRUCTIONS = "Read the following text aloud, word for word, and say nothing else."


class SpeechRequest(BaseModel):
    """Body of a request for speech."""

    model_config = ConfigDict(extra="forbid", strict=True, populate_by_name=True)

    input: str = Field(min_length=1, max_length=MAX_INPUT)
    model: str | None = None
    voice: str | None = Field(None, max_length=256, validation_alias=AliasChoices("voice", "speaker"))
    instructions: str | None = Field(None, max_length=MAX_INPUT, description="Replaces the wish to read the text.")
    response_format: Literal["wav", "pcm", "flac", "mp3", "opus"] = "wav"
    speed: float = Field(1, description="The model decides how fast it speaks; only 1 is possible.")
    stream: bool = Field(False, description="Send the sound as it is made (wav and pcm).")
    stream_format: Literal["audio", "sse"] | None = Field(None, description="As stream=true; sse: as events.")
    max_new_tokens: int | None = Field(
        None, ge=1, le=MAX_INT, description="Length of the text that is spoken, in tokens."
    )
    seed: Seed | None = None
    return_stage_metrics: bool = Field(False, description="Add times by stage to the last event (stream_format sse).")


@router.get("/v1/audio/voices")
async def voices(request: Request) -> dict[str, Any]:
    """The voices that requests may name."""
    service = service_of(request)
    service.check_makes("audio")
    return {"voices": service.voices, "uploaded_voices": []}


@router.post("/v1/audio/speech")
async def speech(body: SpeechRequest, request: Request) -> Response:
    """Speak a text."""
    service = service_of(request)
    service.check_model(body.model)
    service.check_makes("audio")
    if body.speed != 1:
        raise RequestError(f"speed={body.speed:g}: only 1 is possible; {service.name} decides itself", field="speed")
    streams = body.stream or body.stream_format is not None
    if streams and body.response_format not in ("wav", "pcm"):
        raise RequestError("response_format: a stream's is wav or pcm", field="response_format")
    if body.return_stage_metrics and body.stream_format != "sse":
        raise RequestError('return_stage_metrics: needs stream_format="sse"', field="return_stage_metrics")
    voice = pick_voice(body.voice, service.voices, "voice")
    run = await _prepared(service, body, voice)
    if streams:
        as_events = body.stream_format == "sse"
        kind = "text/event-stream" if as_events else CONTENT_TYPES[body.response_format]
        pieces = _events(service, body, run) if as_events else _sound(service, body, run, {})
        return await streamed(request, pieces, kind, *(() if as_events else (None,)))
    outputs = await while_connected(request.receive, service.collect(*run))
    data = await service.aside(_whole, outputs, body.response_format)
    return Response(data, media_type=CONTENT_TYPES[body.response_format])


async def _prepared(service: Service, body: SpeechRequest, voice: str | None) -> tuple[Any, Any, list[str]]:
    """Prompt, parameters and modalities."""
    text = f"{body.instructions or INSTRUCTIONS}\n\n{body.input}"
    turn = {"role": "user", "content": text}
    chat = ChatCompletionRequest.model_validate(
        {"messages": [turn], "seed": body.seed, "max_tokens": body.max_new_tokens, "stream": True}
    )
    begun, _ = await begin(Chat(service, chat, request_id(), voice))
    prompt, params = begun.made
    return prompt, params, ["audio"]


def _silent() -> RequestError:
    """The answer was over before there was a word to speak."""
    return RequestError("the model had nothing to say to this input", field="input", code="no_speech")


def _whole(outputs: list[OmniRequestOutput], form: str) -> bytes:
    spoken = [output for output in join(outputs) if output.multimodal_output]
    if not spoken:
        raise _silent()
    samples, rate = samples_of(spoken[0].multimodal_output)
    return encode_sound(samples, rate, form)


async def _sound(
    service: Service, body: SpeechRequest, run: tuple[Any, Any, list[str]], metrics: dict[str, Any]
) -> AsyncGenerator[bytes, None]:
    """The file, piece by piece; a wav's head says no length. ``metrics`` gets the times of the stages."""
    begun = False
    with service.admitted():
        async with aclosing(service.stream(*run)) as outputs:
            async for output in outputs:
                metrics.update(output.metrics)
                if "audio" not in output.multimodal_output:
                    continue
                samples, rate = samples_of(output.multimodal_output)
                head = wav_head(rate) if body.response_format == "wav" and not begun else b""
                begun = True
                yield head + pcm16(samples)
    if not begun:
        raise _silent()


async def _events(
    service: Service, body: SpeechRequest, run: tuple[Any, Any, list[str]]
) -> AsyncGenerator[bytes, None]:
    """The same pieces as events."""
    count = 0
    metrics: dict[str, Any] = {}
    async with aclosing(_sound(service, body, run, metrics)) as pieces:
        async for piece in pieces:
            count += len(piece)
            yield sse({"type": "speech.audio.delta", "audio": base64.b64encode(piece).decode()}, "speech.audio.delta")
    read = len(run[0]["engine_input"]["prompt_token_ids"])
    usage = {"input_tokens": read, "output_tokens": None, "total_tokens": None}  # sound is not counted in tokens
    done = {"type": "speech.audio.done", "bytes": count, "usage": usage}
    yield sse({**done, "metrics": metrics} if body.return_stage_metrics else done, "speech.audio.done")
