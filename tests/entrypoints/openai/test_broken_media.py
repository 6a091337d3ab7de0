"""Media that are cut off or damaged: refused by name, for their request alone."""

from __future__ import annotations

import base64
import io
from typing import Any

import av
import numpy as np
import pytest
import soundfile

from tests.entrypoints.openai.server import Server, error_of
from tests.entrypoints.openai.test_chat import PATH, picture_url, sound_file

NOISE = np.random.default_rng(0).standard_normal(8000) / 10
WAV = sound_file(0.5)
PNG = base64.b64decode(picture_url().partition(",")[2])


def sound(samples: Any, kind: str = "WAV", form: str = "PCM_16") -> bytes:
    out = io.BytesIO()
    soundfile.write(out, samples, 16000, format=kind, subtype=form)
    return out.getvalue()


def film(frames: int = 8) -> bytes:
    """An MP4 file of noise, two seconds long."""
    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as file:
        stream = file.add_stream("mpeg4", rate=4)
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        for i in range(frames):
            noise = np.random.default_rng(i).integers(0, 255, (64, 64, 3), dtype=np.uint8)
            file.mux(stream.encode(av.VideoFrame.from_ndarray(noise, format="rgb24")))
        file.mux(stream.encode())
    return out.getvalue()


MP4 = film()


def post(server: Server, kind: str, data: bytes) -> Any:
    url = {"url": f"data:application/octet-stream;base64,{base64.b64encode(data).decode()}"}
    turn = {"role": "user", "content": [{"type": f"{kind}_url", f"{kind}_url": url}, {"type": "text", "text": "what"}]}
    return server.post(PATH, {"messages": [turn], "max_tokens": 1})


@pytest.fixture(autouse=True, scope="module")
def right_ones_are_read_afterwards(omni_server: Server) -> Any:
    yield
    for kind, data in (("audio", WAV), ("image", PNG), ("video", MP4)):
        answer = post(omni_server, kind, data)
        assert answer.status_code == 200, answer.text


@pytest.mark.parametrize(
    ("kind", "data", "message"),
    [
        ("audio", b"", "no sound of a known format"),
        ("audio", WAV[:20] + b"\xff" * 400, "no sound of a known format"),
        ("audio", WAV[:44], "the sound is empty"),
        ("audio", sound(NOISE, "FLAC")[:3000], "cannot be read to its end"),
        ("audio", sound(np.where(np.arange(8000) == 3, np.nan, NOISE), form="FLOAT"), "not finite"),
        ("audio", sound(np.where(np.arange(8000) == 3, np.inf, NOISE), form="DOUBLE"), "not finite"),
        ("image", b"", "no picture of a known format"),
        ("image", PNG[: len(PNG) // 2], "cannot be read to its end"),
        ("video", b"", "no video of a known format"),
        ("video", MP4[:40] + b"\xff" * 2000, "no video of a known format"),
        ("video", MP4[: len(MP4) // 2], "no video of a known format"),
        ("video", MP4[:48] + bytes(len(MP4) // 2) + MP4[48 + len(MP4) // 2 :], "the video cannot be read"),
        ("video", MP4[: len(MP4) // 4] + bytes(len(MP4) // 2) + MP4[3 * len(MP4) // 4 :], "the video cannot be read"),
        ("video", film(1), "has 1 pictures; 2 are needed"),
    ],
)
def test_broken(omni_server: Server, kind: str, data: bytes, message: str) -> None:
    answer = post(omni_server, kind, data)
    assert answer.status_code == 400, answer.text
    assert error_of(answer)["param"] == f"messages.0.content.0.{kind}_url"
    assert message in error_of(answer)["message"]


@pytest.mark.parametrize("length", [1, 200])
def test_too_short_a_sound(omni_server: Server, length: int) -> None:
    answer = post(omni_server, "audio", sound(NOISE[:length]))
    assert answer.status_code == 400, answer.text
    assert error_of(answer)["message"] == f"audio: {length} samples at 16000 Hz; 201 are needed at least"


@pytest.mark.parametrize(("name", "status"), [("min_pixel", 400), ("min_pixels", 200)])
def test_arguments_of_the_processor(omni_server: Server, name: str, status: int) -> None:
    content = [{"type": "image_url", "image_url": {"url": picture_url()}}]
    values = {"messages": [{"role": "user", "content": content}], "max_tokens": 1, "mm_processor_kwargs": {name: 1024}}
    answer = omni_server.post(PATH, values)
    assert answer.status_code == status, answer.text
    if status == 400:
        assert error_of(answer)["param"] == "mm_processor_kwargs"
        assert "did you mean 'min_pixels'" in error_of(answer)["message"]
