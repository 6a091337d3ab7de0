"""``/start_profile`` and ``/stop_profile``: torch profiler traces of the running stages."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request

from vllm_omni.entrypoints.openai.health import service_of
from vllm_omni.errors import RequestError

router = APIRouter()


@router.post("/start_profile")
async def start_profile(request: Request) -> dict[str, Any]:
    """Start traces in all stages; they go to VLLM_TORCH_PROFILER_DIR."""
    service = service_of(request)
    if service.profiling:
        raise RequestError("a profile is being made already")
    service.profiling = True
    try:
        await service.omni.start_profile()
    except BaseException:
        service.profiling = False
        raise
    return {"status": "started"}


@router.post("/stop_profile")
async def stop_profile(request: Request) -> dict[str, Any]:
    """Stop them; returns the files, by stage."""
    service = service_of(request)
    if not service.profiling:
        raise RequestError("no profile is being made")
    service.profiling = False
    files = await service.omni.stop_profile()
    return {"status": "stopped", "files": {str(stage_id): paths for stage_id, paths in files.items()}}
