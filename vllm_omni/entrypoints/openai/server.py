"""Run the server: bind, load, serve, drain, end."""

from __future__ import annotations

import functools
import gc
import signal
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

import uvicorn

from vllm_omni.entrypoints import omni_args
from vllm_omni.entrypoints.async_omni import AsyncOmni
from vllm_omni.entrypoints.openai.app import build_app
from vllm_omni.entrypoints.openai.args import ServeArgs
from vllm_omni.entrypoints.openai.connection import Connection, Limits, limits_of
from vllm_omni.entrypoints.openai.request_ids import RequestIds, name_in_log
from vllm_omni.entrypoints.openai.service import Service
from vllm_omni.entrypoints.openai.text_args import TextArgs
from vllm_omni.entrypoints.stage_arguments import runs_on_vllm
from vllm_omni.errors import ConfigError
from vllm_omni.logger import init_logger

logger = init_logger(__name__)
BACKLOG = 2048


class _Server(uvicorn.Server):
    """uvicorn's server, which tells the service when it begins to drain."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if not self._service.draining:
            logger.info("draining: %d requests are open", self._service.open_requests)
        self._service.draining = True
        super().handle_exit(sig, frame)


def run_server(args: ServeArgs, text: TextArgs, omni_arguments: Mapping[str, Any]) -> None:
    """Serve until SIGTERM or Ctrl-C. All stages have ended when it returns.

    Raises:
        ConfigError: a setting is wrong, or the address is taken.
        OmniError: the model could not be started.
    """
    with _sigterm_raises(), _bound(args) as sock:
        text.check_parsers()
        limits = limits_of(args)
        omni = AsyncOmni(**with_reasoning(text, omni_arguments))
        try:
            _serve(args, text, omni, sock, limits)
        except SystemExit:
            logger.info("stopped")  # uvicorn raises the signal again when it has drained
        finally:
            omni.shutdown()


def with_reasoning(text: TextArgs, omni_arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments, with the reasoning parser for the engine, too: grammars begin where the reasoning ends.

    Raises:
        ConfigError: settings for text, of a model that makes none.
    """
    out = dict(omni_arguments)
    if not text.given():
        return out
    stage = next(stage for stage in omni_args.resolve(out).pipeline.stages if not stage.engine_input_source)
    if not runs_on_vllm(stage):
        name = text.given()[0]
        raise ConfigError(f"{name}: only for models whose prompt an engine of vLLM's reads", field=name)
    if text.reasoning_parser is not None:
        overrides = {str(key): dict(value) for key, value in (out.get("stage_overrides") or {}).items()}
        overrides.setdefault(str(stage.stage_id), {})["reasoning_parser"] = text.reasoning_parser
        out["stage_overrides"] = overrides
    return out


def _text(service: Service, args: TextArgs) -> None:
    """Load vLLM's serving code for a model whose prompt one of its engines reads."""
    if service.omni.renderer is not None:
        from vllm_omni.entrypoints.openai.text import Text

        service.text = Text(service, args)
        service.adapters = frozenset(args.adapters())


def served_names(args: ServeArgs, model: str) -> Sequence[str]:
    """Names that requests may call ``model`` by; where the package lies is nobody's business."""
    return args.served_model_name or ("default" if model == str(omni_args.DEFAULT_MODEL) else model,)


def _serve(args: ServeArgs, text: TextArgs, omni: AsyncOmni, sock: socket.socket, limits: Limits) -> None:
    model = next((str(s.engine_args["model"]) for s in omni.pipeline.stages if "model" in s.engine_args), "model")
    service = Service(omni, args, served_names(args, model))
    _text(service, text)
    name_in_log()
    config = uvicorn.Config(
        RequestIds(build_app(service), args.enable_request_id_headers, args.access_log),
        http=functools.partial(Connection, limits=limits),  # type: ignore[arg-type]
        loop="uvloop",
        proxy_headers=args.access_log,
        log_config=None,
        access_log=False,
        server_header=False,
        backlog=BACKLOG,
        timeout_graceful_shutdown=max(1, round(args.drain_timeout)),
        ssl_certfile=args.ssl_certfile,
        ssl_keyfile=args.ssl_keyfile,
        ws="none",
    )
    host, port = sock.getsockname()[:2]
    scheme = "http" if args.ssl_certfile is None else "https"
    shown = f"[{host}]" if ":" in host else host
    sock.listen(BACKLOG)  # from here on clients wait instead of being refused
    logger.info("serving %s on %s://%s:%d", service.name, scheme, shown, port)
    gc.freeze()  # what was imported stays; the collector need not look at it during requests
    _Server(config, service).run(sockets=[sock])


@contextmanager
def _bound(args: ServeArgs) -> Iterator[socket.socket]:
    """The socket to listen on, taken before the model is loaded."""
    try:
        family, kind, proto, _, address = socket.getaddrinfo(args.host, args.port, type=socket.SOCK_STREAM)[0]
        sock = socket.socket(family, kind, proto)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
    except OSError as error:
        raise ConfigError(f"cannot listen on {args.host}:{args.port}: {error}", field="port") from error
    with sock:
        yield sock


@contextmanager
def _sigterm_raises() -> Iterator[None]:
    """SIGTERM ends the program as Ctrl-C does, so that what was started is ended."""

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
