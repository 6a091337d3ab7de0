"""``/v1/chat/completions``: vLLM's chats, with what other stages make in the answers."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request, Response

from vllm_omni.config.stage import StageConfig
from vllm_omni.entrypoints.openai.body_route import BodyRoute
from vllm_omni.entrypoints.openai.chat_pictures import chat_with_pictures, picture_params
from vllm_omni.entrypoints.openai.chat_protocol import PICTURE_FIELDS, ChatCompletionRequest, vllm_fields
from vllm_omni.entrypoints.openai.chat_render import check_listed, checked_messages, divided, merged, sampling_params
from vllm_omni.entrypoints.openai.chat_shapes import OpenAIShape, UpstreamShape
from vllm_omni.entrypoints.openai.choices import all_of, check_choices, side_by_side, total_usage
from vllm_omni.entrypoints.openai.health import service_of
from vllm_omni.entrypoints.openai.request_ids import request_id
from vllm_omni.entrypoints.openai.service import Service
from vllm_omni.entrypoints.openai.streaming import DONE, sse, streamed, while_connected
from vllm_omni.entrypoints.openai.voices import pick_voice
from vllm_omni.entrypoints.results import join
from vllm_omni.errors import RequestError, StageError
from vllm_omni.inputs.data import OmniDiffusionSamplingParams, OmniSamplingParams
from vllm_omni.outputs import OmniRequestOutput

if TYPE_CHECKING:
    from vllm_omni.entrypoints.openai.text import Turn

router = APIRouter(route_class=BodyRoute)
_ERROR = 'data: {"error"'
_DONE = DONE.decode()


@dataclass
class Chat:
    """One request to a model that makes text."""

    service: Service
    body: ChatCompletionRequest
    request_id: str
    voice: str | None
    media: list[OmniRequestOutput] = field(default_factory=list)
    """What other stages made, of an answer that is not streamed."""
    number: int | None = None
    """Place of the answer among several that are requests of their own."""
    turns: list[dict[str, Any]] | None = None
    """The messages, once they are checked and their media read."""
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def modalities(self) -> list[str]:
        """What stages have to make; the text is an answer's transcript, too."""
        wanted = self.body.modalities or ["text"]
        return ["text", *(kind for kind in wanted if kind != "text")]

    @property
    def requests(self) -> int:
        """Requests to the model that the answers take: of text alone the engine makes several of one."""
        return (self.body.n or 1) if set(self.modalities) - {"text"} else 1

    @property
    def is_plain(self) -> bool:
        """Whether vLLM's chunks go out as they are."""
        return self.modalities == ["text"] and not self.body.return_stage_metrics and not self.upstream

    @property
    def upstream(self) -> bool:
        """Whether answers have the form of upstream."""
        return self.service.args.compat == "upstream"

    @property
    def shape(self) -> OpenAIShape:
        """The form of answers."""
        form = self.body.audio.format if self.body.audio is not None else "wav"
        kind = UpstreamShape if self.upstream else OpenAIShape
        return kind(self.request_id, self.created, "audio" in self.modalities, form)


@router.post("/v1/chat/completions")
async def completions(body: ChatCompletionRequest, request: Request) -> Response:
    """Answer a chat: with text, with speech, or with pictures, as the model makes them."""
    service = service_of(request)
    service.check_model(body.model)
    if body.stream_options is not None and not body.stream:
        raise RequestError("stream_options: needs stream=true", field="stream_options")
    if service.text is None or "text" not in service.makes:
        service.check_makes("image")
        return await chat_with_pictures(service, body, request)
    chat = _checked(service, body, request)
    if body.stream:
        return await streamed(request, _streamed(chat))
    answer = await while_connected(request.receive, _whole(chat))
    return Response(answer, media_type="application/json")


def _checked(service: Service, body: ChatCompletionRequest, request: Request) -> Chat:
    """Raises ``RequestError`` for what the model does not make or read."""
    for kind in body.modalities or ():
        service.check_makes(kind, "modalities")
    wanted = set(body.modalities or ())
    for name in PICTURE_FIELDS:
        if getattr(body, name) is not None and "image" not in wanted:
            raise RequestError(f"{name}: the request asks for no pictures (modalities)", field=name)
    if body.n is not None and wanted - {"text"}:
        check_choices(body.n, service.args.max_queue)
    speaks, voice = "audio" in wanted, None
    if body.top_logprobs is not None and not body.logprobs:
        raise RequestError("top_logprobs: needs logprobs=true", field="top_logprobs")
    if body.audio is not None:
        if not speaks:
            raise RequestError('audio: needs "audio" in modalities', field="audio")
        voice = pick_voice(body.audio.voice, service.voices, "audio.voice")
    if speaks and body.stream and service.args.compat == "openai":
        if body.audio is None:
            raise RequestError("audio.format: is missing; a stream's is pcm16", field="audio.format")
        if body.audio.format != "pcm16":
            raise RequestError("audio.format: a stream's is pcm16", field="audio.format")
    return Chat(service, body, request_id(body.request_id), voice)


# ---------------------------------------------------------------- into vLLM's serving code


async def begin(chat: Chat) -> tuple[Turn, Any]:
    """Render the chat and start it: the turn, and vLLM's answer or its stream.

    Raises:
        RequestError: a message, a medium or a parameter is wrong.
    """
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest as Plain

    from vllm_omni.entrypoints.openai.text import Turn, checked, typed_errors

    service, body = chat.service, chat.body
    assert service.text is not None
    defaults, fields, rest, stages = stage_params(service, body)
    turns = await _turns(chat)
    information = None if chat.voice is None else {"speaker": chat.voice}
    given = body.model_fields_set
    about = "messages", given, chat.media.append
    turn = Turn(service, stages, service.reader, rest, chat.modalities, information, *about)
    own = {"messages": turns, "request_id": chat.request_id}
    with typed_errors("messages", given):
        request = Plain(
            **{**fields, **vllm_fields(body), **_of_choice(chat, fields, stages), **own},
            model=service.adapter(body.model),
        )
        serving = service.text.chat(turn, defaults)
        return turn, checked(await serving.create_chat_completion(request, None), "messages", given)


async def _turns(chat: Chat) -> list[dict[str, Any]]:
    if chat.turns is None:
        chat.turns = await chat.service.aside(checked_messages, chat.body.messages, chat.service.args)
    return chat.turns


def _of_choice(chat: Chat, fields: Mapping[str, Any], stages: Sequence[OmniSamplingParams]) -> dict[str, Any]:
    """What is other for one of several answers: every seed, by its number, as vLLM has it for ``n``."""
    if chat.number is None:
        return {}
    for place, params in enumerate(stages):
        if place != chat.service.reader and params.seed is not None:
            params.seed += chat.number
    seed = fields.get("seed") if chat.body.seed is None else chat.body.seed
    return {"n": 1, **({} if seed is None else {"seed": seed + chat.number})}


async def _apart(chat: Chat) -> list[Chat]:
    """A chat for each answer that is a request of its own."""
    if chat.requests == 1:
        return [chat]
    await _turns(chat)  # once for all
    return [
        replace(chat, request_id=f"{chat.request_id}-{number}", media=[], number=number)
        for number in range(chat.requests)
    ]


def stage_params(
    service: Service, body: ChatCompletionRequest | None
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any], list[OmniSamplingParams]]:
    """Parameters of the stage that reads the prompt, as ``chat_render.divided`` divides them, and those of all stages:
    their own, with those of a chat's ``sampling_params_list`` over them."""
    stages = service.omni.pipeline.stages
    listed = None if body is None else body.sampling_params_list
    rows: Sequence[Mapping[str, Any]] = listed if listed is not None else [{}] * len(stages)
    if len(rows) != len(stages):
        raise RequestError(
            f"sampling_params_list has {len(rows)} entries; there are {len(stages)} stages",
            field="sampling_params_list",
        )
    out = list(service.omni.default_sampling_params_list)
    for i, (stage, row) in enumerate(zip(stages, rows, strict=True)):
        where = f"sampling_params_list.{i}"
        if stage.stage_type == "diffusion":
            if row:
                raise RequestError(f"{where}: stage {stage.stage_id} makes pictures and takes none here", field=where)
            if body is not None:
                out[i] = _of_pictures(stage, body, service.args.max_generated_image_size)
            continue
        check_listed(row, stage, where)
        if i != service.reader:
            out[i] = sampling_params(merged(stage.default_sampling_params, row), where)
    reader = merged(stages[service.reader].default_sampling_params, rows[service.reader])
    return *divided(reader), out


def _of_pictures(stage: StageConfig, body: ChatCompletionRequest, limit: int) -> OmniDiffusionSamplingParams:
    given = picture_params(body, limit)
    params = OmniDiffusionSamplingParams.from_kwargs({**stage.default_sampling_params, **given})
    params.validate()
    return params


# ---------------------------------------------------------------- answers


async def _whole(chat: Chat) -> bytes:
    with chat.service.admitted(chat.requests):
        chats = await _apart(chat)
        made = await all_of([_made(one) for one in chats])
        answer: bytes = await chat.service.aside(_dumped, chats, made, f"chatcmpl-{chat.request_id}")
        return answer


async def _made(chat: Chat) -> tuple[Mapping[str, Any], Any]:
    """What the stages say of one request, and vLLM's answer."""
    turn, response = await begin(chat)
    if turn.cancelled:
        raise asyncio.CancelledError
    return turn.metrics, response


def _dumped(chats: Sequence[Chat], made: Sequence[tuple[Mapping[str, Any], Any]], name: str) -> bytes:
    answers = []
    for chat, (metrics, response) in zip(chats, made, strict=True):
        answer = response.model_dump(exclude_none=True)  # vLLM's own fields alone when they say something
        for choice in answer["choices"]:
            choice.setdefault("logprobs", None)
            choice["message"] = {"content": None, "refusal": None, **choice["message"]}
        chat.shape.finish_answer(answer, join(chat.media))
        if chat.body.return_stage_metrics:
            (answer if chat.number is None else answer["choices"][-1])["metrics"] = metrics
        answers.append(answer)
    whole = {**answers[0], "id": name}
    if len(answers) > 1:
        choices = [choice for answer in answers for choice in answer["choices"]]
        whole["choices"] = [{**choice, "index": index} for index, choice in enumerate(choices)]
        whole["usage"] = total_usage([answer["usage"] for answer in answers])
    return json.dumps(whole, default=str).encode()


async def _streamed(chat: Chat) -> AsyncGenerator[bytes, None]:
    with chat.service.admitted(chat.requests):
        if chat.is_plain:
            turn, pieces = await begin(chat)
            try:
                async with aclosing(plain(turn, pieces)) as events:
                    async for event in events:
                        yield event
            finally:
                await turn.aclose()
        else:
            async with aclosing(_choices(chat)) as chunks:
                async for chunk in chunks:
                    yield sse(chunk)
            yield DONE


async def _choices(chat: Chat) -> AsyncGenerator[dict[str, Any], None]:
    """The chunks of all answers; their usage comes together, at the end."""
    chats = await _apart(chat)
    usages: list[dict[str, Any]] = []
    last: dict[str, Any] = {}
    async with aclosing(side_by_side([_mixed(one) for one in chats])) as chunks:
        async for number, chunk in chunks:
            chunk["id"] = f"chatcmpl-{chat.request_id}"
            if not chunk["choices"]:
                usages.append(chunk["usage"])
                last = chunk
                continue
            if chats[number].number is not None:
                chunk["choices"] = [{**choice, "index": number} for choice in chunk["choices"]]
            yield chunk
    if usages:
        yield {**last, "usage": total_usage(usages)}


async def plain(turn: Turn, pieces: AsyncGenerator[str, None]) -> AsyncGenerator[bytes, None]:
    """vLLM's stream as it is, up to an error."""
    async with aclosing(pieces):
        async for piece in pieces:
            _raise_errors(turn, piece)
            yield piece.encode()


def _raise_errors(turn: Turn, piece: str) -> None:
    """vLLM's stream says its errors as pieces of it.

    Raises:
        OmniError: it does.
    """
    if turn.error is not None:
        raise turn.error
    if piece.startswith(_ERROR):
        raise StageError(str(json.loads(piece[6:])["error"]["message"]))


async def _mixed(chat: Chat) -> AsyncGenerator[dict[str, Any], None]:
    """One request's chunks: vLLM's, and between them what other stages make. Those that end the answer come last."""
    turn, pieces = await begin(chat)
    events: asyncio.Queue[str | OmniRequestOutput | None] = asyncio.Queue()
    turn.on_media = events.put_nowait

    async def produce() -> None:
        try:
            async for piece in pieces:
                events.put_nowait(piece)
        finally:
            events.put_nowait(None)

    task = asyncio.create_task(produce())
    shape, usage = chat.shape, None
    head: dict[str, Any] = {}
    ends: list[dict[str, Any]] = []
    try:
        while (event := await events.get()) is not None:
            if isinstance(event, OmniRequestOutput):
                for delta in await chat.service.aside(shape.media_deltas, event):
                    yield {**head, **shape.chunk(delta)}
                continue
            _raise_errors(turn, event)
            if event == _DONE:
                continue
            chunk = json.loads(event[6:])
            head = head or {name: chunk[name] for name in ("id", "object", "created", "model")}
            if not chunk["choices"]:
                usage = chunk
                continue
            now, end = shape.text(chunk)
            if now is not None:
                yield now
            if end is not None:
                ends.append(end)
        await task
    finally:
        task.cancel()
        await asyncio.wait({task})
        await turn.aclose()
    for delta in shape.last_deltas():
        yield {**head, **shape.chunk(delta)}
    if chat.body.return_stage_metrics and ends:
        ends[-1]["metrics"] = turn.metrics
    for end in ends:
        yield end
    if usage is not None:
        yield usage
