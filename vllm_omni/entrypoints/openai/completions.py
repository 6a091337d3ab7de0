"""``/v1/completions``, ``/tokenize`` and ``/detokenize``: vLLM's, for models that make text."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Annotated, Any

from fastapi import APIRouter, Request, Response
from pydantic import Field

from vllm_omni.entrypoints.openai.chat import plain, stage_params
from vllm_omni.entrypoints.openai.chat_protocol import (
    MAX_LIST,
    MAX_TEXT,
    Body,
    Count,
    Message,
    SamplingBody,
    Tool,
    vllm_fields,
)
from vllm_omni.entrypoints.openai.chat_render import checked_messages
from vllm_omni.entrypoints.openai.health import service_of
from vllm_omni.entrypoints.openai.request_ids import request_id
from vllm_omni.entrypoints.openai.service import Service
from vllm_omni.entrypoints.openai.streaming import streamed, while_connected
from vllm_omni.errors import NotFoundError, RequestError

router = APIRouter()
MAX_PROMPTS = 64
MAX_TOKENS = 131_072
Text = Annotated[str, Field(max_length=MAX_TEXT)]
Tokens = Annotated[list[Count], Field(min_length=1, max_length=MAX_TOKENS)]


class CompletionRequest(SamplingBody):
    """Text that goes on from a prompt, or from several."""

    prompt: (
        Text
        | Tokens
        | Annotated[list[Text], Field(min_length=1, max_length=MAX_PROMPTS)]
        | Annotated[list[Tokens], Field(min_length=1, max_length=MAX_PROMPTS)]
    )
    suffix: Text | None = None
    logprobs: int | None = Field(None, ge=0, le=20)


class TokenizeRequest(Body):
    """A text or a chat to be tokenised; one of them."""

    model: str | None = None
    prompt: Text | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=4096)] | None = None
    tools: Annotated[list[Tool], Field(min_length=1, max_length=MAX_LIST)] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(Body):
    """Tokens to be made text."""

    model: str | None = None
    tokens: Annotated[list[Count], Field(max_length=MAX_TOKENS)]


def _check(service: Service, model: str | None) -> None:
    """Raises ``RequestError`` when the model is another one, or makes no text."""
    service.check_model(model)
    service.check_makes("text")
    if service.text is None:
        raise NotFoundError(f"{service.name} has no tokenizer here", field="model", code="not_supported")


@router.post("/v1/completions")
async def completions(body: CompletionRequest, request: Request) -> Response:
    """Go on with a text."""
    service = service_of(request)
    _check(service, body.model)
    if body.stream_options is not None and not body.stream:
        raise RequestError("stream_options: needs stream=true", field="stream_options")
    if body.stream:
        return await streamed(request, _streamed(service, body))
    answer = await while_connected(request.receive, _whole(service, body))
    return Response(answer, media_type="application/json")


async def _begin(service: Service, body: CompletionRequest) -> tuple[Any, Any]:
    """The turn, and vLLM's answer or its stream."""
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest as Plain

    from vllm_omni.entrypoints.openai.text import Turn, checked, typed_errors

    assert service.text is not None
    defaults, fields, rest, stages = stage_params(service, None)
    given = body.model_fields_set
    turn = Turn(service, stages, service.reader, rest, ["text"], None, "prompt", given)
    with typed_errors("prompt", given):
        values = {"max_tokens": defaults.get("max_tokens", 16), **fields}
        plain_request = Plain(
            **{**values, **vllm_fields(body), "request_id": request_id(body.request_id)},
            model=service.adapter(body.model),
        )
        serving = service.text.completion(turn, defaults)
        return turn, checked(await serving.create_completion(plain_request, None), "prompt", given)


async def _whole(service: Service, body: CompletionRequest) -> bytes:
    with service.admitted():
        turn, response = await _begin(service, body)
        if turn.cancelled:
            raise asyncio.CancelledError
        answer: bytes = await service.aside(_dumped, response)
        return answer


def _dumped(response: Any) -> bytes:
    answer = response.model_dump(exclude_none=True)
    for choice in answer["choices"]:
        choice.setdefault("logprobs", None)
    return json.dumps(answer).encode()


async def _streamed(service: Service, body: CompletionRequest) -> AsyncGenerator[bytes, None]:
    with service.admitted():
        turn, pieces = await _begin(service, body)
        try:
            async with aclosing(plain(turn, pieces)) as events:
                async for event in events:
                    yield event
        finally:
            await turn.aclose()


@router.post("/tokenize")
async def tokenize(body: TokenizeRequest, request: Request) -> Response:
    """The tokens of a text, or of a chat as the model reads it."""
    from vllm.entrypoints.serve.tokenize.protocol import TokenizeChatRequest, TokenizeCompletionRequest

    from vllm_omni.entrypoints.openai.text import checked, typed_errors

    service = service_of(request)
    _check(service, body.model)
    if (body.prompt is None) == (body.messages is None):
        raise RequestError("prompt: give this or messages, not both", field="prompt")
    values = vllm_fields(body)
    kind = TokenizeCompletionRequest if body.messages is None else TokenizeChatRequest
    for name in values:
        if name not in kind.model_fields:
            raise RequestError(f"{name}: not for {'a prompt' if body.messages is None else 'a chat'}", field=name)
    if body.messages is not None:
        values["messages"] = await service.aside(checked_messages, body.messages, service.args)
    field = "prompt" if body.messages is None else "messages"
    assert service.text is not None
    with typed_errors(field, body.model_fields_set):
        answer = checked(await service.text.tokenization.create_tokenize(kind(**values), None), field)
    return Response(answer.model_dump_json(exclude_none=True), media_type="application/json")


@router.post("/detokenize")
async def detokenize(body: DetokenizeRequest, request: Request) -> Response:
    """The text of tokens."""
    from vllm.entrypoints.serve.tokenize.protocol import DetokenizeRequest as Plain

    from vllm_omni.entrypoints.openai.text import checked, typed_errors

    service = service_of(request)
    _check(service, body.model)
    assert service.text is not None
    with typed_errors("tokens"):
        service.text.engine.renderer.validate_token_ids(body.tokens, parameter="tokens")
        answer = checked(await service.text.tokenization.create_detokenize(Plain(tokens=body.tokens), None), "tokens")
    return Response(answer.model_dump_json(), media_type="application/json")
