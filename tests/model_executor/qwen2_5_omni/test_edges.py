"""The edges as pure functions: no engine, no checkpoint."""

from typing import Any

import pytest
import torch
from transformers import Qwen2_5OmniConfig
from vllm.sampling_params import SamplingParams

from vllm_omni.errors import ConfigError, RequestError
from vllm_omni.inputs.edge import EdgeInput
from vllm_omni.model_executor.models.qwen2_5_omni.token2wav import GRAPHED_BLOCKS, GRAPHED_CODES
from vllm_omni.model_executor.stage_input_processors.codec_chunks import ChunkSchedule, FrameStream
from vllm_omni.model_executor.stage_input_processors.qwen2_5_omni import talker2token2wav, thinker2talker
from vllm_omni.model_executor.tiny_models.qwen2_5_omni import tiny_config

PROMPT = {"prompt": "hi", "additional_information": {"speaker": "Ethan"}}
EXTRA = {
    "initial_codec_chunk_frames": 4,
    "codec_chunk_frames": 16,
    "codec_left_context_frames": 20,
    "codec_right_context_frames": 6,
}


@pytest.fixture(scope="module")
def config() -> Any:
    return Qwen2_5OmniConfig(**{key: value for key, value in tiny_config().items() if key != "architectures"})


def windows(config: Any, outputs: list[list[int]], **values: Any) -> list[dict[str, Any]]:
    """What token2wav gets when the talker's ``outputs`` come one by one."""
    carry: dict[str, Any] = {}
    made = []
    for i, codes in enumerate(outputs):
        data = [{"token_ids": codes}]
        edge_values = {"sampling_params": None, "extra": EXTRA, **values}
        edge = EdgeInput("r", {1: data}, PROMPT, carry=carry, last=i == len(outputs) - 1, config=config, **edge_values)
        prompt = talker2token2wav(edge)
        if prompt is not None:
            made.append(prompt["additional_information"])
    return made


def test_windows_cover_every_code_once(config: Any) -> None:
    codes = list(range(100, 171))
    made = windows(config, [[code] for code in codes] + [[8294]])
    heard = [code for window in made for code in window["codes"][slice(*window["keep"])]]
    assert heard == codes
    fresh = [window["keep"][1] - window["keep"][0] for window in made]
    assert fresh[:4] == [4, 8, 16, 16]
    for window in made:
        assert window["offset"] % 12 == 0, "a window starts at a block of the flow"
        assert window["codes"] == codes[window["offset"] : window["offset"] + len(window["codes"])]
        first = window["offset"] + window["keep"][0]
        assert window["keep"][0] >= min(20, first)
        assert window["speaker"] == "Ethan"
    assert len(made[0]["codes"]) == 12, "a whole block"
    for window in made[1:-1]:
        assert len(window["codes"]) - window["keep"][1] == 6


def test_without_streaming_there_is_one_window(config: Any) -> None:
    (window,) = windows(config, [[5, 6, 7, 8292]])
    assert (window["codes"], window["offset"], window["keep"]) == ([5, 6, 7], 0, [0, 3])


def test_a_talker_that_says_nothing(config: Any) -> None:
    assert windows(config, [[8294]]) == []


def test_settings_of_the_flow_travel(config: Any) -> None:
    params = SamplingParams(seed=3, extra_args={"num_steps": 5})
    (window,) = windows(config, [[5]], sampling_params=params)
    assert (window["seed"], window["num_steps"]) == (3, 5)
    assert "seed" not in windows(config, [[5]])[0]
    with pytest.raises(RequestError, match="did you mean 'num_steps'"):
        windows(config, [[5]], sampling_params=SamplingParams(extra_args={"num_step": 5}))


def test_default_windows_are_those_that_are_captured(config: Any) -> None:
    """The first comes after 24 codes; blocks and vocoder lengths of a long stream and of every last window."""
    whole = list(range(100, 600))
    for count in (*range(30, 180, 7), 500):
        made = windows(config, [[code] for code in whole[:count]] + [[8294]], extra={})
        heard = [code for window in made for code in window["codes"][slice(*window["keep"])]]
        assert heard == whole[:count]
        for number, window in enumerate(made[:-1]):
            most = (24, 48, 84, 144, 168)[min(number, 4)]
            assert len(window["codes"]) == most, "full blocks"
            assert -(-most // 12) in GRAPHED_BLOCKS
        for window in made:
            decoded = window["keep"][1] - window["keep"][0] + min(20, window["keep"][0])
            decoded += min(20, len(window["codes"]) - window["keep"][1])
            fits = any(decoded <= size <= len(window["codes"]) for size in GRAPHED_CODES)
            assert fits or (window is made[-1] and window["offset"] == 0)
    fresh = [window["keep"][1] - window["keep"][0] for window in made]
    assert fresh[:6] == [8, 16, 36, 72, 96, 96]


def test_a_first_window_is_no_larger_than_the_later_ones(config: Any) -> None:
    """The model's own first window shrinks with them; one that is asked for is refused."""
    extra = {"codec_chunk_frames": 6, "codec_right_context_frames": 4}
    made = windows(config, [[code] for code in range(40)], extra=extra)
    assert made[0]["keep"] == [0, 6]
    assert len(made[0]["codes"]) == 12
    with pytest.raises(ConfigError, match="initial_codec_right_context_frames=5 is more than"):
        windows(config, [[5]], extra={**extra, "initial_codec_right_context_frames": 5})


def test_a_second_window_does_not_come_later_for_its_context() -> None:
    """It needs as many fewer new codes as it waits for more codes after them than the first does."""
    extra = {**EXTRA, "codec_chunk_frames": 24, "initial_codec_chunk_frames": 8, "codec_left_context_frames": 0}
    extra |= {"codec_right_context_frames": 12, "initial_codec_right_context_frames": 4}
    schedule = ChunkSchedule.of(extra)
    assert [schedule.size(i) for i in range(4)] == [8, 8, 24, 24]
    assert [schedule.ahead(i) for i in range(3)] == [4, 12, 12]
    assert ChunkSchedule.of({**extra, "initial_codec_chunk_frames": 2}).size(1) == 1, "one at least"
    assert ChunkSchedule.of({**extra, "initial_codec_right_context_frames": 12}).size(1) == 16
    stream: FrameStream[int] = FrameStream()
    came = [i + 1 for i in range(60) if stream.take([i], schedule, last=False) is not None]
    assert came == [12, 28, 52], "codes that had come when a window was full"


@pytest.mark.parametrize(
    "bad", [{"codec_chunk_frames": 0}, {"codec_right_context_frames": -1}, {"codec_chunk_frames": 2}]
)
def test_bad_chunk_sizes(config: Any, bad: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=r"codec_chunk_frames|codec_right_context_frames"):
        windows(config, [[5]], extra={**EXTRA, **bad})


def test_a_thinker_without_hidden_states(config: Any) -> None:
    edge = EdgeInput("r", {0: [{"token_ids": [1, 2], "prompt_token_ids": [3]}]}, "hi", None, config=config)
    with pytest.raises(RequestError, match=r"hidden_layers: \[0, -1\]"):
        thinker2talker(edge)


def test_rows_are_passed_on_as_they_are(config: Any) -> None:
    """The driver does not look into tensors: they may be elsewhere."""
    rows = [{"hidden.0": object(), "hidden.-1": object(), "positions": object(), "start": i} for i in range(4)]
    outputs = [{"token_ids": [i], **row} for i, row in enumerate(rows)]
    outputs[0]["prompt_token_ids"] = [7, 8, 9]
    prompt = thinker2talker(EdgeInput("r", {0: outputs}, PROMPT, None, config=config))
    assert prompt is not None
    assert prompt["prompt_token_ids"] == [8296] * 3 + [8292, 8293]
    assert prompt["conditioning_steps"] == 2
    info = prompt["additional_information"]
    assert info["prompt_hidden"] is rows[0]["hidden.-1"]
    assert info["positions"] is rows[0]["positions"]
    assert info["reply_embeds"] == [row["hidden.0"] for row in rows[1:]]
    assert not any(isinstance(value, torch.Tensor) for value in info.values())
