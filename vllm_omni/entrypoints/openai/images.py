"""``/v1/images/generations``."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import re
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING, Annotated, Any, Literal

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, ConfigDict, Field

from vllm_omni.entrypoints.openai.body_route import BodyRoute
from vllm_omni.entrypoints.openai.health import service_of
from vllm_omni.entrypoints.openai.service import Service
from vllm_omni.entrypoints.openai.streaming import sse, sse_raw, streamed, while_connected
from vllm_omni.errors import RequestError, StageError
from vllm_omni.inputs.data import OmniTextPrompt
from vllm_omni.outputs import OmniRequestOutput, Preview

if TYPE_CHECKING:
    from PIL.Image import Image

router = APIRouter(route_class=BodyRoute)
MAX_PROMPT = 32_000
SMALL = 32 * 32
"""Pixels that are encoded in less time than it takes to wake another thread."""
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
    partial_images: int = Field(
        0, ge=0, le=200, description="Previews of a stream, evenly spaced between the steps, at most one a step."
    )
    background: Literal["auto", "opaque"] = Field("auto", description="Pictures are opaque.")
    quality: Literal["auto"] = Field("auto", description="The model's own; num_inference_steps trades it for time.")
    user: str | None = Field(None, max_length=256, description="The end user, for the caller's own records.")
    negative_prompt: str | None = Field(None, max_length=MAX_PROMPT)
    num_inference_steps: int | None = Field(None, ge=1, le=200)
    guidance_scale: float | None = Field(None, ge=0, le=20)
    true_cfg_scale: float | None = Field(None, ge=0, le=20)
    seed: Seed | None = None
    generator_device: Literal["cpu", "cuda"] | None = Field(None, description="Where noise from the seed is drawn.")
    return_stage_metrics: bool = Field(False, description="Add times, seed and steps to the answer.")


def size_of(size: str | None, width: int | None, height: int | None) -> str | None:
    """A request's size as text, which it may say as width and height, too.

    Raises:
        RequestError: it is given twice, or one side alone.
    """
    if width is None and height is None:
        return size
    if size is not None:
        raise RequestError("size: given beside width or height", field="size")
    if width is None or height is None:
        raise RequestError("width and height belong together", field="height" if width is None else "width")
    return f"{width}x{height}"


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


def has_pictures(prompt: str | OmniTextPrompt) -> bool:
    """Whether the model is given pictures."""
    return not isinstance(prompt, str) and "multi_modal_data" in prompt


def token_usage(metrics: Mapping[str, Any], reads_pictures: bool) -> dict[str, Any] | None:
    """The tokens of a request for pictures, as OpenAI counts them: of the prompt, and of the pictures made.

    None when the pipeline does not tell them in its ``metrics``: ``prompt_tokens``, ``output_tokens``, and
    ``input_image_tokens`` when it reads pictures.
    """
    names = ("prompt_tokens", "output_tokens", *(("input_image_tokens",) if reads_pictures else ()))
    if not all(type(metrics.get(name)) is int for name in names):  # a custom pipeline's may be anything
        return None
    text, made = metrics["prompt_tokens"], metrics["output_tokens"]
    seen = metrics["input_image_tokens"] if reads_pictures else 0
    return {
        "input_tokens": text + seen,
        "output_tokens": made,
        "total_tokens": text + seen + made,
        "input_tokens_details": {"text_tokens": text, "image_tokens": seen},
    }


def shape(image: Image) -> str:
    """Its size as requests give it."""
    return f"{image.width}x{image.height}"


def _answer(body: ImageGenerationRequest, outputs: Sequence[OmniRequestOutput], reads_pictures: bool) -> bytes:
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
    usage = token_usage(outputs[-1].metrics, reads_pictures)
    if usage is not None:
        answer["usage"] = usage
    if body.return_stage_metrics:
        answer["metrics"] = outputs[-1].metrics
    return json.dumps(answer, default=str).encode()


def prompt_of(body: ImageGenerationRequest) -> str | OmniTextPrompt:
    """The request's prompt as the engine takes it: text, or a dictionary where there is a negative prompt, too."""
    if body.negative_prompt is None:
        return body.prompt
    return {"prompt": body.prompt, "negative_prompt": body.negative_prompt}


def sampling_of(body: ImageGenerationRequest, limit: int) -> dict[str, Any]:
    """The request's fields as sampling parameters (names of ``OmniDiffusionSamplingParams``), without those left out.

    Args:
        body: the request.
        limit: pixels that a picture may have, width times height.

    Raises:
        RequestError: ``partial_images`` without a stream, the quality of a ``png``, or a ``size`` that is none or too
            large.
    """
    names = ("num_inference_steps", "guidance_scale", "true_cfg_scale", "seed", "generator_device")
    given = {name: getattr(body, name) for name in names if getattr(body, name) is not None}
    if body.partial_images and not body.stream:
        raise RequestError("partial_images: needs stream=true", field="partial_images")
    if body.output_compression < 100 and body.output_format == "png":
        raise RequestError("output_compression: is for jpeg and webp; png loses nothing", field="output_compression")
    counts = {"num_outputs_per_prompt": body.n, "num_previews": body.partial_images}
    return {**given, **parse_size(body.size, limit), **counts}


@router.post("/v1/images/generations")
async def generations(body: ImageGenerationRequest, request: Request) -> Response:
    """Make pictures from a prompt."""
    service = service_of(request)
    service.check_model(body.model)
    service.check_makes("image")
    params = service.params(sampling_of(body, service.args.max_generated_image_size))
    return await drawn(service, body, prompt_of(body), params, request)


async def drawn(
    service: Service,
    body: ImageGenerationRequest,
    prompt: str | OmniTextPrompt,
    params: Sequence[Any],
    request: Request,
    event: str = "image_generation",
) -> Response:
    """The answer to a request for pictures, or its stream, whose events begin with ``event``."""
    if body.stream:
        return await streamed(request, _events(service, body, prompt, params, event))
    outputs = await while_connected(request.receive, service.collect(prompt, params, ["image"]))
    made = body, outputs, has_pictures(prompt)
    small = sum(image.width * image.height for output in outputs for image in output.images) <= SMALL
    answer = _answer(*made) if small else await service.aside(_answer, *made)
    return Response(answer, media_type="application/json")


async def _events(
    service: Service, body: ImageGenerationRequest, prompt: str | OmniTextPrompt, params: Sequence[Any], name: str
) -> AsyncGenerator[bytes, None]:
    """Progress and previews as they come, then one event a picture."""
    shown = 0
    with service.admitted():
        async with aclosing(with_progress(service, prompt, params)) as events:
            async for event in events:
                if isinstance(event, tuple):
                    stage_id, step, total = event
                    kind = f"{name}.progress"
                    yield sse({"type": kind, "stage_id": stage_id, "step": step, "total": total}, kind)
                elif isinstance(event, Preview):
                    kind = f"{name}.partial_image"
                    facts = {"partial_image_index": shown, "step": event.step, "total": event.total}
                    for index, image in enumerate(await service.aside(event.pictures)):
                        more = {"type": kind, "image_index": index, **facts}
                        yield sse_raw(await service.aside(_picture_event, body, image, more), kind)
                    shown += 1
                else:
                    made = pictures([event])
                    usage = token_usage(event.metrics, has_pictures(prompt))
                    for index, image in enumerate(made):
                        kind = f"{name}.completed"
                        more = {"type": kind, "image_index": index, "usage": usage if image is made[-1] else None}
                        if body.return_stage_metrics:
                            more["metrics"] = event.metrics
                        yield sse_raw(await service.aside(_picture_event, body, image, more), kind)


def _picture_event(body: ImageGenerationRequest, image: Image, more: dict[str, Any]) -> bytes:
    """What the events of previews and of finished pictures have in common, and ``more``."""
    event: dict[str, Any] = {
        **more,
        "b64_json": encode_base64(image, body.output_format, body.output_compression),
        "created_at": int(time.time()),
        "size": shape(image),
        "output_format": body.output_format,
        "background": "opaque",
        "quality": "auto",
    }
    return json.dumps(event, default=str).encode()


async def with_progress(
    service: Service, prompt: str | OmniTextPrompt, params: Sequence[Any]
) -> AsyncGenerator[tuple[int, int, int] | Preview | OmniRequestOutput, None]:
    """Progress (stage, step, total), previews and outputs of one admitted request, in the order in which they come."""
    events: asyncio.Queue[tuple[int, int, int] | Preview | OmniRequestOutput | None] = asyncio.Queue()

    async def produce() -> None:
        try:
            outputs = service.stream(
                prompt,
                params,
                ["image"],
                lambda *step: events.put_nowait(step),
                on_preview=lambda _, preview: events.put_nowait(preview),
            )
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
