"""The requests of the workloads: the same in every run, and taken by the server's own checks."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest

from vllm_omni.benchmarks.args import BenchArgs
from vllm_omni.benchmarks.workload import Call, Target, calls, parse_shape
from vllm_omni.entrypoints.openai.chat_protocol import ChatCompletionRequest
from vllm_omni.entrypoints.openai.images import ImageGenerationRequest, parse_size
from vllm_omni.entrypoints.openai.speech import SpeechRequest
from vllm_omni.errors import ConfigError

PAINTER = Target("painter", frozenset({"image"}), 1)
OMNI = Target("omni", frozenset({"text", "audio"}), 3)
WRITER = Target("writer", frozenset({"text"}), 1)
MODELS = {"image": ImageGenerationRequest, "speech": SpeechRequest, "chat": ChatCompletionRequest}


def some(target: Target, count: int = 5, **settings: Any) -> list[Call]:
    return list(itertools.islice(calls(BenchArgs(**settings), target), count))


@pytest.mark.parametrize(
    ("workload", "target"),
    [
        *[("small", target) for target in (PAINTER, OMNI, WRITER)],
        *[("t2i", PAINTER), ("mixed", PAINTER), ("tts", OMNI), ("omni", OMNI), ("omni", WRITER)],
    ],
)
def test_requests_fit_the_server_and_are_the_same_every_time(workload: Any, target: Target) -> None:
    made = some(target, 20, workload=workload)
    for call in made:
        assert MODELS[call.kind].model_validate_json(call.encoded())
    assert made == some(target, 20, workload=workload)
    assert made != some(target, 20, workload=workload, seed=1)
    assert len({call.encoded() for call in made}) == 20, "a server could answer from a cache"


def test_mixed_sizes_have_their_weights_and_one_order() -> None:
    labels = [call.label for call in some(PAINTER, 100, workload="mixed")]
    assert labels == [call.label for call in some(PAINTER, 100, workload="mixed", seed=7)]
    counts = Counter([call.label for call in some(PAINTER, 4000, workload="mixed")])
    shares = {label: count / 4000 for label, count in counts.items()}
    expected = {"512x512/20": 0.15, "768x768/20": 0.25, "1024x1024/25": 0.45, "1536x1536/35": 0.15}
    assert shares == pytest.approx(expected, abs=0.03)


def test_pictures_of_one_shape() -> None:
    (call,) = some(PAINTER, 1, workload="t2i", shape="512x256/20", true_cfg_scale=3.0)
    assert (call.body["size"], call.body["num_inference_steps"], call.body["true_cfg_scale"]) == ("512x256", 20, 3.0)
    assert parse_size(call.body["size"], 2**20) == {"width": 512, "height": 256}
    assert len(call.body["prompt"].split()) == 40
    (usual,) = some(PAINTER, 1, workload="t2i")
    assert usual.label == "1024x1024/50"
    assert usual.body["true_cfg_scale"] == 4.0


def test_small_pictures_leave_everything_to_the_model() -> None:
    (call,) = some(PAINTER, 1)
    assert set(call.body) == {"model", "prompt", "seed"}


def test_lengths_of_chats() -> None:
    (call,) = some(OMNI, 1, workload="omni", input_tokens=30, output_tokens=50)
    body = call.body
    assert len(body["messages"][0]["content"].split()) == 30
    assert (body["max_tokens"], body["min_tokens"], body["ignore_eos"]) == (50, 50, True)
    assert body["sampling_params_list"] == [{}, {"max_tokens": 180, "min_tokens": 180, "ignore_eos": True}, {}]
    (free,) = some(OMNI, 1, workload="omni", frames_per_token=0)
    assert "sampling_params_list" not in free.body
    (silent,) = some(WRITER, 1, workload="omni")
    assert "modalities" not in silent.body


def test_speech() -> None:
    (call,) = some(OMNI, 1, workload="tts", input_tokens=12, output_tokens=9)
    assert len(call.body["input"].split()) == 12
    assert call.body["max_new_tokens"] == 9
    assert call.body["stream"]


@pytest.mark.parametrize(
    ("workload", "target", "kind"),
    [("t2i", OMNI, "image"), ("mixed", OMNI, "image"), ("tts", PAINTER, "audio"), ("omni", PAINTER, "text")],
)
def test_a_model_that_does_not_make_it(workload: Any, target: Target, kind: str) -> None:
    with pytest.raises(ConfigError, match=f"asks for {kind}"):
        some(target, 1, workload=workload)


@pytest.mark.parametrize(
    ("settings", "target", "says"),
    [
        ({}, Target("filmer", frozenset({"video"}), 1), "none for models that make video, as filmer does"),
        ({"workload": "mixed"}, replace(PAINTER, max_pixels=1536 * 1535), "workload: 1536x1536 has"),
        ({"workload": "t2i"}, replace(PAINTER, max_pixels=10), "shape: 1024x1024 has 1048576 pixels"),
    ],
)
def test_what_the_model_cannot_do_is_refused(settings: Any, target: Target, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        some(target, 1, **settings)


def test_pictures_of_the_largest_size_are_asked_for() -> None:
    assert len(some(replace(PAINTER, max_pixels=1536 * 1536), 3, workload="mixed")) == 3


@pytest.mark.parametrize("shape", ["", "512", "512x512", "512x512/0", "512/20", "512x512/20/1"])
def test_wrong_shapes(shape: str) -> None:
    with pytest.raises(ConfigError, match="WIDTHxHEIGHT/STEPS"):
        parse_shape(shape)


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"concurrency": [1], "request_rate": [1]}, "concurrency"),
        ({"concurrency": [0]}, "concurrency"),
        ({"concurrency": [1.5]}, "concurrency"),
        ({"request_rate": [0], "duration": 1}, "request_rate"),
        ({"request_rate": [1]}, "duration"),
        ({"num_requests": 0}, "num_requests"),
        ({"duration": 0}, "duration"),
        ({"timeout": 0}, "timeout"),
        ({"wait": -1}, "wait"),
        ({"warmup": -1}, "warmup"),
        ({"slo": ["e2e"]}, "slo"),
        ({"slo": ["speed=1"]}, "slo"),
        ({"slo": ["e2e=-1"]}, "slo"),
        ({"slo": ["e2e=nan"]}, "slo"),
        ({"shape": "512x512/20"}, "shape"),
        ({"workload": "tts", "true_cfg_scale": 2.0}, "true_cfg_scale"),
        ({"workload": "t2i", "input_tokens": 2}, "input_tokens"),
        ({"workload": "mixed", "output_tokens": 2}, "output_tokens"),
        ({"workload": "tts", "frames_per_token": 2}, "frames_per_token"),
        ({"workload": "omni", "frames_per_token": -2}, "frames_per_token"),
    ],
)
def test_wrong_settings(settings: Any, field: str) -> None:
    with pytest.raises(ConfigError) as caught:
        BenchArgs(**settings)
    assert caught.value.details["field"] == field


def test_loads() -> None:
    assert BenchArgs().loads == [(1, 0.0)]
    assert BenchArgs(concurrency=[1, 8]).loads == [(1, 0.0), (8, 0.0)]
    assert BenchArgs(request_rate=[0.5, 2], duration=1).loads == [(0, 0.5), (0, 2)]
