"""``/v1/audio/speech`` by OpenAI's client: files, streams, events."""

from __future__ import annotations

import base64
import io
import json
from typing import Any

import numpy as np
import openai
import pytest
import soundfile

from tests.entrypoints.openai.server import Server, error_of
from vllm_omni.entrypoints.openai.speech import INSTRUCTIONS

PATH = "/v1/audio/speech"
ASK: dict[str, Any] = {"input": "hello there", "model": "omni", "seed": 3}


@pytest.fixture(scope="module")
def whole(omni_server: Server) -> Any:
    """The samples of ``ASK``."""
    answer = omni_server.post(PATH, ASK)
    assert (answer.status_code, answer.headers["content-type"]) == (200, "audio/wav")
    samples, rate = soundfile.read(io.BytesIO(answer.content), dtype="int16")
    assert rate == 24000
    assert len(samples) == 12 * 1920 - 555
    assert np.abs(samples).max() > 0
    return samples


def test_voices(omni_server: Server, pictures: Server) -> None:
    names = omni_server.http.get("/v1/audio/voices").json()["voices"]
    assert sorted(names) == ["aiden", "chelsie", "ethan"]
    assert pictures.http.get("/v1/audio/voices").status_code == 400


def close(samples: Any, whole: Any) -> bool:
    """Whether two answers are the same: windows of sound that are made in one batch round as that batch does."""
    return len(samples) == len(whole) and int(np.abs(samples.astype(int) - whole.astype(int)).max()) <= 33


@pytest.mark.parametrize("form", ["pcm", "flac", "mp3", "opus"])
def test_forms(omni_server: Server, whole: Any, form: Any) -> None:
    answer = omni_server.openai.audio.speech.create(
        input="hello there", model="omni", voice="Ethan", response_format=form, extra_body={"seed": 3}
    )
    if form == "pcm":
        assert close(np.frombuffer(answer.content, "<i2"), whole)
        return
    samples, _ = soundfile.read(io.BytesIO(answer.content), dtype="int16")
    if form == "flac":
        assert close(samples, whole)
    assert len(samples) == pytest.approx(len(whole), abs=2500)


def test_another_voice_is_heard(omni_server: Server, whole: Any) -> None:
    other = omni_server.post(PATH, {**ASK, "speaker": "Chelsie", "response_format": "pcm"})
    assert not np.array_equal(np.frombuffer(other.content, "<i2"), whole)


@pytest.mark.parametrize("form", ["wav", "pcm"])
def test_a_stream_is_the_whole(omni_server: Server, whole: Any, form: str) -> None:
    with omni_server.http.stream("POST", PATH, json={**ASK, "stream": True, "response_format": form}) as answer:
        assert answer.headers["content-type"] == f"audio/{form}"
        assert "content-length" not in answer.headers
        pieces = list(answer.iter_raw())
    assert len(pieces) >= 2
    data = b"".join(pieces)
    got = np.frombuffer(data[44:] if form == "wav" else data, "<i2")
    assert np.abs(got.astype(int) - whole).max() <= 8
    if form == "wav":
        assert soundfile.info(io.BytesIO(data)).samplerate == 24000


def test_events(omni_server: Server, whole: Any) -> None:
    body = {**ASK, "stream_format": "sse", "response_format": "pcm"}
    with omni_server.http.stream("POST", PATH, json=body) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        events = [json.loads(line[6:]) for line in answer.iter_lines() if line.startswith("data: ")]
    assert [event["type"] for event in events] == ["speech.audio.delta"] * 2 + ["speech.audio.done"]
    data = b"".join(base64.b64decode(event["audio"]) for event in events[:-1])
    assert events[-1]["bytes"] == len(data) == 2 * len(whole)
    usage = events[-1]["usage"]
    asked = f"{INSTRUCTIONS}\n\n{ASK['input']}"
    turn = {"messages": [{"role": "user", "content": asked}], "max_tokens": 1}
    told = omni_server.post("/v1/chat/completions", turn).json()["usage"]
    assert usage == {"input_tokens": told["prompt_tokens"], "output_tokens": None, "total_tokens": None}


@pytest.mark.parametrize("form", ["wav", "pcm", "flac", "mp3", "opus", "sse"])
def test_streaming_responses_of_the_client(omni_server: Server, whole: Any, form: Any) -> None:
    """What the client reads piece by piece is the file; as events, as files that come as they are made, or at once."""
    ways: list[dict[str, Any]] = [{"response_format": form}]
    if form in ("wav", "pcm"):
        ways.append({"response_format": form, "stream_format": "audio"})
    if form == "sse":
        ways = [{"response_format": "pcm", "stream_format": "sse"}]
    for way in ways:
        with omni_server.openai.audio.speech.with_streaming_response.create(
            input="hello there", model="omni", voice="Ethan", extra_body={"seed": 3}, **way
        ) as answer:
            assert answer.request_id
            data = b"".join(answer.iter_bytes(1000))
        if form == "sse":
            events = [json.loads(line[6:]) for line in data.decode().splitlines() if line.startswith("data: ")]
            data = b"".join(base64.b64decode(event["audio"]) for event in events if "audio" in event)
        if form in ("pcm", "sse"):
            samples = np.frombuffer(data, "<i2")
        elif len(way) == 2:
            samples = np.frombuffer(data[44:], "<i2")
        else:
            samples, _ = soundfile.read(io.BytesIO(data), dtype="int16")
        if form in ("mp3", "opus"):
            assert len(samples) == pytest.approx(len(whole), abs=2500)
        else:
            assert close(samples, whole)


@pytest.mark.parametrize(
    ("change", "param", "status"),
    [
        ({"input": ""}, "input", 400),
        ({"input": "x" * 5000}, "input", 400),
        ({"voice": "../../etc/passwd"}, "voice", 404),
        ({"voice": 7}, "voice", 400),
        ({"response_format": "aac"}, "response_format", 400),
        ({"response_format": "mp3", "stream": True}, "response_format", 400),
        ({"speed": 2}, "speed", 400),
        ({"ref_audio": "file:///etc/passwd"}, "ref_audio", 400),
        ({"model": "tts-1"}, "model", 404),
        ({"max_new_tokens": 1}, "input", 400),
        ({"max_new_tokens": 1, "stream": True}, "input", 400),
    ],
)
def test_wrong_field(omni_server: Server, change: dict[str, Any], param: str, status: int) -> None:
    answer = omni_server.post(PATH, {**ASK, **change})
    assert (answer.status_code, error_of(answer)["param"]) == (status, param)


def test_model_that_does_not_speak(pictures: Server) -> None:
    with pytest.raises(openai.BadRequestError):
        pictures.openai.audio.speech.create(input="x", model="painter", voice="alloy")
