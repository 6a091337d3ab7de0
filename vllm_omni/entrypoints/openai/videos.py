"""``/v1/videos``, for models that make videos: jobs, and ``/v1/videos/sync`` for those who wait."""

from __future__ import annotations

import io
import json
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import ExitStack, aclosing, asynccontextmanager
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import APIRouter, Request, Response
from fastapi.responses import FileResponse
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from vllm_omni.entrypoints.openai.edits import picture_of
from vllm_omni.entrypoints.openai.forms import form_of, form_schema, validated
from vllm_omni.entrypoints.openai.health import service_of
from vllm_omni.entrypoints.openai.images import MAX_PROMPT, Seed, parse_size, size_of
from vllm_omni.entrypoints.openai.media import check_media, optional
from vllm_omni.entrypoints.openai.service import Service
from vllm_omni.entrypoints.openai.streaming import while_connected
from vllm_omni.entrypoints.openai.video_jobs import VideoJob
from vllm_omni.errors import RequestError, StageError
from vllm_omni.inputs.data import OmniTextPrompt
from vllm_omni.outputs import OmniRequestOutput
from vllm_omni.request import check_prompt

FPS = 24
MAX_PICTURES = 256
"""Pixels of a video at most, in pictures of the largest size."""
_FIELDS = ("num_inference_steps", "guidance_scale", "guidance_scale_2", "true_cfg_scale", "seed", "fps", "num_frames")


def _number(value: Any) -> Any:
    """The number that a text holds; anything else as it is."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


class VideoRequest(BaseModel):
    """Fields of a request for a video, as text or as JSON."""

    model_config = ConfigDict(extra="forbid")

    prompt: str = Field(max_length=MAX_PROMPT, description="May be empty beside a picture.")
    model: str | None = None
    seconds: Annotated[float, BeforeValidator(_number), Field(gt=0, le=600)] | None = Field(
        None, description="Length; or num_frames. In JSON it may be text, as OpenAI's clients write it."
    )
    size: str | None = Field(None, max_length=16, description='"WIDTHxHEIGHT" or "auto"')
    width: int | None = Field(None, ge=16, le=16384, description="With height in place of size.")
    height: int | None = Field(None, ge=16, le=16384)
    user: str | None = Field(None, max_length=256)
    num_frames: int | None = Field(None, ge=1, le=4096)
    fps: int | None = Field(None, ge=1, le=240)
    negative_prompt: str | None = Field(None, max_length=MAX_PROMPT)
    num_inference_steps: int | None = Field(None, ge=1, le=200)
    guidance_scale: float | None = Field(None, ge=0, le=20)
    guidance_scale_2: float | None = Field(None, ge=0, le=20)
    true_cfg_scale: float | None = Field(None, ge=0, le=20)
    seed: Seed | None = None


_SCHEMA = form_schema(VideoRequest, {"input_reference": "A picture to begin with."})


def is_active(service: Service) -> bool:
    """Whether the served model makes videos."""
    return "video" in service.makes


def router(service: Service) -> APIRouter:
    """The endpoints; those that are not active say so, and are not in the OpenAPI document."""
    made = APIRouter(include_in_schema=is_active(service))
    made.post("/v1/videos/sync", openapi_extra=_SCHEMA)(sync)
    made.post("/v1/videos", openapi_extra=_SCHEMA)(create)
    made.get("/v1/videos")(listed)
    made.get("/v1/videos/{video_id}")(retrieve)
    made.get("/v1/videos/{video_id}/content")(content)
    made.delete("/v1/videos/{video_id}")(delete)
    return made


def _check(service: Service) -> None:
    if not is_active(service):
        raise RequestError(f"{service.name} does not make videos", field="model", code="not_supported")


# ---------------------------------------------------------------- requests


@asynccontextmanager
async def _read(request: Request, service: Service) -> AsyncIterator[tuple[VideoRequest, OmniTextPrompt, list[Any]]]:
    """Body, prompt and parameters of a request, which is a form or JSON."""
    if request.headers.get("content-type", "").startswith("application/json"):
        body, pictures = await _json(request), []
    else:
        async with form_of(request, ["input_reference"]) as form:
            _check(service)
            body, pictures = validated(VideoRequest, dict(form.fields)), form.files.get("input_reference", [])
    _check(service)
    service.check_model(body.model)
    prompt: OmniTextPrompt = {"prompt": body.prompt}
    if body.negative_prompt is not None:
        prompt["negative_prompt"] = body.negative_prompt
    if pictures:
        prompt["multi_modal_data"] = {"image": await service.aside(_reference, pictures, service)}
    check_prompt(prompt)
    yield body, prompt, service.params(_sampling(body, service.args.max_generated_image_size))


async def _json(request: Request) -> VideoRequest:
    try:
        values = json.loads(await request.body())
    except ValueError as error:
        raise RequestError(f"the body is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise RequestError("the body must be a JSON object")
    return validated(VideoRequest, values, strict=True)


def _reference(pictures: Sequence[bytes], service: Service) -> Any:
    if "image" not in service.reads:
        raise RequestError(f"input_reference: {service.name} reads no pictures", field="input_reference")
    if len(pictures) > 1:
        raise RequestError("input_reference: given twice", field="input_reference")
    check_media(pictures[0], "image", "input_reference", service.args)
    return picture_of(pictures[0], "input_reference")


def _sampling(body: VideoRequest, limit: int) -> dict[str, Any]:
    given = {name: getattr(body, name) for name in _FIELDS if getattr(body, name) is not None}
    if body.seconds is not None:
        if body.num_frames is not None:
            raise RequestError("seconds: given beside num_frames", field="seconds")
        given["fps"] = body.fps or FPS  # the model is to show as many a second as it was asked to make
        given["num_frames"] = max(1, round(body.seconds * given["fps"]))
    size = parse_size(size_of(body.size, body.width, body.height), limit)
    frames = given.get("num_frames", 1)
    if frames * size.get("width", 0) * size.get("height", 0) > MAX_PICTURES * limit:
        raise RequestError(f"num_frames={frames}: too many of this size", field="num_frames")
    return {**given, **size}


# ---------------------------------------------------------------- the file


def encoded(output: OmniRequestOutput, fps: int | None) -> tuple[bytes, dict[str, Any]]:
    """An mp4 of the frames that a model made, and facts of it.

    ``multimodal_output["video"]`` holds the frames, [F, H, W, 3]: bytes, or numbers in [0, 1]; ``fps`` beside it says
    how many a second they are. Sides are cut to even numbers, as the coding needs them.

    Raises:
        StageError: there are no frames in it.
    """
    if "video" not in output.multimodal_output:
        raise StageError("the model made no video")
    av = optional("av", "model")
    frames = np.asarray(output.multimodal_output["video"])
    if frames.ndim == 5 and len(frames) == 1:
        frames = frames[0]
    if frames.ndim != 4 or frames.shape[-1] != 3 or not len(frames):
        raise StageError(f"the model's video has the shape {list(frames.shape)}; expected [frames, height, width, 3]")
    if frames.dtype != np.uint8:
        frames = (np.clip(frames, 0.0, 1.0) * 255.0).round().astype(np.uint8)
    rate = int(fps or output.multimodal_output.get("fps") or FPS)
    height, width = frames.shape[1] // 2 * 2, frames.shape[2] // 2 * 2
    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=rate)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for frame in frames:
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame[:height, :width]), format="rgb24")
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    count = len(frames)
    stages = output.metrics.get("stages", {})
    facts = {
        "fps": rate,
        "num_frames": count,
        "duration_s": count / rate,
        "inference_time_s": sum(times.get("run_s", 0.0) for times in stages.values()),
        "stage_durations": stages,
    }
    return out.getvalue(), {**facts, "size": f"{width}x{height}", "media_type": "video/mp4"}


async def _made(service: Service, body: VideoRequest, prompt: Any, params: Sequence[Any], job: VideoJob) -> bytes:
    """The file of a request, once it is admitted."""

    def progress(_: int, step: int, total: int) -> None:
        job.progress = min(99, 100 * step // max(1, total))

    job.status = "in_progress"
    outputs = []
    async with aclosing(service.stream(prompt, params, ["video"], progress)) as stream:
        async for output in stream:
            outputs.append(output)
    if not outputs:
        raise StageError("the model made no video")
    data, facts = await service.aside(encoded, outputs[-1], body.fps or (FPS if body.seconds is not None else None))
    job.size, job.seconds = facts.pop("size"), f"{facts['duration_s']:g}"
    job.facts = facts
    return data


def _job(service: Service, body: VideoRequest) -> VideoJob:
    return VideoJob(
        service.name,
        body.prompt,
        size_of(body.size, body.width, body.height) or "auto",
        "" if body.seconds is None else f"{body.seconds:g}",
    )


# ---------------------------------------------------------------- endpoints


async def create(request: Request) -> Response:
    """Begin a video; ``GET /v1/videos/{video_id}`` says how far it is."""
    service = service_of(request)
    async with _read(request, service) as (body, prompt, params):

        async def work(job: VideoJob) -> bytes:
            return await _made(service, body, prompt, params, job)

        job = _job(service, body)
        with ExitStack() as place:
            place.enter_context(service.admitted())
            service.videos.start(job, work).add_done_callback(_leaver(place.pop_all()))
    return _answer(job.shown())


def _leaver(place: ExitStack) -> Callable[[object], None]:
    """What gives a place back when its job has ended."""
    return lambda _: place.close()


async def sync(request: Request) -> Response:
    """Make a video and answer with the file."""
    service = service_of(request)
    async with _read(request, service) as (body, prompt, params):
        job = _job(service, body)
    data = await while_connected(request.receive, _waited(service, body, prompt, params, job))
    headers = {
        "x-model": service.name,
        "x-stage-durations": json.dumps(job.facts["stage_durations"]),
        "x-inference-time-s": f"{job.facts['inference_time_s']:.3f}",
    }
    return Response(data, media_type="video/mp4", headers=headers)


async def _waited(service: Service, body: VideoRequest, prompt: Any, params: Sequence[Any], job: VideoJob) -> bytes:
    with service.admitted():
        return await _made(service, body, prompt, params, job)


async def listed(
    request: Request, limit: int = 20, after: str | None = None, order: Literal["asc", "desc"] = "desc"
) -> Response:
    """The jobs, page by page."""
    service = service_of(request)
    _check(service)
    for name in request.query_params.keys() - {"limit", "after", "order"}:
        raise RequestError(f"{name}: unknown parameter; known are after, limit, order", field=name)
    if not 1 <= limit <= 100:
        raise RequestError(f"limit={limit}: allowed is 1 to 100", field="limit")
    jobs = service.videos.listed()
    if order == "desc":
        jobs.reverse()
    if after is not None:
        jobs = jobs[jobs.index(service.videos.get(after)) + 1 :]
    page = jobs[:limit]
    ends = {"first_id": page[0].id if page else None, "last_id": page[-1].id if page else None}
    return _answer({"object": "list", "data": [job.shown() for job in page], **ends, "has_more": len(jobs) > len(page)})


async def retrieve(request: Request, video_id: str) -> Response:
    """One job."""
    service = service_of(request)
    _check(service)
    return _answer(service.videos.get(video_id).shown())


async def content(request: Request, video_id: str, variant: Literal["video"] = "video") -> Response:
    """The finished file."""
    service = service_of(request)
    _check(service)
    return FileResponse(service.videos.file(service.videos.get(video_id)), media_type="video/mp4")


async def delete(request: Request, video_id: str) -> Response:
    """Forget a video; one that is being made is cancelled."""
    service = service_of(request)
    _check(service)
    service.videos.delete(service.videos.get(video_id))
    return _answer({"id": video_id, "object": "video.deleted", "deleted": True})


def _answer(values: dict[str, Any]) -> Response:
    return Response(json.dumps(values, default=str), media_type="application/json")
