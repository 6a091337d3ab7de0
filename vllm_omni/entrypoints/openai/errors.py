"""Errors as OpenAI's clients read them: ``{"error": {message, type, param, code}}``."""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Iterable
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from vllm_omni.errors import OmniError, OverloadError, RequestAborted, http_status
from vllm_omni.logger import init_logger

logger = init_logger(__name__)

MAX_MESSAGE = 2000
_FIELD = re.compile(r"[a-z][a-z0-9_]*")
_NO_FIELDS = {"body", "query", "path", "str", "int", "float", "bool", "list", "dict", "none"}
_PARAMS = {
    "height": "size",
    "width": "size",
    "num_outputs_per_prompt": "n",
    "num_previews": "partial_images",
    "output_modalities": "modalities",
}
"""Names inside -> names in the requests, where they differ."""


_INSTEAD = {
    "best_of": "is not supported; n gives several answers to choose from",
    "use_beam_search": "is not supported; n with temperature gives several answers",
    "length_penalty": "is not supported; it belongs to beam search, which is not there",
    "vae_use_slicing": "is the server's to decide; start it with --vae-use-slicing",
    "vae_use_tiling": "is the server's to decide; start it with --vae-use-tiling",
    "extra_params": "is not read; give each parameter as a field of its own",
    **dict.fromkeys(("width", "height"), 'is not read here; give size="WIDTHxHEIGHT"'),
    "style": "is not read; say it in the prompt",
    "moderation": "is not read; nothing is moderated here",
    "mask_image": "is not read: no model here takes a mask; say in the prompt what is to change",
    "reference_image": "is not read; give several pictures as image[]",
    "image_reference": "is not read; a picture to begin with is input_reference",
    "lora": "is not supported: there are no adapters for pictures and videos yet",
    **dict.fromkeys(("flow_shift", "boundary_ratio"), "is not read; the checkpoint's schedule decides"),
    **dict.fromkeys(
        ("layers", "resolution", "bot_task", "sys_type", "system_prompt", "use_system_prompt", "strength"),
        "is not read by any model here",
    ),
    **dict.fromkeys(
        ("task_type", "ref_audio", "ref_text", "ref_audio_2", "speaker_embedding", "x_vector_only_mode"),
        "is not supported: no model here copies a voice; /v1/audio/voices lists those that there are",
    ),
    "language": "is not read; say it in instructions",
    "sample_rate": "is not read; the sound has the model's own rate",
    "initial_codec_chunk_frames": "is the server's to decide, in the stage configuration's connectors",
}
"""Parameters of other servers -> what to do instead."""


def error_body(message: str, status: int, param: str | None = None, code: str | None = None) -> bytes:
    """The JSON of an error."""
    kind = {401: "authentication_error", 429: "rate_limit_error"}.get(status)
    if kind is None:
        kind = "invalid_request_error" if status < 500 else "server_error"
    text = message if len(message) <= MAX_MESSAGE else message[: MAX_MESSAGE - 3] + "..."
    return json.dumps({"error": {"message": text, "type": kind, "param": param, "code": code}}).encode()


def error_response(
    message: str, status: int, param: str | None = None, code: str | None = None, headers: dict[str, str] | None = None
) -> Response:
    """The answer that reports an error."""
    body = error_body(message, status, param, code)
    return Response(body, status, {"content-type": "application/json", **(headers or {})})


def describe(error: OmniError) -> tuple[str, int, str | None, str | None]:
    """(message, status, param, code) of a typed error."""
    field = error.details.get("field")
    param = _PARAMS.get(field, field) if isinstance(field, str) else None
    message = error.message if param == field or param is None else f"{param}: {error.message}"
    return message, http_status(error), param, error.details.get("code")


def omni_response(error: OmniError) -> Response:
    """The answer that reports a typed error; one that is not the client's fault is logged with its cause."""
    message, status, param, code = describe(error)
    if status >= 500:
        logger.log(logging.ERROR, "%d %s\n%s", status, message, error.details.get("cause", ""))
    headers = {}
    if isinstance(error, OverloadError):
        headers["retry-after"] = str(max(1, math.ceil(error.details.get("retry_after", 1))))
    return error_response(message, status, param, code, headers)


def _validation_message(error: dict[str, Any]) -> tuple[str, str | None]:
    path = field_path(error["loc"])
    if error["type"] == "json_invalid":
        return f"the body is not JSON: {error.get('ctx', {}).get('error', error['msg'])}", None
    if not path:
        return "the body must be a JSON object (content-type: application/json)", None
    param = ".".join(path)
    if error["type"] == "missing":
        return f"{param} is missing", param
    if error["type"] == "extra_forbidden":
        return f"{param}: {_INSTEAD.get(param, 'unknown parameter, or one that this server does not support')}", param
    given = "" if isinstance(error.get("input"), (dict, list)) else f"={_short(error.get('input'))}"
    return f"{param}{given}: {error['msg']}", param


def field_path(loc: Iterable[str | int]) -> list[str]:
    """The fields and places in lists of pydantic's path to an error, without its names of types."""
    return [str(part) for part in loc if isinstance(part, int) or (_FIELD.fullmatch(part) and part not in _NO_FIELDS)]


def _short(value: Any) -> str:
    text = ascii(value)
    return text if len(text) <= 80 else text[:77] + "..."


async def _on_validation(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    message, param = _validation_message(error.errors()[0])
    return error_response(message, 400, param)


async def _on_omni(request: Request, error: Exception) -> Response:
    assert isinstance(error, OmniError)
    if isinstance(error, RequestAborted):
        return Response(status_code=http_status(error))  # nobody is there to read it
    return omni_response(error)


async def _on_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if error.status_code == 404:
        return error_response(f"{request.method} {request.url.path}: no such endpoint", 404)
    text = error.detail or HTTPStatus(error.status_code).phrase
    return error_response(text, error.status_code, headers=dict(error.headers or {}))


async def _on_other(request: Request, error: Exception) -> Response:
    """A bug: the log gets its traceback (from the server), the client does not."""
    return error_response("internal error; the server's log says more", 500)


def install(app: FastAPI) -> None:
    """Give ``app`` these answers."""
    app.add_exception_handler(RequestValidationError, _on_validation)
    app.add_exception_handler(OmniError, _on_omni)
    app.add_exception_handler(HTTPException, _on_http)
    app.add_exception_handler(Exception, _on_other)
