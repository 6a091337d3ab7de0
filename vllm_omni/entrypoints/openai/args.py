"""What the HTTP server is started with, beside the arguments of ``AsyncOmni``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from vllm_omni import envs
from vllm_omni.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ServeArgs:
    """Settings of the HTTP server."""

    host: str = "127.0.0.1"
    """Address to listen on; ``0.0.0.0`` for all of the machine's."""
    port: int = 8000
    """Port to listen on; 0 takes a free one, which the log names."""
    api_key: str | None = None
    """Key that requests must bring (``Authorization: Bearer``); the environment variable VLLM_API_KEY says the same
    without showing it in the list of processes. Without a key every request is served."""
    served_model_name: Sequence[str] = ()
    """Names that requests may call the model by; the first is the one that answers show. Default: the model as it was
    given, or ``default`` for the package's own."""
    compat: Literal["openai", "upstream"] = "openai"
    """Form of the answers of chats: OpenAI's, or upstream's where it is another (a choice of its own for sound; in
    streams sound and pictures in delta.content, with modality beside it)."""
    max_queue: int = 256
    """Requests that may be open at once, running and waiting together; one more is answered with 429."""
    request_timeout: float = 600.0
    """Seconds that one request may take, waiting included."""
    drain_timeout: float = 60.0
    """Seconds that open requests get to finish after SIGTERM."""
    max_body_bytes: int = 64 * 2**20
    """Size of a request's body at most; a larger one is answered with 413."""
    max_connections: int | None = None
    """Connections that may be open at once; one more is answered with 503. Default: what the limit of open files
    (ulimit -n) leaves."""
    header_timeout: float = 30.0
    """Seconds that a client may take to send a request's head, from its connection on."""
    body_timeout: float = 30.0
    """Seconds that a client may take to send a request's body."""
    send_timeout: float = 30.0
    """Seconds that a client may take to read the next part of an answer."""
    max_generated_image_size: int = 2048 * 2048
    """Pixels (width times height) that a request may ask for."""
    max_media_bytes: int = 64 * 2**20
    """Size of one input picture, sound or video at most, as it is sent."""
    max_media_pixels: int = 64 * 2**20
    """Pixels of one input picture at most, after decompression."""
    max_audio_seconds: float = 1800.0
    """Length of one input sound at most."""
    allowed_media_domains: Sequence[str] = ()
    """Hosts that http(s) URLs of input media may name; without any, such URLs are refused."""
    allow_private_media: bool = False
    """Whether those hosts may have addresses that are not public (of this machine, of the local network)."""
    allowed_local_media_path: str | None = None
    """Folder whose files requests may name by ``file://``; without it, such URLs are refused."""
    allowed_origins: Sequence[str] = ()
    """Origins of web pages that may use the server from a browser (CORS); ``*`` for all."""
    ssl_certfile: str | None = None
    """Certificate for https."""
    ssl_keyfile: str | None = None
    """Key of the certificate."""
    enable_request_id_headers: bool = True
    """Give every answer the header x-request-id: the client's own name of the request, or a fresh one. The name is in
    the log and in traces in any case."""
    access_log: bool = False
    """Log a line for each request."""

    def __post_init__(self) -> None:
        for name in ("max_queue", "max_body_bytes", "max_media_bytes", "max_media_pixels"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}: must be at least 1", field=name)
        if self.max_connections is not None and self.max_connections < 1:
            raise ConfigError(f"max_connections={self.max_connections}: must be at least 1", field="max_connections")
        for name in (
            *("request_timeout", "drain_timeout", "header_timeout", "body_timeout", "send_timeout"),
            "max_audio_seconds",
        ):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name}={getattr(self, name)}: must be above 0", field=name)
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"port={self.port}: allowed is 0 to 65535", field="port")
        if self.max_generated_image_size < 256:
            raise ConfigError("max_generated_image_size: must be at least 256", field="max_generated_image_size")
        if self.api_key == "":
            raise ConfigError("api_key is empty", field="api_key")
        if (self.ssl_certfile is None) != (self.ssl_keyfile is None):
            raise ConfigError("ssl_certfile and ssl_keyfile belong together", field="ssl_certfile")
        for name in ("ssl_certfile", "ssl_keyfile"):
            path = getattr(self, name)
            if path is not None and not Path(path).is_file():
                raise ConfigError(f"{name}={path!r}: no such file", field=name)
        if self.allowed_local_media_path is not None and not Path(self.allowed_local_media_path).is_dir():
            raise ConfigError(
                f"allowed_local_media_path={self.allowed_local_media_path!r}: no such folder",
                field="allowed_local_media_path",
            )

    @property
    def key(self) -> str | None:
        """The API key, from the option or the environment."""
        return self.api_key or envs.VLLM_API_KEY()
