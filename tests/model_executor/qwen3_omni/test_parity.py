"""The three stages in vLLM's engine equal transformers' own model on the same checkpoint."""

from pathlib import Path

import pytest
import torch

from tests.ar_support import StageSet
from tests.model_executor.qwen3_omni.support import Pipeline, Reference, make_prompt
from tests.model_executor.support import MODALITIES, Prompt, Spoken

TOKENS, FRAMES = 8, 16
STREAM = {"initial_codec_chunk_frames": 2, "codec_chunk_frames": 6}


@pytest.fixture(scope="module")
def pipeline(start_stage: StageSet, checkpoint: Path, reference: Reference) -> Pipeline:
    return Pipeline(start_stage, checkpoint, reference.config)


@pytest.fixture(scope="module")
def prompts(reference: Reference) -> dict[str, Prompt]:
    return {kind: make_prompt(reference.processor, kind) for kind in MODALITIES}


@pytest.fixture(scope="module")
def expected(reference: Reference, prompts: dict[str, Prompt]) -> dict[str, Spoken]:
    return {kind: reference.speak(prompt, TOKENS, FRAMES) for kind, prompt in prompts.items()}


def check(got: Spoken, want: Spoken) -> None:
    assert got.tokens == want.tokens
    assert torch.equal(got.codes.long(), want.codes)
    assert got.wave.shape == want.wave.shape
    torch.testing.assert_close(got.wave, want.wave, atol=1e-3, rtol=0)


def test_the_reference_is_not_degenerate(expected: dict[str, Spoken]) -> None:
    """What the tests below compare depends on every input."""
    for spoken in expected.values():
        assert len(set(spoken.tokens)) > TOKENS // 2
        assert len(spoken.codes.unique(dim=0)) == FRAMES
        assert 0.05 < spoken.wave.std() < 0.5
        assert (spoken.wave.abs() < 1).float().mean() > 0.99
    codes = [spoken.codes for spoken in expected.values()]
    assert all(not torch.equal(a, b) for i, a in enumerate(codes) for b in codes[:i])


@pytest.mark.parametrize("kind", MODALITIES)
def test_speech(pipeline: Pipeline, prompts: dict[str, Prompt], expected: dict[str, Spoken], kind: str) -> None:
    check(*pipeline.speak([prompts[kind]], TOKENS, FRAMES), expected[kind])


@pytest.mark.parametrize("kind", MODALITIES)
def test_hidden_states(pipeline: Pipeline, reference: Reference, prompts: dict[str, Prompt], kind: str) -> None:
    """Embeddings and the layer that the talker listens to, of the prompt and of every generated token but the last."""
    from vllm.sampling_params import SamplingParams

    (result,) = pipeline.thinker.ask([prompts[kind].ours], SamplingParams(temperature=0.0, max_tokens=TOKENS))
    states = reference.states(prompts[kind], result.tokens)
    for layer in (0, reference.config.talker_config.accept_hidden_layer):
        torch.testing.assert_close(result.rows(f"hidden.{layer}"), states[layer], atol=1e-4, rtol=1e-4)
    assert ["positions" in payload for payload in result.payloads] == [True] + [False] * (TOKENS - 1)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_a_batch_equals_one_by_one(
    pipeline: Pipeline, prompts: dict[str, Prompt], expected: dict[str, Spoken], stream: bool
) -> None:
    """All prompts at once; streamed, text flows into the running talker and codes out of it."""
    results = pipeline.speak(list(prompts.values()), TOKENS, FRAMES, stream=stream, extra=STREAM)
    for kind, got in zip(prompts, results, strict=True):
        check(got, expected[kind])


def test_another_voice(pipeline: Pipeline, reference: Reference, prompts: dict[str, Prompt]) -> None:
    want = reference.speak(prompts["text"], TOKENS, FRAMES, speaker="Chelsie")
    check(*pipeline.speak([prompts["text"]], TOKENS, FRAMES, speaker="Chelsie"), want)
    ethan = reference.speak(prompts["text"], TOKENS, FRAMES, speaker="Ethan")
    assert not torch.equal(want.codes, ethan.codes)


def test_streamed_sound_comes_before_the_text_ends(pipeline: Pipeline, prompts: dict[str, Prompt]) -> None:
    order: list[tuple[bool, bool, bool]] = []

    def look() -> None:
        busy = [stage.scheduler.has_requests() for stage in (pipeline.thinker, pipeline.talker)]
        heard = any(result.payloads for name, result in pipeline.vocoder.results.items() if name not in before)
        order.append((busy[0], busy[1], heard))

    before = set(pipeline.vocoder.results)
    pipeline.speak([prompts["text"]], 20, 24, stream=True, extra=STREAM, on_step=look)
    assert (True, True, True) in order  # sound while thinker and talker still work
