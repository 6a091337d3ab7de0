"""Where input media may come from, and what they may grow to; without a server."""

from __future__ import annotations

import base64
import io
import struct
import threading
import zlib
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from vllm_omni.entrypoints.openai import media
from vllm_omni.entrypoints.openai.args import ServeArgs
from vllm_omni.errors import ConfigError, NotFoundError, RequestError, TooLargeError

LIMITS: dict[str, Any] = {"max_media_bytes": 50_000, "max_media_pixels": 10_000}


def png(width: int = 20, height: int = 10) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (width, height)).save(out, "PNG")
    return out.getvalue()


def bomb(side: int) -> bytes:
    """A PNG of a few bytes whose head says that it is ``side`` pixels wide and high."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 99)) + chunk(b"IEND", b"")


def load(url: str, **settings: Any) -> bytes:
    return media.load_media(url, "image", "photo", ServeArgs(**{**LIMITS, **settings}))


def data_url(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()


@pytest.fixture(scope="module")
def site() -> Iterator[str]:
    """A web site on this machine."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(302 if self.path == "/away" else 200)
            self.send_header("location", "http://example.com/")
            self.end_headers()
            self.wfile.write(b"x" * 60_000 if self.path == "/large" else png())

        def log_message(self, *args: Any) -> None:
            return

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://localhost:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_url_of_an_allowed_host(site: str) -> None:
    assert load(f"{site}/a.png", allowed_media_domains=["localhost"], allow_private_media=True) == png()


def test_refused_urls(site: str) -> None:
    allowed = {"allowed_media_domains": ["localhost"], "allow_private_media": True}
    with pytest.raises(RequestError, match="not allowed"):
        load(f"{site}/a.png")
    with pytest.raises(RequestError, match="not public"):
        load(f"{site}/a.png", allowed_media_domains=["localhost"])
    with pytest.raises(RequestError, match="answers 302"):
        load(f"{site}/away", **allowed)
    with pytest.raises(TooLargeError):
        load(f"{site}/large", **allowed)
    with pytest.raises(RequestError, match="user name"):
        load(site.replace("://", "://me:secret@"), **allowed)
    with pytest.raises(RequestError, match="ConnectError"):
        load("http://localhost:9/", **allowed)


@pytest.mark.parametrize(
    "address",
    [
        *("127.0.0.1", "10.0.0.1", "192.168.1.1", "172.16.0.1", "169.254.169.254", "100.64.0.1", "0.0.0.0"),
        *("[::1]", "[fc00::1]", "[fe80::1]", "[::ffff:127.0.0.1]", "[::ffff:169.254.169.254]", "224.0.0.1"),
    ],
)
def test_addresses_that_are_not_public(address: str) -> None:
    """Even when a careless setting allows the host."""
    with pytest.raises(RequestError, match="not public"):
        load(f"http://{address}:9/", allowed_media_domains=[address.strip("[]")])


def test_files(tmp_path: Path) -> None:
    inside = tmp_path / "inside"
    inside.mkdir()
    (inside / "a.png").write_bytes(png())
    (tmp_path / "b.png").write_bytes(png())
    (inside / "link.png").symlink_to(tmp_path / "b.png")
    (inside / "large.png").write_bytes(b"x" * 60_000)
    allowed = {"allowed_local_media_path": str(inside)}
    assert load(f"file://{inside}/a.png", **allowed) == png()
    with pytest.raises(RequestError, match="not allowed"):
        load(f"file://{inside}/a.png")
    for name in ("../b.png", "%2e%2e/b.png", "link.png"):
        with pytest.raises(RequestError, match="outside"):
            load(f"file://{inside}/{name}", **allowed)
    with pytest.raises(RequestError):
        load(f"file://{inside}/a.png%00.txt", **allowed)
    with pytest.raises(RequestError):
        load("file://other.host/a.png", **allowed)
    with pytest.raises(NotFoundError):
        load(f"file://{inside}/none.png", **allowed)
    with pytest.raises(NotFoundError):
        load(f"file://{inside}", **allowed)
    with pytest.raises(TooLargeError):
        load(f"file://{inside}/large.png", **allowed)


def test_bombs() -> None:
    assert load(data_url(png(100, 100))) == png(100, 100)
    for side in (101, 5_000, 60_000):
        with pytest.raises(TooLargeError):
            load(data_url(bomb(side)))
    with pytest.raises(TooLargeError):
        load(data_url(b"x" * 60_000))


@pytest.mark.parametrize("data", [b"", b"GIF89a", b"<svg/>", b"%!PS", b"\x89PNG\r\n\x1a\n", b"BM" + bytes(60)])
def test_no_pictures(data: bytes) -> None:
    with pytest.raises(RequestError):
        load(data_url(data))


@pytest.mark.parametrize(
    "settings",
    [
        {"port": -1},
        {"max_queue": 0},
        {"request_timeout": 0.0},
        {"api_key": ""},
        {"ssl_certfile": "x"},
        {"ssl_certfile": "/no", "ssl_keyfile": "/no"},
        {"allowed_local_media_path": "/no/such/folder"},
        {"max_generated_image_size": 1},
    ],
)
def test_wrong_settings(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        ServeArgs(**settings)
    assert caught.value.details["field"] in settings
