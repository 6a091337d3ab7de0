"""A route whose request is one JSON body: checked in one go, without the framework's general machinery."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import BaseModel, ValidationError

_NO_JSON = {"type": "model_attributes_type", "loc": ("body",), "msg": "Input should be a JSON object", "input": None}


class BodyRoute(APIRoute):
    """An ``APIRoute``, in the OpenAPI document too, that parses its body from the bytes.

    For endpoints ``(body: Model, request: Request) -> Response``; what has other parameters is an ordinary route.
    FastAPI would parse the JSON into Python values first and solve dependencies that there are none of; that takes
    longer than everything else in a small request.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Called once, when the route is made."""
        model = _only_body(self.endpoint)
        if model is None:
            return super().get_route_handler()
        endpoint: Callable[..., Awaitable[Response]] = self.endpoint

        async def handle(request: Request) -> Response:
            return await endpoint(body=_parsed(model, await request.body(), request), request=request)

        return handle


def _only_body(endpoint: Callable[..., Any]) -> type[BaseModel] | None:
    """The model of ``body`` when the endpoint takes ``body`` and ``request`` alone."""
    parameters = inspect.signature(endpoint, eval_str=True).parameters
    if set(parameters) != {"body", "request"}:
        return None
    model = parameters["body"].annotation
    return model if isinstance(model, type) and issubclass(model, BaseModel) else None


def _parsed(model: type[BaseModel], body: bytes, request: Request) -> BaseModel:
    """The body. A content type that says no JSON is refused: a web page can send such bodies to any server unasked.

    Raises:
        RequestValidationError: it is not JSON, or a field is wrong.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if not (kind == "application/json" or (kind.startswith("application/") and kind.endswith("+json"))):
        raise RequestValidationError([_NO_JSON])
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        raise RequestValidationError(error.errors(include_url=False)) from error
