"""The application: all endpoints over one served model."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware

from vllm_omni.entrypoints.openai import (
    chat,
    completions,
    edits,
    errors,
    health,
    images,
    info,
    metrics,
    page,
    profile,
    speech,
    videos,
)
from vllm_omni.entrypoints.openai.gate import Gate
from vllm_omni.entrypoints.openai.service import Service
from vllm_omni.entrypoints.openai.trace_context import TraceContext
from vllm_omni.version import __version__

MAX_BODIES = 8
"""Bodies of the largest size that are held at once."""


def build_app(service: Service) -> FastAPI:
    """The application around ``service``, which it attaches to the loop that runs it."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await service.omni.attach()
        yield
        await service.videos.close()
        service.close()

    args = service.args
    middleware = [
        Middleware(
            Gate,
            key=args.key,
            max_body=args.max_body_bytes,
            max_bodies=MAX_BODIES * args.max_body_bytes,
            body_timeout=args.body_timeout,
            answers=service.metrics.http,
        )
    ]
    if service.omni.collects_traces:
        middleware.append(Middleware(TraceContext))
    if args.allowed_origins:
        cors = Middleware(
            CORSMiddleware,
            allow_origins=list(args.allowed_origins),
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=["x-request-id"],
        )
        middleware.insert(0, cors)
    app = FastAPI(
        title="vllm-omni",
        version=__version__,
        lifespan=lifespan,
        middleware=middleware,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    app.state.service = service
    errors.install(app)
    for router in (
        images.router,  # first what is asked for most: the list is searched for each request
        chat.router,
        completions.router,
        edits.router(service),
        videos.router(service),
        speech.router,
        health.router,
        info.router,
        metrics.router,
        profile.router,
        page.router,
    ):
        app.include_router(router)
    return app
