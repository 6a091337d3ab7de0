"""Qwen2.5-Omni over HTTP, with ``--compat upstream``: answers as the clients of upstream read them; media by URL."""

from __future__ import annotations

import base64
import http.server
import io
import json
import subprocess
import threading
import wave
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.entrypoints.openai.server import Server, error_of
from tests.model_executor.qwen2_5_omni.support import SAMPLES_PER_CODE, Reference
from tests.model_executor.qwen2_5_omni.test_end2end import CODES, TOKENS, short_stages
from tests.model_executor.support import Prompt

PATH = "/v1/chat/completions"
ASK: list[Any] = [{"role": "user", "content": "what is it"}]
BOTH = ["text", "audio"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from vllm_omni.model_executor.tiny_models.qwen2_5_omni import make_tiny_qwen2_5_omni

    return make_tiny_qwen2_5_omni(tmp_path_factory.mktemp("qwen2_5_omni"))


@pytest.fixture(scope="module")
def expected(checkpoint: Path) -> tuple[str, Any, int]:
    """Text and waveform that transformers makes of ``ASK``, and the tokens of its prompt."""
    reference = Reference(checkpoint)
    text = reference.processor.apply_chat_template(ASK, add_generation_prompt=True, tokenize=False)
    spoken = reference.speak(Prompt(text, {}, {}), TOKENS, CODES)
    said = reference.processor.tokenizer.decode(spoken.tokens, skip_special_tokens=True)
    return said, spoken.wave.numpy(), len(reference.processor.tokenizer.encode(text))


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a web server with ``a.png``, ``a.wav`` and ``a.mp4``."""
    import av

    folder = tmp_path_factory.mktemp("media")
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (64, 96, 3), dtype=np.uint8)).save(folder / "a.png")
    with wave.open(str(folder / "a.wav"), "wb") as file:
        file.setparams((1, 2, 16000, 0, "NONE", ""))
        file.writeframes(rng.integers(-9999, 9999, 16000).astype("<i2").tobytes())
    with av.open(str(folder / "a.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=8)
        stream.width = stream.height = 64
        for _ in range(16):
            frame = av.VideoFrame.from_ndarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, directory=str(folder), **kwargs)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://localhost:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(scope="module")
def upstream(checkpoint: Path, media: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    stages = short_stages(checkpoint, tmp_path_factory.mktemp("stages"))
    server = Server(
        *(str(checkpoint), "--stage-configs-path", str(stages), "--served-model-name", "omni", "--omni"),
        *("--compat", "upstream", "--allowed-media-domains", "localhost", "--allow-private-media"),
    )
    yield server
    assert server.stop() == 0, server.log
    assert "Traceback" not in server.log, server.log


def samples(data: str) -> Any:
    """The samples of a base64 WAV file."""
    with wave.open(io.BytesIO(base64.b64decode(data, validate=True))) as file:
        assert file.getframerate() == 24000
        return np.frombuffer(file.readframes(file.getnframes()), "<i2") / 32767


def test_two_choices(upstream: Server, expected: tuple[str, Any, int]) -> None:
    """By OpenAI's client: one choice for the text, one for the sound."""
    answer = upstream.openai.chat.completions.create(model="omni", messages=ASK, extra_body={"modalities": BOTH})
    text, sound = answer.choices
    assert (text.message.content, text.message.audio, text.finish_reason) == (expected[0], None, "length")
    assert sound.message.audio is not None
    assert (sound.message.content, sound.message.audio.transcript) == (None, "")
    assert torch.allclose(
        torch.tensor(samples(sound.message.audio.data)).float(), torch.tensor(expected[1]).float(), atol=2e-3
    )
    assert answer.usage is not None
    assert (answer.usage.completion_tokens, answer.usage.prompt_tokens) == (TOKENS, expected[2])


def test_modality_of_each_chunk(upstream: Server, expected: tuple[str, Any, int]) -> None:
    """Sound comes in delta.content, as files; the pieces together are the whole."""
    stream = upstream.openai.chat.completions.create(
        model="omni", messages=ASK, stream=True, extra_body={"modalities": BOTH}
    )
    text, sound, ends = "", [], []
    for chunk in stream:
        (choice,) = chunk.choices
        kind = chunk.model_dump()["modality"]
        ends.append(choice.finish_reason)
        assert choice.delta.model_dump().get("audio") is None
        if kind == "text":
            text += choice.delta.content or ""
        elif choice.delta.content:
            assert kind == "audio"
            sound.append(samples(choice.delta.content))
    assert text == expected[0]
    assert len(sound) > 1
    assert np.abs(np.concatenate(sound) - expected[1]).max() < 2e-3
    assert [end for end in ends if end] == ["length"]
    assert ends[-1] == "length"


def test_text_alone(upstream: Server, expected: tuple[str, Any, int]) -> None:
    answer = upstream.post(PATH, {"messages": ASK}).json()
    assert [choice["message"]["content"] for choice in answer["choices"]] == [expected[0]]
    chunks = upstream.openai.chat.completions.create(model="omni", messages=ASK, stream=True)
    assert {chunk.model_dump()["modality"] for chunk in chunks} == {"text"}


@pytest.mark.parametrize(("kind", "file"), [("image_url", "a.png"), ("audio_url", "a.wav"), ("video_url", "a.mp4")])
def test_media_by_url(upstream: Server, media: str, expected: tuple[str, Any, int], kind: str, file: str) -> None:
    """What a URL names is read: it has tokens, as many as the same file in a data URL; and the answer is spoken."""
    import httpx

    data = base64.b64encode(httpx.get(f"{media}/{file}").content).decode()
    counts = []
    for url in (f"{media}/{file}", f"data:application/octet-stream;base64,{data}"):
        turn = {"role": "user", "content": [{"type": kind, kind: {"url": url}}, {"type": "text", "text": "what is it"}]}
        answer = upstream.post(PATH, {"messages": [turn], "modalities": BOTH})
        assert answer.status_code == 200, answer.text
        body = answer.json()
        counts.append(body["usage"]["prompt_tokens"])
        assert len(samples(body["choices"][1]["message"]["audio"]["data"])) == CODES * SAMPLES_PER_CODE
    assert counts[0] == counts[1] > expected[2] + 4


def test_wrong_urls(upstream: Server, media: str) -> None:
    for url in (f"{media}/none.png", f"{media}/a.wav", media.replace("localhost", "127.0.0.1") + "/a.png"):
        turn = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}
        answer = upstream.post(PATH, {"messages": [turn]})
        assert (answer.status_code, error_of(answer)["param"]) == (400, "messages.0.content.0.image_url"), answer.text


def test_media_of_a_request_that_was_refused_are_read_again(upstream: Server, media: str) -> None:
    """A request that ends after its media were read, before the engine got them, leaves nothing wrong behind."""
    part = {"type": "image_url", "image_url": {"url": f"{media}/a.png"}}
    turn = {"role": "user", "content": [part, {"type": "text", "text": "say"}]}
    refused = upstream.post(PATH, {"messages": [turn], "stop_token_ids": [10**6]})
    assert (refused.status_code, error_of(refused)["param"]) == (400, "stop_token_ids")
    assert upstream.post(PATH, {"messages": [turn]}).status_code == 200


def test_curl(upstream: Server, tmp_path: Path) -> None:
    """A chat with sound in, and speech in every form of bytes."""
    speech = json.dumps({"input": "say it again", "model": "omni", "voice": "chelsie", "response_format": "flac"})
    command = ["curl", "-sSf", upstream.url + "/v1/audio/speech", "-H", "content-type: application/json"]
    subprocess.run([*command, "-d", speech, "-o", str(tmp_path / "a.flac")], check=True, timeout=60)
    assert (tmp_path / "a.flac").read_bytes().startswith(b"fLaC")
    out = io.BytesIO()
    with wave.open(out, "wb") as file:
        file.setparams((1, 2, 16000, 0, "NONE", ""))
        file.writeframes(bytes(16000))
    sound = {"type": "input_audio", "input_audio": {"data": base64.b64encode(out.getvalue()).decode(), "format": "wav"}}
    body = json.dumps({"messages": [{"role": "user", "content": [sound]}]})
    (tmp_path / "body.json").write_text(body)
    command[2] = upstream.url + PATH
    done = subprocess.run([*command, "-d", f"@{tmp_path / 'body.json'}"], check=True, capture_output=True, timeout=60)
    assert json.loads(done.stdout)["usage"]["prompt_tokens"] > 10


def test_several_answers(upstream: Server, expected: tuple[str, Any, int]) -> None:
    """Text and sound of each follow each other; chunks say which answer they belong to."""
    body = {"messages": ASK, "modalities": BOTH, "n": 2}
    answer = upstream.post(PATH, body).json()
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert [choice["message"]["content"] for choice in answer["choices"]] == [expected[0], None] * 2
    for choice in answer["choices"][1::2]:
        assert np.abs(samples(choice["message"]["audio"]["data"]) - expected[1]).max() < 2e-3
    assert (answer["usage"]["prompt_tokens"], answer["usage"]["completion_tokens"]) == (expected[2], 2 * TOKENS)
    text, sound = ["", ""], [0, 0]
    for chunk in upstream.openai.chat.completions.create(
        model="omni", messages=ASK, stream=True, n=2, extra_body={"modalities": BOTH}
    ):
        (choice,) = chunk.choices
        if chunk.model_dump()["modality"] == "text":
            text[choice.index] += choice.delta.content or ""
        else:
            sound[choice.index] += len(samples(choice.delta.content or ""))
    assert (text, sound) == ([expected[0]] * 2, [len(expected[1])] * 2)
