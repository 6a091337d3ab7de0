"""Chats with a model that makes pictures: the last user's turn is the prompt."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from fastapi import Request, Response

from vllm_omni.entrypoints.openai.args import ServeArgs
from vllm_omni.entrypoints.openai.chat_protocol import TEXT_ONLY_FIELDS, ChatCompletionRequest, Message
from vllm_omni.entrypoints.openai.choices import all_of, check_choices, side_by_side, total_usage
from vllm_omni.entrypoints.openai.edits import picture_of
from vllm_omni.entrypoints.openai.forms import MAX_FILES
from vllm_omni.entrypoints.openai.images import (
    encode_base64,
    has_pictures,
    parse_size,
    pictures,
    size_of,
    token_usage,
    with_progress,
)
from vllm_omni.entrypoints.openai.media import load_media
from vllm_omni.entrypoints.openai.request_ids import request_id
from vllm_omni.entrypoints.openai.service import Service
from vllm_omni.entrypoints.openai.streaming import DONE, sse, streamed, while_connected
from vllm_omni.errors import RequestError
from vllm_omni.inputs.data import OmniDiffusionSamplingParams, OmniSamplingParams, OmniTextPrompt
from vllm_omni.outputs import OmniRequestOutput

if TYPE_CHECKING:
    from PIL.Image import Image


def prompt_of(messages: Sequence[Message], args: ServeArgs, reads_pictures: bool) -> OmniTextPrompt:
    """The last turn, which must be a user's: its text, and its pictures. Reads media: not in the event loop.

    Raises:
        RequestError: another role, neither text nor a picture, or something that the model does not read.
    """
    last, where = messages[-1], f"messages.{len(messages) - 1}.content"
    if last.role != "user":
        raise RequestError("messages: the last one must be the user's", field="messages")
    parts = [{"type": "text", "text": last.content}] if isinstance(last.content, str) else last.content or []
    texts: list[str] = []
    images: list[Image] = []
    for place, part in enumerate(parts):
        if part.get("type") == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif part.get("type") == "image_url" and reads_pictures:
            images.append(_picture(part.get("image_url"), f"{where}.{place}.image_url", args))
        else:
            known = "text and pictures" if reads_pictures else "text"
            raise RequestError(f"messages: this model reads {known} alone", field="messages")
        if len(images) > MAX_FILES:
            raise RequestError(f"messages: allowed are {MAX_FILES} pictures", field="messages")
    prompt: OmniTextPrompt = {"prompt": "\n".join(texts)}
    if images:
        prompt["multi_modal_data"] = {"image": images[0] if len(images) == 1 else images}
    elif not prompt["prompt"]:
        raise RequestError("messages: the last one has no text", field="messages")
    return prompt


def _picture(inner: object, field: str, args: ServeArgs) -> Image:
    url = inner.get("url") if isinstance(inner, Mapping) else inner
    return picture_of(load_media(url, "image", field, args), field)


def picture_params(body: ChatCompletionRequest, limit: int) -> dict[str, Any]:
    """What a chat says of its pictures.

    Raises:
        RequestError: the size is wrong, or given twice.
    """
    names = ("num_inference_steps", "guidance_scale", "true_cfg_scale", "seed", "num_outputs_per_prompt")
    given = {name: getattr(body, name) for name in names if getattr(body, name) is not None}
    return {**given, **parse_size(size_of(body.size, body.width, body.height), limit)}


@dataclass(frozen=True)
class PictureChat:
    """A checked request: one run of the model for each of its ``n`` answers."""

    service: Service
    body: ChatCompletionRequest
    prompt: OmniTextPrompt
    runs: list[list[OmniSamplingParams]]
    """Parameters of the stages, for each answer."""
    head: dict[str, Any]
    """What answer and chunks have in common."""


async def chat_with_pictures(service: Service, body: ChatCompletionRequest, request: Request) -> Response:
    """Answer with pictures, as data URLs in the content."""
    chat = await service.aside(_checked, service, body)
    if body.stream:
        return await streamed(request, _chunks(chat))
    made = await while_connected(request.receive, _made(chat))
    return Response(await service.aside(_answer, chat, made), media_type="application/json")


def _checked(service: Service, body: ChatCompletionRequest) -> PictureChat:
    for name in TEXT_ONLY_FIELDS:
        value = getattr(body, name)
        if value is not None and value is not False:
            raise RequestError(f"{name}: {service.name} makes pictures and does not read it", field=name)
    for kind in body.modalities or ():
        service.check_makes(kind, "modalities")
    check_choices(body.n or 1, service.args.max_queue)
    params = service.params(picture_params(body, service.args.max_generated_image_size))
    prompt = prompt_of(body.messages, service.args, "image" in service.reads)
    if body.negative_prompt is not None:
        prompt["negative_prompt"] = body.negative_prompt
    runs = [_numbered(service, params, number) for number in range(body.n or 1)]
    head = {"id": f"chatcmpl-{request_id(body.request_id)}", "created": int(time.time()), "model": service.name}
    return PictureChat(service, body, prompt, runs, head)


def _numbered(service: Service, params: Sequence[OmniSamplingParams], number: int) -> list[OmniSamplingParams]:
    """The parameters of one answer: every seed, also one that the server was started with, grows by its number."""
    out = list(params)
    for i, (stage, one) in enumerate(zip(service.omni.pipeline.stages, params, strict=True)):
        seed = one.seed if one.seed is not None else stage.engine_args.get("default_seed")
        if number and seed is not None and isinstance(one, OmniDiffusionSamplingParams):
            out[i] = replace(one, seed=seed + number)
            out[i].validate()
    return out


async def _made(chat: PictureChat) -> list[list[OmniRequestOutput]]:
    with chat.service.admitted(len(chat.runs)):
        return await all_of([_outputs(chat, params) for params in chat.runs])


async def _outputs(chat: PictureChat, params: Sequence[OmniSamplingParams]) -> list[OmniRequestOutput]:
    async with aclosing(chat.service.stream(chat.prompt, params, ["image"])) as outputs:
        return [output async for output in outputs]


def _parts(outputs: Sequence[OmniRequestOutput]) -> list[dict[str, Any]]:
    urls = [f"data:image/png;base64,{encode_base64(image)}" for image in pictures(outputs)]
    return [{"type": "image_url", "image_url": {"url": url}} for url in urls]


def _usage(chat: PictureChat, metrics: Mapping[str, Any]) -> dict[str, Any] | None:
    """The tokens of one answer; None when the pipeline does not tell them."""
    used = token_usage(metrics, has_pictures(chat.prompt))
    if used is None:
        return None
    return {
        "prompt_tokens": used["input_tokens"],
        "completion_tokens": used["output_tokens"],
        "total_tokens": used["total_tokens"],
    }


def _answer(chat: PictureChat, made: Sequence[Sequence[OmniRequestOutput]]) -> bytes:
    choices = []
    for index, outputs in enumerate(made):
        message = {"role": "assistant", "content": _parts(outputs), "refusal": None}
        choices.append({"index": index, "message": message, "finish_reason": "stop", "logprobs": None})
    usage = total_usage([_usage(chat, outputs[-1].metrics) for outputs in made])
    answer: dict[str, Any] = {**chat.head, "object": "chat.completion", "choices": choices, "usage": usage}
    if chat.body.return_stage_metrics:
        for choice, outputs in zip([answer] if len(made) == 1 else choices, made, strict=True):
            choice["metrics"] = outputs[-1].metrics
    return json.dumps(answer, default=str).encode()


async def _chunks(chat: PictureChat) -> AsyncGenerator[bytes, None]:
    head = {**chat.head, "object": "chat.completion.chunk"}
    metrics: dict[int, dict[str, Any]] = {}
    begun: set[int] = set()

    def chunk(index: int, delta: dict[str, Any], finish: str | None = None, **more: Any) -> bytes:
        if index not in begun:
            delta = {"role": "assistant", **delta}
            begun.add(index)
        return sse({**head, "choices": [{"index": index, "delta": delta, "finish_reason": finish}], **more})

    with chat.service.admitted(len(chat.runs)):
        runs = [with_progress(chat.service, chat.prompt, params) for params in chat.runs]
        async with aclosing(side_by_side(runs)) as events:
            async for index, event in events:
                if isinstance(event, tuple):
                    stage_id, step, total = event
                    yield chunk(index, {}, progress={"stage_id": stage_id, "step": step, "total": total})
                elif isinstance(event, OmniRequestOutput):
                    metrics[index] = event.metrics
                    yield chunk(index, {"content": await chat.service.aside(_parts, [event])})
    for index in range(len(chat.runs)):
        # a custom pipeline's metrics may be anything
        told = json.loads(json.dumps(metrics.get(index, {}), default=str))
        yield chunk(index, {}, "stop", **({"metrics": told} if chat.body.return_stage_metrics else {}))
    if chat.body.stream_options is not None and chat.body.stream_options.include_usage:
        usage = total_usage([_usage(chat, metrics.get(index, {})) for index in range(len(chat.runs))])
        yield sse({**head, "choices": [], "usage": usage})
    yield DONE
