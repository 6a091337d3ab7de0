"""Chats with a model that makes pictures: the last user's turn is the prompt."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

from fastapi import Request, Response

from vllm_omni.entrypoints.openai.chat_protocol import TEXT_ONLY_FIELDS, ChatCompletionRequest, Message
from vllm_omni.entrypoints.openai.images import encode_base64, parse_size, pictures, with_progress
from vllm_omni.entrypoints.openai.request_ids import request_id
from vllm_omni.entrypoints.openai.service import Service
from vllm_omni.entrypoints.openai.streaming import DONE, sse, streamed, while_connected
from vllm_omni.errors import RequestError
from vllm_omni.inputs.data import OmniTextPrompt
from vllm_omni.outputs import OmniRequestOutput


def prompt_of(messages: Sequence[Message]) -> str:
    """The text of the last turn, which must be a user's.

    Raises:
        RequestError: another role, no text, or something else than text.
    """
    last = messages[-1]
    if last.role != "user":
        raise RequestError("messages: the last one must be the user's", field="messages")
    if isinstance(last.content, str):
        texts = [last.content]
    else:
        for part in last.content or ():
            if part.get("type") != "text" or not isinstance(part.get("text"), str):
                raise RequestError("messages: this model reads text alone", field="messages")
        texts = [part["text"] for part in last.content or ()]
    text = "\n".join(texts)
    if not text.strip():
        raise RequestError("messages: the last one has no text", field="messages")
    return text


def picture_params(body: ChatCompletionRequest, limit: int) -> dict[str, Any]:
    """What a chat says of its pictures.

    Raises:
        RequestError: the size is wrong, or given twice.
    """
    names = ("num_inference_steps", "guidance_scale", "true_cfg_scale", "seed", "num_outputs_per_prompt")
    given = {name: getattr(body, name) for name in names if getattr(body, name) is not None}
    sides = {name: getattr(body, name) for name in ("width", "height") if getattr(body, name) is not None}
    if sides and body.size is not None:
        raise RequestError("size: given beside width or height", field="size")
    if len(sides) == 1:
        raise RequestError("width and height belong together", field=next(iter(sides)))
    size = f"{sides['width']}x{sides['height']}" if sides else body.size
    return {**given, **parse_size(size, limit)}


async def chat_with_pictures(service: Service, body: ChatCompletionRequest, request: Request) -> Response:
    """Answer with pictures, as data URLs in the content."""
    for name in TEXT_ONLY_FIELDS:
        value = getattr(body, name)
        if value is not None and value is not False and (name, value) != ("n", 1):
            raise RequestError(f"{name}: {service.name} makes pictures and does not read it", field=name)
    for kind in body.modalities or ():
        service.check_makes(kind, "modalities")
    params = service.params(picture_params(body, service.args.max_generated_image_size))
    text = prompt_of(body.messages)
    prompt: str | OmniTextPrompt = text
    if body.negative_prompt is not None:
        prompt = {"prompt": text, "negative_prompt": body.negative_prompt}
    if body.stream:
        return await streamed(request, _chunks(service, body, prompt, params))
    outputs = await while_connected(request.receive, service.collect(prompt, params, ["image"]))
    data = await service.aside(_answer, service.name, outputs, body.return_stage_metrics)
    return Response(data, media_type="application/json")


def _parts(outputs: Sequence[OmniRequestOutput]) -> list[dict[str, Any]]:
    urls = [f"data:image/png;base64,{encode_base64(image)}" for image in pictures(outputs)]
    return [{"type": "image_url", "image_url": {"url": url}} for url in urls]


def _answer(model: str, outputs: Sequence[OmniRequestOutput], with_metrics: bool) -> bytes:
    message = {"role": "assistant", "content": _parts(outputs), "refusal": None}
    answer = {
        "id": f"chatcmpl-{request_id()}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": model,
        "choices": [{"index": 0, "message": message, "finish_reason": "stop", "logprobs": None}],
        "usage": {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0},
    }
    if with_metrics:
        answer["metrics"] = outputs[-1].metrics
    return json.dumps(answer, default=str).encode()


async def _chunks(
    service: Service, body: ChatCompletionRequest, prompt: str | OmniTextPrompt, params: Sequence[Any]
) -> AsyncGenerator[bytes, None]:
    head = {"id": f"chatcmpl-{request_id()}", "object": "chat.completion.chunk", "created": int(time.time())}

    def chunk(delta: dict[str, Any], finish: str | None = None, **more: Any) -> bytes:
        choice = {"index": 0, "delta": delta, "finish_reason": finish}
        return sse({**head, "model": service.name, "choices": [choice], **more})

    metrics: dict[str, Any] = {}
    with service.admitted():
        role: dict[str, Any] = {"role": "assistant"}
        async with aclosing(with_progress(service, prompt, params)) as events:
            async for event in events:
                if isinstance(event, tuple):
                    stage_id, step, total = event
                    yield chunk(role, progress={"stage_id": stage_id, "step": step, "total": total})
                elif isinstance(event, OmniRequestOutput):
                    metrics = json.loads(json.dumps(event.metrics, default=str))  # a custom pipeline's may be anything
                    yield chunk({**role, "content": await service.aside(_parts, [event])})
                role = {}
    yield chunk({}, "stop", **({"metrics": metrics} if body.return_stage_metrics else {}))
    if body.stream_options is not None and body.stream_options.include_usage:
        usage = {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}
        yield sse({**head, "model": service.name, "choices": [], "usage": usage})
    yield DONE
