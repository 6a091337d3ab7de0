"""``/v1/images/edits``, for models that read a picture and make one."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from fastapi import APIRouter, Request, Response
from pydantic import ConfigDict, Field

from vllm_omni.entrypoints.openai.args import ServeArgs
from vllm_omni.entrypoints.openai.forms import Form, form_of, form_schema, validated
from vllm_omni.entrypoints.openai.health import service_of
from vllm_omni.entrypoints.openai.images import MAX_PROMPT, ImageGenerationRequest, drawn, sampling_of
from vllm_omni.entrypoints.openai.media import check_media, load_media
from vllm_omni.entrypoints.openai.service import Service
from vllm_omni.errors import RequestError
from vllm_omni.inputs.data import OmniTextPrompt

if TYPE_CHECKING:
    from PIL.Image import Image


class ImageEditRequest(ImageGenerationRequest):
    """Fields of a request to change pictures, as text."""

    model_config = ConfigDict(extra="forbid", strict=False)

    prompt: str = Field(max_length=MAX_PROMPT, description="May be empty: the picture carries the request.")


_SCHEMA = form_schema(ImageEditRequest, {"image": "The picture; image[] for several."}, ["image"])


def is_active(service: Service) -> bool:
    """Whether the served model changes pictures."""
    return "image" in service.reads and "image" in service.makes


def router(service: Service) -> APIRouter:
    """The endpoint; one that is not active says so, and is not in the OpenAPI document."""
    made = APIRouter(include_in_schema=is_active(service))
    made.post("/v1/images/edits", openapi_extra=_SCHEMA)(edits)
    return made


async def edits(request: Request) -> Response:
    """Change pictures as a prompt says."""
    service = service_of(request)
    async with form_of(request, ["image", "mask"], ["url"]) as form:
        if not is_active(service):
            raise RequestError(f"{service.name} does not edit pictures", field="model", code="not_supported")
        body = validated(ImageEditRequest, dict(form.fields))
        service.check_model(body.model)
        if "mask" in form.files:
            raise RequestError(f"mask: {service.name} reads none", field="mask")
        images = await service.aside(_images, form, service.args)
    params = service.params(sampling_of(body, service.args.max_generated_image_size))
    prompt: OmniTextPrompt = {"prompt": body.prompt, "multi_modal_data": {"image": images}}
    if body.negative_prompt is not None:
        prompt["negative_prompt"] = body.negative_prompt
    return await drawn(service, body, prompt, params, request, "image_edit")


def _images(form: Form, args: ServeArgs) -> Image | list[Image]:
    """The pictures, in RGB: one, or a list."""
    data = list(form.files.get("image", ()))
    for one in data:
        check_media(one, "image", "image", args)
        if len(one) > args.max_media_bytes:
            raise RequestError(f"image: larger than {args.max_media_bytes} bytes", field="image")
    data += [load_media(url, "image", "url", args) for url in form.urls.get("url", ())]
    if not data:
        raise RequestError("image is missing", field="image")
    images = [picture_of(one, "image") for one in data]
    return images[0] if len(images) == 1 else images


def picture_of(data: bytes, field: str) -> Image:
    """A checked picture file, decoded to RGB.

    Raises:
        RequestError: it is broken.
    """
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data)) as image:
            return image.convert("RGB")
    except (OSError, ValueError, SyntaxError) as error:
        raise RequestError(f"{field}: the picture is broken: {error}", field=field) from error
