"""The three stages in vLLM's engine equal transformers' own model on the same checkpoint."""

from pathlib import Path

import pytest
import torch

from tests.ar_support import StageSet
from tests.model_executor.qwen2_5_omni.support import SAMPLES_PER_CODE, Pipeline, Reference, make_prompt
from tests.model_executor.support import MODALITIES, Prompt, Spoken

TOKENS, CODES = 8, 30
STREAM = {
    "initial_codec_chunk_frames": 6,
    "codec_chunk_frames": 12,
    "codec_left_context_frames": 600,
    "codec_right_context_frames": 12,
}


@pytest.fixture(scope="module")
def pipeline(start_stage: StageSet, checkpoint: Path, reference: Reference) -> Pipeline:
    return Pipeline(start_stage, checkpoint, reference.config)


@pytest.fixture(scope="module")
def prompts(reference: Reference) -> dict[str, Prompt]:
    return {kind: make_prompt(reference.processor, [kind]) for kind in MODALITIES}


@pytest.fixture(scope="module")
def expected(reference: Reference, prompts: dict[str, Prompt]) -> dict[str, Spoken]:
    return {kind: reference.speak(prompt, TOKENS, CODES) for kind, prompt in prompts.items()}


def check(got: Spoken, want: Spoken) -> None:
    assert got.tokens == want.tokens
    assert got.codes == want.codes
    assert got.wave.shape == want.wave.shape
    torch.testing.assert_close(got.wave, want.wave, atol=1e-3, rtol=0)


def test_the_reference_is_not_degenerate(expected: dict[str, Spoken]) -> None:
    """What the tests below compare depends on every input."""
    for spoken in expected.values():
        assert len(set(spoken.tokens)) > TOKENS // 2
        assert len(set(spoken.codes)) > CODES // 2
        assert len(spoken.wave) == CODES * SAMPLES_PER_CODE
        assert 0.02 < spoken.wave.std() < 0.5
    for a in MODALITIES:
        for b in MODALITIES:
            assert a == b or (expected[a].tokens != expected[b].tokens and expected[a].codes != expected[b].codes)


@pytest.mark.parametrize("kind", MODALITIES)
def test_one_prompt_equals_transformers(
    pipeline: Pipeline, prompts: dict[str, Prompt], expected: dict[str, Spoken], kind: str
) -> None:
    """Text, codes and sound; nothing streamed."""
    check(pipeline.speak([prompts[kind]], TOKENS, CODES)[0], expected[kind])


def test_image_and_audio_in_one_prompt(pipeline: Pipeline, reference: Reference) -> None:
    prompt = make_prompt(reference.processor, ["image", "audio"], "and this", seed=5)
    check(pipeline.speak([prompt], TOKENS, CODES)[0], reference.speak(prompt, TOKENS, CODES))


def test_a_video_with_its_sound(pipeline: Pipeline, reference: Reference) -> None:
    """``use_audio_in_video``: frames and sounds take turns in the prompt, and their markers share positions."""
    prompt = make_prompt(reference.processor, ["video", "audio"], seed=6, audio_in_video=True)
    want = reference.speak(prompt, TOKENS, CODES)
    apart = reference.speak(make_prompt(reference.processor, ["video", "audio"], seed=6), TOKENS, CODES)
    assert want.codes != apart.codes
    check(pipeline.speak([prompt], TOKENS, CODES)[0], want)


def test_the_voice_changes_codes_and_sound(
    pipeline: Pipeline, prompts: dict[str, Prompt], reference: Reference
) -> None:
    want = reference.speak(prompts["text"], TOKENS, CODES, speaker="Ethan")
    got = pipeline.speak([prompts["text"]], TOKENS, CODES, speaker="Ethan")[0]
    check(got, want)
    default = pipeline.speak([prompts["text"]], TOKENS, CODES)[0]
    assert got.tokens == default.tokens
    assert got.codes != default.codes


def test_a_batch_equals_its_requests_alone(
    pipeline: Pipeline, prompts: dict[str, Prompt], expected: dict[str, Spoken]
) -> None:
    kinds = ("text", "image", "audio")
    for kind, got in zip(kinds, pipeline.speak([prompts[kind] for kind in kinds], TOKENS, CODES), strict=True):
        check(got, expected[kind])


@pytest.mark.parametrize("kind", ["text", "video"])
def test_streamed_conditioning_gives_the_same_codes(
    pipeline: Pipeline, prompts: dict[str, Prompt], expected: dict[str, Spoken], kind: str
) -> None:
    """The thinker's rows reach the talker while the thinker writes, and the talker speaks ahead of its end."""
    ahead: list[bool] = []

    def watch() -> None:
        talking = pipeline.talker.scheduler.has_requests()
        ahead.append(talking and pipeline.thinker.scheduler.has_requests())

    got = pipeline.speak([prompts[kind]], TOKENS, CODES, stream=True, extra=STREAM, on_step=watch)[0]
    assert got.tokens == expected[kind].tokens
    assert got.codes == expected[kind].codes
    assert got.wave.shape == expected[kind].wave.shape
    assert sum(ahead) > TOKENS // 2


def test_sound_comes_before_the_last_code(pipeline: Pipeline, prompts: dict[str, Prompt]) -> None:
    early: list[bool] = []

    def watch() -> None:
        done = any(result.finished for result in pipeline.vocoder.results.values() if result is not None)
        early.append(done and pipeline.talker.scheduler.has_requests())

    pipeline.vocoder.results.clear()
    pipeline.speak([prompts["text"]], TOKENS, 60, stream=True, extra=STREAM, on_step=watch)
    assert sum(early) > 20


def test_the_talker_stops_at_its_end_tokens(
    pipeline: Pipeline, reference: Reference, prompts: dict[str, Prompt], expected: dict[str, Spoken]
) -> None:
    """An end token is no code: neither its sound nor anything after it is made."""
    end = expected["text"].codes[11]
    before = expected["text"].codes.index(end)
    params = pipeline.talker_params(CODES, stop_token_ids=[end])
    got = pipeline.speak([prompts["text"]], TOKENS, CODES, talker=params)[0]
    assert got.codes == expected["text"].codes[: before + 1]
    want = reference.speak(prompts["text"], TOKENS, CODES, talker_eos_token_id=[end])
    assert want.codes == got.codes[:before]


def test_the_thinker_may_end_early(pipeline: Pipeline, reference: Reference, prompts: dict[str, Prompt]) -> None:
    """A reply that ends by its end token is spoken without that token; transformers agrees."""
    plain = reference.speak(prompts["text"], TOKENS, 2).tokens
    end = plain[4]
    assert end not in plain[:4]
    params = pipeline.thinker_params(TOKENS, stop_token_ids=[end])
    want = reference.speak(prompts["text"], TOKENS, CODES, thinker_eos_token_id=end)
    check(pipeline.speak([prompts["text"]], TOKENS, CODES, thinker=params)[0], want)


def test_a_reply_of_one_token_is_not_spoken(pipeline: Pipeline, prompts: dict[str, Prompt]) -> None:
    for stream in (False, True):
        got = pipeline.speak([prompts["text"]], 1, CODES, stream=stream)[0]
        assert len(got.tokens) == 1
        assert got.codes == []
        assert len(got.wave) == 0
