"""``return_stage_metrics``: where the time of a chat or of speech went, for those who ask."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.entrypoints.openai.server import Server, error_of

CHAT = "/v1/chat/completions"
SPEECH = "/v1/audio/speech"
TURNS = {"messages": [{"role": "user", "content": "what is it"}]}
SPOKEN = {"modalities": ["text", "audio"], "audio": {"format": "pcm16"}}


def events(server: Server, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    """The events of a stream."""
    with server.http.stream("POST", path, json=body) as answer:
        assert answer.status_code == 200
        lines = [line[6:] for line in answer.iter_lines() if line.startswith("data: ")]
    return [json.loads(line) for line in lines if line != "[DONE]"]


def check(metrics: dict[str, Any], stages: set[str]) -> None:
    """Every stage that ran has all of its times."""
    assert set(metrics["stages"]) == stages
    for times in metrics["stages"].values():
        assert {"start_s", "wait_s", "transfer_s", "queue_s", "run_s"} <= set(times)
        assert min(times.values()) >= 0
        assert times["run_s"] > 0


@pytest.mark.parametrize(("more", "stages"), [({}, {"0"}), (SPOKEN, {"0", "1", "2"})])
def test_chat(omni_server: Server, more: dict[str, Any], stages: set[str]) -> None:
    body = {**TURNS, **more, "return_stage_metrics": True}
    check(omni_server.post(CHAT, body).json()["metrics"], stages)
    chunks = events(omni_server, CHAT, {**body, "stream": True})
    assert [chunk for chunk in chunks if "metrics" in chunk] == [chunks[-1]]
    assert chunks[-1]["choices"][0]["finish_reason"]
    check(chunks[-1]["metrics"], stages)


@pytest.mark.parametrize("stream", [False, True])
def test_pictures_by_chat(pictures: Server, stream: bool) -> None:
    body = {"messages": [{"role": "user", "content": "a steps"}], "stream": stream, "return_stage_metrics": True}
    answer = events(pictures, CHAT, body)[-1] if stream else pictures.post(CHAT, body).json()
    check(answer["metrics"], {"0"})


def test_speech(omni_server: Server) -> None:
    body = {"input": "what is it", "response_format": "pcm", "return_stage_metrics": True}
    last = events(omni_server, SPEECH, {**body, "stream_format": "sse"})[-1]
    assert last["type"] == "speech.audio.done"
    check(last["metrics"], {"0", "1", "2"})
    assert error_of(omni_server.post(SPEECH, body))["param"] == "return_stage_metrics"


def test_who_does_not_ask_gets_none(omni_server: Server) -> None:
    assert "metrics" not in omni_server.post(CHAT, TURNS).json()
    assert all("metrics" not in chunk for chunk in events(omni_server, CHAT, {**TURNS, "stream": True}))
