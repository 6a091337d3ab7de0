"""``/v1/images/generations``."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import re
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING, Annotated, Any, Literal

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, ConfigDict, Field

from vllm_omni.entrypoints.openai.health import service_of
from vllm_omni.entrypoints.openai.service import Service
from vllm_omni.entrypoints.openai.streaming import sse, sse_raw, streamed, while_connected
from vllm_omni.errors import RequestError, StageError
from vllm_omni.inputs.data import OmniTextPrompt
from vllm_omni.outputs import OmniRequestOutput

if TYPE_CHECKING:
    from PIL.Image import Image

router = APIRouter()
MAX_PROMPT = 32_000
_SIZE = re.compile(r"([1-9]\d{0,5})x([1-9]\d{0,5})")

Format = Literal["png", "jpeg", "webp"]
Seed = Annotated[int, Field(ge=-(2**63), le=2**64 - 1)]


class ImageGenerationRequest(BaseModel):
    """Body of a request for pictures. What is not given is the model's default."""

    model_config = ConfigDict(extra="forbid", strict=True)

    prompt: str = Field(min_length=1, max_length=MAX_PROMPT)
    model: str | None = None
    n: int = Field(1, ge=1, le=10)
    size: str | None = Field(None, max_length=16, description='"WIDTHxHEIGHT" or "auto"')
    response_format: Literal["b64_json"] = "b64_json"
    output_format: Format = "png"
    output_compression: int = Field(100, ge=0, le=100, description="Quality of jpeg and webp.")
    stream: bool = Field(False, description="Server-sent events: a progress event a step, then the pictures.")
    user: str | None = Field(None, max_length=256, description="The end user, for the caller's own records.")
    negative_prompt: str | None = Field(None, max_length=MAX_PROMPT)
    num_inference_steps: int | None = Field(None, ge=1, le=200)
    guidance_scale: float | None = Field(None, ge=0, le=20)
    true_cfg_scale: float | None = Field(None, ge=0, le=20)
    seed: Seed | None = None
    return_stage_metrics: bool = Field(False, description="Add times, seed and steps to the answer.")


def parse_size(size: str | None, limit: int) -> dict[str, int]:
    """Width and height; empty for the model's own.

    Raises:
        RequestError: not "WIDTHxHEIGHT", or more than ``limit`` pixels.
    """
    if size is None or size == "auto":
        return {}
    match = _SIZE.fullmatch(size)
    if match is None:
        raise RequestError(f'size={size!r}: expected "WIDTHxHEIGHT", such as "1024x1024", or "auto"', field="size")
    width, height = int(match[1]), int(match[2])
    if width * height > limit:
        raise RequestError(f"size={size!r}: has {width * height} pixels; allowed are {limit}", field="size")
    return {"width": width, "height": height}


def encode(image: Image, form: Format, quality: int) -> bytes:
    """A picture file. ``quality`` is for jpeg and webp."""
    out = io.BytesIO()
    if form == "png":
        image.save(out, "PNG", compress_level=1)
    else:
        (image.convert("RGB") if form == "jpeg" else image).save(out, form.upper(), quality=quality)
    return out.getvalue()


def encode_base64(image: Image, form: Format = "png", quality: int = 100) -> str:
    """A picture file as text."""
    return base64.b64encode(encode(image, form, quality)).decode()


def pictures(outputs: Sequence[OmniRequestOutput]) -> list[Image]:
    """The pictures of a finished request.

    Raises:
        StageError: there are none.
    """
    images: list[Image] = [image for output in outputs for image in output.images]
    if not images:
        raise StageError("the model made no picture")
    return images


def shape(image: Image) -> str:
    """Its size as requests give it."""
    return f"{image.width}x{image.height}"


def _answer(body: ImageGenerationRequest, outputs: Sequence[OmniRequestOutput]) -> bytes:
    images = pictures(outputs)
    data = [
        {"b64_json": encode_base64(image, body.output_format, body.output_compression), "revised_prompt": None}
        for image in images
    ]
    answer: dict[str, Any] = {
        "created": int(time.time()),
        "data": data,
        "output_format": body.output_format,
        "size": shape(images[0]),
    }
    if body.return_stage_metrics:
        answer["metrics"] = outputs[-1].metrics
    return json.dumps(answer, default=str).encode()


def _prompt(body: ImageGenerationRequest) -> str | OmniTextPrompt:
    if body.negative_prompt is None:
        return body.prompt
    return {"prompt": body.prompt, "negative_prompt": body.negative_prompt}


def _sampling(body: ImageGenerationRequest, limit: int) -> dict[str, Any]:
    names = ("num_inference_steps", "guidance_scale", "true_cfg_scale", "seed")
    given = {name: getattr(body, name) for name in names if getattr(body, name) is not None}
    return {**given, **parse_size(body.size, limit), "num_outputs_per_prompt": body.n}


@router.post("/v1/images/generations")
async def generations(body: ImageGenerationRequest, request: Request) -> Response:
    """Make pictures from a prompt."""
    service = service_of(request)
    service.check_model(body.model)
    service.check_makes("image")
    params = service.params(_sampling(body, service.args.max_generated_image_size))
    if body.stream:
        return await streamed(request, _events(service, body, params), service.args.send_timeout)
    outputs = await while_connected(request.receive, service.collect(_prompt(body), params, ["image"]))
    return Response(await service.aside(_answer, body, outputs), media_type="application/json")


async def _events(service: Service, body: ImageGenerationRequest, params: Sequence[Any]) -> AsyncGenerator[bytes, None]:
    """Progress as it comes, then one event a picture."""
    with service.admitted():
        async with aclosing(with_progress(service, _prompt(body), params)) as events:
            async for event in events:
                if isinstance(event, tuple):
                    stage_id, step, total = event
                    kind = "image_generation.progress"
                    yield sse({"type": kind, "stage_id": stage_id, "step": step, "total": total}, kind)
                else:
                    for image in pictures([event]):
                        kind = "image_generation.completed"
                        yield sse_raw(await service.aside(_completed, body, image, event), kind)


def _completed(body: ImageGenerationRequest, image: Image, output: OmniRequestOutput) -> bytes:
    event: dict[str, Any] = {
        "type": "image_generation.completed",
        "b64_json": encode_base64(image, body.output_format, body.output_compression),
        "created_at": int(time.time()),
        "size": shape(image),
        "output_format": body.output_format,
    }
    if body.return_stage_metrics:
        event["metrics"] = output.metrics
    return json.dumps(event, default=str).encode()


async def with_progress(
    service: Service, prompt: str | OmniTextPrompt, params: Sequence[Any]
) -> AsyncGenerator[tuple[int, int, int] | OmniRequestOutput, None]:
    """Progress (stage, step, total) and outputs of one admitted request, in the order in which they come."""
    events: asyncio.Queue[tuple[int, int, int] | OmniRequestOutput | None] = asyncio.Queue()

    async def produce() -> None:
        try:
            outputs = service.stream(prompt, params, ["image"], lambda *step: events.put_nowait(step))
            async with aclosing(outputs):
                async for output in outputs:
                    events.put_nowait(output)
        finally:
            events.put_nowait(None)

    task = asyncio.create_task(produce())
    try:
        while (event := await events.get()) is not None:
            yield event
        await task
    finally:
        task.cancel()
        await asyncio.wait({task})
