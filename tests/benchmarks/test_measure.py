"""What is read off an answer, from pieces with times that are given."""

from __future__ import annotations

import base64
import io
import json
import wave
from typing import Any

import pytest

from tests.benchmarks.fake_server import RATE, delta, wav_head
from vllm_omni.benchmarks.http_client import Answer
from vllm_omni.benchmarks.load import Load, Run, error_message, retry_after
from vllm_omni.benchmarks.measure import Measured, WrongAnswer, read_answer
from vllm_omni.benchmarks.summary import quantile, rows, summarise
from vllm_omni.benchmarks.workload import Call

SPEECH, CHAT, IMAGE = (Call(kind, "x", {}) for kind in ("speech", "chat", "image"))  # type: ignore[arg-type]
LOAD = Load(2, 0.0, None, None, 10.0, False, 0)


def read(call: Call, *pieces: tuple[float, bytes]) -> Measured:
    out = Measured("x", due=10.0, sent=10.0, end=pieces[-1][0])
    read_answer(call, Answer(200, {}, list(pieces), pieces[-1][0]), out)
    return out


def silence(seconds: float) -> bytes:
    return bytes(2 * round(RATE * seconds))


def test_first_sound_is_the_first_sample_not_the_head() -> None:
    measured = read(SPEECH, (10.1, wav_head()), (10.3, silence(0.5)), (10.5, silence(0.5)))
    assert measured.ttfp == pytest.approx(0.3)
    assert measured.audio_seconds == pytest.approx(1.0)
    assert measured.rtf == pytest.approx(0.5)
    assert measured.underrun == 0
    assert measured.ttft is None
    assert measured.tpot is None


@pytest.mark.parametrize("cut", [1, 24, 27, 43, 44, 45])
def test_the_head_may_come_in_parts(cut: int) -> None:
    data = wav_head() + silence(0.5)
    measured = read(SPEECH, (10.1, data[:cut]), (10.2, data[cut:]))
    assert measured.audio_seconds == pytest.approx(0.5, abs=1 / RATE)
    assert measured.ttfp == pytest.approx(0.1 if cut > 44 else 0.2)


def test_underrun_is_the_silence_that_a_listener_hears() -> None:
    """0.1 s of sound that starts at 10.2; the next comes at 10.5 (0.2 s late), the last one in time."""
    measured = read(SPEECH, (10.2, wav_head() + silence(0.1)), (10.5, silence(0.2)), (10.65, silence(0.1)))
    assert measured.underrun == pytest.approx(0.2)
    two = read(SPEECH, (10.0, wav_head() + silence(0.1)), (10.2, silence(0.1)), (10.4, silence(0.1)))
    assert two.underrun == pytest.approx(0.2)


def usage(tokens: int) -> bytes:
    text = {"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": tokens}}
    return b"data: " + json.dumps(text).encode() + b"\n\n"


DONE = b"data: [DONE]\n\n"


def test_text_and_speech_of_a_chat() -> None:
    sound = base64.b64encode(bytes(2 * 2400)).decode()
    measured = read(
        CHAT,
        (10.1, delta(role="assistant", content=None)),
        (10.2, delta(audio={"id": "a", "transcript": "one"})),
        (10.4, delta(audio={"id": "a", "transcript": "two"})[:20]),
        (10.5, delta(audio={"id": "a", "transcript": "two"})[20:] + delta(audio={"id": "a", "data": sound})),
        (10.6, delta(audio={"id": "a", "expires_at": 1}) + usage(4) + DONE),
    )
    assert measured.ttft == pytest.approx(0.2)
    assert measured.itl == pytest.approx([0.3])
    assert measured.tpot == pytest.approx(0.3 / 3)
    assert measured.ttfp == pytest.approx(0.5)
    assert measured.audio_seconds == pytest.approx(0.1)
    assert (measured.prompt_tokens, measured.text_tokens) == (7, 4)


def test_sound_where_the_text_stands() -> None:
    """The form of ``--compat upstream``: files in ``delta.content``, and what they are beside it."""
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setparams((1, 2, 8000, 0, "NONE", ""))
        out.writeframes(bytes(2 * 2000))
    sound = {"modality": "audio", "choices": [{"delta": {"content": base64.b64encode(file.getvalue()).decode()}}]}
    measured = read(CHAT, (10.1, delta(content="x")), (10.3, b"data: " + json.dumps(sound).encode() + b"\n\n" + DONE))
    assert measured.ttft == pytest.approx(0.1)
    assert measured.ttfp == pytest.approx(0.3)
    assert measured.audio_seconds == pytest.approx(0.25)
    assert len(measured.texts) == 1
    sound["choices"][0]["delta"]["content"] = "eHg="  # type: ignore[index]
    with pytest.raises(WrongAnswer, match="not the form"):
        read(CHAT, (10.3, b"data: " + json.dumps(sound).encode() + b"\n\n" + DONE))


def test_an_empty_first_delta_is_no_text() -> None:
    measured = read(CHAT, (10.1, delta(role="assistant", content="")), (10.4, delta(content="x") + DONE))
    assert measured.ttft == pytest.approx(0.4)


@pytest.mark.parametrize(
    ("call", "body", "says"),
    [
        (IMAGE, b'{"data": []}', "no picture"),
        (IMAGE, b"<html>", "not the form"),
        (SPEECH, b"{}", "no wav"),
        (SPEECH, wav_head(), "no sound"),
        (CHAT, delta(content="x"), "cut off"),
        (CHAT, b'event: error\ndata: {"error": {"message": "stage 1 is gone"}}\n\n', "stage 1 is gone"),
        (CHAT, b"data: {\n\n", "not the form"),
    ],
)
def test_what_is_no_answer(call: Call, body: bytes, says: str) -> None:
    with pytest.raises(WrongAnswer, match=says):
        read(call, (10.1, body))


def test_retry_after_and_messages() -> None:
    assert retry_after(Answer(429, {"retry-after": "3"})) == 3
    assert retry_after(Answer(429, {"retry-after": "tomorrow"})) == 1
    assert error_message(Answer(400, {}, [(0.0, b'{"error": {"message": "no"}}')])) == "no"
    assert error_message(Answer(502, {}, [(0.0, b"Bad Gateway")])) == "Bad Gateway"


def finished(label: str, took: float, error: str | None = None, **more: Any) -> Measured:
    return Measured(label, due=1.0, sent=1.0, end=1.0 + took, error=error, message="why", status=200, **more)


def test_quantiles_are_values_that_occurred() -> None:
    values = [float(i) for i in range(1, 101)]
    assert [quantile(values, share) for share in (0.5, 0.9, 0.95, 0.99, 1.0)] == [50, 90, 95, 99, 100]
    assert quantile([3.0], 0.99) == 3


def test_summary() -> None:
    requests = [finished("a", i / 10, images=2) for i in range(1, 11)]
    requests += [
        finished("b", 0.001, "429", retry_after=3.0),
        finished("b", 0.002, "429"),
        finished("b", 9.0, "timeout"),
    ]
    run = Run(begun=0.0, end=10.0, cpu_seconds=1.0, requests=requests)
    out = summarise(run, LOAD, {"e2e": 0.5}, {"0": {"run": 0.25}})
    assert (out["requests"], out["succeeded"], out["requests_per_s"]) == (13, 10, 1.0)
    assert out["e2e"]["p50"] == pytest.approx(0.5)
    assert out["e2e"]["max"] == pytest.approx(1.0)
    assert out["images_per_s"] == 2.0
    waits = out["errors"]["429"].pop("retry_after_s")
    assert (waits["told"], waits["p50"], waits["max"]) == (1, 3.0, 3.0)
    assert out["errors"] == {"429": {"count": 2, "first": "why"}, "timeout": {"count": 1, "first": "why"}}
    assert out["goodput"]["requests_per_s"] == pytest.approx(0.5)
    assert out["goodput"]["share"] == pytest.approx(5 / 13)
    assert out["by_label"]["a"]["e2e"]["p90"] == pytest.approx(0.9)
    assert out["by_label"]["b"] == {"requests": 3, "succeeded": 0, "goodput_share": 0.0}
    assert out["stages"] == {"0": {"run": 0.25}}
    assert not out["client"]["limits"]
    assert "ttft" not in out


def test_objectives_bound_what_there_is() -> None:
    spoken = finished("a", 2.0, sounds=[(1.2, 1.0), (2.4, 1.0)], texts=[1.1])
    assert spoken.meets({"e2e": 2.1, "ttfp": 0.3, "ttft": 0.2, "rtf": 1.1, "underrun": 0.3, "tpot": 0.0})
    for name, bound in {"e2e": 1.9, "ttfp": 0.1, "ttft": 0.05, "rtf": 0.9, "underrun": 0.1}.items():
        assert not spoken.meets({name: bound}), name


def test_rows_are_in_the_order_in_which_they_were_due() -> None:
    requests = [Measured("b", due=3.0, sent=3.5, end=4.0), Measured("a", due=2.0, sent=2.0, end=2.5)]
    listed = rows(Run(begun=1.0, end=4.0, requests=requests))
    assert [row["label"] for row in listed] == ["a", "b"]
    assert listed[1]["due_s"] == 2.0
    assert listed[1]["sent_s"] == 2.5
    assert listed[1]["e2e"] == 1.0
