"""Requests that come as forms (multipart/form-data): fields and files, checked."""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ValidationError
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException

from vllm_omni.errors import RequestError

B = TypeVar("B", bound=BaseModel)
MAX_FIELDS = 64
MAX_FILES = 16
MAX_FIELD_BYTES = 1 << 17


@dataclass
class Form:
    """The fields of a form, and its files by field; ``name[]`` is ``name``."""

    fields: dict[str, str] = field(default_factory=dict)
    files: dict[str, list[bytes]] = field(default_factory=dict)
    urls: dict[str, list[str]] = field(default_factory=dict)
    """Fields that may be given several times."""


@asynccontextmanager
async def form_of(request: Request, files: Collection[str], many: Collection[str] = ()) -> AsyncIterator[Form]:
    """The request's form.

    Args:
        files: names of the fields that hold files.
        many: names of the fields that may be given several times.

    Raises:
        RequestError: no form, a file where none belongs, or a field twice.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "multipart/form-data":
        raise RequestError("the body must be a form (content-type: multipart/form-data)")
    try:
        parsed = await request.form(max_files=MAX_FILES, max_fields=MAX_FIELDS, max_part_size=MAX_FIELD_BYTES)
    except HTTPException as error:
        raise RequestError(f"the form cannot be read: {error.detail}") from error
    made = Form()
    try:
        for name, value in parsed.multi_items():
            name = name.removesuffix("[]")
            if isinstance(value, UploadFile) != (name in files):
                raise RequestError(f"{name}: {'expected a file' if name in files else 'is no file'}", field=name)
            if isinstance(value, UploadFile):
                made.files.setdefault(name, []).append(await value.read())
            elif name in many:
                made.urls.setdefault(name, []).append(value)
            elif name in made.fields:
                raise RequestError(f"{name}: given twice", field=name)
            else:
                made.fields[name] = value
        yield made
    finally:
        await parsed.close()


def validated(model: type[B], values: dict[str, Any], strict: bool | None = None) -> B:
    """The body that ``values`` make; ``strict`` as in pydantic, default: as ``model`` has it.

    Raises:
        RequestValidationError: a field is wrong.
    """
    try:
        return model.model_validate(values, strict=strict)
    except ValidationError as error:
        raise RequestValidationError(error.errors(include_url=False)) from error


def form_schema(model: type[BaseModel], files: dict[str, str], needed: Collection[str] = ()) -> dict[str, Any]:
    """What the OpenAPI document says of a form: the fields of ``model``, and ``files`` with what they are."""
    schema = model.model_json_schema()
    for name, text in files.items():
        one = {"type": "string", "format": "binary", "description": text}
        schema["properties"][name] = one
    schema["required"] = [*schema.get("required", ()), *needed]
    return {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": schema}}}}
