"""``/v1/chat/completions`` of a model that reads everything and speaks, by OpenAI's client."""

from __future__ import annotations

import base64
import io
import wave
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from PIL import Image

from tests.entrypoints.openai.server import Server, error_of

PATH = "/v1/chat/completions"
ASK: list[Any] = [{"role": "user", "content": "what is it"}]
SPEAK: dict[str, Any] = {"modalities": ["text", "audio"], "model": "omni"}


def sound_file(seconds: float = 1.0, rate: int = 16000) -> bytes:
    """A WAV file of noise."""
    out = io.BytesIO()
    noise = np.random.default_rng(0).integers(-9999, 9999, int(seconds * rate)).astype("<i2")
    with wave.open(out, "wb") as file:
        file.setparams((1, 2, rate, 0, "NONE", ""))
        file.writeframes(noise.tobytes())
    return out.getvalue()


def picture_url(width: int = 96, height: int = 64) -> str:
    """A picture as a data URL."""
    out = io.BytesIO()
    Image.new("RGB", (width, height), (9, 99, 199)).save(out, "PNG")
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()


def samples(data: str) -> Any:
    """The samples of a base64 WAV file."""
    with wave.open(io.BytesIO(base64.b64decode(data, validate=True))) as file:
        assert (file.getnchannels(), file.getsampwidth(), file.getframerate()) == (1, 2, 24000)
        return np.frombuffer(file.readframes(file.getnframes()), "<i2")


@pytest.fixture(scope="module")
def expected(omni_checkpoint: Path) -> tuple[str, Any]:
    """Text and waveform that transformers makes of ``ASK``."""
    from tests.model_executor.qwen3_omni.support import Reference
    from tests.model_executor.support import Prompt

    reference = Reference(omni_checkpoint)
    text = reference.processor.apply_chat_template(ASK, add_generation_prompt=True, tokenize=False)
    spoken = reference.speak(Prompt(text, {}, {}), 8, 12)
    tokens = reference.processor.tokenizer.decode(spoken.tokens, skip_special_tokens=True)
    return tokens, spoken.wave.numpy()


def test_text(omni_server: Server, expected: tuple[str, Any]) -> None:
    answer = omni_server.openai.chat.completions.create(model="omni", messages=ASK)
    (choice,) = answer.choices
    assert (choice.message.content, choice.finish_reason) == (expected[0], "length")
    assert choice.message.audio is None
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 8
    assert answer.usage.prompt_tokens > 3


def test_text_is_streamed(omni_server: Server, expected: tuple[str, Any]) -> None:
    stream = omni_server.openai.chat.completions.create(
        model="omni", messages=ASK, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    text = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices and chunk.choices[0].delta.content]
    assert "".join(text) == expected[0]
    assert len(text) > 1
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 8
    assert len({chunk.id for chunk in chunks}) == 1


def test_speech(omni_server: Server, expected: tuple[str, Any]) -> None:
    answer = omni_server.openai.chat.completions.create(
        messages=ASK, audio={"voice": "Ethan", "format": "wav"}, **SPEAK
    )
    audio = answer.choices[0].message.audio
    assert audio is not None
    assert answer.choices[0].message.content is None
    assert audio.transcript == expected[0]
    assert np.abs(samples(audio.data) / 32767 - expected[1]).max() < 2e-3


def test_speech_is_streamed(omni_server: Server, expected: tuple[str, Any]) -> None:
    """The pieces together are the whole, and the transcript comes beside them."""
    stream = omni_server.openai.chat.completions.create(
        messages=ASK, stream=True, audio={"voice": "Ethan", "format": "pcm16"}, **SPEAK
    )
    text, sound, order = "", b"", []
    for chunk in stream:
        audio = chunk.choices[0].delta.model_dump().get("audio") or {}
        text += audio.get("transcript") or ""
        sound += base64.b64decode(audio.get("data") or "")
        order += [name for name in ("transcript", "data") if audio.get(name)]
    assert text == expected[0]
    assert np.abs(np.frombuffer(sound, "<i2") / 32767 - expected[1]).max() < 2e-3
    assert order.count("data") == 2


@pytest.mark.parametrize(("form", "magic"), [("flac", b"fLaC"), ("mp3", b""), ("opus", b"OggS"), ("pcm16", b"")])
def test_forms_of_speech(omni_server: Server, form: Any, magic: bytes, expected: tuple[str, Any]) -> None:
    import soundfile

    answer = omni_server.post(PATH, {"messages": ASK, **SPEAK, "audio": {"format": form}})
    data = base64.b64decode(answer.json()["choices"][0]["message"]["audio"]["data"])
    if form == "pcm16":
        assert len(data) == 2 * len(expected[1])
        return
    assert data.startswith(magic)
    assert soundfile.info(io.BytesIO(data)).duration == pytest.approx(len(expected[1]) / 24000, abs=0.1)


def test_sampling(omni_server: Server) -> None:
    body = {"messages": ASK, "max_completion_tokens": 3, "logprobs": True, "top_logprobs": 2, "temperature": 0}
    answer = omni_server.post(PATH, body).json()
    assert answer["usage"]["completion_tokens"] == 3
    rows = answer["choices"][0]["logprobs"]["content"]
    assert len(rows) == 3
    for row in rows:
        assert row["logprob"] <= 0
        assert row["top_logprobs"][0]["token"] == row["token"]
        assert len(row["top_logprobs"]) == 2
    lists = [{"max_tokens": 2}, {}, {}]
    assert (
        omni_server.post(PATH, {"messages": ASK, "sampling_params_list": lists}).json()["usage"]["completion_tokens"]
        == 2
    )


def count(server: Server, *parts: dict[str, Any]) -> int:
    """Prompt tokens of a turn with these parts."""
    turn = {"role": "user", "content": [*parts, {"type": "text", "text": "what is it"}]}
    answer = server.post(PATH, {"messages": [turn], "max_tokens": 1})
    assert answer.status_code == 200, answer.text
    return int(answer.json()["usage"]["prompt_tokens"])


def test_media(omni_server: Server, tmp_path: Path) -> None:
    """Pictures and sound come in every form that the settings allow, and are read: they have tokens."""
    bare = count(omni_server)
    picture = {"type": "image_url", "image_url": {"url": picture_url()}}
    sound = base64.b64encode(sound_file()).decode()
    assert count(omni_server, picture) > bare + 4
    heard = count(omni_server, {"type": "input_audio", "input_audio": {"data": sound, "format": "wav"}})
    assert heard > bare + 4
    url = {"type": "audio_url", "audio_url": {"url": "data:audio/wav;base64," + sound}}
    assert count(omni_server, url) == heard
    words = omni_server.process.args
    assert isinstance(words, list)
    folder = Path(words[words.index("--allowed-local-media-path") + 1])
    (folder / "a.wav").write_bytes(sound_file())
    assert count(omni_server, {"type": "audio_url", "audio_url": {"url": f"file://{folder}/a.wav"}}) == heard


@pytest.mark.parametrize(
    ("part", "status"),
    [
        ({"type": "image_url", "image_url": {"url": "data:image/png;base64,@@@"}}, 400),
        ({"type": "image_url", "image_url": {"url": "data:image/png;base64,aGVsbG8="}}, 400),
        ({"type": "image_url", "image_url": {"url": picture_url(1001, 1000)}}, 413),
        ({"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 2_000_000}}, 413),
        ({"type": "image_url", "image_url": {"url": "data:,x"}}, 400),
        ({"type": "image_url", "image_url": {"url": "ftp://localhost/x.png"}}, 400),
        ({"type": "image_url", "image_url": {"url": "http://localhost:9/x.png"}}, 400),
        ({"type": "image_url", "image_url": {"url": "http://127.0.0.1:9/x.png"}}, 400),
        ({"type": "image_url", "image_url": {"url": "http://localhost@169.254.169.254/"}}, 400),
        ({"type": "image_url", "image_url": {"url": "http://[::1"}}, 400),
        ({"type": "image_url", "image_url": {"url": "https://example.com/x.png"}}, 400),
        ({"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}, 400),
        ({"type": "image_url", "image_url": {"url": 7}}, 400),
        ({"type": "image_url"}, 400),
        ({"type": "input_audio", "input_audio": {"data": "aGVsbG8=", "format": "wav"}}, 400),
        ({"type": "input_audio", "input_audio": {"data": "", "format": "wav"}}, 400),
        (
            {
                "type": "input_audio",
                "input_audio": {"data": base64.b64encode(sound_file(200, 1000)).decode(), "format": "wav"},
            },
            413,
        ),
        ({"type": "video_url", "video_url": {"url": "data:video/mp4;base64,aGVsbG8="}}, 400),
        ({"type": "image_embeds", "image_embeds": "x"}, 400),
        ({"text": "x"}, 400),
        ({"type": "text", "text": 7}, 400),
    ],
)
def test_wrong_media(omni_server: Server, part: dict[str, Any], status: int) -> None:
    answer = omni_server.post(PATH, {"messages": [{"role": "user", "content": [part]}]})
    assert answer.status_code == status, answer.text
    assert error_of(answer)["param"].startswith("messages.0.content.0")
    assert "root:" not in answer.text


@pytest.mark.parametrize(
    ("change", "param", "status"),
    [
        ({"messages": []}, "messages", 400),
        ({"messages": [{"role": "king", "content": "x"}]}, "messages.0.role", 400),
        ({"messages": "x"}, "messages", 400),
        ({"temperature": 3}, "temperature", 400),
        ({"max_tokens": 0}, "max_tokens", 400),
        ({"max_tokens": 2**31}, "max_tokens", 400),
        ({"max_completion_tokens": 10**30}, "max_completion_tokens", 400),
        ({"top_k": 10**30, "temperature": 1}, "top_k", 400),
        ({"sampling_params_list": [{}, {"max_tokens": 10**30}, {}]}, "sampling_params_list.1", 400),
        ({"n": 2}, "n", 400),
        ({"top_logprobs": 2}, "top_logprobs", 400),
        ({"modalities": ["image"]}, "modalities", 400),
        ({"modalities": ["smell"]}, "modalities.0", 400),
        ({"audio": {"format": "wav"}}, "audio", 400),
        ({**SPEAK, "audio": {"voice": "../Ethan"}}, "audio.voice", 404),
        ({**SPEAK, "audio": {"format": "wav"}, "stream": True}, "audio.format", 400),
        ({"stream_options": {"include_usage": True}}, "stream_options", 400),
        ({"size": "64x64"}, "size", 400),
        ({"sampling_params_list": [{}]}, "sampling_params_list", 400),
        ({"sampling_params_list": [{}, {}, {"temperature": 0.5}]}, "sampling_params_list.2", 400),
        ({"sampling_params_list": [{"temperatur": 1}, {}, {}]}, "sampling_params_list.0", 400),
        ({"sampling_params_list": [{}, {"stop_token_ids": ["x"]}, {}]}, "sampling_params_list.1", 400),
        ({"sampling_params_list": [{}, {"temperature": -1}, {}]}, "sampling_params_list.1", 400),
        ({"sampling_params_list": [{}, {"top_k": "many"}, {}]}, "sampling_params_list.1", 400),
        ({"sampling_params_list": [{"extra_args": {"omni": 1}}, {}, {}]}, "sampling_params_list.0", 400),
        ({"sampling_params_list": [{"logits_processors": []}, {}, {}]}, "sampling_params_list.0", 400),
        ({"tools": []}, "tools", 400),
        ({"model": "gpt"}, "model", 404),
        ({"messages": [{"role": "user", "content": "long " * 2000}]}, "messages", 400),
        ({"messages": [{"role": "user", "content": "x" * 600_000}] * 2}, "messages", 413),
        ({"response_format": {"type": "json_schema"}}, "response_format", 400),
    ],
)
def test_wrong_field(omni_server: Server, change: dict[str, Any], param: str, status: int) -> None:
    answer = omni_server.post(PATH, {"messages": ASK, **change})
    assert answer.status_code == status, answer.text
    assert error_of(answer)["param"] == param


def test_model_without_pictures(omni_server: Server) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        omni_server.openai.images.generate(prompt="x", model="omni")
    assert "makes audio and text" in str(caught.value)


def test_pictures_by_chat(pictures: Server) -> None:
    turn = {"role": "user", "content": [{"type": "text", "text": "two words"}]}
    extra = {"height": 32, "width": 48, "seed": 5, "num_outputs_per_prompt": 2}
    answer = pictures.openai.chat.completions.create(model="painter", messages=[turn], extra_body=extra)  # type: ignore[list-item]
    parts: Any = answer.choices[0].message.content
    assert [part["type"] for part in parts] == ["image_url"] * 2
    data = parts[0]["image_url"]["url"].removeprefix("data:image/png;base64,")
    image = Image.open(io.BytesIO(base64.b64decode(data, validate=True)))
    assert (image.size, image.getpixel((0, 0))) == ((48, 32), (2, 0, 5))


def test_pictures_by_chat_are_streamed(pictures: Server) -> None:
    stream = pictures.openai.chat.completions.create(
        model="painter", messages=[{"role": "user", "content": "steps"}], stream=True
    )
    chunks = [chunk.model_dump() for chunk in stream]
    assert [chunk["progress"]["step"] for chunk in chunks if "progress" in chunk] == [1, 2, 3]
    (content,) = [c["choices"][0]["delta"]["content"] for c in chunks if c["choices"][0]["delta"].get("content")]
    assert content[0]["image_url"]["url"].startswith("data:image/png;base64,")
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"temperature": 1.0}, "temperature"),
        ({"modalities": ["audio"]}, "modalities"),
        ({"messages": [{"role": "user", "content": ""}]}, "messages"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "messages"),
        ({"width": 4096, "height": 4096}, "size"),
        ({"width": 64}, "size"),
    ],
)
def test_wrong_pictures_by_chat(pictures: Server, change: dict[str, Any], param: str) -> None:
    answer = pictures.post(PATH, {"messages": ASK, **change})
    assert (answer.status_code, error_of(answer)["param"]) == (400, param)


def test_a_listener_that_leaves_frees_its_request(omni_server: Server) -> None:
    import time

    body = {"messages": ASK, "stream": True, "max_tokens": 400, "ignore_eos": True}
    with httpx.Client(base_url=omni_server.url) as client, client.stream("POST", PATH, json=body) as answer:
        pieces = answer.iter_text()
        next(pieces)
    deadline = time.monotonic() + 10
    while omni_server.http.get("/health").json()["open_requests"]:
        assert time.monotonic() < deadline
