"""Token2wav against transformers, in batches, in windows, and with bad input."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.ar_support import Stage, StageSet
from tests.model_executor.qwen2_5_omni.support import SAMPLES_PER_CODE, Reference
from vllm_omni.errors import RequestError
from vllm_omni.model_executor.stage_input_processors.codec_chunks import ChunkSchedule, FrameStream
from vllm_omni.model_executor.stage_input_processors.qwen2_5_omni import FLOW_SETTINGS

BLOCK = 12
"""Codes in a block of the flow."""


@pytest.fixture(scope="module")
def stage(start_stage: StageSet, checkpoint: Path) -> Stage:
    return start_stage(
        checkpoint,
        "generation",
        model_stage="token2wav",
        model_arch="Qwen2_5OmniToken2WavModel",
        hf_config_name="token2wav_config",
    )


def some_codes(count: int, seed: int = 0) -> list[int]:
    return torch.randint(0, 8193, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def sound(stage: Stage, requests: Sequence[dict[str, Any]]) -> list[torch.Tensor]:
    results = stage.ask([{"additional_information": request} for request in requests])
    for result in results:
        if result.error is not None:
            raise result.error
        assert result.payloads[0]["sr"] == 24000
    return [result.payloads[0]["audio"] for result in results]


@pytest.mark.parametrize("count", [1, 11, 12, 30])
def test_sound_equals_transformers(stage: Stage, reference: Reference, count: int) -> None:
    """Lengths within a block, of a block, and over several."""
    codes = some_codes(count)
    (wave,) = sound(stage, [{"codes": codes, "speaker": "Ethan"}])
    want = reference.sound(codes, "Ethan")
    assert wave.shape == want.shape == (count * SAMPLES_PER_CODE,)
    torch.testing.assert_close(wave, want, atol=1e-3, rtol=0)
    assert want.std() > 0.02


def test_settings_of_the_flow(stage: Stage, reference: Reference) -> None:
    """Seed, steps, guidance (also none) and sway are honoured, and each changes the sound."""
    codes = some_codes(14, 3)
    plain = reference.sound(codes, "Chelsie")
    for given in ({"num_steps": 4}, {"guidance_scale": 2.0}, {"guidance_scale": 0.0}, {"sway_coefficient": None}):
        (wave,) = sound(stage, [{"codes": codes, **given}])
        want = reference.sound(codes, "Chelsie", **given)
        torch.testing.assert_close(wave, want, atol=1e-3, rtol=0)
        assert (want - plain).abs().max() > 0.01
    (wave,) = sound(stage, [{"codes": codes, "seed": 7}])
    torch.testing.assert_close(wave, reference.sound(codes, "Chelsie", seed=7), atol=1e-3, rtol=0)


def test_a_batch_equals_its_requests_alone(stage: Stage) -> None:
    """Different lengths, voices, windows and settings share a step."""
    requests = [
        {"codes": some_codes(30, 1), "speaker": "Ethan"},
        {"codes": some_codes(7, 2)},
        {"codes": some_codes(30, 3), "num_steps": 5},
        {"codes": some_codes(24, 4), "offset": 36, "keep": [12, 20]},
        {"codes": []},
    ]
    alone = [sound(stage, [request])[0] for request in requests]
    steps = stage.num_steps
    for got, want in zip(sound(stage, requests), alone, strict=True):
        torch.testing.assert_close(got, want, atol=1e-4, rtol=0)
    assert stage.num_steps - steps <= 2
    assert [len(wave) // SAMPLES_PER_CODE for wave in alone] == [30, 7, 30, 8, 0]


def stream(stage: Stage, codes: Sequence[int], **sizes: int) -> tuple[torch.Tensor, list[int]]:
    """Sound of a stream of ``codes``, and the sizes of its windows."""
    schedule = ChunkSchedule(codec_chunk_frames=24, initial_codec_chunk_frames=6, **sizes)
    frames: FrameStream[int] = FrameStream()
    requests = []
    for i, code in enumerate(codes):
        window = frames.take([code], schedule, i == len(codes) - 1, align=BLOCK)
        if window is not None:
            keep = [window.context, window.context + window.fresh]
            requests.append({"codes": list(window.frames), "offset": window.start, "keep": keep})
    waves = sound(stage, requests)
    return torch.cat(waves), [len(wave) // SAMPLES_PER_CODE for wave in waves]


def test_a_stream_is_close_to_the_whole(stage: Stage) -> None:
    """The more context, the closer.

    The flow's 36 evaluations each look a block around, so no context but the whole utterance is exact. The tolerance is
    a root mean square error relative to the sound's own, with weights that are random (trained ones fall off faster).
    """
    codes = some_codes(84, 5)
    (whole,) = sound(stage, [{"codes": codes}])
    errors = []
    for context in (0, 12, 24, 48):
        got, sizes = stream(stage, codes, codec_left_context_frames=context, codec_right_context_frames=context)
        assert sizes[:2] == [6, 18]
        assert len(got) == len(whole)
        errors.append(float((got - whole).square().mean().sqrt() / whole.std()))
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 0.1, "without context it is another sound"
    assert errors[1] < 0.02
    assert errors[2] < 1e-3


def test_the_default_stream_is_close_to_the_whole(stage: Stage) -> None:
    """Also its first window, which waits for less than the others."""
    codes = some_codes(84, 5)
    (whole,) = sound(stage, [{"codes": codes}])
    (first,) = sound(stage, [{"codes": codes[:24], "keep": [0, 8]}])
    (second,) = sound(stage, [{"codes": codes[:48], "keep": [8, 24]}])
    for got, begin in ((first, 0), (second, len(first))):
        error = (got - whole[begin : begin + len(got)]).square().mean().sqrt() / whole.std()
        assert error < 1e-3


def test_a_window_with_everything_around_it_is_exact(stage: Stage) -> None:
    codes = some_codes(30, 6)
    (whole,) = sound(stage, [{"codes": codes}])
    parts = sound(stage, [{"codes": codes, "keep": keep} for keep in ([0, 5], [5, 18], [18, 30])])
    torch.testing.assert_close(torch.cat(parts), whole, atol=1e-5, rtol=0)


def test_overlapping_windows_see_the_same_noise(stage: Stage) -> None:
    """At the start of a flow there is only noise: with few steps and no conditioning in common, it decides."""
    codes = some_codes(48, 7)
    (whole,) = sound(stage, [{"codes": codes, "keep": [36, 48]}])
    (window,) = sound(stage, [{"codes": codes[12:], "offset": 12, "keep": [24, 36]}])
    (other,) = sound(stage, [{"codes": codes[12:], "offset": 0, "keep": [24, 36]}])
    assert (window - whole).square().mean() < 0.01 * (other - whole).square().mean()


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        ({}, "codes"),
        ({"codes": [1, 8194]}, "codes"),
        ({"codes": [-1]}, "codes"),
        ({"codes": torch.tensor([1])}, "codes"),
        ({"codes": [1] * 16385}, "codes"),
        ({"codes": [1], "keep": [0, 2]}, "keep"),
        ({"codes": [1], "offset": -1}, "keep"),
        ({"codes": [1], "speaker": "Ehtan"}, "speaker"),
        ({"codes": [1], "num_steps": 1}, "num_steps"),
        ({"codes": [1], "guidance_scale": -1}, "guidance_scale"),
        ({"codes": [1], "sway_coefficient": 3}, "sway_coefficient"),
    ],
)
def test_bad_input_fails_its_request_alone(stage: Stage, request_: dict[str, Any], field: str) -> None:
    good = {"codes": some_codes(5)}
    (want,) = sound(stage, [good])
    results = stage.ask([{"additional_information": info} for info in (good, request_)])
    assert isinstance(results[1].error, RequestError)
    assert results[1].error.details["field"] == field
    assert field not in FLOW_SETTINGS or ": allowed" in results[1].error.message
    torch.testing.assert_close(results[0].payloads[0]["audio"], want, atol=1e-5, rtol=0)
