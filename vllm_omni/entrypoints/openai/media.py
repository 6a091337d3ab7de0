"""Input media of requests: where they may come from, and how large they may be.

Every medium leaves here as bytes that were checked: its size, its kind, and what it grows to when it is decoded, as its
header says. Media are data URLs; http(s) URLs and files are read only where the server's settings allow them.
"""

from __future__ import annotations

import base64
import binascii
import importlib
import io
import ipaddress
import itertools
import socket
import time
from pathlib import Path
from typing import Any, Literal
from urllib.parse import unquote, urlsplit

import httpx
import numpy as np

from vllm_omni.entrypoints.openai.args import ServeArgs
from vllm_omni.errors import NotFoundError, RequestError, TooLargeError

Kind = Literal["image", "audio", "video"]
FETCH_S = 20.0
"""Seconds that reading one URL may take."""
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")


def load_media(url: object, kind: Kind, field: str, args: ServeArgs) -> bytes:
    """The bytes of a medium; may take long, so not in the event loop.

    Raises:
        RequestError: names ``field``; the URL is not allowed, or what it holds is no ``kind``.
        TooLargeError: more bytes, pixels or seconds than allowed.
    """
    if not isinstance(url, str):
        raise RequestError(f"{field}: expected a URL, got {type(url).__name__}", field=field)
    scheme = url[:16].partition(":")[0].lower()
    if scheme == "data":
        data = _from_data_url(url, field, args.max_media_bytes)
    elif scheme in ("http", "https"):
        data = _fetch(url, field, args)
    elif scheme == "file":
        data = _read(url, field, args)
    else:
        raise RequestError(f"{field}: a URL that begins with data:, http:, https: or file: is expected", field=field)
    check_media(data, kind, field, args)
    return data


def from_base64(text: str, field: str, limit: int) -> bytes:
    """Decode base64 strictly.

    Raises:
        RequestError: not base64. TooLargeError: more than ``limit`` bytes.
    """
    if len(text) > limit // 3 * 4 + 4:
        raise TooLargeError(f"{field}: larger than {limit} bytes", field=field)
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise RequestError(f"{field}: not base64: {error}", field=field) from error


def _from_data_url(url: str, field: str, limit: int) -> bytes:
    head, comma, text = url.partition(",")
    if not comma or not head.endswith(";base64"):
        raise RequestError(f'{field}: a data URL is "data:<type>;base64,<data>"', field=field)
    return from_base64(text, field, limit)


# ---------------------------------------------------------------- files


def _read(url: str, field: str, args: ServeArgs) -> bytes:
    if args.allowed_local_media_path is None:
        raise RequestError(f"{field}: file URLs are not allowed (--allowed-local-media-path allows them)", field=field)
    root = Path(args.allowed_local_media_path).resolve()
    parts = urlsplit(url)
    if parts.netloc not in ("", "localhost") or "\0" in unquote(parts.path):
        raise RequestError(f"{field}: expected file:///path", field=field)
    path = Path(unquote(parts.path)).resolve()
    if not path.is_relative_to(root):
        raise RequestError(f"{field}: the file is outside of the folder that is allowed", field=field)
    if not path.is_file():
        raise NotFoundError(f"{field}: no such file", field=field)
    if path.stat().st_size > args.max_media_bytes:
        raise TooLargeError(f"{field}: larger than {args.max_media_bytes} bytes", field=field)
    return path.read_bytes()


# ---------------------------------------------------------------- http


def _fetch(url: str, field: str, args: ServeArgs) -> bytes:
    """Read an http(s) URL from the address that was checked; redirects are not followed."""
    try:
        parts = urlsplit(url)
        host, port = (parts.hostname or "").rstrip("."), parts.port or (443 if parts.scheme == "https" else 80)
    except ValueError as error:
        raise RequestError(f"{field}: {error}", field=field) from error
    if host not in args.allowed_media_domains:
        raise RequestError(
            f"{field}: URLs of host {host!r} are not allowed (--allowed-media-domains lists those that are)",
            field=field,
        )
    if parts.username is not None or parts.password is not None:
        raise RequestError(f"{field}: a URL with a user name is not allowed", field=field)
    address = _address(host, port, field, args.allow_private_media)
    pinned = httpx.URL(url).copy_with(host=address)
    headers = {"host": host if parts.port is None else f"{host}:{port}", "accept-encoding": "identity"}
    until = time.monotonic() + FETCH_S
    try:
        with (
            httpx.Client(timeout=FETCH_S, trust_env=False) as client,
            client.stream("GET", pinned, headers=headers, extensions={"sni_hostname": host}) as answer,
        ):
            if answer.status_code != 200:
                raise RequestError(f"{field}: the URL answers {answer.status_code}", field=field)
            return _bounded(answer, field, args.max_media_bytes, until)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise RequestError(f"{field}: cannot read the URL: {type(error).__name__}", field=field) from error


def _bounded(answer: httpx.Response, field: str, limit: int, until: float) -> bytes:
    data = bytearray()
    for piece in answer.iter_raw(65536):
        data += piece
        if len(data) > limit:
            raise TooLargeError(f"{field}: larger than {limit} bytes", field=field)
        if time.monotonic() > until:
            raise RequestError(f"{field}: the URL took longer than {FETCH_S:g} s", field=field)
    return bytes(data)


def _address(host: str, port: int, field: str, private: bool) -> str:
    """The address to connect to: checked once and used, so that the name cannot lead elsewhere afterwards."""
    try:
        found = [str(row[4][0]) for row in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
    except (OSError, UnicodeError) as error:
        raise RequestError(f"{field}: host {host!r} is not known", field=field) from error
    for address in found:
        ip = ipaddress.ip_address(address.partition("%")[0])
        plain = ip.ipv4_mapped or ip if isinstance(ip, ipaddress.IPv6Address) else ip
        if not private and (not plain.is_global or plain.is_multicast):
            raise RequestError(f"{field}: host {host!r} has an address that is not public", field=field)
    return found[0]


# ---------------------------------------------------------------- what is inside


def optional(library: str, field: str) -> Any:
    """A library of the extra ``media``.

    Raises:
        RequestError: it is not installed on the server.
    """
    try:
        return importlib.import_module(library)
    except ImportError as error:
        text = f'{field}: the server lacks {library} for this; pip install "vllm-omni[media]" brings it'
        raise RequestError(text, field=field) from error


def check_media(data: bytes, kind: Kind, field: str, args: ServeArgs) -> None:
    """Check what a medium grows to when it is decoded, by its header; then that it can be decoded.

    Raises:
        RequestError: no ``kind``, or a broken one. TooLargeError: too many pixels or seconds.
    """
    if kind == "image":
        _check_image(data, field, args.max_media_pixels)
    elif kind == "audio":
        _check_audio(data, field, args.max_audio_seconds)
    else:
        _check_video(data, field, args)


def _check_image(data: bytes, field: str, limit: int) -> None:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(data), formats=IMAGE_FORMATS) as image:
            pixels = image.width * image.height
    except Image.DecompressionBombError as error:
        raise TooLargeError(f"{field}: {error}", field=field) from error
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError) as error:
        raise RequestError(
            f"{field}: no picture of a known format ({', '.join(IMAGE_FORMATS)})", field=field
        ) from error
    if pixels > limit:
        raise TooLargeError(f"{field}: has {pixels} pixels; allowed are {limit}", field=field)
    try:
        with Image.open(io.BytesIO(data), formats=IMAGE_FORMATS) as image:
            image.load()
    except (OSError, ValueError, SyntaxError) as error:
        raise RequestError(f"{field}: the picture cannot be read to its end: {error}", field=field) from error


def _check_audio(data: bytes, field: str, limit: float) -> None:
    soundfile = optional("soundfile", field)

    try:
        info = soundfile.info(io.BytesIO(data))
    except (soundfile.LibsndfileError, RuntimeError, TypeError) as error:
        raise RequestError(f"{field}: no sound of a known format (wav, flac, mp3, ogg)", field=field) from error
    seconds = info.frames / max(1, info.samplerate)
    if seconds * info.channels > limit:
        raise TooLargeError(f"{field}: takes {seconds:.0f} s; allowed are {limit:g} (channels together)", field=field)
    if info.frames == 0:
        raise RequestError(f"{field}: the sound is empty", field=field)
    try:
        for block in soundfile.blocks(io.BytesIO(data), blocksize=1 << 20, dtype="float32"):
            if not np.isfinite(block).all():
                raise RequestError(f"{field}: holds samples that are not finite (NaN or infinity)", field=field)
    except soundfile.LibsndfileError as error:
        raise RequestError(f"{field}: the sound cannot be read to its end: {error}", field=field) from error


def _check_video(data: bytes, field: str, args: ServeArgs) -> None:
    av = optional("av", field)

    try:
        container = av.open(io.BytesIO(data))
    except (av.FFmpegError, OSError, ValueError) as error:
        raise RequestError(f"{field}: no video of a known format", field=field) from error
    with container:
        if not container.streams.video:
            raise RequestError(f"{field}: no video stream", field=field)
        stream = container.streams.video[0]
        pixels = stream.codec_context.width * stream.codec_context.height
        if pixels > args.max_media_pixels:
            text = f"{field}: has {pixels} pixels a frame; allowed are {args.max_media_pixels}"
            raise TooLargeError(text, field=field)
        try:
            pictures = len(list(itertools.islice(container.decode(stream), 2)))
        except (av.FFmpegError, OSError, ValueError) as error:
            raise RequestError(f"{field}: the video cannot be read: {error}", field=field) from error
        if pictures < 2:  # of which vLLM's readers can tell no frame rate
            raise RequestError(f"{field}: the video has {pictures} pictures; 2 are needed at least", field=field)
