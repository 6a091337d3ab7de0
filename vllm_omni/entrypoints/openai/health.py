"""``/health``, ``/ready`` and ``/v1/models``."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request, Response

from vllm_omni.entrypoints.openai.errors import error_response
from vllm_omni.entrypoints.openai.service import Service
from vllm_omni.errors import NotFoundError

router = APIRouter()


def service_of(request: Request) -> Service:
    """The served model."""
    service: Service = request.app.state.service
    return service


@router.get("/health", response_model=None)
def health(request: Request) -> Response | dict[str, Any]:
    """200 while every rank of every stage lives, else 503 with the reason."""
    service = service_of(request)
    service.check_health()
    return {"status": "ok", "open_requests": service.open_requests}


@router.get("/ready", response_model=None)
def ready(request: Request) -> Response | dict[str, Any]:
    """200 while further requests should be sent here, else 503 with the reason."""
    reason = service_of(request).not_ready()
    return {"status": "ready"} if reason is None else error_response(reason, 503, code="not_ready")


@router.get("/v1/models")
async def models(request: Request) -> dict[str, Any]:
    """The names that requests may use."""
    service = service_of(request)
    names = (*service.names, *sorted(service.adapters))
    return {"object": "list", "data": [_card(service, name) for name in names]}


@router.get("/v1/models/{model:path}")
async def model(request: Request, model: str) -> dict[str, Any]:
    """One of them."""
    service = service_of(request)
    if model not in service.names and model not in service.adapters:
        raise NotFoundError(f"no model {model!r}", field="model", code="model_not_found")
    return _card(service, model)


def _card(service: Service, name: str) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": service.started,
        "owned_by": "vllm-omni",
        "root": service.name,
        **({"parent": service.name} if name in service.adapters else {}),
        "output_modalities": sorted(service.makes),
    }
